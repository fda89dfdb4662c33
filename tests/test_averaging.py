"""Averaged targets."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from hf_mim import PiLaMIMForPreTraining
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


@pytest.mark.parametrize("targets", [["q_proj", "fc1"], r"encoder\..*(q_proj|fc1)"], ids=["both", "encoder"])
def test_adapters_are_followed(targets):
    model = tiny_model("pilamim", "ForPreTraining", ema_momentum=0.9)
    get_peft_model(model, LoraConfig(r=2, target_modules=targets))
    generator = torch.Generator().manual_seed(0)
    for name, weight in model.encoder.named_parameters():
        if "lora_B" in name:
            weight.data.normal_(generator=generator)
    layer, target = model.encoder.layers[1].mlp.fc1, model.target_encoder.layers[1].mlp.fc1
    inputs = torch.randn(5, 32, generator=generator)
    with torch.no_grad():
        before, followed = target(inputs), layer(inputs)
        plain = [model.target_encoder.layers[1].mlp.fc2.weight.clone(), model.encoder.layers[1].mlp.fc2.weight]
        for step in range(100):
            model.after_optimizer_step(step, 1000)
        after = target(inputs)
    way = (after - before).norm() / (followed - before).norm()
    assert way > 0.99, way
    torch.testing.assert_close(after, followed, rtol=0, atol=0.02 * followed.abs().max().item())
    assert not torch.equal(plain[0], model.target_encoder.layers[1].mlp.fc2.weight)
    torch.testing.assert_close(model.target_encoder.layers[1].mlp.fc2.weight, plain[1], rtol=0, atol=1e-3)


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


def test_a_model_built_in_16_bits_has_a_target_that_moves():
    config = tiny_model("pilamim", "ForPreTraining").config
    model = PiLaMIMForPreTraining._from_config(config, dtype=torch.bfloat16)
    assert {weight.dtype for weight in model.encoder.parameters()} == {torch.bfloat16}
    assert {weight.dtype for weight in model.target_encoder.parameters()} == {torch.float32}
    assert torch.equal(model.target_encoder.embeddings.cls_token, model.encoder.embeddings.cls_token.float())
    model.after_optimizer_step(0, 10)
