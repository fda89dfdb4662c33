"""Networks of transformers and timm as our encoder, and back: they compute the same."""

import json

import httpx
import pytest
import safetensors.torch
import timm
import torch
import transformers
from huggingface_hub.errors import GatedRepoError

import hf_mim
from hf_mim.evaluation.encoders import load_encoder
from hf_mim.models.vit.frozen_sources import read_source
from hf_mim.models.vit.modeling_vit import MaskedViTModel
from hf_mim.training.building import build_config, build_model, describe_frozen
from hf_mim.training.command import ModelArguments
from hf_mim.training.weights import trained_normalization
from tiny import scrambled, tiny_config, tiny_model

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 32, "patch_size": 8}
MLP = {"intermediate_size": 48}
STOCK = {
    "vit": ("ViT", MLP),
    "deit": ("DeiT", MLP),
    "ijepa": ("IJepa", MLP),
    "vit_without_biases": ("ViT", MLP | {"qkv_bias": False, "num_channels": 5, "hidden_act": "relu"}),
    "dinov2": ("Dinov2", {"layerscale_value": 0.5}),
    "dinov2_gated": ("Dinov2", {"use_swiglu_ffn": True, "mlp_ratio": 3}),
    "dinov2_registers": ("Dinov2WithRegisters", {"num_register_tokens": 3, "layerscale_value": 0.5}),
    "dinov3": ("DINOv3ViT", MLP | {"num_register_tokens": 2, "layerscale_value": 0.5, "rope_theta": 50.0}),
    "dinov3_gated": (
        "DINOv3ViT",
        MLP
        | {"use_gated_mlp": True, "hidden_act": "silu", "query_bias": False, "value_bias": False, "mlp_bias": False},
    ),
    "clip": ("CLIPVision", MLP),
    "siglip": ("SiglipVision", MLP),
}
TIMM = {
    "plain": {},
    "registers": {"reg_tokens": 3, "no_embed_class": True, "init_values": 0.3},
    "positions_of_registers": {"reg_tokens": 2, "qkv_bias": False},
    "clip": {"pre_norm": True, "act_layer": "quick_gelu"},
    "gated": {"mlp_layer": timm.layers.SwiGLUPacked, "act_layer": torch.nn.SiLU, "mlp_ratio": 3},
    "no_cls": {"class_token": False, "global_pool": "map", "act_layer": "gelu_tanh"},
}


def stock(kind):
    torch.manual_seed(0)
    name, fields = STOCK[kind]
    config = getattr(transformers, f"{name}Config")(**(SIZES | fields))
    return scrambled(getattr(transformers, f"{name}Model")(config)).eval()


def timm_vit(**fields):
    torch.manual_seed(0)
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 4, "num_classes": 0}
    model = timm.models.VisionTransformer(**sizes, dynamic_img_size=True, **fields)
    return scrambled(model).eval()


def images(config, height=32, width=32):
    return torch.randn(2, config.num_channels, height, width, generator=torch.Generator().manual_seed(3))


def tokens_of(model, pixel_values):
    """A stock network's tokens after its final LayerNorm, at any size."""
    takes = model.config.model_type in ("vit", "deit", "ijepa", "clip_vision_model", "siglip_vision_model")
    other = tuple(pixel_values.shape[2:]) != (32, 32)
    with torch.no_grad():
        tokens = model(pixel_values, **({"interpolate_pos_encoding": True} if takes and other else {}))[0]
        return model.post_layernorm(tokens) if model.config.model_type == "clip_vision_model" else tokens


def assert_same(encoder, pixel_values, expected):
    with torch.no_grad():
        outputs = encoder(pixel_values, interpolate_pos_encoding=True)
    torch.testing.assert_close(outputs.last_hidden_state, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", STOCK)
def test_stock_networks_compute_the_same_here(kind):
    model = stock(kind)
    encoder = hf_mim.encoder_from(model)
    assert isinstance(encoder, MaskedViTModel) and not encoder.training
    for size in ((32, 32), (48, 40), (16, 24)):
        pixel_values = images(model.config, *size)
        assert_same(encoder, pixel_values, tokens_of(model, pixel_values))
    if kind == "clip":
        with torch.no_grad():
            pooled = model(images(model.config)).pooler_output
            torch.testing.assert_close(encoder(images(model.config)).pooler_output, pooled, rtol=0, atol=1e-5)
    assert encoder.config.use_cls_token == (kind not in ("siglip", "ijepa"))
    assert encoder.config.pooling == ("cls" if encoder.config.use_cls_token else "mean")
    assert encoder.config.num_register_tokens == {"deit": 1, "dinov2_registers": 3, "dinov3": 2}.get(kind, 0)


def test_siglip2_of_any_grid():
    config = transformers.Siglip2VisionConfig(
        **{name: value for name, value in (SIZES | MLP).items() if name != "image_size"}, num_patches=16
    )
    torch.manual_seed(0)
    model = scrambled(transformers.Siglip2VisionModel(config)).eval()
    encoder = hf_mim.encoder_from(model)
    assert (encoder.config.image_size, encoder.config.use_cls_token) == (32, False)
    for rows, columns in ((4, 4), (6, 5), (2, 3)):
        pixel_values = images(config, 8 * rows, 8 * columns)
        patches = pixel_values.unflatten(3, (columns, 8)).unflatten(2, (rows, 8)).permute(0, 2, 4, 3, 5, 1)
        with torch.no_grad():
            expected = model(
                patches.flatten(3).flatten(1, 2),
                pixel_attention_mask=torch.ones(2, rows * columns, dtype=torch.long),
                spatial_shapes=torch.tensor([[rows, columns]] * 2),
            ).last_hidden_state
        assert_same(encoder, pixel_values, expected)


@pytest.mark.parametrize("kind", TIMM)
def test_timm_networks_compute_the_same_here(kind):
    model = timm_vit(**TIMM[kind])
    encoder = hf_mim.encoder_from(model)
    for size in ((32, 32), (48, 40)):
        pixel_values = images(encoder.config, *size)
        with torch.no_grad():
            assert_same(encoder, pixel_values, model.forward_features(pixel_values))


def test_timm_state_dicts_and_files(tmp_path, caplog):
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", depth=1, num_classes=3, img_size=32).eval()
    pixel_values = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected = model.forward_features(pixel_values)
    decoder = {"mask_token": torch.zeros(1, 1, 4), "decoder_embed.weight": torch.zeros(4, 192)}
    safetensors.torch.save_file(model.state_dict() | decoder, tmp_path / "vit.safetensors")
    wrapped = {"model": {f"module.backbone.{name}": value for name, value in model.state_dict().items()}}
    torch.save(wrapped | {"epoch": 3}, tmp_path / "vit.pth")
    for source in (model.state_dict(), tmp_path / "vit.safetensors", str(tmp_path / "vit.pth")):
        assert_same(hf_mim.encoder_from(source), pixel_values, expected)
    assert caplog.text.count("num_attention_heads=3") == 1 and "assumed" in caplog.text
    caplog.clear()
    told = {"num_attention_heads": 3, "layer_norm_eps": 1e-6, "hidden_act": "gelu", "image_size": 32}
    assert_same(hf_mim.encoder_from(model.state_dict(), config=told), pixel_values, expected)
    assert not caplog.text
    with pytest.raises(ValueError, match="num_attention_heads cannot be told.*width 32"):
        hf_mim.encoder_from(timm_vit().state_dict())


def test_networks_of_two_towers_and_with_heads_by_path(tmp_path):
    sizes = SIZES | MLP | {"num_hidden_layers": 1}
    text = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    for name, config_class in (("CLIP", "CLIPConfig"), ("Siglip", "SiglipConfig")):
        config = getattr(transformers, config_class)(vision_config=sizes, text_config=text | {"vocab_size": 99})
        model = scrambled(getattr(transformers, f"{name}Model")(config)).eval()
        model.save_pretrained(tmp_path / name)
        pixel_values = images(config.vision_config)
        expected = tokens_of(model.vision_model, pixel_values)
        assert_same(hf_mim.encoder_from(str(tmp_path / name)), pixel_values, expected)
        assert_same(hf_mim.encoder_from(model), pixel_values, expected)
    config = transformers.Dinov2Config(**sizes | {"num_labels": 3})
    classifier = scrambled(transformers.Dinov2ForImageClassification(config)).eval()
    pixel_values = images(config)
    assert_same(hf_mim.encoder_from(classifier), pixel_values, tokens_of(classifier.dinov2, pixel_values))


def test_what_is_no_plain_vit_is_refused_with_the_reason():
    swin = transformers.SwinModel(transformers.SwinConfig(embed_dim=8, depths=[1, 1], num_heads=[1, 1], image_size=32))
    resnet = transformers.ResNetModel(transformers.ResNetConfig(hidden_sizes=[8, 8, 8, 8], depths=[1, 1, 1, 1]))
    beit = transformers.BeitModel(transformers.BeitConfig(**SIZES, **MLP))
    cases = [
        (swin, "'swin' is hierarchical.*dinov2"),
        (resnet, "'resnet' is convolutional.*dinov2"),
        (beit, "'beit' is not known"),
        (timm.create_model("resnet10t", num_classes=0), "ResNet is no plain ViT"),
        (timm.create_model("resnet10t", num_classes=0).state_dict(), "no plain ViT with timm's names.*convolutional"),
        (timm_vit(qk_norm=True), r"no place for: blocks\.0\.attn\.q_norm"),
        (timm_vit(act_layer=torch.nn.Tanh), "activation Tanh"),
        (timm_vit(global_pool="avg"), "fc_norm"),
    ]
    for model, message in cases:
        with pytest.raises(ValueError, match=f"(?s){message}"):
            hf_mim.encoder_from(model)


@pytest.mark.parametrize("kind", [name for name in STOCK if name.startswith("dino")])
def test_there_and_back(kind, tmp_path):
    """What goes back is the original class, whose own loading reads it; layer scale is 1 and in the maps."""
    model = stock(kind)
    export = hf_mim.to_dinov3 if kind.startswith("dinov3") else hf_mim.to_dinov2
    returned = export(hf_mim.encoder_from(model))
    assert type(returned) is type(model) and not returned.training
    returned.save_pretrained(tmp_path)
    loaded = transformers.AutoModel.from_pretrained(tmp_path)
    assert type(loaded) is type(model)
    for size in ((32, 32), (48, 40)):
        pixel_values = images(model.config, *size)
        expected = tokens_of(model, pixel_values)
        torch.testing.assert_close(tokens_of(loaded, pixel_values), expected, rtol=0, atol=1e-5)
    # AutoBackbone.from_pretrained of transformers 5.24 asks the Hub for a local folder.
    backbone = type(transformers.AutoBackbone.from_config(loaded.config)).from_pretrained(tmp_path).eval()
    with torch.no_grad():
        (feature_map,) = backbone(images(model.config)).feature_maps
    patches = tokens_of(model, images(model.config))[:, -16:]
    torch.testing.assert_close(feature_map.flatten(2).transpose(1, 2), patches, rtol=0, atol=1e-5)


def test_our_own_encoders_become_dinov2():
    square = {"image_size": 32, "patch_size": 8, "position_embedding": "learned"}
    for method, fields in (("tec", {}), ("ocl", {"num_register_tokens": 2, "key_bias": False})):
        model = tiny_model(method, "ForPreTraining", **square, **fields)
        pixel_values = images(model.config)
        with torch.no_grad():
            expected = model.encoder(pixel_values).last_hidden_state
            actual = hf_mim.to_dinov2(model)(pixel_values).last_hidden_state
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)
    keyless = tiny_model("ocl", "Model", key_bias=False)
    pixel_values = images(keyless.config, *keyless.config.image_size)
    with torch.no_grad():
        expected = keyless(pixel_values).last_hidden_state
        torch.testing.assert_close(hf_mim.to_vit(keyless)(pixel_values).last_hidden_state, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("export", "fields", "message"),
    [
        ("to_dinov2", {}, "grid is 4 x 12.*squares only"),
        ("to_dinov2", {"position_embedding": "rotary"}, "rotary positions.*to_dinov3"),
        ("to_dinov2", {"image_size": 32, "patch_size": 8, "intermediate_size": 50}, "intermediate_size is 50"),
        ("to_dinov2", {"embedding_layernorm": True}, "embedding_layernorm"),
        ("to_dinov3", {}, "table of positions.*to_dinov2"),
        ("to_dinov3", {"position_embedding": "rotary", "embedding_layernorm": True}, "embedding_layernorm"),
        ("to_vit", {"num_register_tokens": 2}, "register tokens.*to_dinov2"),
        ("to_vit", {"position_embedding": "rotary"}, "rotary positions.*to_dinov3"),
        ("to_vit", {"use_gated_mlp": True}, "gated MLPs"),
    ],
)
def test_what_a_class_has_not_is_said(export, fields, message):
    with pytest.raises(ValueError, match=message):
        getattr(hf_mim, export)(tiny_model("ocl", "Model", **fields))


def arguments(model_type, path, **fields):
    return ModelArguments(model_type=model_type, model_name_or_path=str(path), **fields)


@pytest.mark.parametrize("kind", ["dinov2_registers", "dinov3_gated", "siglip"])
@pytest.mark.parametrize("method", ["ocl", "pilamim"])
def test_pretraining_goes_on_from_them(kind, method, tmp_path, caplog):
    model = stock(kind)
    model.save_pretrained(tmp_path)
    processor = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(processor))
    args = arguments(method, tmp_path)
    assert trained_normalization(args) == ([0.1, 0.2, 0.3], [0.4, 0.5, 0.6])
    config = build_config(args, (48, 40), None)
    built = build_model(args, config).eval()
    assert built.config.use_cls_token and built.config.pooling == "cls"
    assert ("it gets a new one" in caplog.text) == (kind == "siglip")
    pixel_values = images(config, 48, 40)
    with torch.no_grad():
        if kind == "siglip":
            projected = built.encoder.embeddings(pixel_values)[:, 1:]
            expected = hf_mim.encoder_from(model).embeddings(pixel_values, interpolate_pos_encoding=True)
        else:
            projected, expected = built.encoder(pixel_values).last_hidden_state, tokens_of(model, pixel_values)
        torch.testing.assert_close(projected, expected, rtol=0, atol=1e-5)
        assert built(pixel_values, noise=torch.rand(2, 30)).loss.isfinite()


def test_pretraining_from_what_is_no_vit_is_refused(tmp_path):
    swin = transformers.SwinModel(transformers.SwinConfig(embed_dim=8, depths=[1, 1], num_heads=[1, 1], image_size=32))
    swin.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="model_name_or_path.*hierarchical"):
        build_config(arguments("ocl", tmp_path), None, None)


def test_gated_weights_without_a_token_are_said_in_a_line(monkeypatch):
    refused = GatedRepoError(
        "401 Client Error", response=httpx.Response(401, request=httpx.Request("GET", "http://x"))
    )

    def gated(path, *_, **__):
        # As transformers says it.
        raise OSError(
            f"You are trying to access a gated repo.\nMake sure to have access to it at {path}."
        ) from refused

    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", gated)
    name = "facebook/dinov3-vits16"
    said = "its weights are gated. Ask for access at https://huggingface.co/facebook/dinov3-vits16, then log in"
    with pytest.raises(ValueError, match=f"--model_name_or_path {name}: {said}"):
        build_config(arguments("ocl", name), None, None)
    args = ModelArguments(model_type="tec", base_model_name_or_path=name)
    with pytest.raises(ValueError, match=f"--base_model_name_or_path {name}: {said}"):
        describe_frozen(args, build_config(args, None, None), None)
    with pytest.raises(ValueError, match=f"The model {name} cannot be loaded: {said}"):
        load_encoder(name)


def test_tec_starts_from_and_learns_from_networks_that_are_read_as_ours():
    base = timm_vit(reg_tokens=2)
    encoder = hf_mim.encoder_from(base)
    names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "layer_norm_eps")
    names += ("image_size", "patch_size", "num_channels", "num_register_tokens", "position_embedding")
    fields = {name: getattr(encoder.config, name) for name in names} | {"adapter_group_size": 1}
    config = tiny_config("tec", **fields, initialize_from_base=True, attention_top_k=4)
    model = hf_mim.TECForPreTraining.from_base(base, config)
    given = {name: value for name, value in encoder.vit_state_dict().items() if "cls_token" not in name}
    for part in (model.base.network, model.encoder):
        weights = part.vit_state_dict()
        assert all(torch.equal(weights[name], value) for name, value in given.items())
    with pytest.raises(ValueError, match="no .CLS. token"):
        read_source(timm_vit(class_token=False, global_pool="map"))
    with pytest.raises(ValueError, match="no .CLS. token"):
        read_source(stock("siglip"))
    deit = stock("deit")
    frozen = hf_mim.TECForPreTraining.from_base(deit, tiny_config("tec", **fields | {"num_attention_heads": 2})).base
    pixel_values = images(deit.config)
    with torch.no_grad():
        tokens = frozen.network.layernorm(frozen(pixel_values).last_hidden_states[-1])
    torch.testing.assert_close(tokens, tokens_of(deit, pixel_values)[:, [0, *range(2, 18)]], rtol=0, atol=1e-5)
