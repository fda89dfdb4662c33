"""Position tables: MAE's fixed sin-cos layout, and interpolation to other grids."""

import torch
from torch import nn


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
    return interpolate_position_table(table, made_for, config.grid_size)


def interpolate_position_table(table: torch.Tensor, grid: tuple[int, int], new_grid: tuple[int, int]) -> torch.Tensor:
    """
    Bicubic interpolation of a position table to another patch grid, as ViT's; [CLS] (the first row) stays.

    Args:
        table (`torch.Tensor` of shape `(1, num_prefix + rows * columns, dim)`): Positions of `grid` = (rows, columns),
            with or without [CLS].
        new_grid (`tuple[int, int]`): (rows, columns) wanted.

    Returns:
        `torch.Tensor` of shape `(1, num_prefix + new_rows * new_columns, dim)`; `table` itself where the grids are
        equal.
    """
    if new_grid == grid:
        return table
    dim, num_prefix = table.shape[-1], table.shape[1] - grid[0] * grid[1]
    patches = table[:, num_prefix:].reshape(1, *grid, dim).permute(0, 3, 1, 2)
    patches = nn.functional.interpolate(patches.float(), size=new_grid, mode="bicubic", align_corners=False)
    return torch.cat((table[:, :num_prefix], patches.permute(0, 2, 3, 1).flatten(1, 2).to(table.dtype)), dim=1)
