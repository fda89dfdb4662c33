"""Reading the checkpoints that the methods' authors released."""

import argparse
import pickle
from collections.abc import Mapping
from pathlib import Path

import safetensors.torch
import torch

from ..registry import method_class, method_module


def from_original(checkpoint, model_type: str, *, config=None, teacher=None):
    """
    Turns a checkpoint of a method's released code into our pretraining model.

    Args:
        checkpoint (path, or `dict[str, torch.Tensor]`): A `.pth`, `.pt` or `.safetensors` file, or a state dict, with
            the release's names. Pickles are read with `weights_only=True`: no code in them is run.
        model_type (`str`): "pilamim", ...
        config (the method's config, or `dict`, *optional*): The sizes; fields that a dict lacks, or all if None, are
            read off the weights. Numbers of heads cannot be: the release's usual ones are assumed.
        teacher (path, or state dict, *optional*): The frozen network's weights, for methods whose release keeps them
            apart.

    Returns:
        The method's `ForPreTraining` model, in eval mode.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the method is unknown, the file is damaged or holds more than weights, or the weights are not
            those of the method's release or do not fit `config`.
    """
    converter = method_module(model_type, "convert")
    state = read_checkpoint(checkpoint)
    frozen = None if teacher is None else read_checkpoint(teacher)
    try:
        if config is None or isinstance(config, Mapping):
            config = method_class(model_type, "Config")(
                **(converter.original_config(state, frozen) | dict(config or {}))
            )
        weights = converter.convert_original(state, config, frozen)
    except KeyError as error:
        raise ValueError(
            f"The checkpoint has no weights named {error}; it does not look like one of the {model_type} release. "
            f"It has, for example: {', '.join(list(state)[:5])}."
        ) from error
    model = method_class(model_type, "ForPreTraining")(config)
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise ValueError(f"The weights of the {model_type} release do not fit the config. {error}") from error
    return model.eval()


def read_checkpoint(checkpoint) -> dict[str, torch.Tensor]:
    """The weights of a file or state dict, out of the wrappings that training code puts around them."""
    state = checkpoint if isinstance(checkpoint, Mapping) else _read_file(Path(checkpoint))
    for key in ("model", "state_dict", "module"):
        if isinstance(state.get(key), Mapping):
            state = state[key]
    return {name.removeprefix("module."): value for name, value in state.items() if isinstance(value, torch.Tensor)}


def _read_file(path: Path) -> Mapping:
    if not path.is_file():
        raise FileNotFoundError(f"There is no checkpoint {path}. Give the path of a .pth, .pt or .safetensors file.")
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        with torch.serialization.safe_globals([argparse.Namespace]):
            contents = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, safetensors.SafetensorError, RuntimeError, EOFError) as error:
        raise ValueError(f"{path} is damaged, or holds more than weights, which could run code: not read.") from error
    if not isinstance(contents, Mapping):
        raise ValueError(f"{path} holds a {type(contents).__name__}; expected a dictionary of weights.")
    return contents
