"""Trained networks as they are found, in memory, in a folder or on the Hub, for what is frozen."""

import copy
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel

from .configuration_vit import MaskedViTConfig
from .encoders import encoder_from, load_quietly, read_normalization, tower_of
from .frozen import FrozenViT
from .frozen_layouts import describe_config, layout_of
from .layouts import LAYOUTS


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
            without registers), DINOv3's ViT, or CLIP (its vision tower); DeiT and timm's `vit_*`, which are frozen as
            our encoder with their weights. Of a model with heads or decoders the encoder is taken. A path's
            `preprocessor_config.json` tells the normalisation.

    Raises:
        ValueError: If the network cannot give targets (no [CLS], convolutional, hierarchical, unknown), saying why, or
            if its weights are not all there.
        OSError: If there is no such model.
    """
    if isinstance(model_or_path, PreTrainedModel) and not _is_read_as_ours(tower_of(model_or_path).config):
        encoder = _encoder_of(model_or_path)
        return FrozenSource(encoder.config, encoder.state_dict())
    if not isinstance(model_or_path, (str, Path)):
        encoder = encoder_from(model_or_path)
        layout_of(encoder.config)
        return FrozenSource(encoder.config, encoder.state_dict())
    encoder = _read_encoder(model_or_path)
    return FrozenSource(encoder.config, encoder.state_dict(), *read_normalization(model_or_path))


def _read_encoder(path: str) -> PreTrainedModel:
    config = None if Path(path).expanduser().is_file() else AutoConfig.from_pretrained(path)
    tower = getattr(config, "vision_config", config)
    if config is None or _is_read_as_ours(tower):
        encoder = encoder_from(path)
        layout_of(encoder.config)
        return encoder
    layout_of(tower)
    # AutoModel of a CLIP checkpoint would have its text tower too.
    return load_quietly(AutoModel, path, **({} if tower is config else {"config": tower}))


def read_description(path: str) -> tuple[PreTrainedConfig, list[float] | None, list[float] | None]:
    """
    What is known of a trained network without its weights: config of the encoder, mean and standard deviation of its
    pixels, None where it does not say.

    Raises:
        ValueError: If the network cannot give targets, saying why.
        OSError: If there is no such model.
    """
    config = None if Path(path).expanduser().is_file() else AutoConfig.from_pretrained(path)
    config = getattr(config, "vision_config", config)
    if config is None or _is_read_as_ours(config):
        # Its own config does not describe ours.
        config = encoder_from(path).config
    layout_of(config)
    return config, *read_normalization(path)


def _encoder_of(model: PreTrainedModel) -> PreTrainedModel:
    model = tower_of(model)
    layout = layout_of(model.config)
    is_encoder = any(name == layout.blocks for name, _ in model.named_modules())
    return model if is_encoder else model.base_model


def _is_read_as_ours(config: PreTrainedConfig) -> bool:
    """Whether what is frozen is our encoder with a network's weights, and not the network."""
    layout = LAYOUTS.get(config.model_type)
    return config.model_type == "timm_wrapper" or (layout is not None and layout.has_cls and not layout.frozen)


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
