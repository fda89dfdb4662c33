"""The attentive probe: its attention by hand, a task that a mean cannot do, and its place in the jobs."""

import math

import pytest
import torch
from torch import nn

from hf_mim.evaluation.attentive_probe import AttentiveProbe, attentive_accuracies, evaluate_attentively
from hf_mim.evaluation.encoders import FeatureEncoder
from hf_mim.evaluation.features import extract_features
from hf_mim.evaluation.linear import linear_probe_accuracy
from test_features import load_encoder, noise_pictures, processor, saved


@pytest.mark.parametrize(("dim", "heads"), [(16, 1), (64, 1), (100, 1), (128, 2), (192, 3), (384, 6)])
def test_attention_by_hand(dim, heads):
    """Queries against the keys of every token, head by head, as `scaled_dot_product_attention` has it."""
    probe = AttentiveProbe(dim, 5, [0.1, 0.2])
    assert probe.num_heads == heads
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in probe.parameters():
            parameter.copy_(torch.randn_like(parameter) / math.sqrt(dim))
    tokens = torch.randn(3, 7, dim)
    found = probe.eval()(tokens)
    assert found.shape == (2, 3, 5)
    tokens = tokens / math.sqrt(1 + 1e-6)  # the BatchNorm's running statistics before a step: 0 and 1
    for rate in range(2):
        keys, values = (getattr(probe, name)[rate].flatten(0, 1) for name in ("keys", "values"))
        key, value = ((tokens @ matrix.T).unflatten(2, (heads, -1)).transpose(1, 2) for matrix in (keys, values))
        query = probe.queries[rate].view(1, heads, 1, -1).expand(3, -1, -1, -1)
        gathered = nn.functional.scaled_dot_product_attention(query, key, value).flatten(1)
        expected = gathered @ probe.weights[rate].T + probe.biases[rate]
        torch.testing.assert_close(found[rate], expected, rtol=1e-4, atol=1e-5)


def one_patch_decides(number: int, seed: int):
    """The class is written into one patch of sixteen, wherever that is, beside noise of opposite means."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(number) % 4
    tokens = torch.randn(number, 16, 8, generator=generator)
    place = torch.randint(0, 16, (number,), generator=generator)
    rows = torch.arange(number)
    tokens[rows, place, :4] = 3.0 * nn.functional.one_hot(labels, 4).float()
    tokens[rows, place, 4] = 4.0
    # The others make up for it, so that the mean over the patches says nothing.
    tokens -= tokens.mean(dim=1, keepdim=True)
    return tokens, labels


def test_learns_what_the_mean_cannot():
    (train, train_labels), (test, test_labels) = one_patch_decides(2000, 0), one_patch_decides(600, 1)
    mean = linear_probe_accuracy(train.mean(dim=1) * 1e6, train_labels, test.mean(dim=1) * 1e6, test_labels)
    assert mean < 40
    found = attentive_accuracies(train.half(), {"a": train_labels}, test.half(), {"a": test_labels})
    assert found["a"] > 80
    again = attentive_accuracies(train.half(), {"a": train_labels}, test.half(), {"a": test_labels})
    assert found == again


def test_each_rate_learns_as_it_would_alone():
    tokens, labels = one_patch_decides(64, 0)

    def trained(rates):
        probe = AttentiveProbe(8, 4, rates)
        for step in range(5):
            probe.step(tokens[step * 8 :][:8], labels[step * 8 :][:8], 1.0)
        return probe

    together = trained([1e-3, 1e-2])
    assert not torch.allclose(together.weights[0], together.weights[1], atol=1e-3)
    for head, rate in enumerate((1e-3, 1e-2)):
        alone = trained([rate])
        for name in ("queries", "keys", "values", "weights", "biases"):
            # AdamW divides by the gradient's size: where that is all but zero, rounding shows.
            torch.testing.assert_close(
                getattr(together, name)[head], getattr(alone, name)[0], rtol=1e-3, atol=0.05 * rate
            )


def test_tokens_are_those_of_the_encoder_and_not_kept(tmp_path):
    encoder = load_encoder(saved("dinov2_with_registers", tmp_path / "model"))
    data = noise_pictures(5)
    found = extract_features(
        {"a": encoder}, data, processor(), ["cls", "patches"], batch_size=2, cache_dir=tmp_path / "cache"
    )
    assert found["a"]["patches"].shape == (5, 16, 32) and found["a"]["patches"].dtype == torch.float16
    pixel_values = torch.stack([(data[index].float() / 255 - 0.5) / 0.25 for index in range(5)])
    expected = encoder.patches(pixel_values).flatten(1, 2)
    torch.testing.assert_close(found["a"]["patches"].float(), expected, rtol=1e-3, atol=1e-3)
    assert len(list((tmp_path / "cache").iterdir())) == 1
    again = extract_features({"a": encoder}, data, processor(), ["patches", "cls"], cache_dir=tmp_path / "cache")
    torch.testing.assert_close(again["a"]["patches"], found["a"]["patches"], rtol=1e-3, atol=1e-3)


def test_bounded_memory_and_tokens_that_are_not_finite(tmp_path, monkeypatch):
    encoder = load_encoder(saved("vit", tmp_path))
    train, test = noise_pictures(40), noise_pictures(20, seed=1)
    labels = [{"a": torch.arange(len(split)) % 2, "several": torch.ones(len(split), 3)} for split in (train, test)]
    settings = {"batch_size": 16}
    found = evaluate_attentively({"x": encoder}, train, test, *labels, processor(), **settings)
    assert (found["num_train"], found["num_test"]) == (40, 20) and list(found["accuracy"]["x"]) == ["a"]
    assert 0 <= found["accuracy"]["x"]["a"] <= 100
    # Room for 30 pictures of 16 tokens of 32 numbers: both splits are halved.
    monkeypatch.setattr("hf_mim.evaluation.attentive_probe._MAX_BYTES", 30 * 16 * 32 * 2)
    found = evaluate_attentively({"x": encoder}, train, test, *labels, processor(), **settings)
    assert (found["num_train"], found["num_test"]) == (20, 10)
    with torch.no_grad():
        encoder.model.layernorm.bias[3] = torch.nan
    found = evaluate_attentively({"x": FeatureEncoder(encoder.model)}, train, test, *labels, processor(), **settings)
    assert found["accuracy"] == {"x": {"a": None}}
