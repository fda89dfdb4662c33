"""What a masked Vision Transformer reads: kept patches with their positions, behind [CLS] and registers."""

import torch
from torch import nn

from .configuration_vit import MaskedViTConfig
from .position import fixed_position_table, interpolate_position_table, rotary_table, select_positions
from .sizes import as_pair


def patchify(pixel_values: torch.Tensor, patch_size: tuple[int, int]) -> torch.Tensor:
    """
    Cuts pictures into patches, as a view that copies nothing.

    Args:
        pixel_values (`torch.Tensor` of shape `(batch_size, num_channels, height, width)`).
        patch_size (`tuple[int, int]`): (height, width) of a patch, which divide those of the picture.

    Returns:
        `torch.Tensor` of shape `(batch_size, rows, columns, num_channels, patch_height, patch_width)`.
    """
    batch_size, channels, height, width = pixel_values.shape
    rows, columns = height // patch_size[0], width // patch_size[1]
    patches = pixel_values.reshape(batch_size, channels, rows, patch_size[0], columns, patch_size[1])
    return patches.permute(0, 2, 4, 1, 3, 5)


class MaskedViTPatchProjection(nn.Conv2d):
    """A convolution by name and shape, for exchange with ViT; of patches it is the linear map that it stands for."""

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """Tokens of patches (batch_size, length, pixels of a patch); of whole pictures as `nn.Conv2d`."""
        if pixels.ndim != 3:
            return super().forward(pixels)
        return nn.functional.linear(pixels, self.weight.flatten(1), self.bias)


class MaskedViTPatchEmbeddings(nn.Module):
    """The linear map from patches to tokens, applied to the kept patches only."""

    def __init__(self, config: MaskedViTConfig):
        super().__init__()
        self.patch_size = as_pair(config.patch_size)
        self.projection = MaskedViTPatchProjection(
            config.num_channels, config.hidden_size, self.patch_size, self.patch_size
        )

    def forward(self, pixel_values: torch.Tensor, ids_keep: torch.Tensor | None = None) -> torch.Tensor:
        """Tokens (batch_size, num_keep or num_patches, hidden_size) of the patches `ids_keep`, None for all."""
        patches = patchify(pixel_values.to(self.projection.weight.dtype), self.patch_size)
        if ids_keep is None:
            patches = patches.flatten(1, 2)
        else:
            columns = patches.shape[2]
            samples = torch.arange(ids_keep.shape[0], device=patches.device).unsqueeze(1)
            samples = samples // (ids_keep.shape[0] // patches.shape[0])
            patches = patches[samples, ids_keep // columns, ids_keep % columns]
        # By its call and not by its weights, which may lie on the disk until then.
        return self.projection(patches.flatten(2))


class MaskedViTEmbeddings(nn.Module):
    """Patch tokens with positions, hidden patches left out, [CLS] and registers in front."""

    def __init__(self, config: MaskedViTConfig):
        super().__init__()
        self.config = config
        width = config.hidden_size
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width)) if config.use_cls_token else None
        registers = config.num_register_tokens
        self.register_tokens = nn.Parameter(torch.zeros(1, registers, width)) if registers else None
        self.patch_embeddings = MaskedViTPatchEmbeddings(config)
        if config.position_embedding == "rotary":
            self.position_embeddings = None
        else:
            add_position_table(self, config, width)
        normed = config.embedding_layernorm
        self.layernorm = nn.LayerNorm(width, eps=config.layer_norm_eps) if normed else nn.Identity()

    def grid(self, height: int, width: int, interpolate: bool) -> tuple[int, int]:
        """The patch grid (rows, columns) of pictures of `height` x `width` pixels."""
        patch_height, patch_width = as_pair(self.config.patch_size)
        if (height, width) == as_pair(self.config.image_size):
            return self.config.grid_size
        if not interpolate:
            expected = as_pair(self.config.image_size)
            raise ValueError(
                f"The pictures have {height} x {width} pixels, the model expects {expected[0]} x {expected[1]} "
                "(height x width). Resize them, or pass interpolate_pos_encoding=True."
            )
        if height % patch_height or width % patch_width:
            raise ValueError(
                f"{height} x {width} pixels are not divisible by the patch size {patch_height} x {patch_width} "
                "(height x width). Resize the pictures to multiples of it."
            )
        return height // patch_height, width // patch_width

    def rotary(
        self, pixel_values: torch.Tensor, ids_keep: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor] | None:
        """What turns the queries and keys of the patches `ids_keep`, by [`rotary_table`]; None without it."""
        config = self.config
        if config.position_embedding != "rotary":
            return None
        grid = self.grid(*pixel_values.shape[2:], interpolate=True)
        head_dim = config.hidden_size // config.num_attention_heads
        return rotary_table(grid, head_dim, config.rope_theta, ids_keep, pixel_values.device)

    def class_token(self) -> torch.Tensor:
        """[CLS] before its position is added, (1, 1, hidden_size)."""
        return self.cls_token

    def forward(
        self,
        pixel_values: torch.Tensor,
        ids_keep: torch.Tensor | None = None,
        interpolate_pos_encoding: bool = False,
    ) -> torch.Tensor:
        if pixel_values.ndim != 4 or pixel_values.shape[1] != self.config.num_channels:
            raise ValueError(
                f"pixel_values has the shape {tuple(pixel_values.shape)}; expected (batch_size, "
                f"{self.config.num_channels}, height, width). Check the pictures' channels against num_channels."
            )
        dtype, num_cls = self.patch_embeddings.projection.weight.dtype, int(self.config.use_cls_token)
        grid = self.grid(*pixel_values.shape[2:], interpolate_pos_encoding)
        tokens, prefix = self.patch_embeddings(pixel_values, ids_keep), []
        if self.cls_token is not None:
            prefix.append(self.class_token())
        if self.position_embeddings is not None:
            table, how = self.position_embeddings, self.config.position_interpolation
            table = interpolate_position_table(table, self.config.grid_size, grid, how)
            tokens = tokens + select_positions(table, ids_keep, num_cls)[:, num_cls:]
            prefix = [cls + table[:, :1] for cls in prefix]
        if self.register_tokens is not None:
            prefix.append(self.register_tokens)
        prefix = [token.expand(tokens.shape[0], -1, -1).to(dtype) for token in prefix]
        return self.layernorm(torch.cat((*prefix, tokens.to(dtype)), dim=1) if prefix else tokens.to(dtype))


def add_position_table(module: nn.Module, config: MaskedViTConfig, dim: int) -> None:
    """
    Gives `module` its `position_embeddings` (1, num_cls + L, dim): a trained parameter, or the fixed table.

    The fixed table is a buffer that is not saved: it follows from the config. [`MaskedViTPreTrainedModel`] writes it
    again after loading, where it would otherwise hold uninitialised memory.
    """
    if config.position_embedding == "learned":
        module.position_embeddings = nn.Parameter(torch.zeros(1, int(config.use_cls_token) + config.num_patches, dim))
    else:
        table = fixed_position_table(config, dim)
        # Moved to the default device, which is "meta" while a model is being loaded.
        module.register_buffer("position_embeddings", table.to(torch.get_default_device()), persistent=False)
