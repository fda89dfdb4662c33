"""Maps at the size of pictures."""

import torch
from torch import nn


def upsample(maps: torch.Tensor, size) -> torch.Tensor:
    """Maps (batch_size, channels, rows, columns) at that (height, width), bilinearly, in float32."""
    return nn.functional.interpolate(maps.float(), size=tuple(size), mode="bilinear", align_corners=False)
