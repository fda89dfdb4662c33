"""Feature maps of four sizes from the one that a plain Vision Transformer has."""

import torch
from torch import nn


class ChannelLayerNorm(nn.LayerNorm):
    """LayerNorm over the channels of a map (batch_size, channels, height, width)."""

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return super().forward(features.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class SimpleFeaturePyramid(nn.Module):
    """
    ViTDet's simple feature pyramid (Li et al., *Exploring Plain Vision Transformer Backbones for Object Detection*,
    ECCV 2022): each level is made of the last map alone.

    Args:
        in_channels (`int`): Of the map; a multiple of 4.
        out_channels (`int`, defaults to 256): Of every level.
        eps (`float`, defaults to 1e-6): Of the LayerNorms.

    Raises:
        ValueError: If 4 does not divide `in_channels`.
    """

    # Of each level: pixels a side for each patch.
    scales = (4.0, 2.0, 1.0, 0.5)

    def __init__(self, in_channels: int, out_channels: int = 256, eps: float = 1e-6):
        super().__init__()
        if in_channels % 4:
            raise ValueError(f"The pyramid halves the channels twice, and in_channels is {in_channels}: not by 4.")
        half, quarter = in_channels // 2, in_channels // 4
        resized = {
            4.0: (
                nn.ConvTranspose2d(in_channels, half, kernel_size=2, stride=2),
                ChannelLayerNorm(half, eps=eps),
                nn.GELU(),
                nn.ConvTranspose2d(half, quarter, kernel_size=2, stride=2),
            ),
            2.0: (nn.ConvTranspose2d(in_channels, half, kernel_size=2, stride=2),),
            1.0: (),
            # A last odd row or column counts too.
            0.5: (nn.MaxPool2d(kernel_size=2, stride=2, ceil_mode=True),),
        }
        channels = (quarter, half, in_channels, in_channels)
        self.levels = nn.ModuleList(
            nn.Sequential(
                *resized[scale],
                nn.Conv2d(number, out_channels, kernel_size=1, bias=False),
                ChannelLayerNorm(out_channels, eps=eps),
                nn.Conv2d(out_channels, out_channels, kernel_size=3, padding=1, bias=False),
                ChannelLayerNorm(out_channels, eps=eps),
            )
            for scale, number in zip(self.scales, channels, strict=True)
        )

    def forward(self, features: torch.Tensor) -> list[torch.Tensor]:
        """
        Args:
            features (`torch.Tensor` of shape `(batch_size, in_channels, rows, columns)`): One vector a patch.

        Returns:
            Four maps (batch_size, out_channels, height, width), the largest first: of 4, 2, 1 and 1/2 (rounded up) of
            the rows and columns. With patches of 16 pixels their strides are 4, 8, 16 and 32.
        """
        return [level(features) for level in self.levels]
