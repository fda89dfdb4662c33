"""Going on, and fine-tuning, at another image size than the weights': positions are interpolated."""

import pytest
import torch
from transformers import ViTConfig, ViTForImageClassification, ViTModel

import hf_mim
from hf_mim.models.vit.position import interpolate_position_table
from hf_mim.registry import METHODS, method_class
from hf_mim.training.building import build_config, build_model
from hf_mim.training.command import ClassifierArguments, ModelArguments
from hf_mim.training.task_models import build_classifier, build_classifier_config
from tiny import tiny_batch, tiny_model

NEW = (48, 64)


@pytest.fixture(params=["sincos", "learned"])
def positions(request):
    return request.param


def pixel_values(channels=5):
    return torch.randn(2, channels, *NEW, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("method", [name for name in METHODS if name != "tec"])
def test_going_on_is_the_same_encoder_with_interpolated_positions(method, positions, tmp_path):
    fields = {"position_embedding": positions}
    if method == "dbot":
        # Its teacher must have the new grid: a new one has.
        fields["teacher_config"] = None
    source = tiny_model(method, "ForPreTraining", **fields)
    if method == "dbot":
        source = source.encoder
    source.save_pretrained(tmp_path / "source")
    args = ModelArguments(model_type=method, model_name_or_path=str(tmp_path / "source"))
    model = build_model(args, build_config(args, NEW, None)).eval()
    assert model.config.grid_size == (6, 16)
    encoder = getattr(source, "encoder", source)
    with torch.no_grad():
        expected = encoder(pixel_values(), interpolate_pos_encoding=True).last_hidden_state
        torch.testing.assert_close(model.encoder(pixel_values()).last_hidden_state, expected, rtol=0, atol=1e-5)
        assert model(**tiny_batch(model.config)).loss.isfinite()
    # What is saved knows it, and can be gone on from at a third size.
    model.save_pretrained(tmp_path / "again")
    loaded = method_class(method, "Model").from_pretrained(tmp_path / "again")
    torch.testing.assert_close(loaded(pixel_values()).last_hidden_state, expected, rtol=0, atol=1e-5)


def test_decoders_and_targets_are_resized_too(tmp_path):
    source = tiny_model("pilamim", "ForPreTraining", position_embedding="learned")
    source.save_pretrained(tmp_path)
    args = ModelArguments(model_type="pilamim", model_name_or_path=str(tmp_path))
    model = build_model(args, build_config(args, NEW, None))
    for part in ("pixel_decoder", "latent_decoder", "target_encoder.embeddings"):
        old, new = (m.get_submodule(part).position_embeddings for m in (source, model))
        torch.testing.assert_close(new, interpolate_position_table(old, (4, 12), (6, 16)))


def test_the_baseline(tmp_path):
    sizes = {"image_size": 32, "patch_size": 8, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    decoder = {"decoder_hidden_size": 16, "decoder_num_hidden_layers": 1, "decoder_num_attention_heads": 2}
    source = hf_mim.ViTMAEForPreTraining(hf_mim.ViTMAEConfig(**sizes, **decoder)).eval()
    source.save_pretrained(tmp_path)
    args = ModelArguments(model_type="vit_mae", model_name_or_path=str(tmp_path))
    model = build_model(args, build_config(args, (48, 48), None)).eval()
    table = source.vit.embeddings.position_embeddings
    expected = interpolate_position_table(table, (4, 4), (6, 6))
    torch.testing.assert_close(model.vit.embeddings.position_embeddings, expected)
    assert not model.decoder.decoder_pos_embed.requires_grad
    assert model(torch.randn(2, 3, 48, 48)).loss.isfinite()


@pytest.mark.parametrize("method", METHODS)
def test_fine_tuning(method, positions, tmp_path):
    source = tiny_model(method, "ForPreTraining", position_embedding=positions)
    source.save_pretrained(tmp_path)
    args = ClassifierArguments(model_name_or_path=str(tmp_path), drop_path_rate=0.0)
    model = build_classifier(args, build_classifier_config(args, NEW, None)).eval()
    with torch.no_grad():
        expected = source.encoder(pixel_values(), interpolate_pos_encoding=True).last_hidden_state
        actual = model.encoder(pixel_values()).last_hidden_state
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)


def test_fine_tuning_of_a_stock_vit(tmp_path):
    config = ViTConfig(image_size=32, patch_size=8, hidden_size=32, num_hidden_layers=2, num_attention_heads=2)
    source = ViTModel(config, add_pooling_layer=False).eval()
    source.save_pretrained(tmp_path)
    args = ClassifierArguments(model_name_or_path=str(tmp_path), drop_path_rate=0.0, pooling="cls")
    model = build_classifier(args, build_classifier_config(args, (64, 64), None)).eval()
    assert type(model) is ViTForImageClassification and model.config.image_size == 64
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = source(images, interpolate_pos_encoding=True).last_hidden_state
        torch.testing.assert_close(model.vit(images).last_hidden_state, expected, rtol=0, atol=1e-4)


def test_another_patch_size_is_refused(tmp_path):
    tiny_model("ocl", "ForPreTraining").save_pretrained(tmp_path)
    args = ModelArguments(model_type="ocl", model_name_or_path=str(tmp_path), patch_size=[4])
    with pytest.raises(ValueError, match="patch_size: .* is asked for"):
        build_config(args, NEW, None)
