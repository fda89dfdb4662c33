"""Trained networks as they are found, in memory, in a folder or on the Hub, for what is frozen."""

import copy
import json
from dataclasses import dataclass

import torch
from transformers import AutoConfig, AutoModel, CLIPVisionModel, PreTrainedConfig, PreTrainedModel
from transformers.utils import cached_file, logging

from .alignment import align_weights
from .configuration_vit import MaskedViTConfig
from .frozen import FrozenViT
from .frozen_layouts import describe_config, layout_of


@dataclass
class FrozenSource:
    """
    A trained network to be frozen, in parts.

    Args:
        config (`PreTrainedConfig`): Of its encoder; goes into the method's config.
        state (`dict[str, torch.Tensor]`): The weights of its encoder, for [`load_source`].
        image_mean, image_std (`list[float]`, *optional*): How it wants pixels in [0, 1] normalised, if it says so.
    """

    config: PreTrainedConfig
    state: dict[str, torch.Tensor]
    image_mean: list[float] | None = None
    image_std: list[float] | None = None


def read_source(model_or_path) -> FrozenSource:
    """
    A trained network that can be frozen: its config, weights and pixel normalisation.

    Args:
        model_or_path (`PreTrainedModel`, or a path or name on the Hub): One of ours, ViT, ViTMAE, DINOv2 (with or
            without registers), DINOv3's ViT, or CLIP (its vision tower). Of a model with heads or decoders the encoder
            is taken. A path's `preprocessor_config.json` tells the normalisation.

    Raises:
        ValueError: If the network cannot give targets (no [CLS], convolutional, hierarchical, unknown), saying why, or
            if its weights are not all there.
        OSError: If there is no such model.
    """
    if isinstance(model_or_path, PreTrainedModel):
        encoder = _encoder_of(model_or_path)
        return FrozenSource(encoder.config, encoder.state_dict())
    config, *normalization = read_description(model_or_path)
    # AutoModel of a CLIP checkpoint would have its text tower too.
    model_class = CLIPVisionModel if config.model_type == "clip_vision_model" else AutoModel
    encoder = load_quietly(model_class, model_or_path)
    return FrozenSource(encoder.config, encoder.state_dict(), *normalization)


def load_quietly(model_class, path) -> PreTrainedModel:
    """
    An encoder in float32, without the report that a pretraining checkpoint also has decoders.

    Raises:
        ValueError: If the checkpoint lacks weights of the encoder.
    """
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        encoder, info = model_class.from_pretrained(path, dtype=torch.float32, output_loading_info=True)
    finally:
        logging.set_verbosity(verbosity)
    missing = sorted(name for name in info["missing_keys"] if not name.startswith("pooler."))
    if missing:
        raise ValueError(f"{path} lacks weights of its encoder: {', '.join(missing[:3])} ({len(missing)} tensors).")
    align_weights(encoder)
    return encoder


def read_description(path: str) -> tuple[PreTrainedConfig, list[float] | None, list[float] | None]:
    """
    What is known of a trained network without its weights: config of the encoder, mean and standard deviation of its
    pixels, None where it does not say.

    Raises:
        ValueError: If the network cannot give targets, saying why.
        OSError: If there is no such model.
    """
    config = AutoConfig.from_pretrained(path)
    config = getattr(config, "vision_config", config)
    layout_of(config)
    return config, *read_normalization(path)


def _encoder_of(model: PreTrainedModel) -> PreTrainedModel:
    model = getattr(model, "vision_model", model)
    layout = layout_of(model.config)
    is_encoder = any(name == layout.blocks for name, _ in model.named_modules())
    return model if is_encoder else model.base_model


def read_normalization(path: str) -> tuple[list[float] | None, list[float] | None]:
    """Mean and standard deviation, one number a channel or one for all, of the image processor beside a network."""
    for name, key in (("preprocessor_config.json", None), ("processor_config.json", "image_processor")):
        file = cached_file(path, name, _raise_exceptions_for_missing_entries=False)
        if file is not None:
            with open(file, encoding="utf-8") as stream:
                settings = json.load(stream)
            settings = settings.get(key, {}) if key else settings
            if not settings.get("do_normalize", True):
                # Pixels in [0, 1] as they are.
                return [0.0], [1.0]
            if "image_mean" in settings:
                return settings["image_mean"], settings["image_std"]
    return None, None


def student_config(source: FrozenSource, name: str, config: MaskedViTConfig | type[MaskedViTConfig]):
    """
    The config of a model that learns from `source`, with the fields that `build_frozen` reads filled in.

    Args:
        source: The trained network.
        name (`str`): With which the fields start.
        config: Of the model, which is copied; or its class, for the width, depth, heads and grid of `source`.
    """
    if isinstance(config, type):
        names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "image_size", "patch_size")
        config = config(**{field: getattr(source.config, field) for field in (*names, "num_channels")})
    config = copy.deepcopy(config)
    setattr(config, f"{name}_config", describe_config(source.config))
    if source.image_mean is not None:
        setattr(config, f"{name}_image_mean", source.image_mean)
        setattr(config, f"{name}_image_std", source.image_std)
    return config


@torch.no_grad()
def load_source(frozen: FrozenViT, source: FrozenSource) -> None:
    """
    Fills a frozen network with trained weights.

    Raises:
        ValueError: If the weights are of other names or shapes.
    """
    wanted = frozen.network.state_dict()
    try:
        # A source may have more: a pooler, a mask token.
        frozen.network.load_state_dict({name: value for name, value in source.state.items() if name in wanted})
    except RuntimeError as error:
        raise ValueError(
            f"The weights do not fit a frozen network of type {frozen.config.model_type!r}. {error}"
        ) from error
    frozen.is_trained = True
