"""An encoder of some channels for images of others."""

import copy
from collections.abc import Sequence

import torch
from transformers.utils import logging

from .modeling_vit import MaskedViTModel

logger = logging.get_logger(__name__)

# In a channel map: a channel of the images that the weights know nothing of.
NEW = "-"


def read_channel_map(entries: Sequence[str | int], num_given: int) -> list[int | None]:
    """
    Args:
        entries: For each channel of the images, the channel of the weights that it is, from 0, or "-".
        num_given (`int`): Channels that the weights are of.

    Returns:
        The same as numbers, None for "-".

    Raises:
        ValueError: If an entry is none of these, or a channel of the weights is named twice, or none is.
    """
    said = f"--channel_map is {' '.join(map(str, entries))}"
    channels = []
    for entry in map(str, entries):
        if entry != NEW and not (entry.isdecimal() and int(entry) < num_given):
            raise ValueError(
                f"{said}: {entry!r} is no channel of the weights, which have {num_given}: give numbers from 0 to "
                f"{num_given - 1}, or {NEW} for a channel that they do not have."
            )
        channels.append(None if entry == NEW else int(entry))
    named = [channel for channel in channels if channel is not None]
    if not named or len(named) != len(set(named)):
        twice = "no channel of the weights is used" if not named else "a channel of the weights is named twice"
        raise ValueError(f"{said}: {twice}. Name each at most once, and {NEW} for others.")
    return channels


@torch.no_grad()
def with_channels(
    encoder: MaskedViTModel, num_channels: int, channel_map: Sequence[str | int] | None = None
) -> MaskedViTModel:
    """
    The encoder for images of `num_channels` channels.

    With a map, each channel of the images starts with the filters of the channel that it is said to be, and others
    with zeros: the response is that to the channels which the weights know. Without one, and with another number of
    channels, each starts with the mean of the filters times the given number over the new one: images with the same
    in all channels give the response that they gave.

    Args:
        encoder: Returned as it is where nothing changes.
        num_channels (`int`): Of the images.
        channel_map (*optional*): As [`read_channel_map`] takes it, of `num_channels` entries.

    Raises:
        ValueError: If the map does not fit.
    """
    given = encoder.config.num_channels
    channels = None if channel_map is None else read_channel_map(channel_map, given)
    if num_channels == given and channels in (None, list(range(given))):
        return encoder
    if channels is not None and len(channels) != num_channels:
        raise ValueError(f"--channel_map has {len(channels)} entries for images of {num_channels} channels.")
    name = "embeddings.patch_embeddings.projection.weight"
    state = encoder.state_dict()
    filters = state[name]
    if channels is None:
        new = filters.mean(dim=1, keepdim=True).expand(-1, num_channels, -1, -1) * (given / num_channels)
        logger.warning(
            f"The weights are of {given} channels, the images have {num_channels}: each starts with the mean of the "
            f"filters, times {given}/{num_channels}. --channel_map says which channel is which instead."
        )
    else:
        new = torch.zeros_like(filters[:, :1]).repeat(1, num_channels, 1, 1)
        for channel, source in enumerate(channels):
            if source is not None:
                new[:, channel] = filters[:, source]
    config = copy.deepcopy(encoder.config)
    config.num_channels = num_channels
    changed = type(encoder)._from_config(config, attn_implementation=encoder.config._attn_implementation)
    changed.load_state_dict(state | {name: new})
    return changed.eval()


def map_normalization(values: Sequence[float] | None, channel_map: Sequence[str | int]) -> list[float | None] | None:
    """The mean or standard deviation of the weights' channels for those of the images; None where not known."""
    if values is None:
        return None
    named = [int(entry) if str(entry) != NEW else None for entry in channel_map]
    return [None if channel is None else values[channel if len(values) > 1 else 0] for channel in named]
