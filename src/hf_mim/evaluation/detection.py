"""How well objects are found: COCO's mean average precision, and pictures of it."""

import numpy as np
import torch
from accelerate.utils import gather_object
from PIL import Image, ImageDraw

from .dense import class_colours

# As torchmetrics calls them, of boxes and of masks.
_SCORES = ("map", "map_50", "map_75", "map_small", "map_medium", "map_large")
_KINDS = {"box": "bbox", "mask": "segm"}


class DetectionScores:
    """
    COCO's mean average precision over pictures, by torchmetrics with faster-coco-eval.

    What is found in a picture goes in by the picture's index, so that several processes, each with its share, give the
    same as one.

    Args:
        with_masks (`bool`): Whether masks are judged beside boxes.

    Raises:
        ImportError: If one of the two packages is not installed.
    """

    def __init__(self, with_masks: bool):
        import faster_coco_eval  # noqa: F401  # torchmetrics asks for it too late, and not by its name
        from torchmetrics.detection import MeanAveragePrecision

        self.kinds = ("box", "mask") if with_masks else ("box",)
        self.metric = MeanAveragePrecision(
            iou_type=tuple(_KINDS[kind] for kind in self.kinds),
            class_metrics=True,
            backend="faster_coco_eval",
            sync_on_compute=False,
        )
        # COCO's rules look at the likeliest 100 of a picture, and so do detectors.
        self.metric.warn_on_many_detections = False
        self.indices: list[int] = []

    def add(self, index: int, found: dict[str, torch.Tensor], truth: dict[str, torch.Tensor]) -> None:
        """
        Args:
            index (`int`): Of the picture.
            found: `scores`, `labels`, `boxes` and perhaps `masks` of a picture, as the image processor gives them.
            truth: Its `boxes`, `classes`, `crowds`, `areas` and perhaps `masks`.
        """
        target = {
            "boxes": truth["boxes"].float(),
            "labels": truth["classes"],
            "iscrowd": truth["crowds"].long(),
            "area": truth["areas"].float(),
        }
        found = {name: values.cpu() for name, values in found.items()}
        if "mask" in self.kinds:
            target["masks"], found["masks"] = truth["masks"].to(torch.uint8), found["masks"].to(torch.uint8)
        self.metric.update([found], [target])
        self.indices.append(index)

    def compute(self, names: list[str]) -> dict:
        """
        Args:
            names: Of the classes.

        Returns:
            In percent, `None` where there is nothing to find: `box_map` (over IoU 0.5 to 0.95), `box_map_50`,
            `box_map_75`, those of small, medium and large objects, `mask_map` and so on; and `box_ap` and `mask_ap` by
            class.
        """
        self._gather()
        computed = self.metric.compute()
        scores = {}
        for kind in self.kinds:
            prefix = f"{_KINDS[kind]}_" if len(self.kinds) > 1 else ""
            for score in _SCORES:
                scores[f"{kind}_{score}"] = _percent(computed[f"{prefix}{score}"])
            classes = computed["classes"].reshape(-1).tolist()
            precisions = computed[f"{prefix}map_per_class"].reshape(-1)
            found = dict(zip(classes, map(_percent, precisions), strict=True))
            scores[f"{kind}_ap"] = {name: found.get(number) for number, name in enumerate(names)}
        return scores

    def _gather(self) -> None:
        """All processes get what each has, in the order of the pictures."""
        states = {name: values for name, values in self.metric.metric_state.items() if len(values)}
        mine = [
            (index, {name: values[place] for name, values in states.items()})
            for place, index in enumerate(self.indices)
        ]
        every = sorted(gather_object(mine), key=lambda one: one[0])
        for name in {name for _, state in every for name in state}:
            setattr(self.metric, name, [state[name] for _, state in every])
        self.indices = [index for index, _ in every]


def _percent(value: torch.Tensor) -> float | None:
    return None if value < 0 else 100.0 * float(value)


def draw_objects(image: np.ndarray, objects: dict[str, torch.Tensor], num_classes: int) -> np.ndarray:
    """
    A picture, uint8 (height, width, 3), with the boxes of objects, and their masks where there are any.

    Args:
        objects: `boxes` (n, 4) in pixels, `labels` (n,), and perhaps `masks` (n, height, width).
    """
    # The first of its colours is for a ground.
    colours = class_colours(num_classes + 1)(objects["labels"] + 1)
    image = image.astype(np.float32)
    for mask, shade in zip(objects.get("masks", ()), colours, strict=False):
        image[mask.numpy()] = 0.5 * image[mask.numpy()] + 0.5 * shade
    drawn = Image.fromarray(image.round().astype(np.uint8))
    draw = ImageDraw.Draw(drawn)
    for box, shade in zip(objects["boxes"].tolist(), colours, strict=True):
        x0, y0, x1, y1 = (round(side) for side in box)
        draw.rectangle((x0, y0, max(x0, x1 - 1), max(y0, y1 - 1)), outline=tuple(shade.tolist()))
    return np.array(drawn)
