"""
Pictures with masks: reading and checking masks, and what a segmenter is trained and judged on.

The augmentation is a function of (seed, epoch, index): torchvision's transforms draw from the global generators, which
are set for the length of a call, and put back.
"""

import os
from dataclasses import dataclass, field

import numpy as np
import torch
from torch.utils.data import Dataset
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from .dataset import IGNORED, ImageDataset
from .finetuning import global_seed
from .images import IMAGE_EXTENSIONS
from .sources.folder import find_images
from .transforms import sample_generator


@dataclass
class MaskArguments:
    """Where the masks are. With neither: those of the embedded scenes."""

    train_mask_dir: str | None = field(
        default=None,
        metadata={
            "help": "Folder of masks beside --train_dir: one of the same stem for each picture, a PNG whose numbers "
            "(grey or palette) are classes."
        },
    )
    validation_mask_dir: str | None = field(
        default=None, metadata={"help": "The same for --validation_dir. Default: a share of training is held out."}
    )
    mask_column_name: str | None = field(
        default=None, metadata={"help": "Column of the masks in --dataset_name. Default: mask, label or annotation."}
    )
    class_names: list[str] | None = field(
        default=None, metadata={"help": "Names of the classes, in order. Default: as many numbers as the masks have."}
    )
    ignore_index: int = field(default=IGNORED, metadata={"help": "Number of pixels that do not count, in the masks."})
    reduce_labels: bool = field(
        default=False, metadata={"help": "0 is no class, and 1 the first one: as in ADE20K. 0 does not count then."}
    )

    def __post_init__(self):
        if not 0 <= self.ignore_index <= 255:
            raise ValueError(f"--ignore_index is {self.ignore_index}; expected a number from 0 to 255.")
        if self.validation_mask_dir and not self.train_mask_dir:
            raise ValueError("--validation_mask_dir goes with --train_mask_dir: give both, or neither.")


def read_mask(value, name: str, ignore_index: int = IGNORED, reduce_labels: bool = False) -> np.ndarray:
    """
    The classes of a picture's pixels, uint8 (height, width), `IGNORED` where there is none.

    Args:
        value: A path, the bytes of a file, `{"bytes": ..., "path": ...}`, a `PIL.Image.Image` or an array.

    Raises:
        ValueError: If it cannot be read, or its numbers are no classes: colours, or more than 8 bits.
    """
    import io

    from PIL import Image

    if isinstance(value, dict):
        value = io.BytesIO(value["bytes"]) if value.get("bytes") is not None else value.get("path")
    if value is None:
        raise ValueError(f"{name}: the mask is missing (None).")
    if isinstance(value, np.ndarray):
        numbers = value
    else:
        try:
            image = value if isinstance(value, Image.Image) else Image.open(value)
            image.load()
        except (OSError, SyntaxError) as error:
            raise ValueError(f"{name}: the mask cannot be read: {error}") from error
        if image.mode not in ("L", "P", "1"):
            what = "16 or 32 bits a pixel" if image.mode[0] in "IF" else f"colours ({image.mode})"
            raise ValueError(
                f"{name}: a mask of {what}; expected one number from 0 to 255 a pixel, the class: a grey PNG of 8 "
                "bits, or one with a palette. Convert it."
            )
        numbers = np.array(image)
    if numbers.ndim != 2 or numbers.size == 0:
        raise ValueError(f"{name}: a mask of the shape {numbers.shape}; expected (height, width).")
    if numbers.dtype != np.uint8:
        if numbers.min() < 0 or numbers.max() > 255:
            raise ValueError(f"{name}: classes from {numbers.min()} to {numbers.max()}; expected 0 to 255.")
        numbers = numbers.astype(np.uint8)
    mask = numbers.copy()
    if reduce_labels:
        mask = np.where(numbers == 0, IGNORED, numbers - 1).astype(np.uint8)
    mask[numbers == ignore_index] = IGNORED
    return mask


class Masks:
    """Masks by index, read when they are asked for."""

    def __init__(self, values, args: MaskArguments):
        self.values, self.args = values, args

    def __getitem__(self, index: int) -> np.ndarray:
        value = self.values[index]
        name = value if isinstance(value, str) else f"mask {index}"
        return read_mask(value, name, self.args.ignore_index, self.args.reduce_labels)


def add_masks(pictures: ImageDataset, folder: str, args: MaskArguments) -> None:
    """
    Gives the pictures of a folder their masks: those of the same stem, below `folder`.

    Raises:
        ValueError: If a picture has no mask, or a mask no picture, naming it.
    """
    values = pictures._values
    paths = {os.path.splitext(path)[0]: path for path in find_images(folder)}
    stems = [os.path.splitext(os.path.relpath(values[row], values.root))[0] for row in range(len(values))]
    without = [stem for stem in stems if stem not in paths]
    if without:
        raise ValueError(
            f"{values[stems.index(without[0])]} has no mask {os.path.join(folder, without[0])}.png ({len(without)} "
            f"of {len(stems)} pictures have none). Add it, or take the picture away."
        )
    over = sorted(set(paths) - set(stems))
    if over:
        raise ValueError(
            f"{os.path.join(folder, paths[over[0]])} has no picture of its stem in {values.root} ({len(over)} masks "
            f"have none; pictures end in {', '.join(IMAGE_EXTENSIONS[:5])}, ...). Add it, or take the mask away."
        )
    pictures.annotations["mask"] = Masks([os.path.join(folder, paths[stem]) for stem in stems], args)


def check_masks(pictures: ImageDataset, num_classes: int | None) -> np.ndarray:
    """
    Reads every mask.

    Returns:
        How many pixels each number has, int64 of shape `(256,)`.

    Raises:
        ValueError: If a mask cannot be read, is of another size than its picture, or has a class too high; or if there
            is no pixel with a class. The message names the mask's file.
    """
    total = np.zeros(256, dtype=np.int64)
    for index in range(len(pictures)):
        mask = np.asarray(pictures.annotations["mask"][int(pictures._rows[index])])
        values = getattr(pictures.annotations["mask"], "values", None)
        of = values[int(pictures._rows[index])] if values is not None else None
        name = of if isinstance(of, str) else f"the mask of {pictures.name(index)}"
        size = tuple(pictures[index].shape[1:])
        if mask.shape != size:
            raise ValueError(
                f"{name} has {mask.shape[0]} x {mask.shape[1]} pixels, and its picture, {pictures.name(index)}, "
                f"{size[0]} x {size[1]} (height x width). Make them the same."
            )
        counts = np.bincount(mask.ravel(), minlength=256)
        if num_classes is not None and counts[num_classes:IGNORED].any():
            wrong = num_classes + int(np.flatnonzero(counts[num_classes:IGNORED])[0])
            raise ValueError(
                f"{name} has the class {wrong}, and there are {num_classes}: 0 to {num_classes - 1}, and "
                "--ignore_index for none. Name more --class_names, or give --reduce_labels where 0 is no class."
            )
        total += counts
    if not total[:IGNORED].any():
        raise ValueError(f"No pixel of the masks of {pictures.source} has a class: all are to be ignored.")
    return total


class SegmentationTransform:
    """
    A picture and its mask to what a segmenter is trained on: resized by a random factor, cropped, flipped, its colours
    changed.

    Args:
        image_size (`tuple[int, int]`): (height, width) of the crop. A picture that is not enlarged just covers it.
        mean, std: One number a channel.
        scale_jitter (`tuple[float, float]`): Lowest and highest factor. Where the picture is then smaller than the
            crop, what is missing is 0, and its class `IGNORED`.
        horizontal_flip (`bool`): Mirror every second picture, by chance.
        photometric_jitter (`bool`): Change brightness, contrast, saturation and hue, of pictures of 8 bits with three
            channels.
        seed (`int`).
    """

    def __init__(
        self, image_size, mean, std, *, scale_jitter=(0.5, 2.0), horizontal_flip=True, photometric_jitter=True, seed=0
    ):
        self.image_size, self.mean, self.std = tuple(image_size), list(mean), list(std)
        self.scale_jitter, self.seed = tuple(scale_jitter), seed
        steps = [
            v2.RandomCrop(self.image_size, pad_if_needed=True, fill={tv_tensors.Image: 0, tv_tensors.Mask: IGNORED})
        ]
        if horizontal_flip:
            steps.append(v2.RandomHorizontalFlip())
        self.augment = v2.Compose(steps)
        self.change_colours = v2.RandomPhotometricDistort() if photometric_jitter else None

    def __call__(self, item: dict[str, torch.Tensor], epoch: int, index: int) -> dict[str, torch.Tensor]:
        generator = sample_generator(self.seed, epoch, index)
        low, high = self.scale_jitter
        scale = low + (high - low) * generator.random()
        image, mask = tv_tensors.Image(item["image"]), tv_tensors.Mask(item["mask"])
        size = covering_size(image.shape[1:], self.image_size, scale)
        if size != tuple(image.shape[1:]):
            image, mask = F.resize(image, list(size), antialias=True), F.resize(mask, list(size))
        with global_seed(int(generator.integers(2**32))):
            image, mask = self.augment(image, mask)
            if self.change_colours is not None and image.dtype == torch.uint8 and image.shape[0] == 3:
                image = self.change_colours(image)
        return {"pixel_values": normalised(image, self.mean, self.std), "labels": torch.as_tensor(mask).long()}


def covering_size(size, wanted: tuple[int, int], scale: float = 1.0) -> tuple[int, int]:
    """The (height, width) of a picture of `size` that just covers `wanted`, in its proportions, times `scale`."""
    factor = scale * max(wanted[0] / size[0], wanted[1] / size[1])
    least = wanted if scale == 1 else (1, 1)
    return tuple(max(one, round(side * factor)) for one, side in zip(least, size, strict=True))


def normalised(image: torch.Tensor, mean, std) -> torch.Tensor:
    """float32, by mean and std, of pictures of 8 bits or floats."""
    image = image.as_subclass(torch.Tensor)
    return F.normalize(image.float() / 255 if image.dtype == torch.uint8 else image.float(), list(mean), list(std))


class SegmentationDataset(Dataset):
    """`dataset[epoch, index]` is a picture and its mask as `transform(item, epoch, index)` makes them."""

    num_broken = 0

    def __init__(self, pictures: ImageDataset, transform):
        self.pictures, self.transform = pictures, transform

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, epoch_and_index: tuple[int, int]) -> dict[str, torch.Tensor]:
        epoch, index = epoch_and_index
        return self.transform(self.pictures.annotated(index, ["mask"]), epoch, index)


class WholePictures:
    """A picture, resized so that it just covers `image_size`, as `pixel_values`, and its mask as it is as `labels`."""

    def __init__(self, image_size: tuple[int, int], mean, std):
        self.image_size, self.mean, self.std = tuple(image_size), mean, std

    def __call__(self, item: dict[str, torch.Tensor], epoch: int, index: int) -> dict[str, torch.Tensor]:
        image = item["image"].contiguous()
        image = F.resize(image, list(covering_size(image.shape[1:], self.image_size)), antialias=True)
        return {"pixel_values": normalised(image, self.mean, self.std), "labels": item["mask"].long()}
