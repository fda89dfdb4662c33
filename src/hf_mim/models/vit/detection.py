"""torchvision's Mask R-CNN on the simple feature pyramid of a map of patches."""

from collections import OrderedDict
from dataclasses import dataclass

import torch
from torch import nn
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FasterRCNN, FastRCNNConvFCHead, FastRCNNPredictor
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.mask_rcnn import MaskRCNN, MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.rpn import RPNHead
from torchvision.ops import MultiScaleRoIAlign
from torchvision.ops.poolers import LevelMapper
from transformers.utils import ModelOutput

from .pyramid import ChannelLayerNorm, SimpleFeaturePyramid
from .sizes import as_pair

# The levels of the pyramid that regions are cut out of; proposals come from one more.
_LEVELS = ("0", "1", "2", "3")


@dataclass
class ObjectDetectionOutput(ModelOutput):
    """
    What a detector gives: in training mode losses, in evaluation mode what it has found.

    Args:
        loss (`torch.Tensor`): The sum of the others.
        loss_objectness, loss_proposal_box (`torch.Tensor`): Of the proposals: whether there is an object, and where.
        loss_class, loss_box, loss_mask (`torch.Tensor`): Of the regions; the last one with masks alone.
        detections (`list[dict[str, torch.Tensor]]`): Of each picture, the likeliest first: `scores` (n,), `labels`
            (n,), class indices from 0; `boxes` (n, 4), x0, y0, x1, y1 as shares of the picture's width and height; and
            with masks `masks` (n, 28, 28), how likely each part of the box is the object's, from 0 to 1.
    """

    loss: torch.Tensor | None = None
    loss_objectness: torch.Tensor | None = None
    loss_proposal_box: torch.Tensor | None = None
    loss_class: torch.Tensor | None = None
    loss_box: torch.Tensor | None = None
    loss_mask: torch.Tensor | None = None
    detections: list[dict[str, torch.Tensor]] | None = None


# torchvision's names of the losses.
_LOSSES = {
    "loss_objectness": "loss_objectness",
    "loss_rpn_box_reg": "loss_proposal_box",
    "loss_classifier": "loss_class",
    "loss_box_reg": "loss_box",
    "loss_mask": "loss_mask",
}


class DetectionPyramid(SimpleFeaturePyramid):
    """[`SimpleFeaturePyramid`], and every second place of its last level as a fifth one."""

    def __init__(self, in_channels: int, out_channels: int, eps: float):
        super().__init__(in_channels, out_channels, eps)
        # torchvision asks its backbones.
        self.out_channels = out_channels

    def forward(self, features: torch.Tensor) -> "OrderedDict[str, torch.Tensor]":
        levels = super().forward(features)
        return OrderedDict(zip((*_LEVELS, "pool"), (*levels, levels[-1][:, :, ::2, ::2]), strict=True))


class PatchAnchors(AnchorGenerator):
    """
    Anchors whose distances are those of the pyramid's levels, at any size of the pictures. torchvision's divides the
    picture's side by the map's, which is another number where a level is rounded up.

    Args:
        strides (`list[float]`): Of each level, in pixels.
        size (`float`): Side of a square anchor, in strides of its level.
    """

    def __init__(self, strides: list[float], size: float):
        super().__init__(sizes=tuple((size * stride,) for stride in strides), aspect_ratios=((0.5, 1.0, 2.0),) * 5)
        self.strides = strides

    def forward(self, image_list: ImageList, feature_maps: list[torch.Tensor]) -> list[torch.Tensor]:
        device = feature_maps[0].device
        # Made here: a model that is being loaded is built without memory.
        self.cell_anchors = [
            self.generate_anchors(size, ratios, device=device)
            for size, ratios in zip(self.sizes, self.aspect_ratios, strict=True)
        ]
        grids = [feature_map.shape[-2:] for feature_map in feature_maps]
        anchors = torch.cat(self.grid_anchors(grids, [(stride, stride) for stride in self.strides]))
        return [anchors] * len(image_list.image_sizes)


class PatchRoIAlign(MultiScaleRoIAlign):
    """
    Regions cut out of the level that fits their size, whose scale is told and not guessed from the picture's size. A
    region of 14 patches' side is of the level of the patches, as 224 pixels are with patches of 16.
    """

    def __init__(self, output_size: int, patch_size: int):
        super().__init__(list(_LEVELS), output_size, sampling_ratio=2)
        self.scales = [scale / patch_size for scale in SimpleFeaturePyramid.scales]
        self.map_levels = LevelMapper(k_min=2, k_max=5, canonical_scale=14 * patch_size, canonical_level=4)


class _ProposalHead(RPNHead):
    """In float32 what places are computed from: those of bfloat16 are several pixels apart in a large picture."""

    def forward(self, levels):
        objectness, deltas = super().forward(levels)
        return [one.float() for one in objectness], [one.float() for one in deltas]


class _BoxPredictor(FastRCNNPredictor):
    def forward(self, regions):
        return tuple(one.float() for one in super().forward(regions))


class DetectionHead(nn.Module):
    """
    Pyramid, proposals and regions of torchvision's `MaskRCNN`, with ViTDet's sizes and norms; without
    `config.detection_masks` of its `FasterRCNN`.

    Raises:
        ValueError: If patches are not square.
    """

    def __init__(self, config):
        super().__init__()
        patch_height, patch_width = as_pair(config.patch_size)
        if patch_height != patch_width:
            raise ValueError(f"Detectors need square patches; patch_size is {patch_height} x {patch_width}.")
        size, num_classes = config.detection_head_size, config.num_labels + 1
        strides = [patch_width / scale for scale in SimpleFeaturePyramid.scales]
        anchors = PatchAnchors([*strides, 2 * strides[-1]], config.detection_anchor_size)
        pyramid = DetectionPyramid(config.hidden_size, size, config.layer_norm_eps)
        # torchvision's 2000 and 1000, but of few regions no more proposals than can be drawn from.
        in_training, otherwise = min(2000, 4 * config.detection_regions), min(1000, 2 * config.detection_regions)
        settings = {
            "rpn_pre_nms_top_n_train": in_training,
            "rpn_post_nms_top_n_train": in_training,
            "rpn_pre_nms_top_n_test": otherwise,
            "rpn_post_nms_top_n_test": otherwise,
            "rpn_anchor_generator": anchors,
            "rpn_head": _ProposalHead(size, anchors.num_anchors_per_location()[0], conv_depth=2),
            "box_roi_pool": PatchRoIAlign(7, patch_width),
            "box_head": FastRCNNConvFCHead((size, 7, 7), [size] * 4, [4 * size], norm_layer=ChannelLayerNorm),
            "box_predictor": _BoxPredictor(4 * size, num_classes),
            "box_batch_size_per_image": config.detection_regions,
        }
        if config.detection_masks:
            detector = MaskRCNN(
                pyramid,
                **settings,
                mask_roi_pool=PatchRoIAlign(14, patch_width),
                mask_head=MaskRCNNHeads(size, [size] * 4, 1, norm_layer=ChannelLayerNorm),
                mask_predictor=MaskRCNNPredictor(size, size, num_classes),
            )
        else:
            detector = FasterRCNN(pyramid, **settings)
        self.pyramid, self.rpn, self.roi_heads = pyramid, detector.rpn, detector.roi_heads
        # What they start with, as in Mask R-CNN's authors' code; of all else the model decides.
        of_proposals, of_regions = self.rpn.head, self.roi_heads.box_predictor
        of_proposals.cls_logits.initial_std = of_proposals.bbox_pred.initial_std = of_regions.cls_score.initial_std = (
            0.01
        )
        of_regions.bbox_pred.initial_std = 0.001

    def forward(
        self, features: torch.Tensor, pixel_values: torch.Tensor, sizes: list[tuple[int, int]], targets
    ) -> ObjectDetectionOutput:
        """
        Args:
            features (`torch.Tensor` of shape `(batch_size, hidden_size, rows, columns)`): Of the patches.
            pixel_values (`torch.Tensor` of shape `(batch_size, num_channels, height, width)`).
            sizes (`list[tuple[int, int]]`): (height, width) of each picture, without what it was padded with.
            targets (`list[dict]`, *optional*): As torchvision's: `boxes` in pixels, `labels` from 1, `masks`.
        """
        levels = self.pyramid(features)
        proposals, of_proposals = self.rpn(ImageList(pixel_values, sizes), levels, targets)
        found, of_regions = self.roi_heads(levels, proposals, sizes, targets)
        if targets is not None:
            losses = {_LOSSES[name]: value for name, value in (of_proposals | of_regions).items()}
            return ObjectDetectionOutput(loss=sum(losses.values()), **losses)
        for one, (height, width) in zip(found, sizes, strict=True):
            one["labels"] = one["labels"] - 1
            one["boxes"] = one["boxes"] / one["boxes"].new_tensor([width, height, width, height])
            if "masks" in one:
                one["masks"] = one["masks"][:, 0].float()
        return ObjectDetectionOutput(detections=found)


def picture_sizes(pixel_values: torch.Tensor, pixel_mask: torch.Tensor | None) -> list[tuple[int, int]]:
    """The (height, width) of each picture in its upper left corner; all of it without a mask (1: no padding)."""
    if pixel_mask is None:
        return [tuple(pixel_values.shape[2:])] * len(pixel_values)
    heights, widths = pixel_mask.amax(dim=2).sum(dim=1), pixel_mask.amax(dim=1).sum(dim=1)
    return list(zip(heights.tolist(), widths.tolist(), strict=True))


def detection_targets(labels: list[dict], sizes: list[tuple[int, int]], with_masks: bool) -> list[dict]:
    """
    torchvision's targets of transformers' labels.

    Raises:
        ValueError: If there are not as many as pictures, or masks are wanted and not there.
    """
    if len(labels) != len(sizes):
        raise ValueError(f"labels are of {len(labels)} pictures, and pixel_values of {len(sizes)}.")
    targets = []
    for one, (height, width) in zip(labels, sizes, strict=True):
        boxes = one["boxes"].float()
        centre, half = boxes[:, :2], boxes[:, 2:] / 2
        scale = boxes.new_tensor([width, height, width, height])
        target = {
            "boxes": torch.cat([centre - half, centre + half], dim=1) * scale,
            "labels": one["class_labels"].long() + 1,
        }
        if with_masks:
            if "masks" not in one:
                raise ValueError(
                    "labels have no masks; config.detection_masks is True: give them, or set it to False."
                )
            target["masks"] = one["masks"].to(torch.uint8)
        targets.append(target)
    return targets
