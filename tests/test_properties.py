"""How far attention reaches and how many directions features take: values computed by hand."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import Dinov2WithRegistersConfig, Dinov2WithRegistersModel, ViTConfig, ViTModel

from hf_mim.evaluation.properties import (
    draw_attention_distances,
    draw_singular_shares,
    encoder_properties,
    mean_attention_distance,
    top_singular_share,
)
from tiny import tiny_batch, tiny_model


class TestAttentionDistance:
    def test_by_hand(self):
        # 1 x 3 patches, 4 pixels wide; [CLS] first, whose attention counts nothing.
        attention = torch.tensor(
            [
                [0.1, 0.3, 0.3, 0.3],
                [0.5, 0.5, 0.0, 0.0],  # all of the rest to itself: 0
                [0.2, 0.4, 0.0, 0.4],  # half to either neighbour: 4
                [0.0, 0.75, 0.25, 0.0],  # 0.75 * 8 + 0.25 * 4 = 7
            ]
        )
        assert mean_attention_distance(attention, (1, 3), (9, 4)).item() == pytest.approx(11 / 3)

    def test_of_rectangular_patches_in_a_rectangular_grid(self):
        # 2 x 3 patches of 8 x 4 pixels: from each to the last, at row 1 and column 2.
        attention = torch.zeros(7, 7)
        attention[:, 6] = 1.0
        distances = [math.hypot(8 * (1 - row), 4 * (2 - column)) for row in range(2) for column in range(3)]
        assert mean_attention_distance(attention, (2, 3), (8, 4)).item() == pytest.approx(sum(distances) / 6)

    def test_registers_and_batches(self):
        attention = torch.rand(2, 3, 1 + 4 + 6, 1 + 4 + 6, generator=torch.Generator().manual_seed(0))
        distances = mean_attention_distance(attention, (2, 3), (8, 4))
        assert distances.shape == (2, 3)
        alone = mean_attention_distance(attention[1, 2, 5:, 5:], (2, 3), (8, 4))
        assert distances[1, 2].item() == pytest.approx(alone.item())

    def test_of_a_patch_that_attends_only_to_cls(self):
        attention = torch.zeros(4, 4)
        attention[:, 0] = 1.0
        assert mean_attention_distance(attention, (1, 3), (4, 4)).item() == 0.0

    @settings(max_examples=30, deadline=None)
    @given(rows=st.integers(1, 5), columns=st.integers(1, 5), seed=st.integers(0, 100))
    def test_is_between_zero_and_the_diagonal(self, rows, columns, seed):
        length = rows * columns + 1
        attention = torch.rand(length, length, generator=torch.Generator().manual_seed(seed)).softmax(dim=-1)
        distance = mean_attention_distance(attention, (rows, columns), (3, 5)).item()
        assert 0.0 <= distance <= math.hypot(3 * (rows - 1), 5 * (columns - 1)) + 1e-4


class TestSingularShare:
    def test_by_hand(self):
        # Singular values 4, 3, 2, 1.
        features = torch.zeros(5, 4)
        features[torch.arange(4), torch.tensor([2, 0, 3, 1])] = torch.tensor([3.0, -4.0, 1.0, 2.0])
        for top, share in ((1, 0.4), (2, 0.7), (3, 0.9), (4, 1.0), (9, 1.0)):
            assert top_singular_share(features, top).item() == pytest.approx(share), top

    def test_of_one_direction_and_of_nothing(self):
        features = torch.ones(2, 6, 8)
        features[1] = 0
        assert top_singular_share(features, 1).tolist() == pytest.approx([1.0, 0.0], abs=1e-5)

    def test_none_is_refused(self):
        with pytest.raises(ValueError, match="top is 0"):
            top_singular_share(torch.ones(2, 2), 0)


class TestEncoder:
    @pytest.mark.parametrize("kind", ["dbot", "pilamim", "vit", "dinov2_with_registers"])
    def test_properties_of_any_vit(self, kind):
        torch.manual_seed(0)
        sizes = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 64}
        sizes |= {"image_size": 48, "patch_size": 8, "num_channels": 5}
        if kind == "vit":
            encoder, prefix = ViTModel(ViTConfig(**sizes)), 1
        elif kind == "dinov2_with_registers":
            encoder = Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**sizes, num_register_tokens=4))
            prefix = 5
        else:
            encoder, prefix = tiny_model(kind, "Model", image_size=48, patch_size=8), 1
        pictures = torch.randn(5, 5, 48, 48, generator=torch.Generator().manual_seed(1))
        encoder.train()
        before = encoder.config._attn_implementation
        found = encoder_properties(encoder, pictures.split(2), top=3)
        assert encoder.training and encoder.config._attn_implementation == before != "eager"

        encoder.eval().set_attn_implementation("eager")
        with torch.no_grad():
            outputs = encoder(pictures, output_attentions=True, output_hidden_states=True)
        assert found["attention_distance"].shape == (3, 2) and found["top_singular_share"].shape == (3,)
        for layer in range(3):
            for head in range(2):
                attention = outputs.attentions[layer][:, head, prefix:, prefix:]
                total = 0.0
                for query in range(36):
                    for key in range(36):
                        far = 8 * math.hypot(query // 6 - key // 6, query % 6 - key % 6)
                        total += far * (attention[:, query, key] / attention[:, query].sum(dim=-1)).sum().item()
                assert found["attention_distance"][layer, head].item() == pytest.approx(total / 36 / 5, rel=1e-4)
            values = torch.linalg.svdvals(outputs.hidden_states[layer + 1][:, prefix:])
            share = (values[:, :3].sum(dim=1) / values.sum(dim=1)).mean().item()
            assert found["top_singular_share"][layer].item() == pytest.approx(share, rel=1e-4)

    def test_mistakes(self):
        encoder = tiny_model("dbot", "Model")
        with pytest.raises(ValueError, match="no pictures"):
            encoder_properties(encoder, [])
        with pytest.raises(ValueError, match="33 x 48 pixels are not divisible"):
            encoder_properties(encoder, [torch.zeros(1, 5, 33, 48)])
        assert encoder.config._attn_implementation != "eager"

    def test_another_size(self):
        encoder = tiny_model("dbot", "Model")
        found = encoder_properties(encoder, [torch.randn(2, 5, 32, 64, generator=torch.Generator().manual_seed(0))])
        assert found["attention_distance"].isfinite().all()

    def test_drawings(self, tmp_path):
        encoder = tiny_model("dbot", "Model")
        found = encoder_properties(encoder, [tiny_batch(encoder.config)["pixel_values"]])
        distances = {"one": found["attention_distance"], "two": 2 * found["attention_distance"]}
        path = draw_attention_distances(distances, tmp_path / "distances.png")
        assert Image.open(path).width > 800
        path = draw_singular_shares({"one": found["top_singular_share"]}, tmp_path / "shares.png")
        assert Image.open(path).size[0] > 400
