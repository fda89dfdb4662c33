"""Heads that tell how far away each pixel is from maps of patches, and their loss."""

import torch
from torch import nn

from .pyramid import ChannelLayerNorm
from .upsampling import upsample


def build_depth_head(config) -> nn.Module:
    """
    The head that `config.depth_head` names: a module with `stages`, the numbers of the blocks that it reads, which
    takes their patches, each (batch_size, hidden_size, rows, columns), and gives the logarithm of the depth, less
    `config.log_depth_mean`, (batch_size, 1, height, width).
    """
    return {"linear": LinearDepthHead, "dpt": DPTDepthHead}[config.depth_head](config)


def _output(channels: int) -> nn.Conv2d:
    """What ends a head: untrained, the depth is the usual one everywhere, not one that a chance exponent blows up."""
    convolution = nn.Conv2d(channels, 1, kernel_size=1)
    convolution.starts_at_zero = True
    return convolution


class LinearDepthHead(nn.Module):
    """BatchNorm and one 1 x 1 convolution on the patches of the last block."""

    def __init__(self, config):
        super().__init__()
        self.stages = [config.num_hidden_layers]
        self.batch_norm = nn.BatchNorm2d(config.hidden_size)
        self.regressor = _output(config.hidden_size)

    def forward(self, maps: list[torch.Tensor]) -> torch.Tensor:
        return self.regressor(self.batch_norm(maps[-1]))


class DPTDepthHead(nn.Module):
    """
    As in Ranftl et al., *Vision Transformers for Dense Prediction* (ICCV 2021): the patches of four blocks, a quarter
    of the depth apart, become maps of 4, 2, 1 and 1/2 (rounded up) rows and columns a patch, the first block's the
    largest, and are fused from the smallest to the largest, whose size the depths have.
    """

    def __init__(self, config):
        super().__init__()
        depth, size = config.num_hidden_layers, config.depth_head_size
        self.stages = [max(1, depth * quarter // 4) for quarter in (1, 2, 3, 4)]
        resized = (
            nn.ConvTranspose2d(size, size, kernel_size=4, stride=4),
            nn.ConvTranspose2d(size, size, kernel_size=2, stride=2),
            nn.Identity(),
            nn.Conv2d(size, size, kernel_size=3, stride=2, padding=1),
        )
        self.reassemble = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(config.hidden_size, size, kernel_size=1),
                resize,
                nn.Conv2d(size, size, kernel_size=3, padding=1, bias=False),
            )
            for resize in resized
        )
        self.fusions = nn.ModuleList(_Fusion(size, config.layer_norm_eps) for _ in resized)
        self.regressor = nn.Sequential(
            nn.Conv2d(size, size // 2, kernel_size=3, padding=1), nn.ReLU(), _output(size // 2)
        )

    def forward(self, maps: list[torch.Tensor]) -> torch.Tensor:
        levels = [level(one) for level, one in zip(self.reassemble, maps, strict=True)]
        fused = torch.zeros_like(levels[-1])
        for level, fusion in zip(reversed(levels), reversed(self.fusions), strict=True):
            fused = fusion(fused, level)
        return self.regressor(fused)


class _Fusion(nn.Module):
    """What is known of the smaller levels, and one level more, at that level's size."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.of_level, self.of_sum = _Residual(size), _Residual(size)
        # Normalised, which DPT's are not: sums of sums would make the first steps large ones.
        self.projection = nn.Sequential(nn.Conv2d(size, size, kernel_size=1), ChannelLayerNorm(size, eps=eps))

    def forward(self, fused: torch.Tensor, level: torch.Tensor) -> torch.Tensor:
        if fused.shape != level.shape:
            fused = nn.functional.interpolate(fused, size=level.shape[2:], mode="bilinear", align_corners=False)
        return self.projection(self.of_sum(fused + self.of_level(level)))


class _Residual(nn.Sequential):
    def __init__(self, size: int):
        convolutions = (nn.Conv2d(size, size, kernel_size=3, padding=1) for _ in range(2))
        super().__init__(*(module for convolution in convolutions for module in (nn.ReLU(), convolution)))

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return features + super().forward(features)


def known_depths(depths: torch.Tensor) -> torch.Tensor:
    """Where a depth is known, of the same shape: it is a number above 0."""
    return depths.isfinite() & (depths > 0)


def scale_invariant_log_loss(predicted_depth: torch.Tensor, labels: torch.Tensor, invariance: float) -> torch.Tensor:
    """
    Eigen et al., *Depth Map Prediction from a Single Image* (NeurIPS 2014): of the differences d of the logarithms,
    `mean(d ** 2) - invariance * mean(d) ** 2` over the pixels of a picture whose depth is known; the mean of the
    pictures that have such pixels, in float32; 0 where none has.

    Args:
        predicted_depth (`torch.Tensor` of shape `(batch_size, rows, columns)`): Above 0; interpolated to the labels'
            size.
        labels (`torch.Tensor` of shape `(batch_size, height, width)`): 0 or not finite where it is not known.
        invariance (`float`): 0 to 1. With 1 a factor that all of a picture's depths are wrong by costs nothing.

    Raises:
        ValueError: If the labels are no maps of as many pictures.
    """
    if labels.ndim != 3 or len(labels) != len(predicted_depth):
        raise ValueError(
            f"labels has the shape {tuple(labels.shape)}; expected ({len(predicted_depth)}, height, width)."
        )
    known = known_depths(labels)
    number = known.sum(dim=(1, 2))
    predicted = upsample(predicted_depth.unsqueeze(1), labels.shape[1:]).squeeze(1)
    # Of what is not known no logarithm is taken, whose gradient would be no number.
    difference = predicted.where(known, 1.0).log() - labels.float().where(known, 1.0).log()
    mean = difference.sum(dim=(1, 2)) / number.clamp(min=1)
    square = difference.square().sum(dim=(1, 2)) / number.clamp(min=1)
    return (square - invariance * mean.square()).sum() / (number > 0).sum().clamp(min=1)
