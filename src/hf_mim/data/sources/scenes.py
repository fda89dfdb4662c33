"""The embedded scenes, drawn when they are asked for."""

import os

import numpy as np

from ..arguments import DataArguments
from ..dataset import ImageDataset
from .datasets import from_datasets

_NUMBERS = {"train": 12000, "validation": 2000}
_SIZE = 64
_MAX_BYTES = 1 << 30
ANNOTATIONS = ("mask", "instances", "depth", "boxes", "classes")


def open_splits(args: DataArguments) -> tuple[ImageDataset, ImageDataset]:
    """Training and validation scenes: as many as the flags say, of `--image_size`."""
    from ..scenes import MASK_CLASSES, scenes

    numbers = {
        "train": args.max_train_samples or _NUMBERS["train"],
        "validation": args.max_eval_samples or _NUMBERS["validation"],
    }
    image_size = args.image_height_width or (_SIZE, _SIZE)
    splits = {
        split: scenes(
            split,
            number,
            image_size=image_size,
            num_proc=min(os.cpu_count() or 1, 8),
            cache_dir=args.data_cache_dir,
        )
        for split, number in numbers.items()
    }
    pictures = from_datasets(splits, args.num_channels, source="scenes", label_columns=args.label_column_names)
    pictures = {split: _decode_once(pictures[split]) for split in numbers}
    for split, number in numbers.items():
        drawn = _Annotations(split, number, image_size)
        pictures[split].annotations = {name: _Named(drawn, name) for name in ANNOTATIONS}
        pictures[split].mask_names = list(MASK_CLASSES)
    return pictures["train"], pictures["validation"]


def _decode_once(pictures: ImageDataset) -> ImageDataset:
    """The same pictures, all of one size, decoded in memory, if they fit: reading them is then ten times as fast."""
    first = pictures[0]
    shape = (len(pictures), *first.shape[1:], first.shape[0])
    if np.prod(shape, dtype=np.int64) > _MAX_BYTES:
        return pictures
    decoded = np.empty(shape, dtype=np.uint8)
    for index in range(len(pictures)):
        decoded[index] = pictures[index].permute(1, 2, 0).numpy()
    return ImageDataset(
        decoded,
        pictures.num_channels,
        source=pictures.source,
        labels=pictures.labels,
        label_names=pictures.label_names,
    )


class _Annotations:
    """What the renderer knows of scenes, computed when it is first asked for, and kept if all of it fits in memory."""

    def __init__(self, split: str, number: int, image_size: tuple[int, int]):
        self.split, self.image_size = split, image_size
        # Mask and instances in a byte a pixel, depth in four.
        self.is_kept = 6 * number * np.prod(image_size, dtype=np.int64) <= _MAX_BYTES
        self._kept = {}

    def __getitem__(self, index: int):
        from ..scenes import annotate_scene

        found = self._kept.get(index)
        if found is None:
            found = annotate_scene(index, split=self.split, image_size=self.image_size)
            if self.is_kept:
                self._kept[index] = found
        return found


class _Named:
    """One of the annotations, by index."""

    def __init__(self, drawn: _Annotations, name: str):
        self.drawn, self.name = drawn, name

    def __getitem__(self, index: int) -> np.ndarray:
        return getattr(self.drawn[index], self.name)
