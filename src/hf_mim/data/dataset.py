"""Collections of pictures with labels: one kind that is indexed, one that is streamed."""

import contextlib
import hashlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset, get_worker_info
from transformers.utils import logging

from .images import BrokenImageError, read_image

logger = logging.get_logger(__name__)

# The class of a mask's pixels that have none.
IGNORED = 255
# Pictures that `content_fingerprint` looks into.
_SAMPLED = 256


class ImageDataset(Dataset):
    """Pictures by index: `pictures[i]` is a tensor (num_channels, height, width), as `read_image` gives it.

    Args:
        values: what `read_image` takes, by index.
        num_channels (`int`): of every picture.
        source (`str`): where the pictures are from, to name those that have no path.
        labels: label name to integers of shape `(len(values),)`, -1 where there is none; or, where a picture may have
            several classes or none of them (multi-label), to zeros and ones of shape `(len(values), num_classes)`, a
            row of -1 where it is not known.
        label_names: label name to the names of its classes.
        annotations: name to what is known of a picture besides labels, by index, as arrays: `mask`, integers of shape
            (height, width), the pixels' classes (`IGNORED` where there is none); `depth`, float32 of the same shape (0
            where it is not known); `instances`, `boxes` and `classes` as `SceneAnnotations` has them.
        mask_names: of the classes in `annotations["mask"]`.
        groups: integers of shape `(len(values),)`: pictures of the same one stay on one side where some are held out.
        max_image_pixels (`int`, *optional*): as in `read_image`.
    """

    def __init__(
        self,
        values: Sequence,
        num_channels: int,
        *,
        source: str,
        labels: dict[str, np.ndarray] | None = None,
        label_names: dict[str, list[str]] | None = None,
        annotations: dict[str, Sequence] | None = None,
        mask_names: list[str] | None = None,
        groups: np.ndarray | None = None,
        max_image_pixels: int | None = None,
    ):
        self.num_channels = num_channels
        self.source = source
        self.max_image_pixels = max_image_pixels
        self.labels = {key: _label_column(column) for key, column in (labels or {}).items()}
        self.label_names = label_names or {}
        self.annotations = annotations or {}
        self.mask_names = mask_names
        self.groups = groups
        self._values = values
        self._rows = np.arange(len(values))

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> torch.Tensor:
        value = self.stored(index)
        name = self._name(index, value)
        return read_image(value, self.num_channels, name=name, max_image_pixels=self.max_image_pixels)

    def annotated(self, index: int, names: Sequence[str]) -> dict[str, torch.Tensor]:
        """The picture as `"image"`, and those of its annotations that are named. Raises KeyError where one is not."""
        row = int(self._rows[index])
        found = {name: torch.as_tensor(self.annotations[name][row]) for name in names}
        return {"image": self[index]} | found

    def stored(self, index: int):
        """What `read_image` is given: a path, the bytes of a file, an array, or None where there is no picture."""
        return self._values[int(self._rows[index])]

    @property
    def shard_ends(self) -> np.ndarray | None:
        """For each file of many pictures, the index after its last; None where no such files are read in order."""
        ends = getattr(self._values, "ends", None)
        if ends is None or (np.diff(self._rows) <= 0).any():
            return None
        return np.searchsorted(self._rows, ends)

    def multi_label(self, name: str) -> bool:
        """Whether a picture may have several classes of this label: `labels[name]` is then (N, num_classes)."""
        return self.labels[name].ndim == 2

    def name(self, index: int) -> str:
        """The picture's file (of several, which one too), or its row in the data set."""
        # Of files of several pictures, without reading one.
        return self._name(index, None if hasattr(self._values, "name") else self.stored(index))

    def select(self, indices) -> "ImageDataset":
        """These pictures and their labels, in this order, sharing the memory of all."""
        selected = object.__new__(type(self))
        selected.__dict__.update(self.__dict__)
        selected._rows = self._rows[indices]
        selected.labels = {key: column[indices] for key, column in self.labels.items()}
        selected.groups = None if self.groups is None else self.groups[indices]
        return selected

    def keep_labels(self, names: list[str]) -> None:
        """Forgets the labels other than these. Raises ValueError if there is no such label."""
        unknown = [name for name in names if name not in self.labels]
        if unknown:
            there = f"the labels {', '.join(self.labels)}" if self.labels else "no labels"
            raise ValueError(f"--label_column_names {', '.join(unknown)}: the data has {there}.")
        self.labels = {name: self.labels[name] for name in names}
        self.label_names = {name: self.label_names[name] for name in names if name in self.label_names}

    def fingerprint(self) -> str:
        """A hash of the pictures, in their order; of files their names, sizes and times, without reading them.

        Pictures that are neither files, nor an array in memory, nor a column of `datasets` are all read for it.
        """
        digest = hashlib.sha256(f"{self.num_channels} {len(self)}".encode())
        if isinstance(self._values, np.ndarray):
            digest.update(f"{self._values.dtype} {self._values.shape[1:]}".encode())
            for row in self._rows:
                digest.update(np.ascontiguousarray(self._values[row]))
        elif hasattr(self._values, "fingerprint"):
            digest.update(self._values.fingerprint(self._rows).encode())
        else:
            for index in range(len(self)):
                picture = self[index].contiguous()
                digest.update(f"{picture.dtype} {tuple(picture.shape)}".encode())
                digest.update(picture.numpy())
        return digest.hexdigest()

    def content_fingerprint(self) -> str:
        """A hash that a copy elsewhere shares, and that no other set of pictures is likely to have.

        Of their number, the names of all files, and the stored bytes of 256 of them, from everywhere, not decoded. Of
        a user's data set, whose items may differ from time to time, of their number.
        """
        digest = hashlib.sha256(f"{self.num_channels} {len(self)}".encode())
        if hasattr(self._values, "paths"):
            digest.update(np.ascontiguousarray(self._values.paths[self._rows]))
        if not getattr(self._values, "is_stored", True):
            return digest.hexdigest()
        for index in np.unique(np.linspace(0, len(self) - 1, _SAMPLED).round().astype(np.int64)).tolist():
            # A broken picture counts as an empty one.
            with contextlib.suppress(OSError, BrokenImageError):
                digest.update(stored_bytes(self.stored(index)))
        return digest.hexdigest()

    def _name(self, index: int, value) -> str:
        if hasattr(self._values, "name"):
            return self._values.name(int(self._rows[index]))
        row = f"row {self._rows[index]} of {self.source}"
        if isinstance(value, dict) and value.get("path"):
            return f"{value['path']} ({row})"
        return value if isinstance(value, str) else row


def _label_column(column) -> np.ndarray:
    column = np.asarray(column)
    return column.astype(np.int8 if column.ndim == 2 else np.int64)


class ImageStream:
    """Pictures in the order in which they are read, from a `datasets.IterableDataset`.

    Iterating gives tensors of shape `(num_channels, height, width)`. In a `DataLoader`'s worker it gives that worker's
    share: whole files of the data set, so that a worker too many has none.

    Args:
        stream (`datasets.IterableDataset`): rows, with pictures not decoded.
        column (`str`): where a row has its picture.
        num_channels (`int`): of every picture.
        source (`str`): where the pictures are from, to name those that have no path.
        dtype (`np.dtype`, *optional*): of the numbers, where rows hold arrays (as lists) and not files.
        label_names: label name (a column of integers, or of lists of them) to the names of its classes.
        skip_broken (`bool`): leave out what cannot be read, and count it in `num_broken`.
        max_image_pixels (`int`, *optional*): as in `read_image`.
    """

    def __init__(
        self,
        stream,
        column,
        num_channels,
        *,
        source,
        dtype=None,
        label_names=None,
        skip_broken=False,
        max_image_pixels=None,
    ):
        self.stream = stream
        self.column = column
        self.num_channels = num_channels
        self.source = source
        self.dtype = dtype
        self.label_names = label_names or {}
        self.skip_broken = skip_broken
        self.max_image_pixels = max_image_pixels
        self._epoch = 0
        # A slot for each worker, in memory that they share, so that none overwrites another's count.
        self._num_broken = torch.zeros(1024, dtype=torch.int64).share_memory_()

    @property
    def num_broken(self) -> int:
        """Broken pictures that this process and its workers left out in their first pass (`skip_broken` only)."""
        return int(self._num_broken.sum())

    def set_epoch(self, epoch: int) -> None:
        """Chooses the order of the next pass, where the stream is shuffled."""
        self._epoch = epoch
        self.stream.set_epoch(epoch)

    def shard(self, num_shards: int, index: int) -> "ImageStream":
        """The share of process `index` out of `num_shards`."""
        from datasets.distributed import split_dataset_by_node

        shard = object.__new__(type(self))
        shard.__dict__.update(self.__dict__)
        shard.stream = split_dataset_by_node(self.stream, rank=index, world_size=num_shards)
        return shard

    def __iter__(self) -> Iterator[torch.Tensor]:
        worker = get_worker_info()
        for row, example in enumerate(self.stream):
            try:
                picture = read_image(
                    self._value(example),
                    self.num_channels,
                    name=self._name(row, example),
                    max_image_pixels=self.max_image_pixels,
                )
            except BrokenImageError as error:
                if not self.skip_broken:
                    raise
                if self._epoch == 0:
                    self._num_broken[worker.id if worker else 0] += 1
                    logger.warning("Skipped a broken picture: %s", error)
                continue
            yield picture

    def take(self, num: int) -> ImageDataset:
        """The first `num` pictures, as they are stored, and their labels, held in memory."""
        examples = list(self.stream.take(num))
        labels = {
            key: label_numbers([example[key] for example in examples], names)
            for key, names in self.label_names.items()
        }
        return ImageDataset(
            [self._value(example) for example in examples],
            self.num_channels,
            source=self.source,
            labels=labels,
            label_names=self.label_names,
            max_image_pixels=self.max_image_pixels,
        )

    def _value(self, example: dict):
        value = example[self.column]
        return value if value is None or self.dtype is None else np.asarray(value, dtype=self.dtype)

    def _name(self, row: int, example: dict) -> str:
        value = example[self.column]
        path = value.get("path") if isinstance(value, dict) else None
        return f"{path} (in {self.source})" if path else f"picture {row} of the stream {self.source}"


def label_numbers(values: list, names: list[str]) -> np.ndarray:
    """The labels of a column that holds the numbers of classes, or lists of them; None where there is none.

    Returns:
        `np.ndarray`: as a label of `ImageDataset`.
    """
    if not any(isinstance(value, list | tuple | np.ndarray) for value in values):
        return np.array([-1 if value is None else value for value in values], dtype=np.int64)
    column = np.zeros((len(values), len(names)), dtype=np.int8)
    for row, value in zip(column, values, strict=True):
        if value is None:
            row[:] = -1
        else:
            row[[number for number in value if number is not None and number >= 0]] = 1
    return column


def stored_bytes(value) -> bytes:
    """What is stored of a picture, of any kind that `read_image` takes; nothing of one that is missing."""
    if isinstance(value, dict):
        value = value["bytes"] if value.get("bytes") is not None else value["path"]
    if value is None:
        return b""
    if isinstance(value, bytes):
        return value
    if isinstance(value, str | os.PathLike):
        return Path(value).read_bytes()
    array = np.asarray(value)
    return f"{array.dtype} {array.shape}".encode() + array.tobytes()
