"""Export to transformers' own ViT and import from it: the same numbers on both sides."""

import pytest
import torch
from transformers import (
    ViTConfig,
    ViTForImageClassification,
    ViTForMaskedImageModeling,
    ViTMAEConfig,
    ViTMAEModel,
    ViTModel,
)

import hf_mim
from hf_mim.models.vit.encoders import encoder_from
from hf_mim.registry import METHODS
from tiny import scrambled, slow_position_table, tiny_batch, tiny_model

# Sizes that ViT knows too, and not its defaults.
SMALL = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 80}


def assert_close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)


@pytest.fixture(params=METHODS)
def method(request):
    return request.param


@pytest.mark.parametrize("positions", ["sincos", "learned"])
@pytest.mark.parametrize("fields", [{}, {"qkv_bias": False, "layer_norm_eps": 1e-3, "intermediate_size": 80}])
def test_encoder_exports(method, positions, fields):
    model = tiny_model(method, "Model", position_embedding=positions, **fields)
    pixel_values = tiny_batch(model.config)["pixel_values"]
    exported = hf_mim.to_vit(model)
    assert type(exported) is ViTModel and not exported.training
    with torch.no_grad():
        expected, actual = model(pixel_values), exported(pixel_values)
    assert_close(actual.last_hidden_state, expected.last_hidden_state)
    assert_close(actual.pooler_output, expected.pooler_output)


def test_pretraining_model_exports_its_encoder(method):
    model = tiny_model(method, "ForPreTraining")
    pixel_values = tiny_batch(model.config)["pixel_values"]
    with torch.no_grad():
        assert_close(hf_mim.to_vit(model)(pixel_values).pooler_output, model.encoder(pixel_values).pooler_output)


def test_mean_pooling_exports_no_pooler(method):
    model = tiny_model(method, "Model", pooling="mean")
    pixel_values = tiny_batch(model.config)["pixel_values"]
    exported = hf_mim.to_vit(model)
    with torch.no_grad():
        outputs = exported(pixel_values)
        assert_close(outputs.last_hidden_state, model(pixel_values).last_hidden_state)
    assert exported.pooler is None and outputs.pooler_output is None


def test_classifier_exports(method):
    labels = {0: "cat", 1: "dog", 2: "fish"}
    model = tiny_model(method, "ForImageClassification", num_labels=3, id2label=labels)
    pixel_values = tiny_batch(model.config)["pixel_values"]
    exported = hf_mim.to_vit(model)
    assert type(exported) is ViTForImageClassification and exported.config.id2label == labels
    with torch.no_grad():
        assert_close(exported(pixel_values).logits, model(pixel_values).logits)


def test_mean_pooled_classifier_is_refused_with_the_reason(method):
    model = tiny_model(method, "ForImageClassification", pooling="mean")
    with pytest.raises(ValueError, match=r"mean.*\[CLS\] only.*to_vit\(model.encoder\)"):
        hf_mim.to_vit(model)
    assert type(hf_mim.to_vit(model.encoder)) is ViTModel


def test_export_is_a_copy(method):
    model = tiny_model(method, "Model", position_embedding="learned")
    exported = hf_mim.to_vit(model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.no_grad():
        for parameter in exported.parameters():
            parameter.add_(1.0)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_export_keeps_half_precision(method):
    exported = hf_mim.to_vit(tiny_model(method, "Model").to(torch.bfloat16))
    assert {parameter.dtype for parameter in exported.parameters()} == {torch.bfloat16}


def test_saved_exports_load_without_us(fork, method, tmp_path):
    encoder = tiny_model(method, "Model")
    classifier = tiny_model(method, "ForImageClassification", num_labels=3)
    hf_mim.to_vit(encoder).save_pretrained(tmp_path / "encoder")
    hf_mim.to_vit(classifier).save_pretrained(tmp_path / "classifier")
    pixel_values = tiny_batch(encoder.config)["pixel_values"]
    torch.save(pixel_values, tmp_path / "pixel_values.pt")
    code = f"""
import sys, torch
from pathlib import Path
from transformers import AutoModel, AutoModelForImageClassification
folder = Path({str(tmp_path)!r})
pixel_values = torch.load(folder / "pixel_values.pt")
model, info = AutoModel.from_pretrained(folder / "encoder", output_loading_info=True)
assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
classifier = AutoModelForImageClassification.from_pretrained(folder / "classifier")
with torch.no_grad():
    outputs = model(pixel_values)
    torch.save((outputs.last_hidden_state, outputs.pooler_output, classifier(pixel_values).logits), folder / "out.pt")
assert not [name for name in sys.modules if name.split(".")[0] == "hf_mim"]
"""
    fork(code)
    last_hidden_state, pooler_output, logits = torch.load(tmp_path / "out.pt")
    with torch.no_grad():
        assert_close(last_hidden_state, encoder(pixel_values).last_hidden_state)
        assert_close(pooler_output, encoder(pixel_values).pooler_output)
        assert_close(logits, classifier(pixel_values).logits)


@pytest.mark.parametrize(
    "fields",
    [
        {"image_size": 32, "patch_size": 8},
        {"image_size": (32, 48), "patch_size": (8, 4), "num_channels": 5, "qkv_bias": False},
    ],
)
def test_stock_vit_imports(fields):
    torch.manual_seed(0)
    vit = scrambled(ViTModel(ViTConfig(**SMALL, **fields))).eval()
    encoder = encoder_from(vit)
    assert encoder.config.position_embedding == "learned" and not encoder.training
    height, width = (32, 48) if "num_channels" in fields else (32, 32)
    pixel_values = torch.randn(2, vit.config.num_channels, height, width)
    with torch.no_grad():
        assert_close(encoder(pixel_values).last_hidden_state, vit(pixel_values).last_hidden_state)


def vit_mae():
    """A ViTMAE encoder that sees the whole image in order, with the table that it should have had."""
    torch.manual_seed(0)
    mae = ViTMAEModel(ViTMAEConfig(**SMALL, image_size=32, patch_size=8, mask_ratio=0.0))
    scrambled(mae).embeddings.position_embeddings.data.copy_(slow_position_table(4, 4, 32))
    return mae.eval()


def test_vit_mae_imports_with_fixed_positions():
    mae = vit_mae()
    encoder = encoder_from(mae)
    assert encoder.config.position_embedding == "sincos"
    pixel_values = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected = mae(pixel_values, noise=torch.arange(16.0).expand(2, -1)).last_hidden_state
        assert_close(encoder(pixel_values).last_hidden_state, expected)


def test_vit_mae_with_other_positions_keeps_them():
    mae = vit_mae()
    mae.embeddings.position_embeddings.data[0, 3, 0] += 0.01
    encoder = encoder_from(mae)
    assert encoder.config.position_embedding == "learned"
    assert torch.equal(encoder.embeddings.position_embeddings, mae.embeddings.position_embeddings)


def test_import_and_export_return_what_went_in():
    vit = scrambled(ViTModel(ViTConfig(**SMALL, image_size=32, patch_size=8), add_pooling_layer=False))
    returned = hf_mim.to_vit(encoder_from(vit)).state_dict()
    for name, value in vit.state_dict().items():
        assert torch.equal(returned[name], value), name


def test_stock_heads_give_their_encoder():
    vit = scrambled(
        ViTForMaskedImageModeling(ViTConfig(**SMALL, image_size=32, patch_size=8, encoder_stride=8))
    ).eval()
    pixel_values = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected = vit.vit(pixel_values).last_hidden_state
        assert_close(encoder_from(vit)(pixel_values).last_hidden_state, expected)


def test_only_our_models_are_exported():
    with pytest.raises(ValueError, match="pilamim.*ViTModel"):
        hf_mim.to_vit(ViTModel(ViTConfig(**SMALL, image_size=32, patch_size=8)))


@pytest.mark.parametrize("suffix", ["Model", "ForImageClassification"])
def test_exports_take_other_sizes(method, suffix):
    """Positions are interpolated as by the encoder itself; the stock ViT needs a patch size that is a number."""
    model = tiny_model(method, suffix, image_size=(32, 32), patch_size=(8, 8))
    exported = hf_mim.to_vit(model)
    assert exported.config.patch_size == 8 and exported.config.image_size == 32
    pixel_values = torch.randn(2, 5, 48, 40, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected, actual = (m(pixel_values, interpolate_pos_encoding=True) for m in (model, exported))
    name = "logits" if suffix == "ForImageClassification" else "last_hidden_state"
    torch.testing.assert_close(actual[name], expected[name], rtol=0, atol=1e-5)
