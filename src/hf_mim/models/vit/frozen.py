"""
Any pretrained Vision Transformer as a frozen network that gives targets: TEC's base, dBOT's teacher.

The network's own modules are run block by block, so that nothing is computed that no target needs (final norm,
pooler), and attention logits are had for chosen rows without eager attention anywhere.
"""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from transformers import AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.utils import logging

from .autocast import without_autocast
from .configuration_vit import MaskedViTConfig
from .frozen_layouts import frozen_config, layout_of
from .layouts import Layout
from .modeling_vit import MaskedViTModel
from .pixels import PixelRenormalization
from .position import rotate, sincos_position_table
from .sizes import as_pair
from .transfer import grid_of

logger = logging.get_logger(__name__)


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
            self.keys = keys if self.rotary is None else rotate(keys, *self.rotary)
        # Registers stand between [CLS] and the patches.
        places = torch.where(rows > 0, rows + self.num_prefix - 1, rows)
        samples = torch.arange(rows.shape[0], device=rows.device).unsqueeze(1)
        queries = self._split_heads(self.project_query(self.inputs[samples, places]))
        if self.rotary is not None:
            cos, sin = self.rotary
            # [CLS] is not turned: angle 0.
            cos, sin = torch.cat((torch.ones_like(cos[:1]), cos)), torch.cat((torch.zeros_like(sin[:1]), sin))
            queries = rotate(queries, cos[rows].unsqueeze(1), sin[rows].unsqueeze(1))
        return attention_products(queries, self.keys) * queries.shape[-1] ** -0.5

    def _split_heads(self, projected: torch.Tensor) -> torch.Tensor:
        return projected.unflatten(2, (self.num_heads, -1)).transpose(1, 2)


def attention_products(queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """`q k^T` of (batch_size, heads, n, head_dim) and (..., L, head_dim); in float32 under autocast too."""
    with without_autocast(queries):
        return queries.float() @ keys.float().transpose(2, 3)


@dataclass
class FrozenViTOutput:
    """
    Args:
        last_hidden_states (`tuple` of `torch.Tensor` of shape `(batch_size, 1 + L, hidden_size)`): Outputs of the last
            blocks, the last one last, before the final norm; [CLS] first, then the L patches of the grid that is
            wanted, without registers.
        attention (`LastAttention`): Of the last block.
    """

    last_hidden_states: tuple[torch.Tensor, ...]
    attention: LastAttention


class FrozenViT(nn.Module):
    """
    A Vision Transformer that is never trained: always in eval mode, without gradients.

    Args:
        config: As [`frozen_config`] gives. The network is built untrained; `load_source` fills it.
        grid (pair (rows, columns), *optional*): The patch grid that targets are wanted for; the network's own if None.
            Pictures are resized so that the network cuts them into this grid. A network that has positions for its own
            grid alone sees them at its own size, and what it makes of the patches is resampled: outputs of the last
            blocks, and what the last block's attention reads, each channel as an image (bilinear, with antialiasing
            where the grid gets smaller). Both grids then have the same proportions.
        pixels (`dict`, *optional*): `source_mean`, `source_std`, `target_mean`, `target_std`, lists of one number a
            channel, None where not known: how the pictures it is given are normalised, and how it wants them.
        attn_implementation (`str`, *optional*): As the student's; transformers' choice if None.
        channels (`list[int]`, *optional*): Which channels of the student's pictures it sees, in its own order; all if
            None. `source_mean` and `source_std` are of all.
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
        channels: Sequence[int] | None = None,
    ):
        super().__init__()
        self.name = name
        self.layout = layout_of(config)
        self.patch_size = as_pair(config.patch_size)
        self.grid = frozen_grid(config, grid)
        # In which it runs.
        self.own_grid = self.grid if layout_of(config).any_grid else grid_of(config)
        self.network = _build(config, self.layout, attn_implementation)
        # Not the method's description of it: the attention implementation that is set later is in this one.
        self.config = self.network.config
        self.channels = None if channels is None else list(channels)
        check_frozen_channels(self.channels, config.num_channels)
        self.pixels = self._renormalization(**(pixels or {}))
        # Set by `load_source`, and by loading a checkpoint or a state dict that has it.
        self.is_trained = False
        self.register_load_state_dict_pre_hook(_take_for_trained)
        self._has_said = False
        self.requires_grad_(False)
        self.eval()

    def set_source_normalization(self, mean: Sequence[float], std: Sequence[float]) -> None:
        """Tells how the pictures that it is given are normalised, one number a channel of theirs or one for all."""
        _, _, target_mean, target_std = self.pixels.numbers
        device = next(self.network.parameters()).device
        self.pixels = self._renormalization(mean, std, target_mean, target_std).to(device)

    def _renormalization(
        self, source_mean=None, source_std=None, target_mean=None, target_std=None
    ) -> PixelRenormalization:
        if self.channels is not None:
            source_mean, source_std = (
                numbers if numbers is None or len(numbers) == 1 else [numbers[channel] for channel in self.channels]
                for numbers in (source_mean, source_std)
            )
        return PixelRenormalization(self.config.num_channels, source_mean, source_std, target_mean, target_std)

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
        network, num_prefix = self.network, 1 + getattr(self.config, "num_register_tokens", 0)
        hidden_states, block_arguments, rotary = self._embed(self.as_it_sees(pixel_values).to(network.dtype))
        blocks = network.get_submodule(self.layout.blocks)
        outputs = []
        for block in blocks:
            inputs, hidden_states = hidden_states, block(hidden_states, **block_arguments)
            outputs = [*outputs, hidden_states][-num_last_layers:]
        *outputs, inputs = (self._resample(tokens, num_prefix) for tokens in (*outputs, inputs))
        norm, attention = (getattr(block, name) for name in (self.layout.norm, self.layout.attention))
        attention = LastAttention(norm, attention, inputs, rotary, self.num_heads, num_prefix)
        if num_prefix > 1:
            outputs = [torch.cat((tokens[:, :1], tokens[:, num_prefix:]), dim=1) for tokens in outputs]
        return FrozenViTOutput(tuple(outputs), attention)

    def as_it_sees(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """
        The student's pictures with the network's channels, normalisation and size.

        Raises:
            ValueError: If the channels are not the network's.
        """
        if self.channels is not None:
            check_frozen_channels(self.channels, self.config.num_channels, pixel_values.shape[1])
            pixel_values = pixel_values[:, self.channels]
        if pixel_values.shape[1] != self.config.num_channels:
            raise ValueError(
                f"The pictures have {pixel_values.shape[1]} channels, the frozen network takes "
                f"{self.config.num_channels}. Train with num_channels={self.config.num_channels}, or say by "
                f"{self.name}_channels which of them it sees."
            )
        self._say_what_is_not_known()
        return self._resize(self.pixels(pixel_values))

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
        size = tuple(number * patch for number, patch in zip(self.own_grid, self.patch_size, strict=True))
        if tuple(pixel_values.shape[2:]) == size:
            return pixel_values
        return nn.functional.interpolate(pixel_values.float(), size=size, mode="bicubic", antialias=True)

    def _resample(self, tokens: torch.Tensor, num_prefix: int) -> torch.Tensor:
        """Tokens of the network's own grid as of `grid`; those before the patches stay."""
        if self.own_grid == self.grid:
            return tokens
        maps = tokens[:, num_prefix:].transpose(1, 2).unflatten(2, self.own_grid).float()
        maps = nn.functional.interpolate(maps, size=self.grid, mode="bilinear", antialias=True)
        return torch.cat((tokens[:, :num_prefix], maps.flatten(2).transpose(1, 2).to(tokens.dtype)), dim=1)

    def _embed(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, dict, tuple | None]:
        """The first block's input, what the blocks are called with besides, and rotary positions."""
        network, kind = self.network, self.config.model_type
        arguments, rotary = self.layout.block, None
        if kind == "vit_mae":
            # Masks nothing, and keeps the order: the noise ascends.
            noise = torch.arange(self.own_grid[0] * self.own_grid[1], device=pixel_values.device).float()
            hidden_states = network.embeddings(pixel_values, noise=noise.expand(pixel_values.shape[0], -1))[0]
        elif kind == "dinov3_vit":
            hidden_states = network.embeddings(pixel_values)
            rotary = network.rope_embeddings(pixel_values)
            arguments = {"position_embeddings": rotary}
        elif isinstance(network, MaskedViTModel):
            hidden_states = network.embeddings(pixel_values)
            rotary = network.embeddings.rotary(pixel_values)
            arguments = {"rotary": rotary}
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
        ValueError: If the network is not supported, or has a patch grid of other proportions.
    """
    pixels = {
        "source_mean": config.image_mean,
        "source_std": config.image_std,
        "target_mean": getattr(config, f"{name}_image_mean"),
        "target_std": getattr(config, f"{name}_image_std"),
    }
    described = frozen_config(getattr(config, f"{name}_config"), config)
    channels = getattr(config, f"{name}_channels")
    check_frozen_channels(channels, described.num_channels, config.num_channels)
    return FrozenViT(described, config.grid_size, pixels, config._attn_implementation, name, channels)


def frozen_grid(config: PreTrainedConfig, grid: tuple[int, int] | None = None) -> tuple[int, int]:
    """
    The patch grid (rows, columns) that a frozen network of this config gives targets for: `grid`, its own if None.

    Raises:
        ValueError: If it cannot have that grid: its positions are of one grid, of other proportions.
    """
    own_grid = grid_of(config)
    if grid is None or tuple(grid) == own_grid:
        return own_grid
    if not layout_of(config).any_grid and own_grid[0] * grid[1] != own_grid[1] * grid[0]:
        raise ValueError(
            f"The frozen network cuts pictures into {own_grid[0]} x {own_grid[1]} patches (rows x columns; "
            f"image_size {config.image_size}, patch_size {config.patch_size}), the student into {grid[0]} x "
            f"{grid[1]}: of other proportions, in which it would see the pictures distorted. Choose the student's "
            f"image_size and patch_size so that its grid is {own_grid[0]} x {own_grid[1]}, or has its proportions, or "
            "another network."
        )
    return tuple(grid)


def check_frozen_channels(channels: Sequence[int] | None, wanted: int, given: int | None = None) -> None:
    """
    Raises ValueError if the channels that a frozen network is to see are not as many as it takes, or not there.

    Args:
        channels: Indices into the pictures' channels, which may be there twice, as a grey one for a network of RGB.
        wanted (`int`): Channels that the network takes.
        given (`int`, *optional*): Channels of the pictures, where that is known.
    """
    if channels is None:
        return
    if len(channels) != wanted:
        raise ValueError(f"The base's channels are {list(channels)}; the network takes {wanted}: name so many.")
    beyond = [channel for channel in channels if channel < 0 or (given is not None and channel >= given)]
    if beyond:
        raise ValueError(
            f"The base's channels are {list(channels)}, and {beyond[0]} is none of the pictures' {given}: name "
            f"numbers from 0 to {'' if given is None else given - 1}."
        )


def _take_for_trained(frozen: FrozenViT, state: Mapping[str, torch.Tensor], prefix: str, *_) -> None:
    """Before a state dict is loaded: whether it holds the network."""
    frozen.is_trained |= any(name.startswith(f"{prefix}network.") for name in state)


def _build(config: PreTrainedConfig, layout: Layout, attn_implementation: str | None) -> PreTrainedModel:
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
