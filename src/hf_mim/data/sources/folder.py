"""A folder of pictures, with or without a sub-folder for each class, and with or without one for each split."""

import hashlib
import os
from collections import Counter

import numpy as np
from transformers.utils import logging

from ..arguments import DataArguments
from ..dataset import ImageDataset
from ..images import IMAGE_EXTENSIONS
from ..splits import HELD_OUT, TRAINING, choose_splits, find_split, folder_splits, sibling_split

logger = logging.get_logger(__name__)

_ARCHIVES = (".zip", ".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".7z", ".rar")


def open_splits(args: DataArguments) -> tuple[ImageDataset, ImageDataset | None]:
    """The pictures of `--train_dir`, and of `--validation_dir` or the split beside them.

    Raises:
        ValueError: one of the two does not exist or holds no picture, or a split that is asked for is not there.
    """
    train, held_out = _choose_folders(check_folder(args.train_dir), args)
    if args.validation_dir:
        root = check_folder(args.validation_dir)
        splits = folder_splits(root)
        held_out = root if splits is None else splits[find_split(splits, args.validation_split, HELD_OUT + TRAINING)]
    elif held_out is not None:
        logger.warning(f"Training pictures are those of {train}; held out are those of {held_out}.")
    train, *validation = from_folder([train] + [held_out] * (held_out is not None), args.num_channels)
    return train, validation[0] if validation else None


def _choose_folders(root: str, args: DataArguments) -> tuple[str, str | None]:
    splits = folder_splits(root)
    if splits is None:
        return root, sibling_split(root, args.validation_split)
    train, held_out = choose_splits(list(splits), root, args.train_split, args.validation_split)
    return splits[train], None if held_out is None else splits[held_out]


class FileImages:
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


def from_folder(roots: list[str], num_channels: int) -> list[ImageDataset]:
    """Folders of pictures with the same classes (training and validation), as data sets.

    If every picture lies in a sub-folder, and there are at least two of these, they are the classes of `label`.
    """
    found = [find_images(root) for root in roots]
    tops = [[path.partition(os.sep)[0] for path in paths] for paths in found]
    classes = sorted({top for names in tops for top in names})
    labelled = len(classes) > 1 and all(os.sep in path for paths in found for path in paths)
    numbers = {name: number for number, name in enumerate(classes)}
    return [
        ImageDataset(
            FileImages(os.path.expanduser(root), paths),
            num_channels,
            source=os.fspath(root),
            labels={"label": [numbers[top] for top in names]} if labelled else None,
            label_names={"label": classes} if labelled else None,
        )
        for root, paths, names in zip(roots, found, tops, strict=True)
    ]


def find_images(root: str | os.PathLike) -> list[str]:
    """Paths of the pictures below a folder, relative to it, sorted; hidden files and folders are left out.

    Files with other endings are counted, and the log says how many there are of each.

    Raises:
        ValueError: there is no such folder, it cannot be listed, or it holds no picture.
    """
    root = check_folder(root)
    paths, others = [], Counter()
    # A link back up would never end.
    _list_images(root, "", set(), paths, others)
    left_out = ", ".join(f"{count} {ending}" for ending, count in others.most_common(8))
    if not paths:
        there = f" It holds files that end in {left_out}." if left_out else ""
        raise ValueError(f"{root} holds no picture.{there} Files that are read: {', '.join(IMAGE_EXTENSIONS)}.")
    if left_out:
        logger.warning(f"{root}: files left out for their endings: {left_out}.")
    return paths


def _list_images(root: str, below: str, visited: set, paths: list[str], others: Counter) -> None:
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
            _list_images(root, path, visited, paths, others)
        elif name.lower().endswith(IMAGE_EXTENSIONS):
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
