"""
What is trained: of a classifier all, its head, a mode that the model offers or low-rank updates; of the encoder in
pretraining all, its last blocks or low-rank updates.
"""

import importlib.util

from transformers import PreTrainedModel

# The linear maps of a block, by the names that transformers' ViT and ours have.
_LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate", "fc1", "fc2")
_NO_PEFT = "--lora_rank needs PEFT: pip install -e '.[peft]'."


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
        raise ValueError(_NO_PEFT) from error
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
        name
        for name, _ in model.named_modules()
        if name.rsplit(".", 1)[-1] in _LORA_TARGETS and ".layer" in f".{name}"
    ]
    if not names:
        raise ValueError(f"--lora_rank: {type(model).__name__} has no {', '.join(_LORA_TARGETS)} in its blocks.")
    return names


def check_partial_pretraining(model_args, config, training_args) -> None:
    """
    Looks at `--trainable_blocks` and `--lora_rank` of pretraining.

    Args:
        model_args ([`ModelArguments`]), training_args ([`MIMTrainingArguments`]): The flags.
        config: Of the model.

    Raises:
        ValueError: If both are given, a number is out of range, the encoder is untrained, or what they are given with
            does not go with them.
    """
    blocks, rank = model_args.trainable_blocks, model_args.lora_rank
    if blocks is None and rank is None:
        return
    if blocks is not None and rank is not None:
        raise ValueError(
            "--trainable_blocks and --lora_rank are two ways to train less of the encoder: leave one out."
        )
    flag = "trainable_blocks" if rank is None else "lora_rank"
    if blocks is not None and not 1 <= blocks <= config.num_hidden_layers:
        raise ValueError(
            f"--trainable_blocks is {blocks}; the encoder has {config.num_hidden_layers} blocks: give 1 to "
            f"{config.num_hidden_layers}."
        )
    if rank is not None and rank < 1:
        raise ValueError(f"--lora_rank is {rank}; expected at least 1.")
    if model_args.model_name_or_path is None and not getattr(config, "initialize_from_base", False):
        raise ValueError(
            f"--{flag} leaves most of the encoder as it is, and here it is untrained: give --model_name_or_path."
        )
    if training_args.num_stages > 1:
        raise ValueError(
            f"--{flag} is for one stage: the student of a later one is untrained. Leave --num_stages out."
        )
    if rank is not None and training_args.fsdp:
        raise ValueError("--lora_rank does not work with FSDP, whose shards the averaged targets could not add up.")
    if rank is not None and importlib.util.find_spec("peft") is None:
        raise ValueError(_NO_PEFT)


def train_last_blocks(model: PreTrainedModel, number: int) -> None:
    """
    Freezes the encoder of a pretraining model but for its last `number` blocks, its final LayerNorm, and what a method
    has put into it anew (TEC's input adapter). No gradient goes further down, so that nothing is kept for one.
    """
    _freeze_encoder(model)
    for part in (*model.encoder.layers[-number:], model.encoder.layernorm):
        part.requires_grad_(True)


def add_encoder_lora(model: PreTrainedModel, rank: int, start: str | None = None):
    """
    Freezes the encoder of a pretraining model, but for what a method has put into it anew, and puts PEFT's low-rank
    updates on the linear maps of its blocks.

    Args:
        rank (`int`): Of the updates, at least 1.
        start (`str`, *optional*): Where the encoder is from, for the adapter's config.

    Returns:
        PEFT's `PeftModel` of the encoder: `save_pretrained(folder)` writes the adapter, `merge_and_unload()` folds it
        into the weights when training is done.
    """
    from peft import LoraConfig, get_peft_model

    _freeze_encoder(model)
    trained = [parameter for parameter in model.encoder.parameters() if parameter.requires_grad]
    targets = _lora_targets(model.encoder)
    tuner = get_peft_model(model.encoder, LoraConfig(r=rank, lora_alpha=rank, target_modules=targets))
    tuner.peft_config["default"].base_model_name_or_path = start
    for parameter in trained:
        parameter.requires_grad_(True)
    return tuner


def _freeze_encoder(model: PreTrainedModel) -> None:
    """All that came with the weights; a ViT's state dict has no other."""
    encoder = model.encoder
    given = encoder.vit_state_dict() if hasattr(encoder, "vit_state_dict") else encoder.state_dict()
    for name, parameter in encoder.named_parameters():
        if name in given:
            parameter.requires_grad_(False)


def describe_trainable(model: PreTrainedModel) -> str:
    """How many parameters are trained, out of how many."""
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    total = sum(p.numel() for p in model.parameters())
    return f"trains {trained:,} of {total:,} parameters ({100 * trained / total:.2f} %)"
