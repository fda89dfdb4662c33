"""Collections of pictures with labels: one kind that is indexed, one that is streamed, and what they are made from."""

import contextlib
import gzip
import hashlib
import os
import re
import struct
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset, get_worker_info
from transformers.utils import logging

from .pictures import PICTURE_EXTENSIONS, BrokenPictureError, read_picture

logger = logging.get_logger(__name__)

# Pictures that `content_fingerprint` looks into.
_SAMPLED = 256
_ARCHIVES = (".zip", ".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".7z", ".rar")


class PictureDataset(Dataset):
    """Pictures by index: `pictures[i]` is a tensor (num_channels, height, width), as `read_picture` gives it.

    Args:
        values: what `read_picture` takes, by index.
        num_channels (`int`): of every picture.
        source (`str`): where the pictures are from, to name those that have no path.
        labels: label name to integers of shape `(len(values),)`, -1 where there is none; or, where a picture may have
            several classes or none of them (multi-label), to zeros and ones of shape `(len(values), num_classes)`, a
            row of -1 where it is not known.
        label_names: label name to the names of its classes.
        max_image_pixels (`int`, *optional*): as in `read_picture`.
    """

    def __init__(
        self,
        values: Sequence,
        num_channels: int,
        *,
        source: str,
        labels: dict[str, np.ndarray] | None = None,
        label_names: dict[str, list[str]] | None = None,
        max_image_pixels: int | None = None,
    ):
        self.num_channels = num_channels
        self.source = source
        self.max_image_pixels = max_image_pixels
        self.labels = {key: _label_column(column) for key, column in (labels or {}).items()}
        self.label_names = label_names or {}
        self._values = values
        self._rows = np.arange(len(values))

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> torch.Tensor:
        value = self.stored(index)
        name = self._name(index, value)
        return read_picture(value, self.num_channels, name=name, max_image_pixels=self.max_image_pixels)

    def stored(self, index: int):
        """What `read_picture` is given: a path, the bytes of a file, an array, or None where there is no picture."""
        return self._values[int(self._rows[index])]

    def multi_label(self, name: str) -> bool:
        """Whether a picture may have several classes of this label: `labels[name]` is then (N, num_classes)."""
        return self.labels[name].ndim == 2

    def name(self, index: int) -> str:
        """The picture's file, or its row in the data set."""
        return self._name(index, self.stored(index))

    def select(self, indices) -> "PictureDataset":
        """These pictures and their labels, in this order, sharing the memory of all."""
        selected = object.__new__(type(self))
        selected.__dict__.update(self.__dict__)
        selected._rows = self._rows[indices]
        selected.labels = {key: column[indices] for key, column in self.labels.items()}
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
        if isinstance(self._values, FilePictures):
            digest.update(np.ascontiguousarray(self._values.paths[self._rows]))
        if not getattr(self._values, "is_stored", True):
            return digest.hexdigest()
        for index in np.unique(np.linspace(0, len(self) - 1, _SAMPLED).round().astype(np.int64)).tolist():
            # A broken picture counts as an empty one.
            with contextlib.suppress(OSError, BrokenPictureError):
                digest.update(stored_bytes(self.stored(index)))
        return digest.hexdigest()

    def _name(self, index: int, value) -> str:
        row = f"row {self._rows[index]} of {self.source}"
        if isinstance(value, dict) and value.get("path"):
            return f"{value['path']} ({row})"
        return value if isinstance(value, str) else row


def _label_column(column) -> np.ndarray:
    column = np.asarray(column)
    return column.astype(np.int8 if column.ndim == 2 else np.int64)


class PictureStream:
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
        max_image_pixels (`int`, *optional*): as in `read_picture`.
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

    def shard(self, num_shards: int, index: int) -> "PictureStream":
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
                picture = read_picture(
                    self._value(example),
                    self.num_channels,
                    name=self._name(row, example),
                    max_image_pixels=self.max_image_pixels,
                )
            except BrokenPictureError as error:
                if not self.skip_broken:
                    raise
                if self._epoch == 0:
                    self._num_broken[worker.id if worker else 0] += 1
                    logger.warning("Skipped a broken picture: %s", error)
                continue
            yield picture

    def take(self, num: int) -> PictureDataset:
        """The first `num` pictures, as they are stored, and their labels, held in memory."""
        examples = list(self.stream.take(num))
        labels = {
            key: label_numbers([example[key] for example in examples], names)
            for key, names in self.label_names.items()
        }
        return PictureDataset(
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
        `np.ndarray`: as a label of `PictureDataset`.
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
    """What is stored of a picture, of any kind that `read_picture` takes; nothing of one that is missing."""
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


# --- a folder of pictures


class FilePictures:
    """Paths below a root, in one array: a million Python strings would be copied into every worker, page by page."""

    def __init__(self, root: str, paths: list[str]):
        self.root = root
        self.paths = np.array([os.fsencode(path) for path in paths])

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> str:
        return os.path.join(self.root, os.fsdecode(bytes(self.paths[index])))

    def fingerprint(self, rows: np.ndarray) -> str:
        # Two trees of the same names may have the same sizes and times.
        digest = hashlib.sha256(os.path.realpath(self.root).encode(errors="surrogateescape"))
        for row in rows:
            status = os.stat(self[row])
            # The time of the last change of the entry cannot be set, as that of the last writing can.
            times = f"{status.st_size} {status.st_mtime_ns} {status.st_ctime_ns} "
            digest.update(times.encode() + bytes(self.paths[row]) + b"\0")
        return digest.hexdigest()


def find_pictures(root: str | os.PathLike) -> list[str]:
    """Paths of the pictures below a folder, relative to it, sorted; hidden files and folders are left out.

    Files with other endings are counted, and the log says how many there are of each.

    Raises:
        ValueError: there is no such folder, it cannot be listed, or it holds no picture.
    """
    root = check_folder(root)
    paths, others = [], Counter()
    # A link back up would never end.
    _list_pictures(root, "", set(), paths, others)
    left_out = ", ".join(f"{count} {ending}" for ending, count in others.most_common(8))
    if not paths:
        there = f" It holds files that end in {left_out}." if left_out else ""
        raise ValueError(f"{root} holds no picture.{there} Files that are read: {', '.join(PICTURE_EXTENSIONS)}.")
    if left_out:
        logger.warning(f"{root}: files left out for their endings: {left_out}.")
    return paths


def _list_pictures(root: str, below: str, visited: set, paths: list[str], others: Counter) -> None:
    folder = os.path.join(root, below)
    try:
        status = os.stat(folder)
        if (status.st_dev, status.st_ino) in visited:
            return
        visited.add((status.st_dev, status.st_ino))
        with os.scandir(folder) as scan:
            entries = sorted((entry.name, entry.is_dir()) for entry in scan if not entry.name.startswith("."))
    except OSError as error:
        raise ValueError(f"{folder} cannot be listed: {error.strerror}.") from error
    for name, is_folder in entries:
        path = os.path.join(below, name) if below else name
        if is_folder:
            _list_pictures(root, path, visited, paths, others)
        elif name.lower().endswith(PICTURE_EXTENSIONS):
            paths.append(path)
        else:
            others[os.path.splitext(name)[1].lower() or "no ending"] += 1


def check_folder(path: str | os.PathLike) -> str:
    path = os.path.expanduser(path)
    if not os.path.isdir(path):
        refuse_archive("--train_dir", path)
        what = "is a file" if os.path.exists(path) else "does not exist"
        raise ValueError(f"{path} {what}, expected a folder of pictures (or of idx files, *-ubyte).")
    return path


def refuse_archive(flag: str, name: str) -> None:
    """Raises ValueError, with the way out, for a zip or tar file."""
    ending = next((ending for ending in _ARCHIVES if name.lower().endswith(ending)), None)
    if ending is None:
        return
    folder = name[: -len(ending)]
    unpack = f"unzip {name} -d {folder}" if ending == ".zip" else f"mkdir {folder}; tar xf {name} -C {folder}"
    raise ValueError(
        f"{flag} {name}: pictures are not read out of an archive, where each would cost a search. Unpack it once "
        f"({unpack}), then --train_dir {folder}."
    )


def from_folder(roots: list[str], num_channels: int) -> list[PictureDataset]:
    """Folders of pictures with the same classes (training and validation), as data sets.

    If every picture lies in a sub-folder, and there are at least two of these, they are the classes of `label`.
    """
    found = [find_pictures(root) for root in roots]
    tops = [[path.partition(os.sep)[0] for path in paths] for paths in found]
    classes = sorted({top for names in tops for top in names})
    labelled = len(classes) > 1 and all(os.sep in path for paths in found for path in paths)
    numbers = {name: number for number, name in enumerate(classes)}
    return [
        PictureDataset(
            FilePictures(os.path.expanduser(root), paths),
            num_channels,
            source=os.fspath(root),
            labels={"label": [numbers[top] for top in names]} if labelled else None,
            label_names={"label": classes} if labelled else None,
        )
        for root, paths, names in zip(roots, found, tops, strict=True)
    ]


# --- idx files


_IDX_NAME = re.compile(r"ubyte(\.gz)?$")
# The split of idx files whose name does not say which it is.
UNNAMED = "all"


def read_idx(path: str | os.PathLike) -> np.ndarray:
    """An idx file of unsigned bytes, as MNIST's, plain or compressed by gzip.

    Returns:
        `np.ndarray` of uint8: `(N,)` labels, `(N, height, width)` or `(N, height, width, channels)` pictures.

    Raises:
        ValueError: it is not such a file, or is longer or shorter than it says.
    """
    path = os.fspath(path)
    try:
        with gzip.open(path) if path.endswith(".gz") else open(path, "rb") as file:
            data = file.read()
    except (OSError, EOFError) as error:
        raise ValueError(f"{path}: cannot be read: {error}") from error
    if len(data) < 4 or data[:3] != b"\0\0\x08" or not 1 <= data[3] <= 4:
        raise ValueError(
            f"{path}: begins with {data[:4].hex() or 'nothing'}, expected 000008 and the number of dimensions "
            "(1 to 4), as an idx file of unsigned bytes does."
        )
    header = 4 + 4 * data[3]
    if len(data) < header:
        raise ValueError(f"{path}: cut off within its header.")
    shape = struct.unpack(f">{data[3]}I", data[4:header])
    expected = int(np.prod(shape, dtype=object))
    if len(data) - header != expected:
        raise ValueError(
            f"{path}: holds {len(data) - header} values, but its header says {expected} ({shape}): cut off or damaged."
        )
    return np.frombuffer(bytearray(data), dtype=np.uint8, offset=header).reshape(shape)  # bytearray: writable


def has_idx_files(folder: str | os.PathLike) -> bool:
    return any(_IDX_NAME.search(name) for name in os.listdir(folder))


def from_idx(folder: str, num_channels: int) -> dict[str, PictureDataset]:
    """The idx files of a folder by split, as their names have it: "train", "validation", "test" (t10k), or `UNNAMED`.

    The labels of `train-images-idx3-ubyte` are in `train-labels-idx1-ubyte`, and so on.
    """
    # a plain file goes before its compressed twin
    names = [name for name in os.listdir(folder) if _IDX_NAME.search(name)]
    names.sort(key=lambda name: name.endswith(".gz"))
    stems: dict[str, str] = {}
    for name in names:
        stems.setdefault(name.removesuffix(".gz"), os.path.join(folder, name))

    splits: dict[str, PictureDataset] = {}
    for stem, path in sorted(stems.items()):
        if "images" not in stem:
            continue
        split = _idx_split(stem)
        if split in splits:
            raise ValueError(
                f"{folder} holds several sets of {split} pictures: {splits[split].source} and {path}. Keep one."
            )
        pictures = read_idx(path)
        labels_path = stems.get(stem.replace("images", "labels").replace("idx3", "idx1"))
        labels = read_idx(labels_path) if labels_path else None
        if labels is not None and len(labels) != len(pictures):
            raise ValueError(f"{labels_path} holds {len(labels)} labels for the {len(pictures)} pictures of {path}.")
        splits[split] = PictureDataset(
            pictures,
            num_channels,
            source=path,
            labels=None if labels is None else {"label": labels},
            label_names=None if labels is None else {"label": [str(n) for n in range(int(labels.max(initial=0)) + 1)]},
        )
    if not splits:
        raise ValueError(f"{folder} holds idx files ({', '.join(sorted(stems))}), but none named *images*-ubyte.")
    return splits


def _idx_split(stem: str) -> str:
    for split, words in (("train", "train"), ("validation", "val|dev"), ("test", "test|t10k")):
        if re.search(words, stem, re.IGNORECASE):
            return split
    return UNNAMED
