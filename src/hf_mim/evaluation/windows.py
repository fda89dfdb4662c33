"""A model of pixels on whole pictures, by windows that slide over them."""

from collections.abc import Callable

import torch

from ..models.vit.upsampling import upsample


def window_starts(length: int, window: int, stride: int) -> list[int]:
    """Where windows begin that cover `length` (at least `window`): every `stride`, the last one at the end."""
    return [*range(0, length - window, stride), length - window]


@torch.no_grad()
def sliding_maps(
    predict: Callable[[torch.Tensor], torch.Tensor], pixel_values: torch.Tensor, window: tuple[int, int]
) -> torch.Tensor:
    """
    What is told of each pixel of one picture: the means over windows that overlap by a third.

    Args:
        predict: Takes one window (1, num_channels, *window) and gives maps (1, channels, rows, columns) of any size,
            which are interpolated to the window's.
        pixel_values (`torch.Tensor` of shape `(num_channels, height, width)`): No smaller than `window`.

    Returns:
        `torch.Tensor` of shape `(channels, height, width)`, float32.
    """
    (height, width), (rows, columns) = pixel_values.shape[1:], window
    total, counts = 0.0, pixel_values.new_zeros(height, width)
    for top in window_starts(height, rows, max(1, 2 * rows // 3)):
        for left in window_starts(width, columns, max(1, 2 * columns // 3)):
            part = ..., slice(top, top + rows), slice(left, left + columns)
            maps = upsample(predict(pixel_values[part].unsqueeze(0)), window)[0]
            if counts.sum() == 0:
                total = maps.new_zeros(len(maps), height, width)
            total[part] += maps
            counts[part] += 1
    return total / counts
