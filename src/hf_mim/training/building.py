"""The model that the flags ask for: from a preset, or from weights."""

from dataclasses import fields

from huggingface_hub.errors import StrictDataclassError
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import logging

from ..models.presets import preset_config
from ..models.vit.channels import read_channel_map, with_channels
from ..models.vit.encoders import why_not_loaded
from ..models.vit.frozen import FrozenViT, build_frozen, check_frozen_channels, frozen_grid
from ..models.vit.frozen_layouts import describe_config
from ..models.vit.frozen_sources import load_source, read_description, read_source
from ..models.vit.pretraining import MaskedViTForPreTraining
from ..models.vit.transfer import at_image_size
from ..registry import ENCODER, METHODS, MODEL_TYPES, RECORDS, method_class, method_name
from .command import ModelArguments
from .config_overrides import parse_overrides
from .weights import (
    ENCODER_FIELDS,
    attention_of,
    check_asked_for,
    check_there,
    load_encoder_at,
    load_resized,
    read_config,
    sizes_asked_for,
)

logger = logging.get_logger(__name__)


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
        check_asked_for(args.model_name_or_path, given, sizes_asked_for(image_size, num_channels) | chosen)
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
                raise ValueError(f"--{flag} {path}: {why_not_loaded(path, error)}") from error
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


def build_model(args: ModelArguments, config) -> MaskedViTForPreTraining:
    """The pretraining model, with the weights of `model_name_or_path` where given."""
    model_class = method_class(args.model_type, "ForPreTraining")
    kwargs = attention_of(args)
    part, frozen = RECORDS[args.model_type].frozen, _frozen_path(args)
    if args.model_name_or_path is None:
        model = model_class._from_config(config, **kwargs)
        if frozen is not None:
            model.take_source(read_source(frozen))
        return model
    source = read_config(args.model_name_or_path)
    if source.model_type == args.model_type and source.num_channels == config.num_channels and not args.channel_map:
        try:
            model, info = load_resized(
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
        encoder = load_encoder_at(args.model_name_or_path, config.image_size)
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


def load_beginning(args: ModelArguments, config) -> PreTrainedModel | FrozenViT | None:
    """
    The trained network that a run begins with, as it was: the encoder of `model_name_or_path` for the run's images;
    else the network that the method learns from. None where there is neither.
    """
    if args.model_name_or_path is not None:
        encoder = load_encoder_at(args.model_name_or_path, config.image_size)
        return with_channels(encoder, config.num_channels, args.channel_map)
    path = _frozen_path(args)
    if path is None:
        return None
    frozen = build_frozen(config, RECORDS[args.model_type].frozen.name)
    load_source(frozen, read_source(path))
    return frozen


def _say_what_is_new(path: str, source, names: set[str]) -> None:
    built = sorted({name.split(".")[0] for name in names})
    if built:
        logger.warning(f"{path} ({source.model_type}) gives the encoder; new: {', '.join(built)}.")


def load_pretraining_model(args: ModelArguments, folder: str) -> MaskedViTForPreTraining:
    """The pretraining model that a run of the method has saved in `folder`."""
    return method_class(args.model_type, "ForPreTraining").from_pretrained(folder, **attention_of(args))


def _frozen_path(args: ModelArguments) -> str | None:
    """The trained network that the method learns from, if the flags name one."""
    part = RECORDS[args.model_type].frozen
    return None if part is None else getattr(args, f"{part.name}_model_name_or_path")


def _fields_of_weights(args, image_size: tuple[int, int] | None, num_channels: int | None) -> dict:
    path, model_type = args.model_name_or_path, args.model_type
    config = read_config(path)
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
                config = load_encoder_at(path, image_size).config
            except ValueError as error:
                raise ValueError(f"--model_name_or_path {path}: {error}") from error
        given = {name: getattr(config, name) for name in ENCODER_FIELDS}
        if not config.use_cls_token and getattr(method_class(model_type, "Config"), "needs_cls_token", True):
            # The method adds one.
            del given["use_cls_token"], given["pooling"]
    if args.channel_map is not None:
        read_channel_map(args.channel_map, given["num_channels"])
    return given if num_channels is None else given | {"num_channels": num_channels}
