"""The parts that all methods' encoders are made of, each against a slow or an independent version of itself."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torchvision.ops import StochasticDepth
from transformers import ViTConfig, ViTModel

from golden import Golden
from hf_mim import to_vit
from hf_mim.models.vit.configuration_vit import MaskedAutoencoderConfig, MaskedViTConfig
from hf_mim.models.vit.convert_vit import convert_layers, copy_affine
from hf_mim.models.vit.decoder import MaskedViTDecoder
from hf_mim.models.vit.embeddings import MaskedViTPatchEmbeddings, patchify
from hf_mim.models.vit.frozen_sources import read_source
from hf_mim.models.vit.masking import random_masking, restore_order
from hf_mim.models.vit.modeling_vit import MaskedViTBackbone, MaskedViTForImageClassification, MaskedViTModel
from hf_mim.models.vit.position import interpolate_position_table, sincos_position_table
from hf_mim.registry import METHODS
from tiny import scrambled, slow_position_table, tiny_batch, tiny_config, tiny_model


def test_random_masking_by_hand():
    noise = torch.tensor([[0.5, 0.1, 0.9, 0.3], [0.2, 0.8, 0.4, 0.6]])
    ids_keep, mask, ids_restore = random_masking(noise, 2)
    assert ids_keep.tolist() == [[1, 3], [0, 2]]
    assert mask.tolist() == [[1, 0, 1, 0], [0, 1, 0, 1]]
    assert ids_restore.tolist() == [[2, 0, 3, 1], [0, 3, 1, 2]]
    assert mask.dtype == torch.float32


def test_what_is_predicted_is_what_is_not_kept():
    masking = random_masking(torch.tensor([[0.5, 0.1, 0.9, 0.3], [0.2, 0.8, 0.4, 0.6]]), 2)
    assert masking.ids_keep.tolist() == [[1, 3], [0, 2]]
    assert masking.ids_predict.tolist() == [[0, 2], [3, 1]]
    assert torch.equal(masking.mask.gather(1, masking.ids_predict), torch.ones(2, 2))


def test_restore_order_by_hand():
    tokens = torch.tensor([[[100.0], [1.0], [3.0]]])  # [CLS], then patches 1 and 3 as they were kept
    restored = restore_order(tokens, torch.full((1, 1, 1), -1.0), torch.tensor([[2, 0, 3, 1]]))
    assert restored.tolist() == [[[100.0], [-1.0], [1.0], [-1.0], [3.0]]]


@st.composite
def masked_batches(draw):
    batch_size, num_patches = draw(st.integers(1, 4)), draw(st.integers(2, 40))
    num_keep = draw(st.integers(1, num_patches - 1))
    # Coarse numbers, so that equal ones occur.
    numbers = draw(st.lists(st.integers(0, 60), min_size=batch_size * num_patches, max_size=batch_size * num_patches))
    return torch.tensor(numbers).view(batch_size, num_patches) / 61, num_keep


@settings(deadline=None, derandomize=True)
@given(masked_batches())
def test_masking_is_a_partition_that_can_be_undone(case):
    noise, num_keep = case
    batch_size, num_patches = noise.shape
    ids_keep, mask, ids_restore = random_masking(noise, num_keep)
    assert mask.sum(dim=1).tolist() == [num_patches - num_keep] * batch_size
    for sample in range(batch_size):
        kept, hidden = ids_keep[sample].tolist(), mask[sample].nonzero().flatten().tolist()
        assert sorted(kept + hidden) == list(range(num_patches))
        assert sorted(ids_restore[sample].tolist()) == list(range(num_patches))
        assert [ids_restore[sample, patch].item() for patch in kept] == list(range(num_keep))
        assert noise[sample, kept].max() <= noise[sample, hidden].min()


@settings(deadline=None, derandomize=True)
@given(masked_batches())
def test_restored_tokens_are_where_they_belong(case):
    noise, num_keep = case
    batch_size, num_patches = noise.shape
    ids_keep, mask, ids_restore = random_masking(noise, num_keep)
    # A token carries the number of its patch and of its picture.
    tokens = torch.stack((ids_keep, torch.arange(batch_size)[:, None].expand_as(ids_keep)), dim=-1).float()
    cls = torch.full((batch_size, 1, 2), 500.0)
    restored = restore_order(torch.cat((cls, tokens), dim=1), torch.full((1, 1, 2), -1.0), ids_restore)
    assert restored.shape == (batch_size, 1 + num_patches, 2)
    for sample in range(batch_size):
        assert restored[sample, 0].tolist() == [500.0, 500.0]
        for patch in range(num_patches):
            expected = [-1.0, -1.0] if mask[sample, patch] else [patch, sample]
            assert restored[sample, 1 + patch].tolist() == expected


def test_patchify_cuts_as_unfold_does():
    pixel_values = torch.randn(2, 5, 24, 12)
    patches = patchify(pixel_values, (8, 3))
    assert patches.shape == (2, 3, 4, 5, 8, 3)
    unfolded = nn.functional.unfold(pixel_values, (8, 3), stride=(8, 3)).transpose(1, 2)
    assert torch.equal(patches.flatten(3).flatten(1, 2), unfolded)
    assert torch.equal(patches[1, 2, 3], pixel_values[1, :, 16:24, 9:12])


def test_patchify_copies_nothing():
    pixel_values = torch.randn(2, 5, 24, 12)
    assert patchify(pixel_values, (8, 3)).data_ptr() == pixel_values.data_ptr()


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_projection_is_the_convolution_gathered(memory_format):
    config = tiny_config("pilamim")
    embeddings = MaskedViTPatchEmbeddings(config)
    batch = tiny_batch(config)
    pixel_values = batch["pixel_values"].contiguous(memory_format=memory_format)
    ids_keep, _, _ = random_masking(batch["noise"], 7)
    with torch.no_grad():
        everything = embeddings.projection(pixel_values).flatten(2).transpose(1, 2)
        expected = torch.stack([tokens[kept] for tokens, kept in zip(everything, ids_keep, strict=True)])
        torch.testing.assert_close(embeddings(pixel_values), everything, rtol=0, atol=1e-5)
        torch.testing.assert_close(embeddings(pixel_values, ids_keep), expected, rtol=0, atol=1e-5)


def test_masked_embeddings_are_the_whole_ones_gathered():
    model = tiny_model("pilamim", "Model", position_embedding="learned")
    batch = tiny_batch(model.config)
    ids_keep, _, _ = random_masking(batch["noise"], 7)
    with torch.no_grad():
        everything = model.embeddings(batch["pixel_values"])
        kept = model.embeddings(batch["pixel_values"], ids_keep)
    for sample in range(3):
        chosen = [0, *(1 + ids_keep[sample]).tolist()]
        torch.testing.assert_close(kept[sample], everything[sample, chosen], rtol=0, atol=1e-5)
    cls = model.embeddings.cls_token[0, 0] + model.embeddings.position_embeddings[0, 0]
    torch.testing.assert_close(kept[:, 0], cls.expand(3, -1))


@pytest.mark.parametrize(("rows", "columns", "dim"), [(4, 12, 32), (7, 3, 48), (1, 1, 4), (14, 14, 768)])
def test_fixed_table_against_the_slow_one(rows, columns, dim):
    table = sincos_position_table(rows, columns, dim)
    assert table.dtype == torch.float32 and table.shape == (1, 1 + rows * columns, dim)
    torch.testing.assert_close(table, slow_position_table(rows, columns, dim), rtol=0, atol=1e-6)


def test_fixed_table_by_hand():
    table = sincos_position_table(2, 3, 4)[0]
    assert table[0].tolist() == [0.0, 0.0, 0.0, 0.0]
    # Row 1, column 2 of 3 columns: sin 2, cos 2, sin 1, cos 1.
    expected = torch.tensor([0.9092974, -0.4161468, 0.8414710, 0.5403023])
    torch.testing.assert_close(table[1 + 1 * 3 + 2], expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("new_size", [(48, 48), (24, 40), (16, 32)])
def test_interpolation_is_vits_own(new_size):
    torch.manual_seed(0)
    vit = ViTModel(ViTConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=32, patch_size=8))
    height, width = new_size
    grid = (height // 8, width // 8)
    expected = vit.embeddings.interpolate_pos_encoding(torch.zeros(1, 1 + grid[0] * grid[1], 32), height, width)
    actual = interpolate_position_table(vit.embeddings.position_embeddings, (4, 4), grid)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-6)


def test_interpolation_keeps_rows_and_columns_apart():
    # A table that grows along the rows only must do so on any new grid, and be constant along the columns.
    table = torch.cat((torch.full((1, 1, 1), 9.0), torch.arange(4.0).repeat_interleave(6).view(1, 24, 1)), dim=1)
    larger = interpolate_position_table(table, (4, 6), (8, 3))
    assert larger[0, 0, 0] == 9.0
    patches = larger[0, 1:, 0].view(8, 3)
    assert (patches.diff(dim=0) > 0).all()
    torch.testing.assert_close(patches, patches[:, :1].expand(8, 3))


def test_interpolation_to_the_same_grid_is_the_table_itself():
    table = sincos_position_table(4, 6, 8)
    assert interpolate_position_table(table, (4, 6), (4, 6)) is table


def drop_rates(layers):
    return [layer.drop_path.p if isinstance(layer.drop_path, StochasticDepth) else 0.0 for layer in layers]


def test_stochastic_depth_rises_linearly():
    model = MaskedViTModel(tiny_config("pilamim", num_hidden_layers=5, drop_path_rate=0.4))
    assert drop_rates(model.layers) == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4])
    assert drop_rates(MaskedViTModel(tiny_config("pilamim", num_hidden_layers=1, drop_path_rate=0.4)).layers) == [0.0]
    decoder = MaskedViTDecoder(tiny_config("pilamim", decoder_num_hidden_layers=3), 8, drop_path_rate=0.2)
    assert drop_rates(decoder.layers) == pytest.approx([0.0, 0.1, 0.2])


def test_stochastic_depth_drops_pictures_whole_and_keeps_the_mean():
    model = tiny_model("pilamim", "Model", num_hidden_layers=2, drop_path_rate=0.5).train()
    layer = model.layers[1]
    torch.manual_seed(0)
    dropped = layer.drop_path(torch.ones(2000, 3, 4))
    assert set(dropped.unique().tolist()) == {0.0, 2.0}
    assert torch.equal(dropped, dropped[:, :1, :1].expand_as(dropped))
    assert dropped.mean().item() == pytest.approx(1.0, abs=0.1)


def test_decoder_puts_positions_and_mask_tokens_in():
    model = tiny_model("pilamim", "ForPreTraining", decoder_num_hidden_layers=1)
    decoder = model.pixel_decoder
    decoder.layers = nn.ModuleList()
    batch = tiny_batch(model.config, batch_size=1)
    ids_keep, mask, ids_restore = random_masking(batch["noise"], 12)
    encoded = torch.randn(1, 13, 32)
    with torch.no_grad():
        predicted = decoder(encoded, ids_restore)
        for patch in range(48):
            token = decoder.mask_token[0, 0]
            if not mask[0, patch]:
                token = decoder.embed(encoded[0, 1 + ids_keep[0].tolist().index(patch)])
            expected = decoder.head(decoder.layernorm(token + decoder.position_embeddings[0, 1 + patch]))
            torch.testing.assert_close(predicted[0, 1 + patch], expected, rtol=0, atol=1e-5)


# ---- An encoder without [CLS], a decoder of chosen positions: what I-JEPA is made of

IJEPA = {
    "use_cls_token": False,
    "pooling": "mean",
    "image_size": 32,
    "patch_size": 8,
    "hidden_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "decoder_hidden_size": 24,
    "decoder_num_hidden_layers": 3,
    "decoder_num_attention_heads": 4,
}


def release_weights(golden) -> tuple[dict, dict]:
    """Of I-JEPA's encoder and predictor, by our names."""
    encoder = convert_layers(golden.state, "encoder.blocks", "layers")
    encoder |= copy_affine(golden.state, "encoder.patch_embed.proj", "embeddings.patch_embeddings.projection")
    encoder |= copy_affine(golden.state, "encoder.norm", "layernorm")
    predictor = convert_layers(golden.state, "predictor.predictor_blocks", "layers")
    for theirs, ours in {"embed": "embed", "norm": "layernorm", "proj": "head"}.items():
        predictor |= copy_affine(golden.state, f"predictor.predictor_{theirs}", ours)
    return encoder, predictor | {"mask_token": golden.state["predictor.mask_token"]}


def test_parts_give_the_numbers_of_ijepa():
    golden = Golden("ijepa")
    config = MaskedAutoencoderConfig(**IJEPA)
    encoder, decoder = MaskedViTModel(config).eval(), MaskedViTDecoder(config, config.hidden_size).eval()
    for module, weights in zip((encoder, decoder), release_weights(golden), strict=True):
        module.load_state_dict(weights)
    ids_context, ids_target = golden.input["ids_context"][:, 0], golden.input["ids_target"]
    with torch.no_grad():
        context = encoder(golden.input["pixel_values"], ids_keep=ids_context).last_hidden_state
        golden.assert_tensor("context", context)
        predictions = []
        for block in ids_target.unbind(dim=1):
            ids_patch = torch.cat((ids_context, block), dim=1)
            ids_restore = torch.arange(ids_patch.shape[1]).expand_as(ids_patch)
            predictions.append(decoder(context, ids_restore, ids_patch)[:, ids_context.shape[1] :])
        golden.assert_tensor("prediction", torch.cat(predictions))


def test_encoder_without_cls():
    config = MaskedAutoencoderConfig(**IJEPA)
    model = scrambled(MaskedViTModel(config).eval())
    assert "embeddings.cls_token" not in model.state_dict()
    pixel_values = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        outputs = model(pixel_values)
        larger = model(torch.randn(2, 3, 64, 48), interpolate_pos_encoding=True)
        kept = model(pixel_values, ids_keep=torch.tensor([[3, 5], [0, 9]])).last_hidden_state
    assert outputs.last_hidden_state.shape == (2, 16, 48)
    torch.testing.assert_close(outputs.pooler_output, outputs.last_hidden_state.mean(dim=1))
    assert larger.last_hidden_state.shape == (2, 8 * 6, 48) and kept.shape == (2, 2, 48)
    expected = slow_position_table(4, 4, 48)[:, 1:]
    torch.testing.assert_close(model.embeddings.position_embeddings, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("positions", ["sincos", "learned"])
def test_encoder_without_cls_through_saving_and_its_heads(positions, tmp_path):
    config = MaskedViTConfig(**{k: v for k, v in IJEPA.items() if "decoder" not in k}, position_embedding=positions)
    model = scrambled(MaskedViTModel(config).eval())
    model.save_pretrained(tmp_path)
    pixel_values = torch.randn(2, 3, 32, 32)
    classifier = MaskedViTForImageClassification.from_pretrained(tmp_path)
    backbone = MaskedViTBackbone.from_pretrained(tmp_path)
    with torch.no_grad():
        tokens = MaskedViTModel.from_pretrained(tmp_path)(pixel_values).last_hidden_state
        assert torch.equal(tokens, model(pixel_values).last_hidden_state)
        expected = classifier.classifier(tokens.mean(dim=1))
        torch.testing.assert_close(classifier(pixel_values).logits, expected)
        (feature_map,) = backbone(pixel_values).feature_maps
    torch.testing.assert_close(feature_map.flatten(2).transpose(1, 2), tokens)


def test_what_needs_cls_is_refused_without_it():
    with pytest.raises(ValueError, match='pooling is "cls", and use_cls_token is False.*pooling="mean"'):
        MaskedViTConfig(use_cls_token=False)
    for method in METHODS:
        with pytest.raises(ValueError, match=f"use_cls_token is False, and {method} learns with its .CLS. token"):
            tiny_config(method, use_cls_token=False, pooling="mean")
    encoder = MaskedViTModel(MaskedAutoencoderConfig(**IJEPA))
    with pytest.raises(ValueError, match="no .CLS. token .use_cls_token=False."):
        to_vit(encoder)
    with pytest.raises(ValueError, match="use_cls_token=False cannot give targets: it has no .CLS. token"):
        read_source(encoder)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_errs_no_more_than_the_stock_vit(dtype):
    """Of the same weights, by their outputs' distance from float32's."""
    model = tiny_model("pilamim", "Model", hidden_size=64, num_hidden_layers=6)
    pixel_values = tiny_batch(model.config, 8)["pixel_values"]
    errors = []
    for network in (model, to_vit(model).eval()):
        with torch.no_grad():
            exact = network(pixel_values).last_hidden_state
            with torch.autocast("cpu", dtype=dtype):
                half = network(pixel_values).last_hidden_state
        errors.append(((half.float() - exact).norm() / exact.norm()).item())
    assert 0 < errors[0] <= 1.05 * errors[1], errors
