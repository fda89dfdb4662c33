"""What of a classifier is trained: all of it, its head, a mode that the model offers, low-rank updates."""

from transformers import PreTrainedModel

# The linear maps of a block, by the names that transformers' ViT and ours have.
_LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2")


def set_trainable(model: PreTrainedModel, mode: str) -> None:
    """
    Leaves what `mode` says to be trained, and freezes the rest.

    Args:
        model: A classifier. One with modes of its own has `trainable_modes()`, their names, and
            `set_trainable(mode)`.
        mode (`str`): "all", "head" (its `classifier`), or one of the model's own.

    Raises:
        ValueError: If there is no such mode.
    """
    own = list(model.trainable_modes()) if hasattr(model, "trainable_modes") else []
    if mode in own:
        model.set_trainable(mode)
    elif mode == "head":
        model.requires_grad_(False)
        model.classifier.requires_grad_(True)
    elif mode != "all":
        modes = ["all", "head", *(name for name in own if name not in ("all", "head"))]
        raise ValueError(f"--trainable is {mode!r}; {type(model).__name__} has the modes {', '.join(modes)}.")


def add_lora(model: PreTrainedModel, rank: int):
    """
    Puts PEFT's low-rank updates on the linear maps of the blocks. What was trained stays trained, if it is not all.

    Returns:
        PEFT's `LoraModel`, whose `merge_and_unload()` folds the updates into the weights when training is done.

    Raises:
        ValueError: If PEFT is not installed, or the model has no such maps.
    """
    try:
        from peft import LoraConfig
        from peft.tuners.lora import LoraModel
    except ImportError as error:
        raise ValueError("--lora_rank needs PEFT: pip install -e '.[peft]'.") from error
    if all(parameter.requires_grad for parameter in model.parameters()):
        set_trainable(model, "head")
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=_lora_targets(model))
    tuner = LoraModel(model, config, "default")
    for parameter in trained:
        parameter.requires_grad_(True)
    return tuner


def _lora_targets(model: PreTrainedModel) -> list[str]:
    names = [
        name for name, _ in model.named_modules() if name.rsplit(".", 1)[-1] in _LORA_TARGETS and ".layer" in name
    ]
    if not names:
        raise ValueError(f"--lora_rank: {type(model).__name__} has no {', '.join(_LORA_TARGETS)} in its blocks.")
    return names


def describe_trainable(model: PreTrainedModel) -> str:
    """How many parameters are trained, out of how many."""
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    total = sum(p.numel() for p in model.parameters())
    return f"trains {trained:,} of {total:,} parameters ({100 * trained / total:.2f} %)"
