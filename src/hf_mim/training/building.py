"""The model that the flags ask for: from a preset, or from weights."""

import json

import torch
from transformers import AutoConfig, AutoModel
from transformers.utils import logging

from ..hub.vit import encoder_from_vit
from ..models.vit.configuration_vit import as_pair
from ..models.vit.modeling_vit import MaskedViTForPreTraining
from ..registry import METHODS, method_class
from .command import ModelArguments
from .presets import preset_config

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
    "position_embedding",
    "pooling",
)


def build_config(args: ModelArguments, image_size: tuple[int, int] | None, num_channels: int):
    """
    The method's config by preset and flags; with `model_name_or_path`, the encoder's fields are those of the weights.

    Raises:
        ValueError: If a name is unknown or sizes do not fit.
    """
    fields = preset_config(args.model_type, args.preset, image_size) | {"num_channels": num_channels}
    if args.patch_size is not None:
        fields["patch_size"] = [args.patch_size[0], args.patch_size[-1]]
    if args.mask_ratio is not None:
        fields["mask_ratio"] = args.mask_ratio
    overrides = parse_overrides(args.config_overrides)
    config_class = method_class(args.model_type, "Config")
    unknown = sorted(set(overrides) - set(config_class().to_dict()))
    if unknown:
        raise ValueError(f"--config_overrides: {config_class.__name__} has no field {', '.join(unknown)}.")
    if args.model_name_or_path is not None:
        fields |= _encoder_fields(args.model_name_or_path)
        if image_size is not None and tuple(image_size) != as_pair(fields["image_size"]):
            raise ValueError(
                f"--image_size {' '.join(map(str, image_size))}: {args.model_name_or_path} has "
                f"{' x '.join(map(str, as_pair(fields['image_size'])))} pixels. Leave --image_size out."
            )
        if num_channels != fields["num_channels"]:
            raise ValueError(
                f"--num_channels {num_channels}: {args.model_name_or_path} has {fields['num_channels']} channels."
            )
    return config_class(**(fields | overrides))


def build_model(args: ModelArguments, config) -> MaskedViTForPreTraining:
    """The pretraining model, with the weights of `model_name_or_path` where given."""
    model_class = method_class(args.model_type, "ForPreTraining")
    kwargs = {} if args.attn_implementation is None else {"attn_implementation": args.attn_implementation}
    if args.model_name_or_path is None:
        return model_class._from_config(config, **kwargs)
    source = AutoConfig.from_pretrained(args.model_name_or_path)
    if source.model_type == args.model_type:
        return model_class.from_pretrained(args.model_name_or_path, config=config, initialize_missing=True, **kwargs)
    model = model_class._from_config(config, **kwargs)
    model.encoder.load_state_dict(_load_encoder(args.model_name_or_path).state_dict())
    missing = {name for name in model.state_dict() if not name.startswith("encoder.")}
    built = sorted({name.split(".")[0] for name in model.fill_missing(missing)})
    if built:
        logger.warning(f"{args.model_name_or_path} ({source.model_type}) gives the encoder; new: {', '.join(built)}.")
    return model


def parse_overrides(text: str | None) -> dict:
    """`"a=1,b=[2,3],c=mean"` or a JSON object as a dictionary; values are read as JSON where they are JSON."""
    if not text:
        return {}
    if text.lstrip().startswith("{"):
        return json.loads(text)
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
    try:
        return json.loads(text.strip().lower() if text.strip() in ("True", "False", "None") else text)
    except ValueError:
        return text.strip()


def _load_encoder(path: str):
    source = AutoConfig.from_pretrained(path)
    encoder = AutoModel.from_pretrained(path, dtype=torch.float32)
    return encoder if source.model_type in METHODS else encoder_from_vit(encoder)


def _encoder_fields(path: str) -> dict:
    config = AutoConfig.from_pretrained(path)
    if config.model_type not in METHODS:
        config = _load_encoder(path).config
    return {name: getattr(config, name) for name in _ENCODER_FIELDS}
