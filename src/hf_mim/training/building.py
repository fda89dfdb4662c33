"""The model that the flags ask for: from a preset, or from weights."""

import copy
import json
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, AutoModelForImageClassification, PreTrainedConfig, PreTrainedModel
from transformers.utils import logging

from ..models.presets import preset_config
from ..models.vit.alignment import align_weights
from ..models.vit.channels import map_normalization, read_channel_map, with_channels
from ..models.vit.checkpoint_files import refuse_folder
from ..models.vit.encoders import encoder_from, read_normalization
from ..models.vit.frozen import check_frozen_channels, frozen_grid
from ..models.vit.frozen_layouts import describe_config
from ..models.vit.frozen_sources import read_description, read_source
from ..models.vit.pretraining import MaskedViTForPreTraining
from ..models.vit.repository import locate
from ..models.vit.sizes import as_pair
from ..models.vit.transfer import at_image_size, load_at_another_size
from ..registry import BASELINES, ENCODER, METHODS, MODEL_TYPES, RECORDS, method_class, method_name
from .command import ClassifierArguments, ModelArguments

logger = logging.get_logger(__name__)

# What tells an encoder's shape; weights that are loaded decide it.
_ENCODER_FIELDS = (
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


def build_config(args: ModelArguments, image_size: tuple[int, int] | None, num_channels: int | None):
    """
    The method's config by preset and flags; with `model_name_or_path`, the encoder's fields are those of the weights,
    and all are where the weights are of the same method. Sizes and channels that are None are those of the weights,
    else the preset's and 3; with other channels than theirs the weights' filters are spread over these.

    Raises:
        ValueError: If a name is unknown or sizes do not fit.
    """
    settings = preset_config(args.model_type, args.preset, image_size, args.patch_size)
    settings["num_channels"] = 3 if num_channels is None else num_channels
    if args.channel_map is not None:
        if args.model_name_or_path is None:
            raise ValueError("--channel_map is of the weights that --model_name_or_path names: give it too.")
        if num_channels not in (None, len(args.channel_map)):
            raise ValueError(
                f"--channel_map has {len(args.channel_map)} entries, and --num_channels is {num_channels}."
            )
        num_channels = len(args.channel_map)
    config_class = method_class(args.model_type, "Config")
    chosen = parse_overrides(args.config_overrides)
    unknown = sorted(set(chosen) - set(config_class().to_dict()))
    if unknown:
        raise ValueError(f"--config_overrides: {config_class.__name__} has no field {', '.join(unknown)}.")
    if args.patch_size is not None:
        chosen["patch_size"] = [args.patch_size[0], args.patch_size[-1]]
    if args.mask_ratio is not None:
        chosen["mask_ratio"] = args.mask_ratio
    if args.model_name_or_path is not None:
        given = _fields_of_weights(args, image_size, num_channels)
        _check_asked_for(args.model_name_or_path, given, _sizes_asked_for(image_size, num_channels) | chosen)
        # The baseline has not all fields that the methods share.
        known = {field.name for field in fields(config_class)}
        settings |= {name: value for name, value in given.items() if name in known}
    try:
        return config_class(**(settings | chosen))
    except StrictDataclassError as error:
        raise ValueError(f"The network's config: {' '.join(str(error).split())}") from error


def describe_frozen(args: ModelArguments, config, num_channels: int | None) -> None:
    """
    Writes into a method's config which trained network it learns from, and that network's channels where the flags
    name none.

    Raises:
        ValueError: If the flag that names it is missing, or names what cannot be learnt from.
    """
    if args.base_channels is not None and _frozen_path(args) is None:
        raise ValueError(
            "--base_channels is of the network that TEC or dBOT learns from: give --base_model_name_or_path or "
            "--teacher_model_name_or_path too."
        )
    for model_type, record in RECORDS.items():
        if record.frozen is None:
            continue
        name, optional = record.frozen.name, record.frozen.optional
        flag = f"{name}_model_name_or_path"
        path = getattr(args, flag)
        if model_type != args.model_type:
            if path is not None:
                raise ValueError(f"--{flag} is of {method_name(model_type)}; --model_type is {args.model_type}.")
        elif path is not None:
            check_there(path, flag)
            try:
                frozen, mean, std = read_description(path)
            except (OSError, ValueError) as error:
                raise ValueError(f"--{flag} {path}: {error}") from error
            if num_channels is None and args.model_name_or_path is None and args.base_channels is None:
                config.num_channels = frozen.num_channels
            if args.base_channels is None and frozen.num_channels != config.num_channels:
                raise ValueError(
                    f"--{flag} {path} takes pictures of {frozen.num_channels} channels; these have "
                    f"{config.num_channels}. Leave --num_channels out, choose another network, or say by "
                    f"--base_channels which {frozen.num_channels} of the channels it sees, from 0."
                )
            check_frozen_channels(args.base_channels, frozen.num_channels, config.num_channels)
            try:
                frozen_grid(frozen, config.grid_size)
            except ValueError as error:
                raise ValueError(f"--{flag} {path}: {error}") from error
            setattr(config, f"{name}_channels", args.base_channels)
            setattr(config, f"{name}_config", describe_config(frozen))
            setattr(config, f"{name}_image_mean", mean)
            setattr(config, f"{name}_image_std", std)
        elif not optional and args.model_name_or_path is None:
            raise ValueError(
                f"{method_name(model_type)} learns from a trained network: give --{flag}, a folder or a name on the "
                "Hub (a ViT with [CLS]: of hf_mim, ViT, ViTMAE, DINOv2, DINOv3 or CLIP)."
            )


def _sizes_asked_for(image_size: tuple[int, int] | None, num_channels: int | None) -> dict:
    asked = {"image_size": image_size, "num_channels": num_channels}
    return {name: value for name, value in asked.items() if value is not None}


def _check_asked_for(path: str, given: dict, asked: dict) -> None:
    for name in set(_ENCODER_FIELDS) & set(asked):
        there, here = (
            as_pair(value) if name in ("image_size", "patch_size") else value for value in (given[name], asked[name])
        )
        if there != here:
            raise ValueError(f"{name}: {here} is asked for, and {path} has {there}. Leave {name} out of the flags.")


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
        config = _read_config(path)
        if config.model_type in BASELINES or (config.model_type == "vit" and args.pooling == "mean"):
            config = _load_encoder(path).config
        given = {name: getattr(config, name, None) for name in ("image_size", "num_channels", "num_hidden_layers")}
        if not isinstance(given["num_hidden_layers"], int) or given["image_size"] is None:
            raise ValueError(f"{path} ({config.model_type}) is no Vision Transformer of one width and a fixed size.")
        if image_size is not None and config.model_type in (*METHODS, *ENCODER, "vit"):
            config = at_image_size(config, image_size)
            given["image_size"] = image_size
        _check_asked_for(path, given, _sizes_asked_for(image_size, num_channels))
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
    kwargs = _attention(args)
    path = args.model_name_or_path
    source = None if path is None else _read_config(path)
    if source is None or source.model_type != config.model_type:
        model = method_class(config.model_type, "ForImageClassification")._from_config(config, **kwargs)
        if source is not None:
            model.encoder.load_vit_state_dict(_load_encoder(path, config.image_size).vit_state_dict())
        _start_head(model)
        return model
    model, info = _from_pretrained(
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
            encoder = _load_encoder(path, image_size)
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
    model = model_class._from_config(config, dtype=torch.float32, **_attention(args))
    if encoder is not None:
        model.encoder.load_state_dict(encoder.state_dict())
    return model


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


def build_model(args: ModelArguments, config) -> MaskedViTForPreTraining:
    """The pretraining model, with the weights of `model_name_or_path` where given."""
    model_class = method_class(args.model_type, "ForPreTraining")
    kwargs = _attention(args)
    part, frozen = RECORDS[args.model_type].frozen, _frozen_path(args)
    if args.model_name_or_path is None:
        model = model_class._from_config(config, **kwargs)
        if frozen is not None:
            model.take_source(read_source(frozen))
        return model
    source = _read_config(args.model_name_or_path)
    if source.model_type == args.model_type and source.num_channels == config.num_channels and not args.channel_map:
        try:
            model, info = _from_pretrained(
                model_class.from_pretrained, args.model_name_or_path, config, source, initialize_missing=True, **kwargs
            )
        except RuntimeError as error:
            if "ignore_mismatched_sizes" not in str(error):
                raise
            raise ValueError(
                f"The decoders in {args.model_name_or_path} have other sizes than the flags ask for (see the report "
                "above). Leave their sizes out of --config_overrides."
            ) from error
        missing = info["missing_keys"]
        _say_what_is_new(args.model_name_or_path, source, set(missing))
    else:
        model = model_class._from_config(config, **kwargs)
        encoder = _load_encoder(args.model_name_or_path, config.image_size)
        model.load_encoder(with_channels(encoder, config.num_channels, args.channel_map))
        given = (f"{model.base_model_prefix}.", *([] if frozen is None else [f"{part.name}."]))
        missing = {name for name in model.state_dict() if not name.startswith(given)}
        _say_what_is_new(args.model_name_or_path, source, model.fill_missing(missing))
    if frozen is not None:
        model.take_source(read_source(frozen), new_encoder=False)
    elif part is not None and not part.optional and any(key.startswith(f"{part.name}.") for key in missing):
        raise ValueError(
            f"{args.model_name_or_path} does not hold the network that {method_name(args.model_type)} learns from. "
            f"Give --{part.name}_model_name_or_path too."
        )
    return model


def _say_what_is_new(path: str, source, names: set[str]) -> None:
    built = sorted({name.split(".")[0] for name in names})
    if built:
        logger.warning(f"{path} ({source.model_type}) gives the encoder; new: {', '.join(built)}.")


def load_pretraining_model(args: ModelArguments, folder: str) -> MaskedViTForPreTraining:
    """The pretraining model that a run of the method has saved in `folder`."""
    return method_class(args.model_type, "ForPreTraining").from_pretrained(folder, **_attention(args))


def _attention(args: ModelArguments | ClassifierArguments) -> dict[str, str]:
    return {} if args.attn_implementation is None else {"attn_implementation": args.attn_implementation}


def _frozen_path(args: ModelArguments) -> str | None:
    """The trained network that the method learns from, if the flags name one."""
    part = RECORDS[args.model_type].frozen
    return None if part is None else getattr(args, f"{part.name}_model_name_or_path")


def parse_overrides(text: str | None) -> dict:
    """`"a=1,b=[2,3],c=mean"` or a JSON object as a dictionary; values are read as JSON where they are JSON."""
    if not text:
        return {}
    if text.lstrip().startswith("{"):
        try:
            return json.loads(text)
        except ValueError as error:
            raise ValueError(f"--config_overrides is {text!r}, which is not JSON: {error}.") from error
    overrides: dict = {}
    name = None
    for part in text.split(","):
        if "=" in part:
            name, _, value = part.partition("=")
            overrides[name.strip()] = value
        elif name is not None:
            # A comma inside a list.
            overrides[name.strip()] += "," + part
        else:
            raise ValueError(f"--config_overrides is {text!r}; expected name=value, separated by commas.")
    return {name: _read_value(value) for name, value in overrides.items()}


def _read_value(text: str):
    text = text.strip()
    try:
        return json.loads({"True": "true", "False": "false", "None": "null"}.get(text, text))
    except ValueError:
        return text


def _load_encoder(path: str, image_size=None):
    """The encoder at `path` as ours; at another image size with interpolated positions."""
    encoder = encoder_from(locate(path))
    if image_size is None or as_pair(image_size) == as_pair(encoder.config.image_size):
        return encoder
    resized = type(encoder)(at_image_size(encoder.config, as_pair(image_size)))
    load_at_another_size(resized, encoder)
    return resized.eval()


def _from_pretrained(load, path: str, config, source, **kwargs):
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


def _read_config(path: str) -> PreTrainedConfig:
    check_there(path, "model_name_or_path")
    try:
        return encoder_from(path).config if Path(path).is_file() else AutoConfig.from_pretrained(locate(path))
    except (OSError, ValueError) as error:
        raise ValueError(f"--model_name_or_path {path}: {error}") from error


def _fields_of_weights(args, image_size: tuple[int, int] | None, num_channels: int | None) -> dict:
    path, model_type = args.model_name_or_path, args.model_type
    config = _read_config(path)
    if image_size is not None and config.model_type in MODEL_TYPES | ENCODER:
        config = at_image_size(config, image_size)
    if config.model_type == model_type:
        # Of a baseline transformers reads its own fields alone.
        names = {field.name for field in fields(method_class(model_type, "Config"))}
        names = {name for name in names if hasattr(config, name)} - {field.name for field in fields(PreTrainedConfig)}
        given = {name: getattr(config, name) for name in names if not name.startswith("_")}
    else:
        if config.model_type not in METHODS | ENCODER:
            try:
                config = _load_encoder(path, image_size).config
            except ValueError as error:
                raise ValueError(f"--model_name_or_path {path}: {error}") from error
        given = {name: getattr(config, name) for name in _ENCODER_FIELDS}
        if not config.use_cls_token and getattr(method_class(model_type, "Config"), "needs_cls_token", True):
            # The method adds one.
            del given["use_cls_token"], given["pooling"]
    if args.channel_map is not None:
        read_channel_map(args.channel_map, given["num_channels"])
    return given if num_channels is None else given | {"num_channels": num_channels}
