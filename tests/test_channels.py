"""Weights of some channels for images of others, and a base that sees some of the channels."""

import numpy as np
import pytest
import torch
from transformers import ViTConfig, ViTModel

import hf_mim
from hf_mim.data.arguments import DataArguments
from hf_mim.data.loading import resolve_mean_std
from hf_mim.data.plain import open_images
from hf_mim.models.vit.channels import with_channels
from hf_mim.models.vit.encoders import encoder_from
from hf_mim.training.building import build_config, build_model, describe_frozen
from hf_mim.training.command import ModelArguments
from hf_mim.training.weights import trained_normalization
from tiny import scrambled, tiny_config, tiny_model

SIZES = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 48}
SIZES |= {"image_size": 16, "patch_size": 4}


@pytest.fixture(scope="module")
def vit(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vit")
    torch.manual_seed(0)
    scrambled(ViTModel(ViTConfig(**SIZES), add_pooling_layer=False)).save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text('{"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]}')
    return folder


def build(vit, num_channels=None, model_type="ocl", **flags):
    args = ModelArguments(model_type=model_type, model_name_or_path=str(vit), **flags)
    config = build_config(args, None, num_channels)
    describe_frozen(args, config, num_channels)
    return build_model(args, config).eval()


@torch.no_grad()
def tokens(encoder, pixel_values):
    return encoder(pixel_values).last_hidden_state


def test_the_same_in_every_channel_gives_the_response_that_it_gave(vit, caplog):
    grey = torch.randn(2, 1, 16, 16)
    expected = tokens(encoder_from(str(vit)), grey.expand(-1, 3, -1, -1))
    for number in (1, 4, 7):
        caplog.clear()
        model = build(vit, number)
        assert f"times 3/{number}" in caplog.text and model.config.num_channels == number
        torch.testing.assert_close(tokens(model.encoder, grey.expand(-1, number, -1, -1)), expected)
        filters = model.encoder.embeddings.patch_embeddings.projection.weight
        assert torch.equal(filters[:, 0], filters[:, -1])


def test_a_map_says_which_channel_is_which(vit):
    image = torch.randn(2, 4, 16, 16)
    model = build(vit, channel_map=["2", "1", "-", "0"])
    expected = tokens(encoder_from(str(vit)), image[:, [3, 1, 0]])
    torch.testing.assert_close(tokens(model.encoder, image), expected)
    # A channel that is not named is not seen; as a recipe gives them.
    model = build(vit, channel_map=[1, "-"])
    only_green = torch.zeros(2, 3, 16, 16)
    only_green[:, 1] = image[:, 0]
    torch.testing.assert_close(tokens(model.encoder, image[:, :2]), tokens(encoder_from(str(vit)), only_green))
    args = ModelArguments(model_name_or_path=str(vit), channel_map=["2", "1", "-", "0"])
    assert trained_normalization(args) == ([0.3, 0.2, None, 0.1], [0.6, 0.5, None, 0.4])


def test_a_pretraining_checkpoint_gives_its_encoder_and_fields(tmp_path):
    model = tiny_model("pilamim", "ForPreTraining", mask_ratio=0.6)
    model.save_pretrained(tmp_path)
    built = build(tmp_path, 2, "pilamim")
    assert (built.config.mask_ratio, built.config.num_channels) == (0.6, 2)
    kept, image = model.encoder, torch.randn(2, 1, 32, 48)
    with torch.no_grad():
        actual = built.encoder(image.expand(-1, 2, -1, -1)).last_hidden_state
        torch.testing.assert_close(actual, kept(image.expand(-1, 5, -1, -1)).last_hidden_state)


def test_nothing_changes_without_need(vit):
    encoder = encoder_from(str(vit))
    assert with_channels(encoder, 3) is encoder and with_channels(encoder, 3, [0, 1, 2]) is encoder


@pytest.mark.parametrize(
    ("flags", "number", "message"),
    [
        ({"channel_map": ["0", "1", "0"]}, None, "0 1 0: a channel of the weights is named twice"),
        ({"channel_map": ["0", "3"]}, None, "'3' is no channel of the weights, which have 3.*0 to 2"),
        ({"channel_map": ["0", "-1"]}, None, "'-1' is no channel"),
        ({"channel_map": ["red"]}, None, "'red' is no channel"),
        ({"channel_map": ["-", "-"]}, None, "no channel of the weights is used"),
        ({"channel_map": ["0", "1"]}, 3, "2 entries, and --num_channels is 3"),
    ],
)
def test_maps_that_cannot_be_meant(vit, flags, number, message):
    """Told by the config, before data is read."""
    args = ModelArguments(model_type="ocl", model_name_or_path=str(vit), **flags)
    with pytest.raises(ValueError, match=message):
        build_config(args, None, number)


def test_a_map_without_weights_is_refused():
    with pytest.raises(ValueError, match="--model_name_or_path"):
        build_config(ModelArguments(channel_map=["0"]), None, None)


@pytest.mark.parametrize(("method", "part"), [("tec", "base"), ("dbot", "teacher")])
def test_a_base_sees_the_channels_that_it_knows(vit, method, part, tmp_path):
    fields = SIZES | {"num_channels": 5, "decoder_hidden_size": 16, "decoder_num_attention_heads": 2}
    fields |= {f"{part}_channels": [3, 2, 1], f"{part}_image_mean": [0.1, 0.2, 0.3], f"{part}_image_std": [0.5]}
    fields |= {"image_mean": [0.0, 0.1, 0.2, 0.3, 0.4], "image_std": [1.0, 2.0, 3.0, 4.0, 5.0]}
    fields |= {"attention_top_k": 4} if method == "tec" else {}
    model_class = getattr(hf_mim, f"{tiny_config(method).__class__.__name__[:-6]}ForPreTraining")
    model = model_class.from_teacher(ViTModel.from_pretrained(vit), tiny_config(method, **fields))
    image = torch.rand(2, 5, 16, 16)
    mean, std = (torch.tensor(fields[name]).view(1, -1, 1, 1) for name in ("image_mean", "image_std"))
    wanted = (image[:, [3, 2, 1]] - torch.tensor([0.1, 0.2, 0.3]).view(1, -1, 1, 1)) / 0.5
    with torch.no_grad():
        seen = getattr(model, part)((image - mean) / std).last_hidden_states[-1]
        expected = ViTModel.from_pretrained(vit)(wanted, output_hidden_states=True).hidden_states[-1]
    torch.testing.assert_close(seen, expected, rtol=0, atol=1e-5)
    model.save_pretrained(tmp_path)
    loaded = model_class.from_pretrained(tmp_path)
    assert getattr(loaded.config, f"{part}_channels") == [3, 2, 1]
    noise = torch.rand(2, 16)
    with torch.no_grad():
        assert torch.equal(loaded(image, noise=noise).loss, model(image, noise=noise).loss)


def test_channels_of_a_base_by_flag(vit):
    def described(*channels, number=4):
        args = ModelArguments(
            model_type="tec", base_model_name_or_path=str(vit), base_channels=list(channels) or None, patch_size=[4]
        )
        config = build_config(args, (16, 16), number)
        describe_frozen(args, config, number)
        return config

    assert described(3, 2, 1).base_channels == [3, 2, 1]
    assert described(0, 0, 0, number=1).num_channels == 1
    for channels, message in (
        ((), "takes pictures of 3 channels; these have 4.*--base_channels"),
        ((0, 1), "are .0, 1.; the network takes 3"),
        ((0, 1, 4), "4 is none of the pictures' 4: name numbers from 0 to 3"),
        ((0, 1, -1), "-1 is none"),
    ):
        with pytest.raises(ValueError, match=message):
            described(*channels)
    args = ModelArguments(model_type="tec", base_model_name_or_path=str(vit), patch_size=[4])
    with pytest.raises(ValueError, match="base_model_name_or_path.*4 x 4 patches.*the student into 8 x 4"):
        describe_frozen(args, build_config(args, (32, 16), 3), 3)
    args = ModelArguments(model_type="ocl", base_channels=[0])
    with pytest.raises(ValueError, match="give --base_model_name_or_path"):
        describe_frozen(args, build_config(args, (16, 16), 3), 3)


def test_channels_that_the_weights_do_not_have_are_measured():
    arrays = [np.full((8, 8, 2), [51, infrared], dtype=np.uint8) for infrared in (0, 204)]
    mean, std = resolve_mean_std(DataArguments(), open_images(arrays, 2), ([0.7, None], [0.9, None]))
    assert mean == pytest.approx([0.7, 0.4]) and std == pytest.approx([0.9, 0.4])
