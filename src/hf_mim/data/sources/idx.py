"""Idx files, as MNIST's."""

import gzip
import os
import re
import struct

import numpy as np

from ..arguments import DataArguments
from ..dataset import ImageDataset
from ..splits import HELD_OUT, TRAINING, choose_splits, find_split
from .folder import check_folder

_IDX_NAME = re.compile(r"ubyte(\.gz)?$")
# The split of idx files whose name does not say which it is.
UNNAMED = "all"


def open_splits(args: DataArguments) -> tuple[ImageDataset, ImageDataset | None]:
    """The idx files of `--train_dir`, and of `--validation_dir` or the held-out ones beside them.

    Raises:
        ValueError: a file is damaged, or a split that is asked for is not there.
    """
    train, held_out = _choose_idx(check_folder(args.train_dir), args)
    if args.validation_dir:
        found = from_idx(check_folder(args.validation_dir), args.num_channels)
        held_out = found[find_split(found, args.validation_split, (*HELD_OUT, UNNAMED, *TRAINING))]
    return train, held_out


def _choose_idx(root: str, args: DataArguments) -> tuple[ImageDataset, ImageDataset | None]:
    found = from_idx(root, args.num_channels)
    if list(found) == [UNNAMED]:
        return found[UNNAMED], None
    train, validation = choose_splits(list(found), root, args.train_split, args.validation_split)
    return found[train], None if validation is None else found[validation]


def has_idx_files(folder: str | os.PathLike) -> bool:
    return any(_IDX_NAME.search(name) for name in os.listdir(folder))


def from_idx(folder: str, num_channels: int) -> dict[str, ImageDataset]:
    """The idx files of a folder by split, as their names have it: "train", "validation", "test" (t10k), or `UNNAMED`.

    The labels of `train-images-idx3-ubyte` are in `train-labels-idx1-ubyte`, and so on.
    """
    # a plain file goes before its compressed twin
    names = [name for name in os.listdir(folder) if _IDX_NAME.search(name)]
    names.sort(key=lambda name: name.endswith(".gz"))
    stems: dict[str, str] = {}
    for name in names:
        stems.setdefault(name.removesuffix(".gz"), os.path.join(folder, name))

    splits: dict[str, ImageDataset] = {}
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
        splits[split] = ImageDataset(
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
