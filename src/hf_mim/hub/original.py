"""Reading the checkpoints that the methods' authors released."""

from collections.abc import Mapping

import torch
from transformers.utils import logging

from ..models.vit.checkpoint_files import read_checkpoint
from ..models.vit.encoders import encoder_from
from ..registry import method_class, method_module

logger = logging.get_logger(__name__)

# Releases of networks to learn from, under timm's names, and their licences: our encoder without a method.
ENCODER_RELEASES = {"dino": "apache-2.0", "ibot": "apache-2.0"}
# Of their checkpoints in training, the network that the authors evaluate comes first.
_NETWORKS = ("teacher", "student")
# How many names a message holds.
_MAX_NAMED = 20


def from_original(checkpoint, model_type: str, *, config=None, teacher=None):
    """
    Turns a checkpoint of a method's released code into our pretraining model.

    Args:
        checkpoint (path, or `dict[str, torch.Tensor]`): A `.pth`, `.pt` or `.safetensors` file, or a state dict, with
            the release's names. Pickles are read with `weights_only=True`: no code in them is run.
        model_type (`str`): "pilamim", "tec", "ocl", "dbot", "vit_mae", ...; or "dino" and "ibot", whose backbone (the
            teacher's, of a checkpoint that holds both) becomes an encoder, `MaskedViTModel`.
        config (the method's config, or `dict`, *optional*): The sizes; fields that a dict lacks, or all if None, are
            read off the weights. Numbers of heads cannot be: the release's usual ones are assumed.
        teacher (path, or state dict, *optional*): The frozen network's weights, for methods whose release keeps them
            apart.

    Returns:
        The method's `ForPreTraining` model, or the encoder, in eval mode. Weights of the checkpoint that are not used
        are named in a warning.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the method is unknown, the file is damaged or holds more than weights, or the weights are not
            those of the method's release or do not fit `config`; all that are missing are named.
    """
    model, unused = convert_checkpoint(checkpoint, model_type, config=config, teacher=teacher)
    if unused:
        logger.warning(f"{len(unused)} weights of the checkpoint are not used: {name_some(unused)}.")
    return model


def convert_checkpoint(checkpoint, model_type: str, *, config=None, teacher=None) -> tuple:
    """As [`from_original`]: the model, and the names of weights that are not used, a teacher's after "teacher: "."""
    if model_type in ENCODER_RELEASES:
        return _convert_encoder(checkpoint, model_type, config)
    try:
        converter = method_module(model_type, "convert")
    except ValueError as error:
        raise ValueError(f"{str(error).rstrip('.')}, {', '.join(ENCODER_RELEASES)}.") from None
    state = _Reader(read_checkpoint(checkpoint))
    frozen = None if teacher is None else _Reader(read_checkpoint(teacher))
    try:
        if config is None or isinstance(config, Mapping):
            config = method_class(model_type, "Config")(
                **(
                    converter.original_config(dict(state), None if frozen is None else dict(frozen))
                    | dict(config or {})
                )
            )
    except KeyError as error:
        raise _unlike(model_type, [error.args[0]], state) from error
    for reader in filter(None, (state, frozen)):
        reader.stand_in = torch.zeros(3 * config.num_channels, 1, 1)
    weights = converter.convert_original(state, config, frozen)
    missing = state.missing + [f"teacher: {name}" for name in (frozen.missing if frozen else [])]
    if missing:
        raise _unlike(model_type, missing, state)
    model = method_class(model_type, "ForPreTraining")(config)
    # What a release leaves out by design, its converter says; the fixed tables are the model's own.
    own = model.state_dict() if getattr(converter, "PARTIAL", False) else {}
    try:
        model.load_state_dict(own | weights)
    except RuntimeError as error:
        raise ValueError(f"The weights of the {model_type} release do not fit the config. {error}") from error
    return model.eval(), state.unused() + [f"teacher: {name}" for name in (frozen.unused() if frozen else [])]


def name_some(names: list[str]) -> str:
    """The first names of a list, and how many more there are."""
    more = f", and {len(names) - _MAX_NAMED} more" if len(names) > _MAX_NAMED else ""
    return ", ".join(names[:_MAX_NAMED]) + more


class _Reader(dict):
    """
    A release's weights that remember which were asked for. `stand_in` is given for one that is not there, so that all
    of them can be told at once: of a length that converters can divide.
    """

    def __init__(self, state: Mapping):
        super().__init__(state)
        self.asked: set[str] = set()
        self.missing: list[str] = []
        self.stand_in: torch.Tensor | None = None

    def __getitem__(self, name: str) -> torch.Tensor:
        self.asked.add(name)
        return super().__getitem__(name)

    def __missing__(self, name: str) -> torch.Tensor:
        self.missing.append(name)
        return self.stand_in

    def get(self, name: str, default=None):
        self.asked.add(name)
        return super().get(name, default)

    def unused(self) -> list[str]:
        """Names that nobody asked for, in the checkpoint's order."""
        return [name for name in self if name not in self.asked]


def _unlike(model_type: str, missing: list[str], state: Mapping) -> ValueError:
    named = name_some([repr(name) for name in dict.fromkeys(missing)])
    return ValueError(
        f"The checkpoint has no weights named {named}; it does not look like one of the {model_type} release. It has, "
        f"for example: {', '.join(list(state)[:5]) or 'nothing'}."
    )


def _convert_encoder(checkpoint, model_type: str, config) -> tuple:
    state = read_checkpoint(checkpoint, _NETWORKS)
    names = {name: name.removeprefix("backbone.") for name in state}
    if any(name.startswith("backbone.") for name in state):
        # The heads beside it.
        names = {name: short for name, short in names.items() if name != short}
    used = {name for name, short in names.items() if short.startswith(("cls_", "pos_", "patch_", "blocks.", "norm."))}
    try:
        model = encoder_from({names[name]: state[name] for name in state if name in used}, config=config)
    except KeyError as error:
        raise _unlike(model_type, [error.args[0]], state) from error
    return model, [name for name in state if name not in used]
