"""Weights in files, out of the wrappings that training code puts around them; no code in a pickle is run."""

import argparse
from collections.abc import Mapping
from pathlib import Path

import safetensors.torch
import torch


def read_checkpoint(checkpoint, networks: tuple[str, ...] = ()) -> dict[str, torch.Tensor]:
    """
    The weights of a file or state dict, out of the wrappings that training code puts around them.

    Args:
        networks: Of several networks in a checkpoint, which is wanted: the first of these names that is there.
    """
    state = checkpoint if isinstance(checkpoint, Mapping) else _read_file(Path(checkpoint))
    wanted = next((name for name in networks if isinstance(state.get(name), Mapping)), None)
    for key in ("model", "state_dict", "module", *([wanted] if wanted else [])):
        if isinstance(state.get(key), Mapping):
            state = state[key]
    # Networks beside each other, each with a state dict of its own.
    for part in [name for name, value in state.items() if isinstance(value, Mapping)]:
        state = {**state, **{f"{part}.{str(n).removeprefix('module.')}": value for n, value in state[part].items()}}
    return {name.removeprefix("module."): value for name, value in state.items() if isinstance(value, torch.Tensor)}


def refuse_folder(path: Path) -> None:
    """Raises ValueError, which says what to do, if a path is a folder of a checkpoint in parts, not a file."""
    if not path.is_dir():
        return
    if (path / ".metadata").is_file() or any(path.glob("*.distcp")):
        raise ValueError(
            f"{path} is a checkpoint of torch.distributed in parts (.distcp), whose table is a pickle that could run "
            "code: not read. Where you trust it, make one file of it: python -m "
            f"torch.distributed.checkpoint.format_utils dcp_to_torch {path} checkpoint.pth"
        )
    files = sorted(file.name for file in path.iterdir() if file.suffix in (".pth", ".pt", ".safetensors"))
    named = f" There are {', '.join(files[:5])}{', ...' if len(files) > 5 else ''}." if files else ""
    several = " Of one in shards, put them together first." if len(files) > 1 else ""
    raise ValueError(f"{path} is a folder; expected one .pth, .pt or .safetensors file.{named}{several}")


def _read_file(path: Path) -> Mapping:
    refuse_folder(path)
    if not path.is_file():
        raise FileNotFoundError(f"There is no checkpoint {path}. Give the path of a .pth, .pt or .safetensors file.")
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        with torch.serialization.safe_globals([argparse.Namespace]):
            contents = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        # Of bytes that are no pickle its machine may raise anything.
        raise ValueError(f"{path} is damaged, or holds more than weights, which could run code: not read.") from error
    if not isinstance(contents, Mapping):
        raise ValueError(f"{path} holds a {type(contents).__name__}; expected a dictionary of weights.")
    return contents
