"""The TEC release's weights, and its base's, as ours."""

import torch

from ..vit.configuration_vit import MaskedViTConfig
from ..vit.convert_vit import State, check_fixed_positions, convert_layers, copy_affine, count_layers
from ..vit.frozen_layouts import frozen_config
from ..vit.position import sincos_position_table


def original_config(state: State, teacher: State | None = None) -> dict:
    """
    The fields of `TECConfig` that the release's weights tell.

    Head counts cannot be read off weights: 64 channels a head in encoder and base, 16 heads in the decoder. Square
    pictures are assumed. Give `config` to `from_original` where that is wrong.
    """
    depth = count_layers(state, "blocks")
    groups = count_layers(state, "encoder_adaptor.fuse_fcs")
    decoder_width = state["decoder_pos_embed"].shape[-1]
    return _encoder_config(state) | {
        "base_config": None if teacher is None else _encoder_config(teacher),
        "decoder_hidden_size": decoder_width,
        "decoder_num_hidden_layers": count_layers(state, "decoder_blocks"),
        "decoder_num_attention_heads": 16,
        "decoder_intermediate_size": state["decoder_blocks.0.mlp.fc1.weight"].shape[0],
        "adapter_group_size": depth // groups,
    }


def _encoder_config(state: State) -> dict:
    width, channels, *patch_size = state["patch_embed.proj.weight"].shape
    positions = state["pos_embed"]
    side = round((positions.shape[1] - 1) ** 0.5)
    fixed = torch.allclose(positions.float().cpu(), sincos_position_table(side, side, width), atol=1e-5)
    return {
        "hidden_size": width,
        "num_hidden_layers": count_layers(state, "blocks"),
        "num_attention_heads": max(1, width // 64),
        "intermediate_size": state["blocks.0.mlp.fc1.weight"].shape[0],
        "image_size": [side * patch for patch in patch_size],
        "patch_size": list(patch_size),
        "num_channels": channels,
        "qkv_bias": "blocks.0.attn.qkv.bias" in state,
        "position_embedding": "sincos" if fixed else "learned",
    }


def convert_original(state: State, config, teacher: State | None = None) -> State:
    """
    The release's weights under the names of `TECForPreTraining`.

    Args:
        teacher: The base's weights, under the names of MAE's, iBOT's or timm's ViT.

    Raises:
        ValueError: If there is no teacher.
    """
    if teacher is None:
        raise ValueError(
            "The TEC release keeps the base model apart: give its weights as well, from_original(checkpoint, "
            '"tec", teacher=...).'
        )
    base_config = frozen_config(config.base_config, config)
    if not isinstance(base_config, MaskedViTConfig):
        raise ValueError(
            f"The release's bases are plain ViTs; base_config has the model_type {base_config.model_type!r}. Leave "
            "model_type out."
        )
    if config.position_embedding == "learned":
        positions = {"decoder.position_embeddings": state["decoder_pos_embed"]}
    else:
        positions = {}
        check_fixed_positions(state, "decoder_pos_embed", config.grid_size, config.decoder_hidden_size)
    return {
        **positions,
        **_encoder(state, "encoder", config),
        **copy_affine(state, "cls_token_mlp.fc1", "encoder.embeddings.cls_adapter.fc1"),
        **copy_affine(state, "cls_token_mlp.fc2", "encoder.embeddings.cls_adapter.fc2"),
        **_encoder_adapter(state),
        **convert_layers(state, "decoder_blocks", "decoder.layers"),
        **_target_decoder(state, "forward_fea_decoder", "decoder_pred", "decoder.feature"),
        **_target_decoder(state, "forward_att_decoder", "decoder_qk", "decoder.attention"),
        **_encoder(teacher, "base.network", base_config),
    }


def _encoder(state: State, target: str, config) -> State:
    weights = {
        f"{target}.embeddings.cls_token": state["cls_token"],
        **copy_affine(state, "patch_embed.proj", f"{target}.embeddings.patch_embeddings.projection"),
        **convert_layers(state, "blocks", f"{target}.layers"),
    }
    if config.position_embedding == "learned":
        weights[f"{target}.embeddings.position_embeddings"] = state["pos_embed"]
    else:
        check_fixed_positions(state, "pos_embed", config.grid_size, config.hidden_size)
    if "norm.weight" in state:
        weights |= copy_affine(state, "norm", f"{target}.layernorm")
    else:
        # A base is often kept without its final norm, which no target needs.
        width = state["cls_token"].shape[-1]
        weights |= {f"{target}.layernorm.weight": torch.ones(width), f"{target}.layernorm.bias": torch.zeros(width)}
    return weights


def _encoder_adapter(state: State) -> State:
    source, target = "encoder_adaptor", "encoder_adapter"
    weights = copy_affine(state, f"{source}.adap_before", f"{target}.layernorm_before")
    weights |= copy_affine(state, f"{source}.adap_after", f"{target}.layernorm_after")
    for i in range(count_layers(state, f"{source}.fuse_fcs")):
        weights |= copy_affine(state, f"{source}.fuse_fcs.{i}", f"{target}.fuse.{i}")
        for name in ("fc1", "fc2"):
            weights |= copy_affine(state, f"{source}.adap_mlps.{i}.{name}", f"{target}.mlps.{i}.{name}")
    return weights


def _target_decoder(state: State, source: str, head: str, target: str) -> State:
    return {
        f"{target}.mask_token": state[f"{source}.mask_token"],
        **copy_affine(state, f"{source}.decoder_embed", f"{target}.embed"),
        **copy_affine(state, f"{source}.decoder_norm", f"{target}.layernorm"),
        **copy_affine(state, f"{source}.{head}", f"{target}.head"),
    }
