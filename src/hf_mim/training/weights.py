"""The weights that flags name: their config, their encoder at another image size, how they want pixels normalised."""

import copy
from pathlib import Path

import torch
from transformers import AutoConfig, PreTrainedConfig
from transformers.utils import logging

from ..models.vit.channels import map_normalization
from ..models.vit.checkpoint_files import refuse_folder
from ..models.vit.encoders import encoder_from, read_normalization, why_not_loaded
from ..models.vit.repository import locate
from ..models.vit.sizes import as_pair
from ..models.vit.transfer import at_image_size, load_at_another_size
from .command import ClassifierArguments, ModelArguments

logger = logging.get_logger(__name__)


# What tells an encoder's shape; weights that are loaded decide it.
ENCODER_FIELDS = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "hidden_act",
    "layer_norm_eps",
    "image_size",
    "patch_size",
    "num_channels",
    "qkv_bias",
    "key_bias",
    "use_gated_mlp",
    "embedding_layernorm",
    "num_register_tokens",
    "position_embedding",
    "rope_theta",
    "position_interpolation",
    "sincos_grid",
    "use_cls_token",
    "pooling",
)


def sizes_asked_for(image_size: tuple[int, int] | None, num_channels: int | None) -> dict:
    asked = {"image_size": image_size, "num_channels": num_channels}
    return {name: value for name, value in asked.items() if value is not None}


def check_asked_for(path: str, given: dict, asked: dict) -> None:
    for name in set(ENCODER_FIELDS) & set(asked):
        there, here = (
            as_pair(value) if name in ("image_size", "patch_size") else value for value in (given[name], asked[name])
        )
        if there != here:
            raise ValueError(f"{name}: {here} is asked for, and {path} has {there}. Leave {name} out of the flags.")


def trained_normalization(
    args: ModelArguments | ClassifierArguments,
) -> tuple[list[float] | None, list[float] | None]:
    """
    Mean and standard deviation that the weights of `model_name_or_path` were trained with, in the order of the images'
    channels; None if not known, or in place of a number of a channel that the weights do not have.
    """
    if args.model_name_or_path is None:
        return None, None
    mean, std = read_normalization(locate(args.model_name_or_path))
    channel_map = getattr(args, "channel_map", None)
    if channel_map is not None:
        mean, std = (map_normalization(values, channel_map) for values in (mean, std))
    return mean, std


def attention_of(args: ModelArguments | ClassifierArguments) -> dict[str, str]:
    return {} if args.attn_implementation is None else {"attn_implementation": args.attn_implementation}


def load_encoder_at(path: str, image_size=None):
    """The encoder at `path` as ours; at another image size with interpolated positions."""
    encoder = encoder_from(locate(path))
    if image_size is None or as_pair(image_size) == as_pair(encoder.config.image_size):
        return encoder
    resized = type(encoder)(at_image_size(encoder.config, as_pair(image_size)))
    load_at_another_size(resized, encoder)
    return resized.eval()


def load_resized(load, path: str, config, source, **kwargs):
    """
    A model of `config` with the weights at `path`, whose own config is `source`, and what is to be said of loading.
    Where only the image size differs, positions are interpolated.
    """
    # Weights of 16 bits would be trained in 16 bits.
    kwargs |= {"dtype": torch.float32, "output_loading_info": True}
    path = locate(path)
    if as_pair(source.image_size) == as_pair(config.image_size):
        return load(path, config=config, **kwargs)
    own = copy.deepcopy(config)
    own.image_size = source.image_size
    if hasattr(source, "sincos_grid"):
        own.sincos_grid = source.sincos_grid
    model, info = load(path, config=own, **kwargs)
    attention = {name: kwargs[name] for name in ("attn_implementation",) if name in kwargs}
    resized = type(model)._from_config(config, **attention)
    load_at_another_size(resized, model)
    logger.warning(
        f"{path} is of images of {as_pair(source.image_size)} pixels (height, width): its positions are interpolated "
        f"to {as_pair(config.image_size)}."
    )
    return resized.eval(), info


def check_there(path: str, flag: str) -> None:
    """Raises ValueError if `path` can only be a folder, and there is none, or one without a network in it."""
    looks_local = path.startswith((".", "/", "~")) or path.count("/") > 1
    if looks_local and not Path(path).expanduser().exists():
        raise ValueError(f"--{flag} {path}: there is no such folder.")
    folder = Path(path).expanduser()
    if folder.is_dir() and not (folder / "config.json").is_file():
        refuse_folder(folder)


def read_config(path: str) -> PreTrainedConfig:
    check_there(path, "model_name_or_path")
    try:
        return encoder_from(path).config if Path(path).is_file() else AutoConfig.from_pretrained(locate(path))
    except (OSError, ValueError) as error:
        raise ValueError(f"--model_name_or_path {path}: {why_not_loaded(path, error)}") from error
