"""
Any pretrained Vision Transformer as a frozen network that gives targets: TEC's base, dBOT's teacher.

The network's own modules are run block by block, so that nothing is computed that no target needs (final norm,
pooler), and attention logits are had for chosen rows without eager attention anywhere.
"""

import copy
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn
from transformers import AutoConfig, AutoModel, CLIPVisionModel, PreTrainedConfig, PreTrainedModel
from transformers.utils import cached_file, logging

from .alignment import align_weights
from .configuration_vit import MaskedViTConfig
from .modeling_vit import MaskedViTModel
from .pixels import PixelRenormalization
from .position import sincos_position_table
from .sizes import as_pair

logger = logging.get_logger(__name__)


class _Layout(NamedTuple):
    """Where a type of network keeps its parts."""

    blocks: str
    norm: str
    attention: str
    # Positions can be had for every grid, without leaving what the network was made for.
    any_grid: bool = False
    # Arguments of the constructor, and of every block.
    construction: dict = {}  # noqa: RUF012
    block: dict = {}  # noqa: RUF012


_OURS = _Layout("layers", "layernorm_before", "attention")
_LAYOUTS = {
    "vit": _Layout("layers", "layernorm_before", "attention", construction={"add_pooling_layer": False}),
    "vit_mae": _Layout("layers", "layernorm_before", "attention"),
    "dinov2": _Layout("encoder.layer", "norm1", "attention", any_grid=True),
    "dinov2_with_registers": _Layout("encoder.layer", "norm1", "attention", any_grid=True),
    "dinov3_vit": _Layout("model.layer", "norm1", "attention", any_grid=True),
    "clip_vision_model": _Layout("encoder.layers", "layer_norm1", "self_attn", block={"attention_mask": None}),
}

_NO_CLS = "has no [CLS] token, whose attention chooses patches and whose feature is a target"
_HIERARCHICAL = "is hierarchical: its last blocks see a coarser grid than the patches of a plain ViT"
_CONVOLUTIONAL = "is convolutional: it has no patch tokens and no attention to learn from"
_UNFIT = {
    name: reason
    for reason, names in {
        _NO_CLS: "siglip siglip_vision_model siglip2 siglip2_vision_model ijepa vjepa2 vitdet sam_vision_model",
        _HIERARCHICAL: "swin swinv2 swin2sr maskformer-swin donut-swin hiera pvt pvt_v2 segformer focalnet levit "
        "swiftformer mobilevit mobilevitv2 mvit sam2_hiera_det_model",
        _CONVOLUTIONAL: "resnet convnext convnextv2 dinov3_convnext regnet efficientnet mobilenet_v1 mobilenet_v2 "
        "hgnet_v2 poolformer textnet bit",
    }.items()
    for name in names.split()
}


def frozen_config(described, student: MaskedViTConfig) -> PreTrainedConfig:
    """
    The config of a frozen network from what a method's config says of it.

    Args:
        described (`PreTrainedConfig`, `dict` or None): Of any supported type. A dict without `model_type` describes
            our plain masked ViT, by default with fixed positions; `image_size`, `patch_size` and `num_channels` that
            it lacks are the student's. None: the student's own sizes.
        student: The config of the model that learns from it.

    Raises:
        ValueError: If the type cannot be a frozen network, with the reason.
    """
    if described is None:
        described = {
            name: getattr(student, name)
            for name in (
                "hidden_size",
                "num_hidden_layers",
                "num_attention_heads",
                "intermediate_size",
                "hidden_act",
                "layer_norm_eps",
                "qkv_bias",
                "position_embedding",
            )
        }
    if isinstance(described, Mapping):
        fields = dict(described)
        model_type = fields.pop("model_type", "")
        if model_type:
            config = AutoConfig.for_model(model_type, **fields)
        else:
            sizes = {name: getattr(student, name) for name in ("image_size", "patch_size", "num_channels")}
            config = MaskedViTConfig(**(sizes | fields))
    else:
        config = described
    config = getattr(config, "vision_config", config)
    _layout(config)
    return config


# Of no use to a frozen encoder, or about the run that made it.
_NOT_DESCRIBED = {
    "_name_or_path",
    "architectures",
    "base_config",
    "dtype",
    "id2label",
    "label2id",
    "teacher_config",
    "transformers_version",
}


def describe_config(config: PreTrainedConfig | Mapping | None) -> dict | None:
    """A config as the dict that a method's config keeps and saves; [`frozen_config`] turns it back."""
    if config is None:
        return None
    if isinstance(config, PreTrainedConfig):
        config = getattr(config, "vision_config", config).to_diff_dict()
    fields = {name: value for name, value in config.items() if name not in _NOT_DESCRIBED}
    if not fields.get("model_type"):
        fields.pop("model_type", None)
    return fields


def _layout(config: PreTrainedConfig) -> _Layout:
    if isinstance(config, MaskedViTConfig):
        if not config.use_cls_token:
            raise ValueError(f"A network with use_cls_token=False cannot give targets: it {_NO_CLS}.")
        return _OURS
    if config.model_type not in _LAYOUTS:
        supported = f"Choose hf_mim's own models, or one of {', '.join(_LAYOUTS)}."
        reason = _UNFIT.get(config.model_type)
        if reason is None:
            raise ValueError(
                f"A network of type {config.model_type!r} cannot be read as a frozen ViT: where its blocks and "
                f"positions are is not known. {supported}"
            )
        raise ValueError(f"A network of type {config.model_type!r} cannot give targets: it {reason}. {supported}")
    return _LAYOUTS[config.model_type]


class LastAttention:
    """
    The attention of a frozen network's last block before softmax, row by row; nothing is computed until asked for.

    Args:
        norm, attention: Modules of the block.
        hidden_states (`torch.Tensor` of shape `(batch_size, 1 + registers + L, hidden_size)`): What the block reads.
        rotary (pair of `torch.Tensor` of shape `(L, head_dim)`, *optional*): Cosine and sine of the patches' angles.
        num_heads, num_prefix (`int`): Heads; [CLS] and registers before the patches.
    """

    def __init__(self, norm, attention, hidden_states, rotary, num_heads: int, num_prefix: int):
        self.norm, self.hidden_states, self.rotary = norm, hidden_states, rotary
        # DINOv2 of transformers before 5.20 has them further down, under other names.
        inner = getattr(attention, "attention", attention)
        self.project_query = getattr(inner, "q_proj", None) or inner.query
        self.project_key = getattr(inner, "k_proj", None) or inner.key
        self.num_heads, self.num_prefix = num_heads, num_prefix
        self.inputs = self.keys = None

    def logits(self, rows: torch.Tensor) -> torch.Tensor:
        """
        `q k^T / sqrt(head_dim)` of chosen queries and all patches' keys.

        Args:
            rows (`torch.LongTensor` of shape `(batch_size, n)`): 0 is [CLS], 1 to L the patches, row-major.

        Returns:
            float32 `torch.Tensor` of shape `(batch_size, num_heads, n, L)`.
        """
        # Not by decorating: torch 2.9's compiler cannot follow that on an object made while it traces.
        with torch.no_grad():
            return self._logits(rows)

    def _logits(self, rows: torch.Tensor) -> torch.Tensor:
        if self.keys is None:
            self.inputs = self.norm(self.hidden_states)
            keys = self._split_heads(self.project_key(self.inputs[:, self.num_prefix :]))
            self.keys = keys if self.rotary is None else _rotate(keys, *self.rotary)
        # Registers stand between [CLS] and the patches.
        places = torch.where(rows > 0, rows + self.num_prefix - 1, rows)
        samples = torch.arange(rows.shape[0], device=rows.device).unsqueeze(1)
        queries = self._split_heads(self.project_query(self.inputs[samples, places]))
        if self.rotary is not None:
            cos, sin = self.rotary
            # [CLS] is not turned: angle 0.
            cos, sin = torch.cat((torch.ones_like(cos[:1]), cos)), torch.cat((torch.zeros_like(sin[:1]), sin))
            queries = _rotate(queries, cos[rows].unsqueeze(1), sin[rows].unsqueeze(1))
        return attention_products(queries, self.keys) * queries.shape[-1] ** -0.5

    def _split_heads(self, projected: torch.Tensor) -> torch.Tensor:
        return projected.unflatten(2, (self.num_heads, -1)).transpose(1, 2)


def attention_products(queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """`q k^T` of (batch_size, heads, n, head_dim) and (..., L, head_dim); in float32 under autocast too."""
    if queries.is_meta:
        # There is no autocast for it.
        return queries.float() @ keys.float().transpose(2, 3)
    with torch.autocast(queries.device.type, enabled=False):
        return queries.float() @ keys.float().transpose(2, 3)


def _rotate(vectors: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    first, second = vectors.chunk(2, dim=-1)
    return vectors * cos + torch.cat((-second, first), dim=-1) * sin


@dataclass
class FrozenViTOutput:
    """
    Args:
        last_hidden_states (`tuple` of `torch.Tensor` of shape `(batch_size, 1 + L, hidden_size)`): Outputs of the last
            blocks, the last one last, before the final norm; [CLS] first, then the patches, without registers.
        attention (`LastAttention`): Of the last block.
    """

    last_hidden_states: tuple[torch.Tensor, ...]
    attention: LastAttention


class FrozenViT(nn.Module):
    """
    A Vision Transformer that is never trained: always in eval mode, without gradients.

    Args:
        config: As [`frozen_config`] gives. The network is built untrained; [`load_source`] fills it.
        grid (pair (rows, columns), *optional*): The patch grid that targets are wanted for; the network's own if None.
            Pictures are resized so that the network cuts them into this grid.
        pixels (`dict`, *optional*): `source_mean`, `source_std`, `target_mean`, `target_std`, lists of one number a
            channel, None where not known: how the pictures it is given are normalised, and how it wants them.
        attn_implementation (`str`, *optional*): As the student's; transformers' choice if None.
        name (`str`, defaults to `"frozen"`): With which the fields that describe it start in the method's config.

    Raises:
        ValueError: If the type is not supported, or the network cannot have that grid.
    """

    def __init__(
        self,
        config: PreTrainedConfig,
        grid: tuple[int, int] | None = None,
        pixels: Mapping[str, list] | None = None,
        attn_implementation: str | None = None,
        name: str = "frozen",
    ):
        super().__init__()
        self.name = name
        self.layout = _layout(config)
        self.patch_size = as_pair(config.patch_size)
        own_grid = tuple(
            side // patch for side, patch in zip(as_pair(config.image_size), self.patch_size, strict=True)
        )
        self.grid = own_grid if grid is None else tuple(grid)
        if self.grid != own_grid and not self.layout.any_grid:
            raise ValueError(
                f"The frozen network cuts pictures into {own_grid[0]} x {own_grid[1]} patches (rows x columns; "
                f"image_size {config.image_size}, patch_size {config.patch_size}), the student into {self.grid[0]} x "
                f"{self.grid[1]}: targets and predictions must be of the same patches. Choose the student's "
                f"image_size and patch_size so that its grid is {own_grid[0]} x {own_grid[1]}, or another network."
            )
        self.network = _build(config, self.layout, attn_implementation)
        # Not the method's description of it: the attention implementation that is set later is in this one.
        self.config = self.network.config
        self.pixels = PixelRenormalization(config.num_channels, **(pixels or {}))
        # Set by `load_source`, and by loading a checkpoint or a state dict that has it.
        self.is_trained = False
        self.register_load_state_dict_pre_hook(_take_for_trained)
        self._has_said = False
        self.requires_grad_(False)
        self.eval()

    @property
    def hidden_size(self) -> int:
        return self.config.hidden_size

    @property
    def num_heads(self) -> int:
        return self.config.num_attention_heads

    @property
    def num_layers(self) -> int:
        return self.config.num_hidden_layers

    def train(self, mode: bool = True):
        """Stays in eval mode, whatever is asked."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, pixel_values: torch.Tensor, num_last_layers: int = 1) -> FrozenViTOutput:
        """
        Args:
            pixel_values (`torch.Tensor` of shape `(batch_size, num_channels, height, width)`): Pictures, normalised as
                the student's.
            num_last_layers (`int`, defaults to 1): How many of the last blocks' outputs are wanted, at most all.

        Raises:
            ValueError: If the channels are not the network's, or it has not so many blocks.
        """
        if not 1 <= num_last_layers <= self.num_layers:
            raise ValueError(f"num_last_layers is {num_last_layers}; the frozen network has {self.num_layers} blocks.")
        if pixel_values.shape[1] != self.config.num_channels:
            raise ValueError(
                f"The pictures have {pixel_values.shape[1]} channels, the frozen network takes "
                f"{self.config.num_channels}. Train with num_channels={self.config.num_channels}."
            )
        self._say_what_is_not_known()
        network, num_prefix = self.network, 1 + getattr(self.config, "num_register_tokens", 0)
        hidden_states, block_arguments, rotary = self._embed(self._resize(self.pixels(pixel_values)).to(network.dtype))
        blocks = network.get_submodule(self.layout.blocks)
        outputs = []
        for block in blocks:
            inputs, hidden_states = hidden_states, block(hidden_states, **block_arguments)
            outputs = [*outputs, hidden_states][-num_last_layers:]
        norm, attention = (getattr(block, name) for name in (self.layout.norm, self.layout.attention))
        attention = LastAttention(norm, attention, inputs, rotary, self.num_heads, num_prefix)
        if num_prefix > 1:
            outputs = [torch.cat((tokens[:, :1], tokens[:, num_prefix:]), dim=1) for tokens in outputs]
        return FrozenViTOutput(tuple(outputs), attention)

    def _say_what_is_not_known(self) -> None:
        if self._has_said or torch.compiler.is_compiling():
            return
        self._has_said = True
        names = ("image_mean", "image_std", f"{self.name}_image_mean", f"{self.name}_image_std")
        missing = [name for name, numbers in zip(names, self.pixels.numbers, strict=True) if numbers is None]
        if 0 < len(missing) < len(names):
            logger.warning(
                "How images are normalised is known in part of student and frozen network, and not "
                f"{', '.join(missing)}: the frozen network sees the images as they are for the "
                f"student. Set {', '.join(missing)} in the config."
            )

    def _resize(self, pixel_values: torch.Tensor) -> torch.Tensor:
        size = tuple(number * patch for number, patch in zip(self.grid, self.patch_size, strict=True))
        if tuple(pixel_values.shape[2:]) == size:
            return pixel_values
        return nn.functional.interpolate(pixel_values.float(), size=size, mode="bicubic", antialias=True)

    def _embed(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, dict, tuple | None]:
        """The first block's input, what the blocks are called with besides, and rotary positions."""
        network, kind = self.network, self.config.model_type
        arguments, rotary = self.layout.block, None
        if kind == "vit_mae":
            # Masks nothing, and keeps the order: the noise ascends.
            noise = torch.arange(self.grid[0] * self.grid[1], device=pixel_values.device).float()
            hidden_states = network.embeddings(pixel_values, noise=noise.expand(pixel_values.shape[0], -1))[0]
        elif kind == "dinov3_vit":
            hidden_states = network.embeddings(pixel_values)
            rotary = network.rope_embeddings(pixel_values)
            arguments = {"position_embeddings": rotary}
        else:
            hidden_states = network.embeddings(pixel_values)
            if kind == "clip_vision_model":
                hidden_states = network.pre_layrnorm(hidden_states)
        return hidden_states, arguments, rotary


def build_frozen(config: MaskedViTConfig, name: str) -> FrozenViT:
    """
    The frozen network, untrained, that a method's config describes in its fields `NAME_config`, `NAME_image_mean` and
    `NAME_image_std`; `image_mean` and `image_std` are the student's.

    Raises:
        ValueError: If the network is not supported, or has another patch grid.
    """
    pixels = {
        "source_mean": config.image_mean,
        "source_std": config.image_std,
        "target_mean": getattr(config, f"{name}_image_mean"),
        "target_std": getattr(config, f"{name}_image_std"),
    }
    described = frozen_config(getattr(config, f"{name}_config"), config)
    return FrozenViT(described, config.grid_size, pixels, config._attn_implementation, name)


def _take_for_trained(frozen: FrozenViT, state: Mapping[str, torch.Tensor], prefix: str, *_) -> None:
    """Before a state dict is loaded: whether it holds the network."""
    frozen.is_trained |= any(name.startswith(f"{prefix}network.") for name in state)


def _build(config: PreTrainedConfig, layout: _Layout, attn_implementation: str | None) -> PreTrainedModel:
    # A copy: what is set below, or by transformers, is none of the method's config.
    config = copy.deepcopy(config)
    attention = {} if attn_implementation is None else {"attn_implementation": attn_implementation}
    for name in ("image_size", "patch_size"):
        # Some of transformers' networks divide by them, which takes a number.
        height, width = as_pair(getattr(config, name))
        setattr(config, name, height if height == width else (height, width))
    if not config.model_type:
        return MaskedViTModel._from_config(config, **attention)
    if config.model_type != "vit_mae":
        return AutoModel.from_config(config, **attention, **layout.construction)
    config.mask_ratio = 0.0
    network = AutoModel.from_config(config, **attention)
    embeddings = network.embeddings
    if not embeddings.position_embeddings.is_meta and not embeddings.position_embeddings.any():
        # transformers 5.23 leaves the positions of a new ViTMAE at zero, and its [CLS] too.
        grid = [side // patch for side, patch in zip(embeddings.image_size, as_pair(config.patch_size), strict=True)]
        with torch.no_grad():
            embeddings.position_embeddings.copy_(sincos_position_table(*grid, config.hidden_size))
            embeddings.cls_token.normal_(std=config.initializer_range)
    return network


@dataclass
class FrozenSource:
    """
    A trained network to be frozen, in parts.

    Args:
        config (`PreTrainedConfig`): Of its encoder; goes into the method's config.
        state (`dict[str, torch.Tensor]`): The weights of its encoder, for [`load_source`].
        image_mean, image_std (`list[float]`, *optional*): How it wants pixels in [0, 1] normalised, if it says so.
    """

    config: PreTrainedConfig
    state: dict[str, torch.Tensor]
    image_mean: list[float] | None = None
    image_std: list[float] | None = None


def read_source(model_or_path) -> FrozenSource:
    """
    A trained network that can be frozen: its config, weights and pixel normalisation.

    Args:
        model_or_path (`PreTrainedModel`, or a path or name on the Hub): One of ours, ViT, ViTMAE, DINOv2 (with or
            without registers), DINOv3's ViT, or CLIP (its vision tower). Of a model with heads or decoders the encoder
            is taken. A path's `preprocessor_config.json` tells the normalisation.

    Raises:
        ValueError: If the network cannot give targets (no [CLS], convolutional, hierarchical, unknown), saying why, or
            if its weights are not all there.
        OSError: If there is no such model.
    """
    if isinstance(model_or_path, PreTrainedModel):
        encoder = _encoder_of(model_or_path)
        return FrozenSource(encoder.config, encoder.state_dict())
    config, *normalization = read_description(model_or_path)
    # AutoModel of a CLIP checkpoint would have its text tower too.
    model_class = CLIPVisionModel if config.model_type == "clip_vision_model" else AutoModel
    encoder = load_quietly(model_class, model_or_path)
    return FrozenSource(encoder.config, encoder.state_dict(), *normalization)


def load_quietly(model_class, path) -> PreTrainedModel:
    """
    An encoder in float32, without the report that a pretraining checkpoint also has decoders.

    Raises:
        ValueError: If the checkpoint lacks weights of the encoder.
    """
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        encoder, info = model_class.from_pretrained(path, dtype=torch.float32, output_loading_info=True)
    finally:
        logging.set_verbosity(verbosity)
    missing = sorted(name for name in info["missing_keys"] if not name.startswith("pooler."))
    if missing:
        raise ValueError(f"{path} lacks weights of its encoder: {', '.join(missing[:3])} ({len(missing)} tensors).")
    align_weights(encoder)
    return encoder


def read_description(path: str) -> tuple[PreTrainedConfig, list[float] | None, list[float] | None]:
    """
    What is known of a trained network without its weights: config of the encoder, mean and standard deviation of its
    pixels, None where it does not say.

    Raises:
        ValueError: If the network cannot give targets, saying why.
        OSError: If there is no such model.
    """
    config = AutoConfig.from_pretrained(path)
    config = getattr(config, "vision_config", config)
    _layout(config)
    return config, *read_normalization(path)


def _encoder_of(model: PreTrainedModel) -> PreTrainedModel:
    model = getattr(model, "vision_model", model)
    layout = _layout(model.config)
    is_encoder = any(name == layout.blocks for name, _ in model.named_modules())
    return model if is_encoder else model.base_model


def read_normalization(path: str) -> tuple[list[float] | None, list[float] | None]:
    """Mean and standard deviation, one number a channel or one for all, of the image processor beside a network."""
    for name, key in (("preprocessor_config.json", None), ("processor_config.json", "image_processor")):
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
    return None, None


def student_config(source: FrozenSource, name: str, config: MaskedViTConfig | type[MaskedViTConfig]):
    """
    The config of a model that learns from `source`, with the fields that `build_frozen` reads filled in.

    Args:
        source: The trained network.
        name (`str`): With which the fields start.
        config: Of the model, which is copied; or its class, for the width, depth, heads and grid of `source`.
    """
    if isinstance(config, type):
        names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "image_size", "patch_size")
        config = config(**{field: getattr(source.config, field) for field in (*names, "num_channels")})
    config = copy.deepcopy(config)
    setattr(config, f"{name}_config", describe_config(source.config))
    if source.image_mean is not None:
        setattr(config, f"{name}_image_mean", source.image_mean)
        setattr(config, f"{name}_image_std", source.image_std)
    return config


@torch.no_grad()
def load_source(frozen: FrozenViT, source: FrozenSource) -> None:
    """
    Fills a frozen network with trained weights.

    Raises:
        ValueError: If the weights are of other names or shapes.
    """
    wanted = frozen.network.state_dict()
    try:
        # A source may have more: a pooler, a mask token.
        frozen.network.load_state_dict({name: value for name, value in source.state.items() if name in wanted})
    except RuntimeError as error:
        raise ValueError(
            f"The weights do not fit a frozen network of type {frozen.config.model_type!r}. {error}"
        ) from error
    frozen.is_trained = True
