"""
Pictures with objects: boxes, classes and masks, and what a detector is trained and judged on.

An object's box is x0, y0, x1, y1 in pixels (pixel [0, 0] covers 0 to 1). The augmentation is a function of (seed,
epoch, index), as that of segmentation.
"""

from dataclasses import dataclass, field

import numpy as np
import torch
from torch.utils.data import Dataset, default_collate
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from .dataset import ImageDataset
from .dense import normalised
from .finetuning import global_seed
from .transforms import sample_generator


@dataclass
class ObjectArguments:
    """Where the objects are. With neither: those of the embedded scenes."""

    train_annotations: str | None = field(
        default=None, metadata={"help": "A JSON file as COCO's, of the pictures in --train_dir."}
    )
    validation_annotations: str | None = field(
        default=None, metadata={"help": "The same for --validation_dir. Default: a share of training is held out."}
    )
    objects_column_name: str | None = field(
        default=None,
        metadata={
            "help": "Column of the objects in --dataset_name, each with bbox (x, y, width, height in pixels) and "
            "category, and perhaps segmentation as COCO's. Default: objects or annotations."
        },
    )
    masks: bool | None = field(
        default=None,
        metadata={"help": "Learn masks too (Mask R-CNN, and not Faster R-CNN). Default: where the data has them."},
    )
    skip_broken_objects: bool = field(
        default=False,
        metadata={"help": "Leave out objects whose box is empty or not in the picture, and count them."},
    )

    def __post_init__(self):
        if self.validation_annotations and not self.train_annotations:
            raise ValueError("--validation_annotations goes with --train_annotations: give both, or neither.")


@dataclass(frozen=True)
class Objects:
    """
    The objects of a picture.

    Attributes:
        boxes: float32 of shape (n, 4).
        classes: from 0, int64 of shape (n,).
        crowds: whether it is many of them that count as none, bool of shape (n,).
        areas: in pixels, float32 of shape (n,); 0 for that of the mask, or else of the box.
        masks: bool of shape (n, height, width), or None.
    """

    boxes: np.ndarray
    classes: np.ndarray
    crowds: np.ndarray
    areas: np.ndarray
    masks: np.ndarray | None


# What `Objects` has, by name, as annotations of an `ImageDataset`.
OBJECTS = ("boxes", "classes", "crowds", "areas", "masks")


class _OneOf:
    """One of the fields of a sequence of [`Objects`], by index."""

    def __init__(self, objects, name: str):
        self.objects, self.name = objects, name

    def __getitem__(self, index: int) -> np.ndarray:
        return getattr(self.objects[index], self.name)


class _Last:
    """A sequence whose last item is kept: the fields of one picture are asked for one after the other."""

    def __init__(self, values):
        self.values, self.kept = values, (None, None)

    def __getitem__(self, index: int):
        if self.kept[0] != index:
            self.kept = (index, self.values[index])
        return self.kept[1]


def add_objects(pictures: ImageDataset, objects) -> None:
    """Gives pictures their objects: a sequence of [`Objects`] by row."""
    last = _Last(objects)
    pictures.annotations = {name: _OneOf(last, name) for name in OBJECTS}


class SceneObjects:
    """The objects of scenes, from what their renderer knows."""

    def __init__(self, annotations: dict):
        self.annotations = annotations

    def __getitem__(self, index: int) -> Objects:
        instances, boxes, classes = (self.annotations[name][index] for name in ("instances", "boxes", "classes"))
        return Objects(
            boxes=boxes,
            classes=classes - 1,
            crowds=np.zeros(len(boxes), dtype=bool),
            areas=np.zeros(len(boxes), dtype=np.float32),
            masks=instances == np.arange(1, len(boxes) + 1)[:, None, None],
        )


class DetectionTransform:
    """
    A picture and its objects to what a detector is trained on: resized by a random factor (large-scale jitter),
    cropped, flipped, its colours changed. Objects of which less than a pixel is left are left out, and so are crowds.

    Args:
        image_size (`tuple[int, int]`): (height, width) of the crop. A picture that is not enlarged just fits into it.
        mean, std: One number a channel.
        scale_jitter (`tuple[float, float]`): Lowest and highest factor. What is missing in the crop is 0.
        horizontal_flip (`bool`): Mirror every second picture, by chance.
        photometric_jitter (`bool`): Change brightness, contrast, saturation and hue, of pictures of 8 bits with three
            channels.
        with_masks (`bool`): Whether masks are wanted; boxes are then as tight as what is left of the mask.
        seed (`int`).
    """

    def __init__(
        self,
        image_size,
        mean,
        std,
        *,
        scale_jitter=(0.1, 2.0),
        horizontal_flip=True,
        photometric_jitter=False,
        with_masks=True,
        seed=0,
    ):
        self.image_size, self.mean, self.std = tuple(image_size), list(mean), list(std)
        self.scale_jitter, self.with_masks, self.seed = tuple(scale_jitter), with_masks, seed
        steps = [v2.RandomCrop(self.image_size, pad_if_needed=True)]
        if horizontal_flip:
            steps.append(v2.RandomHorizontalFlip())
        self.augment = v2.Compose(steps)
        self.change_colours = v2.RandomPhotometricDistort() if photometric_jitter else None

    def __call__(self, item: dict[str, torch.Tensor], epoch: int, index: int) -> dict:
        """
        Returns:
            `pixel_values`, float32 of shape `(channels, *image_size)`, and `labels`, as `XForObjectDetection` takes
            them: `class_labels`, `boxes`, `masks`.
        """
        generator = sample_generator(self.seed, epoch, index)
        low, high = self.scale_jitter
        scale = low + (high - low) * generator.random()
        single = ~item["crowds"]
        classes, image = item["classes"][single], tv_tensors.Image(item["image"])
        things = {
            "image": image,
            "boxes": tv_tensors.BoundingBoxes(item["boxes"][single], format="XYXY", canvas_size=image.shape[1:]),
        }
        if self.with_masks:
            things["masks"] = tv_tensors.Mask(item["masks"][single].to(torch.uint8))
        size = fitting_size(image.shape[1:], self.image_size, scale)
        things = {name: F.resize(value, list(size), antialias=True) for name, value in things.items()}
        with global_seed(int(generator.integers(2**32))):
            things = self.augment(things)
            image = things["image"]
            if self.change_colours is not None and image.dtype == torch.uint8 and image.shape[0] == 3:
                image = self.change_colours(image)
        masks = None
        if self.with_masks:
            masks = things["masks"].as_subclass(torch.Tensor)
            boxes, left = tight_boxes(masks)
        else:
            boxes = things["boxes"].as_subclass(torch.Tensor)
            left = ((boxes[:, 2:] - boxes[:, :2]) >= 1).all(dim=1)
        labels = {"class_labels": classes[left], "boxes": as_shares(boxes[left], self.image_size)}
        if masks is not None:
            labels["masks"] = masks[left]
        return {"pixel_values": normalised(image, self.mean, self.std), "labels": labels}


def fitting_size(size, wanted: tuple[int, int], scale: float = 1.0) -> tuple[int, int]:
    """The (height, width) of a picture of `size` that just fits into `wanted`, in its proportions, times `scale`."""
    factor = scale * min(wanted[0] / size[0], wanted[1] / size[1])
    return tuple(max(1, round(side * factor)) for side in size)


def tight_boxes(masks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The smallest boxes (n, 4) around masks (n, height, width), and whether there is anything in each, bool (n,)."""
    rows, columns = masks.bool().any(dim=2), masks.bool().any(dim=1)

    def first_and_end(where):
        place = torch.arange(where.shape[1])
        first = torch.where(where, place, where.shape[1]).amin(dim=1)
        return first, torch.where(where, place + 1, 0).amax(dim=1)

    if not len(masks):
        return torch.zeros(0, 4), torch.zeros(0, dtype=torch.bool)
    (y0, y1), (x0, x1) = first_and_end(rows), first_and_end(columns)
    return torch.stack([x0, y0, x1, y1], dim=1).float(), rows.any(dim=1)


def as_shares(boxes: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Boxes in pixels of a picture of `size` as transformers' detectors learn them: centre and size, as shares."""
    boxes = boxes / boxes.new_tensor([size[1], size[0], size[1], size[0]])
    return torch.cat([(boxes[:, :2] + boxes[:, 2:]) / 2, boxes[:, 2:] - boxes[:, :2]], dim=1)


class WholePicture:
    """A picture as the image processor gives it, its size, and its objects as they are."""

    def __init__(self, processor):
        self.processor = processor

    def __call__(self, item: dict[str, torch.Tensor], epoch: int, index: int) -> dict:
        image = item.pop("image")
        size = tuple(image.shape[1:])
        features = self.processor(image, return_tensors="pt", input_data_format="channels_first")
        return {"features": dict(features), "size": size, "objects": item}


class DetectionDataset(Dataset):
    """
    `dataset[epoch, index]` is a picture and its objects as `transform(item, epoch, index)` makes them.

    Args:
        pictures: With the annotations `OBJECTS`.
        transform: Of dicts with `image` and the objects.
        with_masks (`bool`): Whether masks are read.
    """

    num_broken = 0

    def __init__(self, pictures: ImageDataset, transform, with_masks: bool):
        self.pictures, self.transform = pictures, transform
        self.names = [name for name in OBJECTS if with_masks or name != "masks"]

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, epoch_and_index: tuple[int, int]) -> dict:
        epoch, index = epoch_and_index
        return self.transform(self.pictures.annotated(index, self.names), epoch, index)


def collate_objects(items: list[dict]) -> dict:
    """A batch: pictures of one size, and a list of what is in each."""
    return {
        "pixel_values": default_collate([item["pixel_values"] for item in items]),
        "labels": [item["labels"] for item in items],
    }
