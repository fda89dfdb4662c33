"""Reading the checkpoints that the methods' authors released."""

from collections.abc import Mapping

from ..models.vit.checkpoint_files import read_checkpoint
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
