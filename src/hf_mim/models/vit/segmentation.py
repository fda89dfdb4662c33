"""Heads that tell the class of each pixel from a map of patches, and their loss."""

from types import SimpleNamespace

import torch
from torch import nn

from .pyramid import SimpleFeaturePyramid
from .upsampling import upsample


def build_segmentation_head(config) -> nn.Module:
    """
    The head that `config.segmentation_head` names: a module that takes patches (batch_size, hidden_size, rows,
    columns), and gives logits (batch_size, num_labels, height, width) and those of an auxiliary head, or None.
    """
    return {"linear": LinearSegmentationHead, "upernet": UperNetSegmentationHead}[config.segmentation_head](config)


class LinearSegmentationHead(nn.Module):
    """BatchNorm and one 1 x 1 convolution: DINOv2's linear protocol."""

    def __init__(self, config):
        super().__init__()
        self.batch_norm = nn.BatchNorm2d(config.hidden_size)
        self.classifier = nn.Conv2d(config.hidden_size, config.num_labels, kernel_size=1)

    def forward(self, features: torch.Tensor) -> tuple[torch.Tensor, None]:
        return self.classifier(self.batch_norm(features)), None


class UperNetSegmentationHead(nn.Module):
    """transformers' UperNet on the simple feature pyramid, and its auxiliary head on the level of the patches."""

    def __init__(self, config):
        super().__init__()
        # Imported where it is built: an encoder is made of no module of transformers.
        from transformers.models.upernet.modeling_upernet import UperNetFCNHead, UperNetHead

        size = config.segmentation_head_size
        sizes = SimpleNamespace(
            hidden_size=size,
            num_labels=config.num_labels,
            pool_scales=(1, 2, 3, 6),
            auxiliary_in_channels=None,
            auxiliary_channels=size // 2,
            auxiliary_num_convs=1,
            auxiliary_concat_input=False,
        )
        self.pyramid = SimpleFeaturePyramid(config.hidden_size, size, eps=config.layer_norm_eps)
        self.decode_head = UperNetHead(sizes, in_channels=[size] * 4)
        self.auxiliary_head = UperNetFCNHead(sizes, in_channels=[size] * 4)

    def forward(self, features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        levels = self.pyramid(features)
        return self.decode_head(levels), self.auxiliary_head(levels) if self.training else None


def segmentation_loss(logits: torch.Tensor, labels: torch.Tensor, ignore_index: int) -> torch.Tensor:
    """
    Cross-entropy, the mean over the pixels that have a class, in float32; 0 where none has.

    Args:
        logits (`torch.Tensor` of shape `(batch_size, num_labels, rows, columns)`): Interpolated to the labels' size.
        labels (`torch.LongTensor` of shape `(batch_size, height, width)`).

    Raises:
        ValueError: If the labels are no maps of as many pictures.
    """
    if labels.ndim != 3 or len(labels) != len(logits):
        raise ValueError(f"labels has the shape {tuple(labels.shape)}; expected ({len(logits)}, height, width).")
    logits = upsample(logits, labels.shape[1:])
    total = nn.functional.cross_entropy(logits, labels, ignore_index=ignore_index, reduction="sum")
    return total / (labels != ignore_index).sum().clamp(min=1)
