"""The OCL release's weights as ours."""

import math

import torch

from ..vit.convert_vit import State, convert_layers, copy_affine, count_layers
from ..vit.position import sincos_position_table


def original_config(state: State, teacher: State | None = None) -> dict:
    """
    The fields of `OCLConfig` that the release's weights tell, and those that the release fixes.

    Head counts cannot be read off weights: 64 channels a head. Square pictures are assumed. Give `config` to
    `from_original` where that is wrong.
    """
    width, channels, *patch_size = state["patch_embed.proj.weight"].shape
    side = round((state["pos_embed"].shape[1] - 1) ** 0.5)
    table = sincos_position_table(side, side, width)
    return {
        "hidden_size": width,
        "num_hidden_layers": count_layers(state, "blocks"),
        "num_attention_heads": max(1, width // 64),
        "intermediate_size": state["blocks.0.mlp.fc1.weight"].shape[0],
        "image_size": [side * patch for patch in patch_size],
        "patch_size": list(patch_size),
        "num_channels": channels,
        "qkv_bias": "blocks.0.attn.qkv.bias" in state,
        "position_embedding": "sincos" if _same_table(state["pos_embed"], table) else "learned",
        "mask_ratio": 0.4 if width >= 1024 else 0.3,
        "temperature": 0.07,
        "trainable_temperature": False,
        "freeze_patch_projection": False,
    }


def convert_original(state: State, config, teacher: State | None = None) -> State:
    """
    The release's weights under the names of `OCLForPreTraining`, which has no others but the temperature.

    Raises:
        ValueError: If `config` wants fixed positions and the release's are others.
    """
    weights = {
        "encoder.embeddings.cls_token": state["cls_token"],
        "temperature.log_temperature": torch.tensor([math.log(config.temperature)]),
        **copy_affine(state, "patch_embed.proj", "encoder.embeddings.patch_embeddings.projection"),
        **convert_layers(state, "blocks", "encoder.layers"),
        **copy_affine(state, "norm", "encoder.layernorm"),
    }
    if config.position_embedding == "learned":
        weights["encoder.embeddings.position_embeddings"] = state["pos_embed"]
    elif not _same_table(state["pos_embed"], sincos_position_table(*config.grid_size, config.hidden_size)):
        raise ValueError(
            "The checkpoint's positions are not the fixed sin-cos table of the config's grid, "
            f"{config.grid_size[0]} x {config.grid_size[1]}. Correct image_size and patch_size, or set "
            'position_embedding="learned".'
        )
    return weights


def _same_table(positions: torch.Tensor, table: torch.Tensor) -> bool:
    return positions.shape == table.shape and torch.allclose(positions.float(), table, rtol=0, atol=1e-4)
