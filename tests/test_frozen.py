"""A frozen network of every supported type against its own model."""

import copy
import json

import pytest
import torch
import transformers
from packaging.version import Version
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from hf_mim.models.vit.configuration_vit import MaskedViTConfig
from hf_mim.models.vit.frozen import FrozenViT
from hf_mim.models.vit.frozen_layouts import frozen_config
from hf_mim.models.vit.frozen_sources import load_source, read_source
from hf_mim.models.vit.modeling_vit import MaskedViTModel
from hf_mim.models.vit.pixels import PixelRenormalization
from hf_mim.models.vit.pretraining import MaskedViTForPreTraining
from hf_mim.registry import METHODS
from tiny import scrambled, slow_position_table, tiny_config, tiny_model

SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "image_size": 32,
    "patch_size": 8,
}
# transformers before 5.20 builds DINOv3 for squares only.
_DINOV3_SIZE = (32, 48) if Version(transformers.__version__) >= Version("5.20") else 32
STOCK = {
    "vit": (transformers.ViTConfig, {"image_size": (32, 16), "patch_size": (8, 4)}),
    "vit_mae": (transformers.ViTMAEConfig, {"decoder_hidden_size": 16, "decoder_num_attention_heads": 2}),
    "dinov2": (transformers.Dinov2Config, {"layerscale_value": 0.5, "use_swiglu_ffn": True}),
    "dinov2_with_registers": (transformers.Dinov2WithRegistersConfig, {"num_register_tokens": 3}),
    "dinov3_vit": (transformers.DINOv3ViTConfig, {"num_register_tokens": 2, "image_size": _DINOV3_SIZE}),
    "clip_vision_model": (transformers.CLIPVisionConfig, {}),
}
TYPES = [*STOCK, *METHODS, "plain"]


def own_model(kind):
    """A network of a type, scrambled, whose attentions can be seen; its positions fixed where they are."""
    torch.manual_seed(0)
    if kind in STOCK:
        config_class, fields = STOCK[kind]
        model = transformers.AutoModel.from_config(config_class(**(SIZES | fields)), attn_implementation="eager")
    elif kind == "plain":
        model = MaskedViTModel._from_config(MaskedViTConfig(**SIZES), attn_implementation="eager")
    else:
        model = tiny_model(kind, "Model")
        model.set_attn_implementation("eager")
    return scrambled(model).eval()


def pictures_for(config, batch_size=2):
    size = config.image_size if isinstance(config.image_size, (tuple, list)) else (config.image_size,) * 2
    return torch.randn(batch_size, config.num_channels, *size, generator=torch.Generator().manual_seed(3))


def own_outputs(model, pixel_values):
    arguments = {"output_hidden_states": True, "output_attentions": True}
    if model.config.model_type == "vit_mae":
        model.config.mask_ratio = 0.0
        num_patches = model.embeddings.patch_embeddings.num_patches
        arguments["noise"] = torch.arange(num_patches).float().expand(len(pixel_values), -1)
    with torch.no_grad():
        return model(pixel_values, **arguments)


def without_registers(tokens, config, dim=1):
    registers = getattr(config, "num_register_tokens", 0)
    keep = [0, *range(1 + registers, tokens.shape[dim])]
    return tokens.index_select(dim, torch.tensor(keep))


def frozen_copy(model, **arguments):
    source = read_source(model)
    frozen = FrozenViT(source.config, **arguments)
    load_source(frozen, source)
    return frozen


def assert_same_as_own(frozen, model, pixel_values, tolerance=1e-5):
    outputs, own = frozen(pixel_values, num_last_layers=2), own_outputs(model, pixel_values)
    assert len(outputs.last_hidden_states) == 2
    for ours, theirs in zip(outputs.last_hidden_states, own.hidden_states[-2:], strict=True):
        expected = without_registers(theirs, model.config)
        torch.testing.assert_close(ours, expected, rtol=0, atol=tolerance)
    # Rows in any order, [CLS] among them, others for every picture.
    num_patches = outputs.last_hidden_states[0].shape[1] - 1
    rows = torch.stack([torch.randperm(1 + num_patches)[:5] for _ in pixel_values])
    rows[:, 1] = 0
    logits = outputs.attention.logits(rows)
    own_rows = torch.where(rows > 0, rows + getattr(model.config, "num_register_tokens", 0), 0)
    attentions = own.attentions[-1]
    attentions = attentions[torch.arange(len(rows)).unsqueeze(1), :, own_rows].transpose(1, 2)[..., -num_patches:]
    attentions = attentions / attentions.sum(dim=-1, keepdim=True)
    torch.testing.assert_close(logits.softmax(dim=-1), attentions, rtol=1e-4, atol=1e-6)
    return outputs, own


@pytest.mark.parametrize("kind", TYPES)
def test_outputs_and_attention_are_the_networks_own(kind):
    torch.manual_seed(1)
    model = own_model(kind)
    frozen = frozen_copy(model)
    assert (frozen.hidden_size, frozen.num_heads, frozen.num_layers) == (
        model.config.hidden_size,
        model.config.num_attention_heads,
        3,
    )
    assert_same_as_own(frozen, model, pictures_for(model.config))


@pytest.mark.parametrize("kind", ["vit", "dinov3_vit", "pilamim"])
def test_attention_logits_are_scaled_products(kind):
    """Not only up to a constant a row, which softmax hides."""
    model = own_model(kind)
    frozen, pixel_values = frozen_copy(model), pictures_for(model.config)
    caught = []

    def spy(module, query, key, *arguments, **options):
        caught.append(query @ key.transpose(2, 3) / query.shape[-1] ** 0.5)
        return sdpa_attention_forward(module, query, key, *arguments, **options)

    transformers.AttentionInterface.register("spy", spy)
    frozen.network.set_attn_implementation("spy")
    outputs = frozen(pixel_values)
    assert len(caught) == 3
    num_patches = outputs.last_hidden_states[0].shape[1] - 1
    rows = torch.arange(1 + num_patches).expand(len(pixel_values), -1)
    expected = without_registers(caught[-1], model.config, dim=2)[..., -num_patches:]
    torch.testing.assert_close(outputs.attention.logits(rows), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", TYPES)
def test_saved_and_read_by_path(kind, tmp_path):
    model = own_model(kind)
    model.save_pretrained(tmp_path)
    processor = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(processor))
    source = read_source(str(tmp_path))
    assert (source.image_mean, source.image_std) == ([0.1, 0.2, 0.3], [0.4, 0.5, 0.6])
    frozen = FrozenViT(source.config)
    load_source(frozen, source)
    assert_same_as_own(frozen, model, pictures_for(model.config))


def test_encoders_of_models_with_heads_are_taken(tmp_path):
    torch.manual_seed(0)
    clip = transformers.CLIPModel(
        transformers.CLIPConfig(
            vision_config=SIZES, text_config={"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
        )
    ).eval()
    mae = transformers.ViTMAEForPreTraining(transformers.ViTMAEConfig(**SIZES, decoder_num_attention_heads=2)).eval()
    classifier = transformers.ViTForImageClassification(transformers.ViTConfig(**SIZES)).eval()
    pretraining = tiny_model("pilamim", "ForPreTraining")
    for i, (model, encoder) in enumerate(
        [
            (clip, clip.vision_model),
            (mae, mae.vit),
            (classifier, classifier.vit),
            (pretraining, pretraining.encoder),
        ]
    ):
        model.save_pretrained(tmp_path / str(i))
        pixel_values = pictures_for(encoder.config)
        expected = own_outputs(encoder, pixel_values).hidden_states[-1]
        for given in (model, tmp_path / str(i)):
            outputs = frozen_copy(given)(pixel_values)
            torch.testing.assert_close(outputs.last_hidden_states[-1], expected, rtol=0, atol=1e-5)


def test_source_is_left_as_it_was():
    for kind in ("vit_mae", "dinov3_vit"):
        model = own_model(kind)
        before = model.config.to_dict()
        frozen = frozen_copy(model)
        assert model.config.to_dict() == before
        assert any(parameter.requires_grad for parameter in model.parameters())
        with torch.no_grad():
            next(frozen.parameters()).add_(1)
        again = frozen_copy(model)
        assert not torch.equal(next(frozen.parameters()), next(again.parameters()))


# ---- Frozen


@pytest.mark.parametrize("kind", TYPES)
def test_no_gradient_no_training_mode(kind):
    model = own_model(kind)
    frozen = frozen_copy(model)
    pixel_values = pictures_for(model.config).requires_grad_()
    for candidate in (frozen, copy.deepcopy(frozen), nn.Sequential(frozen).train()[0]):
        candidate.train()
        assert not any(module.training for module in candidate.modules())
        assert not any(parameter.requires_grad for parameter in candidate.parameters())
        outputs = candidate(pixel_values, num_last_layers=3)
        logits = outputs.attention.logits(torch.zeros(2, 1, dtype=torch.long))
        assert not any(tensor.requires_grad for tensor in (*outputs.last_hidden_states, logits))


@pytest.mark.parametrize("kind", TYPES)
def test_half_precision_by_autocast(kind):
    model = own_model(kind)
    frozen, pixel_values = frozen_copy(model), pictures_for(model.config)
    expected = frozen(pixel_values)
    with torch.autocast("cpu", torch.bfloat16):
        outputs = frozen(pixel_values)
        logits = outputs.attention.logits(torch.tensor([[0, 3], [2, 0]]))
    assert logits.dtype == torch.float32
    torch.testing.assert_close(
        outputs.last_hidden_states[-1].float(), expected.last_hidden_states[-1], rtol=0.1, atol=0.1
    )


# ---- As a part of a pretraining model


class Student(MaskedViTForPreTraining):
    """No more than what holds a frozen network."""

    config: MaskedViTConfig
    frozen_modules = ("base",)

    def __init__(self, config):
        super().__init__(config)
        self.encoder = MaskedViTModel(config)
        pixels = {"source_mean": [0.5], "source_std": [0.25], "target_mean": [0.4], "target_std": [0.2]}
        self.base = FrozenViT(frozen_config(config.base, config), pixels=pixels)
        self.post_init()
        self.freeze()


class StudentConfig(MaskedViTConfig):
    base: dict | None = None


Student.config_class = StudentConfig


@pytest.mark.parametrize("kind", TYPES)
def test_saved_and_loaded_as_a_part(kind, tmp_path):
    own = own_model(kind)
    described = own.config.to_dict()
    if kind == "plain":
        del described["model_type"]
    torch.manual_seed(0)
    student = Student(StudentConfig(**SIZES, base=described))
    load_source(student.base, read_source(own))
    student.save_pretrained(tmp_path)
    pixel_values = pictures_for(own.config)
    expected = student.base(pixel_values)
    for dtype, tolerance in ((torch.float32, 0), (torch.bfloat16, 0.2)):
        loaded, info = Student.from_pretrained(tmp_path, output_loading_info=True, dtype=dtype)
        assert not info["missing_keys"] and not info["unexpected_keys"]
        loaded.train()
        assert not any(module.training for module in loaded.base.modules())
        assert not any(parameter.requires_grad for parameter in loaded.base.parameters())
        outputs = loaded.base(pixel_values)
        torch.testing.assert_close(
            outputs.last_hidden_states[0].float(), expected.last_hidden_states[0], rtol=tolerance, atol=tolerance
        )


def test_built_untrained_from_a_description():
    student = MaskedViTConfig(**SIZES | {"num_channels": 5})
    for described, expected in (
        (None, {"hidden_size": 32, "num_channels": 5, "image_size": 32}),
        ({"hidden_size": 16, "num_attention_heads": 2}, {"hidden_size": 16, "num_channels": 5, "image_size": 32}),
        ({"model_type": "vit", **SIZES}, {"hidden_size": 32, "num_channels": 3}),
        (transformers.Dinov2Config(**SIZES), {"hidden_size": 32, "num_channels": 3}),
        (transformers.CLIPConfig(vision_config=SIZES), {"hidden_size": 32, "num_channels": 3}),
    ):
        config = frozen_config(described, student)
        assert {name: getattr(config, name) for name in expected} == expected
        outputs = FrozenViT(config)(pictures_for(config))
        assert outputs.last_hidden_states[0].shape == (2, 17, config.hidden_size)


def test_untrained_vit_mae_knows_positions():
    frozen = FrozenViT(transformers.ViTMAEConfig(**SIZES))
    expected = slow_position_table(4, 4, 32)
    torch.testing.assert_close(frozen.network.embeddings.position_embeddings, expected, rtol=0, atol=1e-6)
    assert frozen.network.embeddings.cls_token.std() == pytest.approx(0.02, rel=0.5)


def test_on_the_meta_device():
    for config in (transformers.ViTMAEConfig(**SIZES), MaskedViTConfig(**SIZES), transformers.DINOv3ViTConfig()):
        with torch.device("meta"):
            frozen = FrozenViT(config)
        assert all(parameter.is_meta for parameter in frozen.parameters())


# ---- Pixels and grids


def test_pixels_are_normalised_as_the_network_wants_them():
    raw = torch.rand(2, 3, 32, 32)
    student = {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.1]}
    wanted = {"mean": [0.1, 0.2, 0.6], "std": [0.5, 0.25, 1.0]}

    def normalised(numbers):
        mean, std = (torch.tensor(numbers[name]).view(3, 1, 1) for name in ("mean", "std"))
        return (raw - mean) / std

    pixels = {"source_mean": student["mean"], "source_std": student["std"]}
    pixels |= {"target_mean": wanted["mean"], "target_std": wanted["std"]}
    model = own_model("dinov2")
    outputs = frozen_copy(model, pixels=pixels)(normalised(student)).last_hidden_states[0]
    expected = own_outputs(model, normalised(wanted)).hidden_states[-1]
    torch.testing.assert_close(outputs, expected, rtol=0, atol=1e-5)
    # Where either is not known, pixels are left alone.
    for unknown in pixels:
        module = PixelRenormalization(3, **(pixels | {unknown: None}))
        assert module(raw) is raw


def test_number_of_means_must_fit_the_channels():
    with pytest.raises(ValueError, match=r"2 numbers, \[0.5, 0.4\].*3 channels"):
        PixelRenormalization(3, [0.5], [0.2], [0.5, 0.4], [0.2])


@pytest.mark.parametrize("kind", ["vit_mae", "dinov3_vit", "dinov2"])
def test_pictures_are_resized_to_the_networks_patches(kind):
    """A student with patches of 4 x 4 pixels, and a network with 8 x 8: the same 4 x 4 grid."""
    model = own_model(kind)
    frozen = frozen_copy(model, grid=(4, 4))
    small = torch.rand(2, 3, 16, 16)
    resized = nn.functional.interpolate(small, size=(32, 32), mode="bicubic", antialias=True)
    expected = without_registers(own_outputs(model, resized).hidden_states[-1], model.config)
    torch.testing.assert_close(frozen(small).last_hidden_states[0], expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["dinov2", "dinov2_with_registers", "dinov3_vit"])
def test_networks_for_any_grid_take_any_grid(kind):
    model = own_model(kind)
    frozen = frozen_copy(model, grid=(2, 3))
    pixel_values = torch.rand(2, 3, 16, 24)
    expected = without_registers(own_outputs(model, pixel_values).hidden_states[-1], model.config)
    assert expected.shape == (2, 7, 32)
    torch.testing.assert_close(frozen(pixel_values).last_hidden_states[0], expected, rtol=0, atol=1e-5)


# From 2 x 2 to 4 x 4 a patch lies a quarter and three quarters between two; at the edge it is the edge's. From 4 x 4
# to 2 x 2 a triangle over two patches to each side: 3/4, 3/4 and 1/4, over their sum.
_BETWEEN = {
    (2, 4): [[1, 0], [3 / 4, 1 / 4], [1 / 4, 3 / 4], [0, 1]],
    (4, 2): [[3 / 7, 3 / 7, 1 / 7, 0], [0, 1 / 7, 3 / 7, 3 / 7]],
}


@pytest.mark.parametrize("kind", ["vit_mae", "clip_vision_model", "plain"])
@pytest.mark.parametrize(("own", "wanted"), [(2, 4), (4, 2)])
def test_patches_are_resampled_to_the_grid_that_is_wanted(kind, own, wanted, monkeypatch):
    monkeypatch.setitem(SIZES, "image_size", 8 * own)
    model = own_model(kind)
    frozen = frozen_copy(model, grid=(wanted, wanted))
    assert frozen.grid == (wanted, wanted) and frozen.own_grid == (own, own)
    pixel_values = torch.rand(2, 3, 8 * own, 8 * own)
    shares = torch.tensor(_BETWEEN[own, wanted])

    def by_hand(tokens):
        patches = tokens[:, 1:].unflatten(1, (own, own))
        patches = torch.einsum("yi,xj,bijc->byxc", shares, shares, patches).flatten(1, 2)
        return torch.cat((tokens[:, :1], patches), dim=1)

    hidden_states = own_outputs(model, pixel_values).hidden_states
    found = frozen(pixel_values, num_last_layers=2)
    for tokens, hidden in zip(found.last_hidden_states, hidden_states[-2:], strict=True):
        torch.testing.assert_close(tokens, by_hand(hidden), rtol=0, atol=1e-5)
    attention = found.attention
    rows = torch.tensor([[0, wanted**2], [2, 1]])
    inputs = attention.norm(by_hand(hidden_states[-2]))
    queries, keys = (
        project(inputs).unflatten(2, (4, 8)).transpose(1, 2)
        for project in (attention.project_query, attention.project_key)
    )
    expected = (queries @ keys[:, :, 1:].transpose(2, 3) / 8**0.5)[torch.arange(2)[:, None], :, rows].transpose(1, 2)
    torch.testing.assert_close(attention.logits(rows), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["vit_mae", "clip_vision_model", "plain"])
def test_grids_of_other_proportions_are_refused_with_both(kind):
    with pytest.raises(ValueError, match="4 x 4 patches.*student into 2 x 8"):
        frozen_copy(own_model(kind), grid=(2, 8))


def test_other_channels_are_refused():
    with pytest.raises(ValueError, match="5 channels.*takes 3"):
        FrozenViT(MaskedViTConfig(**SIZES))(torch.rand(1, 5, 32, 32))


def test_more_blocks_than_there_are_is_refused():
    with pytest.raises(ValueError, match="num_last_layers is 4.*3 blocks"):
        FrozenViT(MaskedViTConfig(**SIZES))(torch.rand(1, 3, 32, 32), num_last_layers=4)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (transformers.SiglipVisionConfig(), r"no \[CLS\]"),
        (transformers.IJepaConfig(), r"no \[CLS\]"),
        (transformers.SwinConfig(), "hierarchical"),
        (transformers.ResNetConfig(), "convolutional"),
        (transformers.ConvNextConfig(), "convolutional"),
        (transformers.BertConfig(), "not known"),
    ],
    ids=lambda value: getattr(value, "model_type", None),
)
def test_what_cannot_give_targets_is_refused_with_the_reason(config, reason, tmp_path):
    config.save_pretrained(tmp_path)
    student = MaskedViTConfig(**SIZES)
    for attempt in (lambda: frozen_config(config, student), lambda: read_source(tmp_path)):
        with pytest.raises(ValueError, match=f"{config.model_type}.*{reason}.*dinov2"):
            attempt()


def test_weights_of_another_network_are_refused():
    frozen = FrozenViT(tiny_config("pilamim"))
    with pytest.raises(ValueError, match="do not fit a frozen network of type 'pilamim'"):
        load_source(frozen, read_source(own_model("vit")))


def test_weights_that_are_not_all_there(tmp_path):
    model = own_model("vit")
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    kept = {name: value for name, value in weights.items() if "layer.0" not in name and "layers.0" not in name}
    assert len(kept) < len(weights)
    save_file(kept, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="lacks weights of its encoder: "):
        read_source(str(tmp_path))
