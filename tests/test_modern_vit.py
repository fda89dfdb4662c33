"""What encoders of today have besides ViT's parts: registers, rotary positions, gated MLPs, keys without a bias."""

import pytest
import torch
from transformers import DINOv3ViTConfig
from transformers.models.dinov3_vit.modeling_dinov3_vit import DINOv3ViTRopePositionEmbedding

from hf_mim.models.vit.configuration_vit import MaskedViTConfig
from hf_mim.models.vit.modeling_vit import MaskedViTBackbone, MaskedViTModel
from hf_mim.models.vit.position import rotary_table
from hf_mim.registry import METHODS, method_class
from tiny import TINY, checkpoint_activations, scrambled, tiny_batch, tiny_config, tiny_model

MODERN = {
    "num_register_tokens": 3,
    "position_embedding": "rotary",
    "key_bias": False,
    "use_gated_mlp": True,
    "hidden_act": "silu",
    "intermediate_size": 56,
    "embedding_layernorm": True,
}


@pytest.fixture(scope="module")
def encoder():
    return tiny_model("ocl", "Model", **MODERN)


def test_rotary_positions_are_those_of_dinov3():
    config = DINOv3ViTConfig(hidden_size=48, num_attention_heads=3, image_size=32, patch_size=8, rope_theta=50.0)
    expected = DINOv3ViTRopePositionEmbedding(config).eval()(torch.zeros(1, 3, 40, 48))
    for ours, theirs in zip(rotary_table((5, 6), 16, 50.0, None, "cpu"), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)


def test_kept_patches_are_turned_by_their_own_places(encoder):
    """All patches in another order give the same tokens in that order, which any other rule of places would not."""
    pixel_values = tiny_batch(encoder.config)["pixel_values"]
    ids = torch.stack([torch.randperm(encoder.config.num_patches) for _ in pixel_values])
    with torch.no_grad():
        whole, shuffled = (encoder(pixel_values, ids_keep=kept).last_hidden_state for kept in (None, ids))
    assert whole.shape[1] == 1 + 3 + encoder.config.num_patches
    expected = torch.stack([tokens[4 + order] for tokens, order in zip(whole, ids, strict=True)])
    torch.testing.assert_close(shuffled[:, 4:], expected)
    torch.testing.assert_close(shuffled[:, :4], whole[:, :4])
    assert not torch.allclose(shuffled[:, 4:], whole[:, 4:], atol=1e-3)


def test_sizes_dtypes_and_other_implementations(encoder):
    pixel_values = torch.randn(2, 5, 64, 24)
    with torch.no_grad():
        with pytest.raises(ValueError, match="interpolate_pos_encoding=True"):
            encoder(pixel_values)
        outputs = encoder(pixel_values, interpolate_pos_encoding=True)
        assert outputs.last_hidden_state.shape == (2, 4 + 8 * 6, 32)
        encoder.set_attn_implementation("eager")
        eager = encoder(pixel_values, interpolate_pos_encoding=True, output_attentions=True)
        encoder.set_attn_implementation("sdpa")
        assert eager.attentions[0].shape == (2, 2, 52, 52)
        torch.testing.assert_close(eager.last_hidden_state, outputs.last_hidden_state)
        compiled = torch.compile(encoder, fullgraph=True, backend="eager")
        torch.testing.assert_close(
            compiled(pixel_values, interpolate_pos_encoding=True).last_hidden_state, outputs.last_hidden_state
        )
        with torch.autocast("cpu", torch.bfloat16):
            half = encoder(pixel_values, interpolate_pos_encoding=True, output_hidden_states=True)
        assert all(states.dtype == torch.float32 for states in half.hidden_states)
        torch.testing.assert_close(half.last_hidden_state, outputs.last_hidden_state, rtol=0, atol=0.1)
        low = tiny_model("ocl", "Model", **MODERN).to(torch.bfloat16)
        assert low(pixel_values, interpolate_pos_encoding=True).last_hidden_state.dtype == torch.bfloat16
    assert encoder.layers[0].attention.k_proj.bias is None and encoder.layers[0].attention.q_proj.bias is not None


def test_mean_pooling_and_feature_maps_leave_registers_out(encoder):
    pixel_values = tiny_batch(encoder.config)["pixel_values"]
    backbone = MaskedViTBackbone(
        MaskedViTConfig(**encoder.config.to_diff_dict() | {"model_type": "masked_vit"})
    ).eval()
    backbone.encoder.load_state_dict(encoder.state_dict())
    with torch.no_grad():
        tokens = encoder(pixel_values).last_hidden_state
        (feature_map,) = backbone(pixel_values).feature_maps
    torch.testing.assert_close(feature_map.flatten(2).transpose(1, 2), tokens[:, 4:])
    encoder.config.pooling = "mean"
    with torch.no_grad():
        torch.testing.assert_close(encoder(pixel_values).pooler_output, tokens[:, 4:].mean(dim=1))
    encoder.config.pooling = "cls"


# I-JEPA's network is transformers' stock one, which has none of it.
@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_such_an_encoder(method, tmp_path):
    model = tiny_model(method, "ForPreTraining", **MODERN)
    batch = tiny_batch(model.config)
    with torch.no_grad():
        expected = model(**batch).loss
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(**batch).loss, expected)
    model.save_pretrained(tmp_path)
    loaded = method_class(method, "ForPreTraining").from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(loaded(**batch).loss, expected)
    model.train()
    checkpoint_activations(model)
    loss = model(**batch).loss
    torch.testing.assert_close(loss.detach(), expected)
    loss.backward()
    without = [n for n, p in model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]
    # A value's bias and what no loss reads have no gradient elsewhere either.
    assert not [name for name in without if "register" in name or "gate" in name or "embeddings.layernorm" in name]


def test_a_tec_of_a_second_round_learns_from_one(tmp_path):
    """The frozen network's attention of chosen rows is turned as in its blocks, registers left out."""
    base = tiny_model("pilamim", "Model", **MODERN)
    model = method_class("tec", "ForPreTraining").from_base(base, tiny_config("tec"))
    batch = tiny_batch(base.config)
    rows = torch.tensor([[0, 3, 7]]).expand(3, -1)
    base.set_attn_implementation("eager")
    with torch.no_grad():
        frozen = model.base(batch["pixel_values"])
        outputs = base(batch["pixel_values"], output_hidden_states=True, output_attentions=True)
        attention = torch.cat((outputs.attentions[-1][:, :, :1], outputs.attentions[-1][:, :, 4:]), dim=2)
        attention = torch.cat((attention[..., :1], attention[..., 4:]), dim=3)[:, :, [0, 3, 7], 1:]
        logits = frozen.attention.logits(rows)
    expected = torch.cat((outputs.hidden_states[-1][:, :1], outputs.hidden_states[-1][:, 4:]), dim=1)
    torch.testing.assert_close(frozen.last_hidden_states[-1], expected)
    torch.testing.assert_close(logits.softmax(-1), attention / attention.sum(-1, keepdim=True))


def test_other_networks_and_positions_are_refused():
    plain = tiny_model("ocl", "ForPreTraining")
    for fields, match in (
        ({"num_register_tokens": 3}, "num_register_tokens is 3 there and 0 here"),
        ({"position_embedding": "rotary"}, "position_embedding is rotary there and sincos here"),
        ({"use_gated_mlp": True}, "use_gated_mlp is True there and False here"),
    ):
        with pytest.raises(ValueError, match=match):
            plain.load_encoder(tiny_model("pilamim", "Model", **fields))
    rotary = tiny_model("ocl", "ForPreTraining", position_embedding="rotary")
    rotary.load_encoder(tiny_model("pilamim", "Model", position_embedding="rotary"))
    for fields, match in (
        ({"num_register_tokens": -1}, "num_register_tokens is -1"),
        ({"position_embedding": "rotary", "hidden_size": 36, "num_attention_heads": 6}, "multiple of 4"),
        ({"rope_theta": 0}, "rope_theta is 0"),
        ({"position_interpolation": "nearest"}, "position_interpolation is 'nearest'.*bicubic_antialias"),
    ):
        with pytest.raises(ValueError, match=match):
            MaskedViTConfig(**fields)


def test_registers_and_the_gate_start_as_tokens_and_maps_do():
    model = MaskedViTModel(MaskedViTConfig(**TINY["ocl"].fields | MODERN | {"hidden_size": 64}))
    assert 0.01 < model.embeddings.register_tokens.std() < 0.03
    gate = model.layers[0].mlp.gate
    assert gate.weight.abs().max() <= (6 / (64 + 56)) ** 0.5 and not gate.bias.any()
    assert scrambled(model).embeddings.register_tokens.requires_grad
