"""Whether the weights of one encoder mean in another what they meant in their own."""

import copy

import torch
from torch import nn
from transformers import PreTrainedConfig

from .configuration_vit import MaskedViTConfig
from .position import interpolate_position_table
from .sizes import as_pair

# The trained, or stored, position tables of ours, ViT's and ViTMAE's networks.
_TABLES = ("position_embeddings", "decoder_pos_embed")

# What decides how an encoder computes, besides the shapes of its weights.
_DECISIVE = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "hidden_act",
    "layer_norm_eps",
    "qkv_bias",
    "key_bias",
    "use_gated_mlp",
    "embedding_layernorm",
    "num_register_tokens",
    "num_channels",
    "image_size",
    "patch_size",
)
_DECISIVE_OF_ROTARY = ("position_embedding", "rope_theta")


def refuse_other_network(config, source, what: str) -> None:
    """
    Raises ValueError where an encoder of `source` would compute something else with the weights it was trained with.

    Args:
        config: Of the encoder that is to take the weights.
        source: Of the encoder that has them; any ViT's.
        what (`str`): The one that has them, for the message.
    """
    different = {}
    for name in (*_DECISIVE, *(_DECISIVE_OF_ROTARY if _is_rotary(source) or _is_rotary(config) else ())):
        if hasattr(source, name):
            # A stock config may lack what its network has not.
            there, here = getattr(source, name), getattr(config, name, getattr(MaskedViTConfig, name))
            if name in ("image_size", "patch_size"):
                there, here = as_pair(there), as_pair(here)
            if there != here:
                different[name] = (there, here)
    if different:
        values = ", ".join(f"{name} is {there} there and {here} here" for name, (there, here) in different.items())
        fix = ", ".join(f"{name}={there!r}" for name, (there, _) in different.items())
        raise ValueError(
            f"The weights of {what} were trained in another network: {values}. Here they would not fit, or compute "
            f"something else. Build the model with {fix}."
        )


def _is_rotary(config) -> bool:
    return getattr(config, "position_embedding", None) == "rotary"


def refuse_other_positions(own_fixed, given, what: str) -> None:
    """
    Raises ValueError where learned positions would be replaced by the fixed table.

    Args:
        own_fixed (`torch.Tensor` of shape `(1, 1 + L, dim)`): The fixed table of the encoder that takes the weights.
        given (`torch.Tensor`): The positions of the encoder that has them.
        what (`str`): The one that has them, for the message.
    """
    if own_fixed.is_meta or given.is_meta:
        return
    if own_fixed.shape != given.shape or (own_fixed.float().cpu() - given.float().cpu()).abs().max() > 1e-3:
        raise ValueError(
            f"{what[0].upper()}{what[1:]} has positions of its own, and this encoder has the fixed sin-cos table, in "
            'which they would be lost. Build the model with position_embedding="learned".'
        )


def at_image_size(config: PreTrainedConfig, image_size: tuple[int, int]) -> PreTrainedConfig:
    """
    The config of the same network for images of another size (height, width), whose positions are interpolated, as the
    releases do when they fine-tune at another size: of a fixed table too, which goes on meaning the same places.
    """
    resized = copy.deepcopy(config)
    resized.image_size = list(image_size) if image_size[0] != image_size[1] else image_size[0]
    if getattr(config, "position_embedding", "learned") != "learned":
        resized.sincos_grid = list(config.sincos_grid or grid_of(config))
    return resized


@torch.no_grad()
def load_at_another_size(model: nn.Module, source: nn.Module) -> None:
    """
    Fills a model with the weights of the same model for another image size, interpolating its position tables.

    Args:
        model: Whose config is that of `source` `at_image_size`.
        source: The one that has the weights.

    Raises:
        RuntimeError: If it is another model.
    """
    grid, new_grid = grid_of(source.config), grid_of(model.config)
    state, wanted = source.state_dict(), model.state_dict()
    for name, value in state.items():
        if name.endswith(_TABLES) and wanted[name].shape != value.shape:
            how = getattr(source.config, "position_interpolation", "bicubic")
            state[name] = interpolate_position_table(value, grid, new_grid, how)
    model.load_state_dict(state)


def grid_of(config: PreTrainedConfig) -> tuple[int, int]:
    """Patches of an image (rows, columns), of any ViT's config."""
    sizes = zip(as_pair(config.image_size), as_pair(config.patch_size), strict=True)
    rows, columns = (side // patch for side, patch in sizes)
    return rows, columns
