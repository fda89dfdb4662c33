"""The classifier or model of pixels that the flags ask for, with the weights that they name."""

import copy
from types import SimpleNamespace

import torch
from transformers import AutoModelForImageClassification, PreTrainedConfig, PreTrainedModel
from transformers.utils import logging

from ..models.vit.alignment import align_weights
from ..models.vit.transfer import at_image_size
from ..registry import BASELINES, ENCODER, METHODS, method_class
from .building import build_config
from .command import ClassifierArguments
from .weights import (
    attention_of,
    check_asked_for,
    check_there,
    load_encoder_at,
    load_resized,
    read_config,
    sizes_asked_for,
)

logger = logging.get_logger(__name__)


def build_classifier_config(args: ClassifierArguments, image_size: tuple[int, int] | None, num_channels: int | None):
    """
    The config of the classifier to be fine-tuned, still without its labels. Sizes and channels as in `build_config`.

    A ViTMAE, which transformers has no classifier for, becomes a `masked_vit`, and so does a stock ViT that is to pool
    by the mean; every other model stays what it is.

    Raises:
        ValueError: If the weights cannot be read, or have other sizes than the flags ask for.
    """
    path = args.model_name_or_path
    if path is None:
        model_type = "masked_vit" if args.model_type in BASELINES else args.model_type
        flags = SimpleNamespace(**{"mask_ratio": None, "channel_map": None} | vars(args) | {"model_type": model_type})
        config = build_config(flags, image_size, num_channels)
    else:
        if args.config_overrides or args.patch_size:
            raise ValueError("--config_overrides and --patch_size are for untrained networks: leave them out.")
        config = read_config(path)
        if config.model_type in BASELINES or (config.model_type == "vit" and args.pooling == "mean"):
            config = load_encoder_at(path).config
        given = {name: getattr(config, name, None) for name in ("image_size", "num_channels", "num_hidden_layers")}
        if not isinstance(given["num_hidden_layers"], int) or given["image_size"] is None:
            raise ValueError(f"{path} ({config.model_type}) is no Vision Transformer of one width and a fixed size.")
        if image_size is not None and config.model_type in (*METHODS, *ENCODER, "vit"):
            config = at_image_size(config, image_size)
            given["image_size"] = image_size
        check_asked_for(path, given, sizes_asked_for(image_size, num_channels))
    if config.model_type in METHODS | ENCODER:
        trained = any("ImageClassification" in name for name in config.architectures or ())
        config.pooling = args.pooling or (config.pooling if trained else "mean")
    elif args.pooling is not None and (config.model_type, args.pooling) != ("vit", "cls"):
        raise ValueError(f"--pooling {args.pooling}: a {config.model_type} has a way of its own. Leave it out.")
    if hasattr(config, "tuning_mode"):
        # Decides which parts the classifier is built with.
        config.tuning_mode = {"all": "full", "head": "linear"}.get(args.trainable, args.trainable)
    if hasattr(config, "drop_path_rate"):
        config.drop_path_rate = args.drop_path_rate
        # It is no longer the config of the run that trained the weights, whose rate a classifier would leave behind.
        config.architectures = None
    elif args.drop_path_rate:
        logger.warning(f"A {config.model_type} of transformers has no drop path: --drop_path_rate is left out.")
    return config


def build_classifier(args: ClassifierArguments, config) -> PreTrainedModel:
    """
    The classifier, with the weights of `model_name_or_path` where given; its head is new unless the weights have one
    for the same labels.

    Raises:
        ValueError: If the weights lack more than the head.
    """
    kwargs = attention_of(args)
    path = args.model_name_or_path
    source = None if path is None else read_config(path)
    if source is None or source.model_type != config.model_type:
        model = method_class(config.model_type, "ForImageClassification")._from_config(config, **kwargs)
        if source is not None:
            model.encoder.load_vit_state_dict(load_encoder_at(path, config.image_size).vit_state_dict())
        _start_head(model)
        return model
    model, info = load_resized(
        AutoModelForImageClassification.from_pretrained, path, config, source, ignore_mismatched_sizes=True, **kwargs
    )
    align_weights(model)
    head = {f"classifier.{name}" for name in model.classifier.state_dict()}
    missing = set(info["missing_keys"]) - head
    if missing:
        raise ValueError(f"{path} lacks weights of the encoder: {', '.join(sorted(missing)[:3])} ({len(missing)}).")
    has_head = not info["missing_keys"] and not info["mismatched_keys"]
    if not has_head or source.id2label != config.id2label:
        if any("ImageClassification" in name for name in source.architectures or ()):
            logger.warning(f"{path} is a classifier of other labels: the head starts anew.")
        _start_head(model)
    return model


def _start_head(model: PreTrainedModel) -> None:
    """Near zero, as MAE's fine-tuning: the first steps do not push a random head's gradient through the encoder."""
    torch.nn.init.trunc_normal_(model.classifier.weight, std=2e-5)
    torch.nn.init.zeros_(model.classifier.bias)


def build_dense_config(
    args: ClassifierArguments, image_size: tuple[int, int] | None, num_channels: int | None
) -> tuple[PreTrainedConfig, PreTrainedModel | None]:
    """
    The config of a model of pixels to be trained, still without its head, and the encoder that it starts from:
    any that `encoder_from` reads, with positions interpolated to `image_size`; None where it is untrained.

    Raises:
        ValueError: If the weights cannot be read, or have other sizes than the flags ask for.
    """
    path = args.model_name_or_path
    if path is None:
        config, encoder = build_classifier_config(args, image_size, num_channels), None
    else:
        if args.config_overrides or args.patch_size:
            raise ValueError("--config_overrides and --patch_size are for untrained networks: leave them out.")
        check_there(path, "model_name_or_path")
        try:
            encoder = load_encoder_at(path, image_size)
        except (OSError, ValueError) as error:
            raise ValueError(f"--model_name_or_path {path}: {error}") from error
        config = copy.deepcopy(encoder.config)
        # It is no longer the config of the run that trained the weights.
        config.architectures = None
        if num_channels not in (None, config.num_channels):
            raise ValueError(f"--num_channels {num_channels}: {path} takes {config.num_channels}. Leave it out.")
    config.drop_path_rate = args.drop_path_rate
    return config, encoder


def build_dense(args: ClassifierArguments, config, encoder: PreTrainedModel | None, suffix: str) -> PreTrainedModel:
    """
    The model of pixels of `config`, whose class's name ends in `suffix`, with the weights of `encoder` where there is
    one; its head is new.
    """
    config.check_sizes()
    model_class = method_class(config.model_type, suffix)
    model = model_class._from_config(config, dtype=torch.float32, **attention_of(args))
    if encoder is not None:
        model.encoder.load_state_dict(encoder.state_dict())
    return model
