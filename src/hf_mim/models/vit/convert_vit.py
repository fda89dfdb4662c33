"""Names of timm-style Vision Transformers (as in the authors' releases) in terms of ours."""

import torch

from .layouts import TAKEN_APART, TIMM_BLOCK
from .position import sincos_position_table

State = dict[str, torch.Tensor]

_BLOCK_NAMES = {there: here for there, here in TIMM_BLOCK.items() if here not in TAKEN_APART}


def convert_block(state: State, source: str, target: str) -> State:
    """
    The weights of one block.

    Args:
        state: The release's weights.
        source, target (`str`): Prefixes of the block there and here, without the last dot.

    Returns:
        Ours; the fused matrix with rows [q; k; v] as three.
    """
    block = {}
    for old, new in _BLOCK_NAMES.items():
        for kind in ("weight", "bias"):
            block[f"{target}.{new}.{kind}"] = state[f"{source}.{old}.{kind}"]
    for kind in ("weight", "bias"):
        fused = state.get(f"{source}.attn.qkv.{kind}")
        if fused is not None:
            for name, part in zip("qkv", fused.chunk(3), strict=True):
                block[f"{target}.attention.{name}_proj.{kind}"] = part
    return block


def convert_layers(state: State, source: str, target: str) -> State:
    """The weights of all blocks `source.0`, `source.1`, ..., as `target.0`, ..."""
    layers = {}
    for i in range(count_layers(state, source)):
        layers |= convert_block(state, f"{source}.{i}", f"{target}.{i}")
    return layers


def count_layers(state: State, source: str) -> int:
    """Number of blocks with names `source.0`, `source.1`, ..."""
    return len({name[len(source) + 1 :].split(".")[0] for name in state if name.startswith(f"{source}.")})


def copy_affine(state: State, source: str, target: str) -> State:
    """Weight and bias of a linear map or a norm under another name."""
    return {f"{target}.{kind}": state[f"{source}.{kind}"] for kind in ("weight", "bias")}


def check_fixed_positions(state: State, name: str, grid: tuple[int, int], dim: int) -> None:
    """
    Raises ValueError if a release's table of positions (1, 1 + rows * columns, dim), where it was saved, is not the
    fixed one, which ours computes.
    """
    found = state.get(name)
    table = sincos_position_table(*grid, dim)
    if found is not None and (found.shape != table.shape or not torch.allclose(found.float().cpu(), table, atol=1e-4)):
        raise ValueError(
            f"{name} of the checkpoint, of shape {tuple(found.shape)}, is not the fixed sin-cos table of the config's "
            f"grid, {grid[0]} x {grid[1]} (rows x columns), and width, {dim}. Correct image_size and patch_size."
        )
