"""Averaged targets."""

import pytest
import torch
from torch import nn

from hf_mim.models.vit.averaging import average_weights
from tiny import tiny_batch, tiny_model


def test_pairs_by_name_and_not_by_order():
    class Wrapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.second, self.first = nn.Linear(1, 1), nn.Linear(1, 1)

    class Plain(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(1, 1), nn.Linear(1, 1)

    source, target = Wrapped(), Plain()
    for module, first, second in ((source, 1.0, 2.0), (target, 10.0, 20.0)):
        nn.init.constant_(module.first.weight, first)
        nn.init.constant_(module.second.weight, second)
    average_weights(target, source, 0.75)
    assert target.first.weight.item() == pytest.approx(0.75 * 10 + 0.25 * 1)
    assert target.second.weight.item() == pytest.approx(0.75 * 20 + 0.25 * 2)


def test_a_compiled_network_is_followed():
    source, target = nn.Sequential(nn.Linear(2, 2)), nn.Sequential(nn.Linear(2, 2))
    average_weights(target, torch.compile(source), 0.0)
    torch.testing.assert_close(target[0].weight, source[0].weight)


def test_other_weights_are_refused():
    with pytest.raises(ValueError, match="1.weight is in one of them|1.bias is in one of them"):
        average_weights(nn.Sequential(nn.Linear(2, 2)), nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), 0.5)


def test_targets_of_16_bits_are_refused():
    model = tiny_model("pilamim", "ForPreTraining").to(torch.bfloat16)
    with pytest.raises(ValueError, match="bfloat16.*stand still.*float32"):
        model.after_optimizer_step(0, 100)


def test_checkpoints_of_16_bits_come_back_with_a_target_that_moves(tmp_path):
    tiny_model("pilamim", "ForPreTraining").to(torch.bfloat16).save_pretrained(tmp_path)
    loaded = type(tiny_model("pilamim", "ForPreTraining")).from_pretrained(tmp_path, dtype="auto")
    assert {weight.dtype for weight in loaded.encoder.parameters()} == {torch.bfloat16}
    assert {weight.dtype for weight in loaded.target_encoder.parameters()} == {torch.float32}
    assert loaded(**tiny_batch(loaded.config)).loss.isfinite()
    before = loaded.target_encoder.layernorm.weight.clone()
    loaded.encoder.layernorm.weight.data += 1
    loaded.after_optimizer_step(0, 100)
    moved = loaded.target_encoder.layernorm.weight - before
    expected = (1 - loaded.config.ema_momentum) * (loaded.encoder.layernorm.weight.float() - before)
    torch.testing.assert_close(moved, expected, rtol=1e-2, atol=0)
