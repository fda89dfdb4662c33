"""Pictures with masks: where they are, and reading and checking them."""

from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np

from .arguments import DataArguments
from .dataset import IGNORED, ImageDataset
from .dense import MapArguments, load_maps, open_map, read_maps

# The same of masks whose classes need more than 8 bits.
_IGNORED_16 = 65535


@dataclass
class MaskArguments(MapArguments):
    """Where the masks are. With neither: those of the embedded scenes."""

    kind: ClassVar[str] = "mask"
    usual_columns: ClassVar[list[str]] = ["mask", "label", "annotation"]

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
    ignore_index: int | None = field(
        default=None,
        metadata={"help": "Number of pixels that do not count, in the masks. Default: 255; 1000 with --rgb_masks."},
    )
    reduce_labels: bool = field(
        default=False, metadata={"help": "0 is no class, and 1 the first one: as in ADE20K. 0 does not count then."}
    )
    rgb_masks: bool = field(
        default=False, metadata={"help": "Masks are colours, red + 256 x green the class: as in ImageNet-S."}
    )

    def __post_init__(self):
        if self.ignore_index is None:
            self.ignore_index = 1000 if self.rgb_masks else IGNORED
        most = 65535 if self.rgb_masks else 255
        if not 0 <= self.ignore_index <= most:
            raise ValueError(f"--ignore_index is {self.ignore_index}; expected a number from 0 to {most}.")
        names = self.class_names or []
        if len(set(names)) < len(names):
            twice = next(name for name in names if names.count(name) > 1)
            raise ValueError(f"--class_names has {twice!r} twice: each class needs a name of its own.")
        super().__post_init__()

    @property
    def unknown(self) -> int:
        return _IGNORED_16 if self.rgb_masks else IGNORED

    def read(self, value, name: str) -> np.ndarray:
        """
        The classes of a picture's pixels, uint8 (int32 of `rgb_masks`) of shape (height, width), `unknown` where there
        is none.

        Raises:
            ValueError: If it cannot be read, or its numbers are no classes: colours or their absence, or more than 8
                bits.
        """
        opened = open_map(value, name, "mask")
        if self.rgb_masks:
            numbers = _of_colours(opened, name)
        else:
            numbers = opened if isinstance(opened, np.ndarray) else _of_grey(opened, name)
            if numbers.ndim != 2 or numbers.size == 0:
                raise ValueError(f"{name}: a mask of the shape {numbers.shape}; expected (height, width).")
            if numbers.dtype != np.uint8:
                if numbers.min() < 0 or numbers.max() > 255:
                    raise ValueError(f"{name}: classes from {numbers.min()} to {numbers.max()}; expected 0 to 255.")
                numbers = numbers.astype(np.uint8)
        mask = np.where(numbers == 0, self.unknown, numbers - 1) if self.reduce_labels else numbers.copy()
        mask = mask.astype(numbers.dtype)
        mask[numbers == self.ignore_index] = self.unknown
        return mask


def _of_grey(image, name: str) -> np.ndarray:
    if image.mode not in ("L", "P", "1"):
        what = "16 or 32 bits a pixel" if image.mode[0] in "IF" else f"colours ({image.mode})"
        raise ValueError(
            f"{name}: a mask of {what}; expected one number from 0 to 255 a pixel, the class: a grey PNG of 8 "
            "bits, or one with a palette. Convert it, or, where red + 256 x green is the class, give --rgb_masks."
        )
    return np.array(image)


def _of_colours(value, name: str) -> np.ndarray:
    if not isinstance(value, np.ndarray):
        if value.mode != "RGB":
            raise ValueError(f"{name}: a mask of mode {value.mode}; --rgb_masks expects colours (RGB).")
        value = np.array(value)
    if value.ndim != 3 or value.shape[2] != 3:
        raise ValueError(f"{name}: a mask of the shape {value.shape}; --rgb_masks expects (height, width, 3).")
    return value[:, :, 0].astype(np.int32) + 256 * value[:, :, 1].astype(np.int32)


def load_masked(
    data_args: DataArguments, mask_args: MaskArguments, seed: int
) -> tuple[ImageDataset, ImageDataset, list[str]]:
    """
    Training and held-out pictures with masks that were all read once, and the names of the classes.

    Raises:
        ValueError: If there are no masks, or one of them is not as it should be.
    """
    train, validation = load_maps(data_args, mask_args, seed)
    names = mask_args.class_names or train.mask_names
    if not data_args.train_dir and not data_args.dataset_name:
        if mask_args.reduce_labels or mask_args.rgb_masks:
            raise ValueError(
                "--reduce_labels and --rgb_masks are of masks of your own; the scenes' are plain classes."
            )
        # Drawn by the renderer, which cannot be wrong about them.
        return train, validation, names
    number = None if names is None else len(names)
    counts = sum(check_masks(split, number, mask_args.unknown) for split in (train, validation))
    if names is None:
        names = [str(number) for number in range(int(np.flatnonzero(counts).max()) + 1)]
    if len(names) < 2:
        raise ValueError("The masks have one class: there is nothing to tell apart.")
    return train, validation, names


def check_masks(pictures: ImageDataset, num_classes: int | None, unknown: int = IGNORED) -> np.ndarray:
    """
    Reads every mask.

    Returns:
        How many pixels each class has, int64 of shape `(unknown,)`.

    Raises:
        ValueError: If a mask cannot be read, is of another size than its picture, or has a class too high; or if there
            is no pixel with a class. The message names the mask's file.
    """
    total = np.zeros(unknown, dtype=np.int64)
    for name, mask in read_maps(pictures, "mask"):
        counts = np.bincount(mask[mask != unknown], minlength=unknown)
        if num_classes is not None and counts[num_classes:].any():
            wrong = num_classes + int(np.flatnonzero(counts[num_classes:])[0])
            raise ValueError(
                f"{name} has the class {wrong}, and there are {num_classes}: 0 to {num_classes - 1}, and "
                "--ignore_index for none. Name more --class_names, or give --reduce_labels where 0 is no class."
            )
        total += counts
    if not total.any():
        raise ValueError(f"No pixel of the masks of {pictures.source} has a class: all are to be ignored.")
    return total
