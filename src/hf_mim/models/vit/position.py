"""Positions: MAE's fixed sin-cos table, interpolation of tables to other grids, and DINOv3's rotary positions."""

import math

import torch
from torch import nn

from .configuration_vit import INTERPOLATIONS


def sincos_position_table(rows: int, columns: int, dim: int, cls_token: bool = True) -> torch.Tensor:
    """
    The fixed table of MAE, TEC, OCL and dBOT.

    The first half of the channels encodes the *column*, the second half the *row*, each `[sin | cos]` with
    `omega_i = 10000 ** (-i / (dim / 4))`. (transformers' `build_2d_sinusoidal_position_embedding` has the halves in
    the other order.) [CLS], where there is one, comes first and is zero.

    Args:
        rows (`int`), columns (`int`): The patch grid.
        dim (`int`): Channels, a multiple of 4.
        cls_token (`bool`, defaults to True): Whether there is a [CLS].

    Returns:
        float32 `torch.Tensor` of shape `(1, 1 + rows * columns, dim)`, without the 1 where there is no [CLS], on the
        CPU.
    """
    # An explicit device: inside `torch.device("meta")` the table must still have values to copy from.
    omega = 10000.0 ** -(torch.arange(dim // 4, dtype=torch.float64, device="cpu") / (dim // 4))
    row = torch.arange(rows, dtype=torch.float64, device="cpu").repeat_interleave(columns)
    column = torch.arange(columns, dtype=torch.float64, device="cpu").repeat(rows)
    halves = [
        angle for position in (column, row) for angle in (position.outer(omega).sin(), position.outer(omega).cos())
    ]
    table = torch.cat(halves, dim=1).float()
    return (torch.cat((table.new_zeros(1, dim), table)) if cls_token else table).unsqueeze(0)


def select_positions(table: torch.Tensor, ids: torch.Tensor | None, num_prefix: int) -> torch.Tensor:
    """
    The positions of chosen patches.

    Args:
        table (`torch.Tensor` of shape `(1, num_prefix + num_patches, dim)`).
        ids (`torch.LongTensor` of shape `(batch_size, length)`, *optional*): Row-major indices; all in order if None.

    Returns:
        `torch.Tensor` of shape `(batch_size, num_prefix + length, dim)`; `table` itself where `ids` is None.
    """
    if ids is None:
        return table
    table = table.expand(ids.shape[0], -1, -1)
    patches = torch.gather(table[:, num_prefix:], 1, ids.unsqueeze(-1).expand(-1, -1, table.shape[-1]))
    return torch.cat((table[:, :num_prefix], patches), dim=1)


def fixed_position_table(config, dim: int) -> torch.Tensor:
    """The fixed table (1, num_prefix + L, dim) of a network with this config: of its grid, or interpolated to it."""
    made_for = tuple(config.sincos_grid or config.grid_size)
    table = sincos_position_table(*made_for, dim, config.use_cls_token)
    return interpolate_position_table(table, made_for, config.grid_size, config.position_interpolation)


def interpolate_position_table(
    table: torch.Tensor, grid: tuple[int, int], new_grid: tuple[int, int], how: str = "bicubic"
) -> torch.Tensor:
    """
    Interpolation of a position table to another patch grid, by default as ViT's; [CLS] (the first row) stays.

    Args:
        table (`torch.Tensor` of shape `(1, num_prefix + rows * columns, dim)`): Positions of `grid` = (rows, columns),
            with or without [CLS].
        new_grid (`tuple[int, int]`): (rows, columns) wanted.
        how (`str`, defaults to `"bicubic"`): One of `INTERPOLATIONS`.

    Returns:
        `torch.Tensor` of shape `(1, num_prefix + new_rows * new_columns, dim)`; `table` itself where the grids are
        equal.
    """
    if new_grid == grid:
        return table
    dim, num_prefix = table.shape[-1], table.shape[1] - grid[0] * grid[1]
    patches = table[:, num_prefix:].reshape(1, *grid, dim).permute(0, 3, 1, 2)
    patches = nn.functional.interpolate(patches.float(), size=new_grid, align_corners=False, **INTERPOLATIONS[how])
    return torch.cat((table[:, :num_prefix], patches.permute(0, 2, 3, 1).flatten(1, 2).to(table.dtype)), dim=1)


def rotary_table(
    grid: tuple[int, int], head_dim: int, theta: float, ids: torch.Tensor | None, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Cosine and sine of the angles by which queries and keys of the patches are turned, as DINOv3's.

    The centres of the patches lie in (-1, 1) along rows and columns, at every size of the picture. The first quarter
    of a head's channels turns by the row, the second by the column, with `2 pi theta ** (-4 i / head_dim)`, and each
    channel of this half is turned with the one that stands as far into the other half. (DINOv3 also rescales the
    places at random in training; here training sees what evaluation does.)

    Args:
        grid (pair (rows, columns)): The patch grid.
        head_dim (`int`): Channels of a head, a multiple of 4.
        theta (`float`): Base of the frequencies.
        ids (`torch.LongTensor` of shape `(batch_size, length)`, *optional*): Which patches, row-major; all if None.

    Returns:
        Two float32 `torch.Tensor` of shape `(rows * columns, head_dim)`, or `(batch_size, 1, length, head_dim)` of the
        patches `ids`.
    """
    frequencies = 1 / theta ** torch.arange(0, 1, 4 / head_dim, dtype=torch.float32, device=device)
    row, column = (
        2.0 * (torch.arange(0.5, number, dtype=torch.float32, device=device) / number) - 1.0 for number in grid
    )
    places = torch.stack((row.repeat_interleave(grid[1]), column.repeat(grid[0])), dim=1)
    angles = (2 * math.pi * places[:, :, None] * frequencies).flatten(1).tile(2)
    if ids is not None:
        angles = angles[ids].unsqueeze(1)
    return angles.cos(), angles.sin()


def rotate(vectors: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Each channel of the first half is turned, in a plane with the same one of the second half, by its angle."""
    first, second = vectors.chunk(2, dim=-1)
    return vectors * cos + torch.cat((-second, first), dim=-1) * sin


def rotate_patches(vectors: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """`rotate` of the last tokens of (batch_size, heads, length, head_dim), as many as there are angles of."""
    num_prefix = vectors.shape[-2] - cos.shape[-2]
    patches = rotate(vectors[:, :, num_prefix:], cos, sin).to(vectors.dtype)
    return torch.cat((vectors[:, :, :num_prefix], patches), dim=2)
