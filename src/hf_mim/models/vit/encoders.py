"""Plain Vision Transformers of transformers and timm as our encoder, which computes what they do."""

import json
import math
from collections.abc import Mapping
from pathlib import Path

import torch
from huggingface_hub.errors import GatedRepoError
from torch import nn
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.utils import cached_file, logging

from .alignment import align_weights
from .checkpoint_files import read_checkpoint
from .configuration_vit import MaskedViTConfig
from .convert_vit import State
from .layouts import TIMM, Layout, read_layout
from .modeling_vit import MaskedViTModel, MaskedViTPreTrainedModel
from .position import sincos_position_table
from .sizes import as_pair

logger = logging.get_logger(__name__)

# What an encoder does not need: heads, poolers, decoders, and the token that stands for hidden patches.
_LEFT_OUT = (
    "pooler.",
    "head.",
    "head_dist.",
    "attn_pool.",
    "decoder.",
    "decoder_",
    "mask_token",
    "embeddings.mask_token",
    "embeddings.position_ids",
)
# Heads of timm's networks, which their weights do not tell, by width.
_TIMM_HEADS = {192: 3, 384: 6, 768: 12, 1024: 16, 1152: 16, 1280: 16, 1408: 16, 1664: 16}
_TIMM_ACTIVATIONS = {"GELU": "gelu", "GELUTanh": "gelu_pytorch_tanh", "QuickGELU": "quick_gelu", "SiLU": "silu"}


@torch.no_grad()
def encoder_from(model, *, config: Mapping | None = None) -> MaskedViTModel:
    """
    The encoder of any plain Vision Transformer as ours, with the same outputs.

    Layer scale is folded into the maps that it follows; missing biases are zeros; DeiT's token of distillation is a
    register; positions stay fixed if they are MAE's table. Poolers and heads are left out. SigLIP has no [CLS], and so
    has the encoder, which then pools by the mean. CLIP's `last_hidden_state` is before its final LayerNorm, ours is
    after it.

    Args:
        model (`PreTrainedModel`, `nn.Module`, path, name on the Hub, or `dict[str, torch.Tensor]`): One of hf_mim,
            whose encoder is returned as it is; ViT, DeiT, ViTMAE, I-JEPA, DINOv2 with or without registers, DINOv3's
            ViT, CLIP's or SigLIP's vision tower, with or without heads; timm's `VisionTransformer`, or its state dict
            (iBOT's and DINO's releases have the same names), also as a `.pth` or `.safetensors` file.
        config (`dict`, *optional*): Fields that a state dict does not tell, `num_attention_heads`, `hidden_act`,
            `layer_norm_eps` and `image_size`: timm's usual ones if left out, which is said.

    Returns:
        `MaskedViTModel` in float32 and eval mode; its `last_hidden_state` is [CLS], then registers, then patches.

    Raises:
        ValueError: If the network is no plain ViT, or has what ours cannot have, with the reason.
        OSError: If there is no such model.
    """
    if isinstance(model, (str, Path)):
        path = Path(model).expanduser()
        model = read_checkpoint(path) if path.is_file() else _load(str(model))
    if isinstance(model, MaskedViTPreTrainedModel):
        return model.base_model
    if isinstance(model, Mapping):
        return _of_timm(dict(model), dict(config or {}), told=False)
    model = getattr(model, "timm_model", model)
    if not isinstance(model, PreTrainedModel):
        return _of_timm(model.state_dict(), _told_by_timm(model) | dict(config or {}), told=True)
    model = tower_of(model)
    layout = read_layout(model.config)
    is_encoder = any(name == layout.blocks for name, _ in model.named_modules())
    state = (model if is_encoder else model.base_model).state_dict()
    return _as_ours(state, layout, _told_by(model.config) | dict(config or {}), model.config.model_type)


def why_not_loaded(path: str, error: Exception) -> str:
    """What to say where weights cannot be loaded: the error, or of gated ones how to get them."""
    cause = error
    while cause is not None:
        if isinstance(cause, GatedRepoError):
            return (
                f"its weights are gated. Ask for access at https://huggingface.co/{path}, then log in "
                "(`hf auth login`), or set HF_TOKEN."
            )
        cause = cause.__cause__
    return str(error)


def tower_of(model: PreTrainedModel) -> PreTrainedModel:
    """The network that sees images, of one that also reads text."""
    return getattr(model, "vision_model", model)


def _load(path: str) -> PreTrainedModel:
    config = AutoConfig.from_pretrained(path)
    tower = getattr(config, "vision_config", config)
    if not isinstance(config, MaskedViTConfig) and config.model_type != "timm_wrapper":
        read_layout(tower)
    # AutoModel of a CLIP checkpoint would have its text tower too.
    return load_quietly(AutoModel, path, **({} if tower is config else {"config": tower}))


def load_quietly(model_class, path, **kwargs) -> PreTrainedModel:
    """
    An encoder in float32, without the report that a pretraining checkpoint also has decoders.

    Raises:
        ValueError: If the checkpoint lacks weights of the encoder.
    """
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        encoder, info = model_class.from_pretrained(path, dtype=torch.float32, output_loading_info=True, **kwargs)
    finally:
        logging.set_verbosity(verbosity)
    missing = sorted(name for name in info["missing_keys"] if not name.startswith("pooler."))
    if missing:
        raise ValueError(f"{path} lacks weights of its encoder: {', '.join(missing[:3])} ({len(missing)} tensors).")
    align_weights(encoder)
    return encoder


def read_normalization(path: str) -> tuple[list[float] | None, list[float] | None]:
    """Mean and standard deviation, one number a channel or one for all, of the image processor beside a network."""
    if Path(path).expanduser().is_file():
        return None, None
    for name, key in (
        ("preprocessor_config.json", None),
        ("processor_config.json", "image_processor"),
        ("config.json", "pretrained_cfg"),
    ):
        file = cached_file(path, name, _raise_exceptions_for_missing_entries=False)
        if file is not None:
            with open(file, encoding="utf-8") as stream:
                settings = json.load(stream)
            settings = settings.get(key, {}) if key else settings
            if not settings.get("do_normalize", True):
                # Pixels in [0, 1] as they are.
                return [0.0], [1.0]
            if "image_mean" in settings:
                return settings["image_mean"], settings["image_std"]
            if key == "pretrained_cfg" and "mean" in settings:
                # timm's.
                return list(settings["mean"]), list(settings["std"])
    return None, None


def _told_by(config: PreTrainedConfig) -> dict:
    """What transformers' config tells that the weights do not."""
    told = {
        name: getattr(config, name)
        for name in (
            "num_attention_heads",
            "hidden_act",
            "layer_norm_eps",
            "image_size",
            "initializer_range",
            "attention_probs_dropout_prob",
            "rope_theta",
        )
        if hasattr(config, name)
    }
    if getattr(config, "use_swiglu_ffn", False):
        # Whatever hidden_act says.
        told["hidden_act"] = "silu"
    if "image_size" not in told:
        # SigLIP 2's positions are of a square, from which they are interpolated to every image.
        told |= {"image_size": math.isqrt(config.num_patches) * config.patch_size, "patch_size": config.patch_size}
    return told


def _told_by_timm(model: nn.Module) -> dict:
    try:
        block = model.blocks[0]
        activation = type(block.mlp.act).__name__
        if getattr(block.mlp.act, "approximate", "none") == "tanh":
            activation = "GELUTanh"
        told = {
            "num_attention_heads": block.attn.num_heads,
            "layer_norm_eps": block.norm1.eps,
            "image_size": model.patch_embed.img_size,
        }
    except (AttributeError, IndexError, KeyError, TypeError) as error:
        raise ValueError(
            f"{type(model).__name__} is no plain ViT of timm ({error}): hierarchical and convolutional networks have "
            "no patches of one size through all blocks. Choose a vit_* or deit_* network."
        ) from error
    if activation not in _TIMM_ACTIVATIONS:
        raise ValueError(
            f"{type(model).__name__} has the activation {activation}; of timm's networks ours has "
            f"{', '.join(_TIMM_ACTIVATIONS)}."
        )
    return told | {"hidden_act": _TIMM_ACTIVATIONS[activation]}


def _of_timm(state: State, fields: dict, told: bool) -> MaskedViTModel:
    """
    Args:
        told (`bool`): Whether `fields` are a network's own, and not what the caller knows of a state dict.
    """
    if any(name.startswith("backbone.") for name in state):
        # As DINO and iBOT save a network in training.
        state = {name[9:]: value for name, value in state.items() if name.startswith("backbone.")}
    if "patch_embed.proj.weight" not in state or "blocks.0.norm1.weight" not in state:
        raise ValueError(
            "The weights are of no plain ViT with timm's names (patch_embed.proj, blocks.0.norm1): hierarchical and "
            f"convolutional networks have others. There are, for example: {', '.join(list(state)[:5])}. Networks of "
            "transformers are read from their folder, which has a config."
        )
    if not told:
        fields = _assumed_of_timm(state, fields)
    return _as_ours(state, TIMM, fields, "timm's vit")


def _assumed_of_timm(state: State, known: dict) -> dict:
    """What timm's usual networks with such weights have, and `known`; says what is assumed."""
    width, *_, height, patch_width = state["patch_embed.proj.weight"].shape
    assumed = {"layer_norm_eps": 1e-5 if "norm_pre.weight" in state else 1e-6, "hidden_act": "gelu"}
    if state["blocks.0.mlp.fc1.weight"].shape[0] == 2 * state["blocks.0.mlp.fc2.weight"].shape[1]:
        assumed["hidden_act"] = "silu"
    if width in _TIMM_HEADS:
        assumed["num_attention_heads"] = _TIMM_HEADS[width]
    rows = state["pos_embed"].shape[1] if "pos_embed" in state else 0
    cls, registers = int("cls_token" in state), state["reg_token"].shape[1] if "reg_token" in state else 0
    for extra in (cls, 0, cls + registers):
        side = math.isqrt(max(rows - extra, 0))
        if side and side * side == rows - extra and "image_size" not in assumed:
            assumed["image_size"] = (side * height, side * patch_width)
    missing = {"num_attention_heads", "image_size"} - set(assumed) - set(known)
    if missing:
        raise ValueError(
            f"{' and '.join(sorted(missing))} cannot be told from weights of width {width} with {rows} positions. "
            f"Give encoder_from(..., config={{{', '.join(f'{name!r}: ...' for name in sorted(missing))}}})."
        )
    said = {name: value for name, value in assumed.items() if name not in known}
    if said:
        logger.warning_once(
            f"A state dict does not tell {', '.join(f'{name}={value}' for name, value in said.items())}: assumed, as "
            "of timm's usual networks with such weights. Give others to encoder_from(..., config={...})."
        )
    return assumed | known


def _as_ours(state: State, layout: Layout, fields: dict, what: str) -> MaskedViTModel:
    """Our encoder with the weights `state` of a network of this layout; `fields` tells what they do not."""
    weights, homeless = {}, []
    for name, value in state.items():
        if not name.startswith(_LEFT_OUT):
            ours = layout.ours(name)
            weights[ours] = value.detach().float().cpu()
            homeless += [name] if ours is None else []
    if any(name.startswith("fc_norm.") for name in homeless):
        raise ValueError(f"The {what} pools before its final LayerNorm (fc_norm), which ours cannot.")
    if homeless:
        raise ValueError(
            f"The {what} has what our plain ViT has no place for: {', '.join(homeless[:4])} ({len(homeless)} tensors)."
        )
    fields = dict(fields)
    _take_apart(weights, fields.pop("patch_size", None))
    config = _config_of(weights, layout, fields)
    table = weights.pop("embeddings.position_embeddings", None)
    if table is not None:
        table = _positions(weights, table, config)
        fixed = sincos_position_table(*config.grid_size, config.hidden_size, config.use_cls_token)
        if config.hidden_size % 4 or not torch.allclose(table, fixed, atol=1e-5):
            config.position_embedding = "learned"
            weights["embeddings.position_embeddings"] = table
    elif config.position_embedding != "rotary":
        raise ValueError(f"The {what} has no table of positions.")
    encoder = MaskedViTModel(config)
    wanted = encoder.state_dict()
    # A map without a bias is one with zeros.
    weights = {name: value for name, value in wanted.items() if name.endswith(".bias")} | weights
    if set(weights) != set(wanted):
        different = sorted(set(weights) ^ set(wanted))
        raise ValueError(
            f"The {what} lacks or has more than our plain ViT: {', '.join(different[:4])} ({len(different)} tensors)."
        )
    encoder.load_state_dict(weights)
    align_weights(encoder)
    return encoder.eval()


def _take_apart(weights: State, patch_size: int | None) -> None:
    """
    Fused maps become several, layer scale goes into what precedes it, shapes become ours.

    Args:
        patch_size (`int`, *optional*): Of square patches that are cut before and flattened as (row, column, channel).
    """
    for name in list(weights):
        part, _, kind = name.rpartition(".")
        if part.endswith(".attention.qkv"):
            for letter, value in zip("qkv", weights.pop(name).chunk(3), strict=True):
                weights[f"{part[:-3]}{letter}_proj.{kind}"] = value
        elif part.endswith(".scale"):
            scale = weights.pop(name)
            linear = part[:-5] + ("o_proj" if part.endswith("attention.scale") else "fc2")
            weights[f"{linear}.weight"] = weights[f"{linear}.weight"] * scale.unsqueeze(1)
            if f"{linear}.bias" in weights:
                weights[f"{linear}.bias"] = weights[f"{linear}.bias"] * scale
        elif part.endswith(".mlp.fc1"):
            hidden = weights[f"{part[:-1]}2.weight"].shape[1]
            if weights[name].shape[0] == 2 * hidden:
                weights[f"{part[:-3]}gate.{kind}"], weights[name] = weights[name].chunk(2)
    for name in ("cls_token", "register_tokens", "position_embeddings"):
        name = f"embeddings.{name}"
        if name in weights:
            weights[name] = weights[name].reshape(1, -1, weights[name].shape[-1])
    projection = "embeddings.patch_embeddings.projection.weight"
    if weights[projection].ndim == 2:
        weights[projection] = weights[projection].unflatten(1, (patch_size, patch_size, -1)).permute(0, 3, 1, 2)
    if "embeddings.register_tokens" in weights and not weights["embeddings.register_tokens"].numel():
        del weights["embeddings.register_tokens"]


def _config_of(weights: State, layout: Layout, fields: dict) -> MaskedViTConfig:
    """The config that the weights tell, and `fields`."""
    width, channels, *patch_size = weights["embeddings.patch_embeddings.projection.weight"].shape
    first = "layers.0"
    biased = {letter for letter in "qkv" if f"{first}.attention.{letter}_proj.bias" in weights}
    has_cls = "embeddings.cls_token" in weights
    registers = weights.get("embeddings.register_tokens")
    read = {
        "hidden_size": width,
        "num_hidden_layers": len({name.split(".")[1] for name in weights if name.startswith("layers.")}),
        "intermediate_size": weights[f"{first}.mlp.fc1.weight"].shape[0],
        "num_channels": channels,
        "patch_size": _size(patch_size),
        "qkv_bias": bool(biased),
        "key_bias": "k" in biased or not biased,
        "use_gated_mlp": f"{first}.mlp.gate.weight" in weights,
        "embedding_layernorm": "embeddings.layernorm.weight" in weights,
        "num_register_tokens": 0 if registers is None else registers.shape[1],
        "use_cls_token": has_cls,
        "pooling": "cls" if has_cls else "mean",
        "position_interpolation": layout.interpolation,
        **({"position_embedding": "rotary"} if layout.rotary else {}),
    }
    return MaskedViTConfig(**read, **(fields | {"image_size": _size(fields["image_size"])}))


def _positions(weights: State, table: torch.Tensor, config: MaskedViTConfig) -> torch.Tensor:
    """The table of [CLS] and patches: zero where [CLS] has no position; those of registers go into the registers."""
    num_cls, registers = int(config.use_cls_token), config.num_register_tokens
    extra = table.shape[1] - config.num_patches
    if registers and extra == num_cls + registers:
        weights["embeddings.register_tokens"] = weights["embeddings.register_tokens"] + table[:, num_cls:extra]
        return torch.cat((table[:, :num_cls], table[:, extra:]), dim=1)
    if extra == 0 and num_cls:
        return torch.cat((torch.zeros_like(table[:, :1]), table), dim=1)
    if extra != num_cls:
        raise ValueError(
            f"There are {table.shape[1]} positions for {config.grid_size[0]} x {config.grid_size[1]} patches (rows x "
            f"columns; image_size {config.image_size}, patch_size {config.patch_size}). Give the image_size of which "
            "the positions are."
        )
    return table


def _size(size) -> int | list[int]:
    height, width = as_pair(size)
    return height if height == width else [height, width]
