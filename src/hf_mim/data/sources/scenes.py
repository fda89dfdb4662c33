"""The embedded scenes, drawn when they are asked for."""

import os

import numpy as np

from ..arguments import DataArguments
from ..dataset import ImageDataset
from .datasets import from_datasets

_NUMBERS = {"train": 12000, "validation": 2000}
_SIZE = 64
_MAX_BYTES = 1 << 30


def open_splits(args: DataArguments) -> tuple[ImageDataset, ImageDataset]:
    """Training and validation scenes: as many as the flags say, of `--image_size`."""
    from ..scenes import scenes

    numbers = {
        "train": args.max_train_samples or _NUMBERS["train"],
        "validation": args.max_eval_samples or _NUMBERS["validation"],
    }
    splits = {
        split: scenes(
            split,
            number,
            image_size=args.image_height_width or _SIZE,
            num_proc=min(os.cpu_count() or 1, 8),
            cache_dir=args.data_cache_dir,
        )
        for split, number in numbers.items()
    }
    pictures = from_datasets(splits, args.num_channels, source="scenes", label_columns=args.label_column_names)
    return tuple(_decode_once(pictures[split]) for split in numbers)


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
