"""A folder of pictures, with or without a sub-folder for each class, and with or without one for each split."""

import hashlib
import os
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from transformers.utils import logging

from ..arguments import DataArguments
from ..dataset import ImageDataset
from ..images import IMAGE_EXTENSIONS
from ..splits import HELD_OUT, TRAINING, choose_splits, find_split, folder_splits, sibling_split
from . import index_cache

logger = logging.get_logger(__name__)

_SETTLED_NS = 60 * 10**9
# Of what is kept of a listing; another number where that changes.
_FORM = "1"

_ARCHIVES = (".zip", ".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".7z", ".rar")


def open_splits(
    args: DataArguments, endings: tuple[str, ...] = IMAGE_EXTENSIONS, open_files: Callable | None = None
) -> tuple[ImageDataset, ImageDataset | None]:
    """The pictures of `--train_dir`, and of `--validation_dir` or the split beside them.

    Args:
        endings: of the files that are read.
        open_files: from a folder and the paths below it to what `ImageDataset` takes as values; the files themselves,
            a picture each, if None. Others are `PartImages`.

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
    roots = [train] + [held_out] * (held_out is not None)
    train, *validation = from_folder(roots, args.num_channels, endings, open_files)
    return train, validation[0] if validation else None


def _choose_folders(root: str, args: DataArguments) -> tuple[str, str | None]:
    splits = folder_splits(root)
    if splits is None:
        return root, sibling_split(root, args.validation_split)
    train, held_out = choose_splits(list(splits), root, args.train_split, args.validation_split)
    return splits[train], None if held_out is None else splits[held_out]


class FileImages:
    """
    Paths below a root, in one array: a million Python strings would be copied into every worker, page by page.

    Args:
        root (`str`): the folder.
        paths: relative to it, strings or an array of bytes.
    """

    def __init__(self, root: str, paths: list[str] | np.ndarray):
        self.root = root
        self.paths = _encoded(paths) if isinstance(paths, list) else paths

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


def from_folder(
    roots: list[str],
    num_channels: int,
    endings: tuple[str, ...] = IMAGE_EXTENSIONS,
    open_files: Callable | None = None,
) -> list[ImageDataset]:
    """Folders of pictures with the same classes (training and validation), as data sets. See `open_splits`.

    If every picture lies in a sub-folder, and there are at least two of these, they are the classes of `label`. Not of
    a folder that is still to be split, where each of them is one group (a volume, a scene, a patient): a class would
    be on one side alone.
    """
    found = [list_folder(root, endings) for root in roots]
    tops = [[folder.partition(os.sep)[0] for folder in listing.folders] for listing in found]
    classes = sorted({tops[i][folder] for i, listing in enumerate(found) for folder in listing.run_folders})
    labelled = len(classes) > 1 and "" not in classes
    numbers = {name: number for number, name in enumerate(classes)}
    files = [
        (open_files or FileImages)(os.path.expanduser(root), listing.paths)
        for root, listing in zip(roots, found, strict=True)
    ]
    columns = [
        listing.by_folder([numbers.get(top, -1) for top in names]) for listing, names in zip(found, tops, strict=True)
    ]
    groups = [None] * len(roots)
    if open_files is not None:
        if len(roots) == 1:
            pairs = set(zip(columns[0].tolist(), files[0].file_groups.tolist(), strict=True))
            labelled = labelled and len(pairs) > len(classes)
        groups = [parts.groups() for parts in files]
        columns = [column[parts.file_numbers] for column, parts in zip(columns, files, strict=True)]
    return [
        ImageDataset(
            values,
            num_channels,
            source=os.fspath(root),
            labels={"label": column} if labelled else None,
            label_names={"label": classes} if labelled else None,
            groups=together,
        )
        for root, values, column, together in zip(roots, files, columns, groups, strict=True)
    ]


@dataclass
class Listing:
    """
    The pictures below a folder.

    Args:
        paths (`np.ndarray` of bytes): relative to the folder, in order.
        run_folders, run_lengths (`np.ndarray` of int64): which of `folders` so many pictures that follow one another
            lie in.
        folders (`list[str]`): relative to the folder; "" is itself.
        states (`np.ndarray` of int64, `(len(folders), 2)`): inode and time of the last change of each.
        others (`dict[str, int]`): files of other endings, by these.
    """

    paths: np.ndarray
    run_folders: np.ndarray
    run_lengths: np.ndarray
    folders: list[str]
    states: np.ndarray
    others: dict[str, int]

    def by_folder(self, values: list[int]) -> np.ndarray:
        """For each picture the value of its folder."""
        return np.repeat(np.array(values, dtype=np.int64)[self.run_folders], self.run_lengths)

    def arrays(self, rule: str) -> dict[str, np.ndarray]:
        others = np.array([f"{count} {ending}" for ending, count in self.others.items()], dtype="U64")
        return vars(self) | {"folders": _encoded(self.folders), "others": others, "rule": np.array(rule)}

    @classmethod
    def from_arrays(cls, arrays: dict[str, np.ndarray]) -> "Listing":
        folders = [os.fsdecode(bytes(folder)) for folder in arrays["folders"]]
        others = (text.split(" ", 1) for text in arrays["others"].tolist())
        named = {name: arrays[name] for name in ("paths", "run_folders", "run_lengths", "states")}
        return cls(folders=folders, others={ending: int(count) for count, ending in others}, **named)


def find_images(root: str | os.PathLike, endings: tuple[str, ...] = IMAGE_EXTENSIONS) -> list[str]:
    """Paths of the pictures below a folder, relative to it, sorted; see [`list_folder`]."""
    return [os.fsdecode(bytes(path)) for path in list_folder(root, endings).paths]


def list_folder(root: str | os.PathLike, endings: tuple[str, ...] = IMAGE_EXTENSIONS) -> Listing:
    """The pictures below a folder, sorted; hidden files and folders are left out.

    Files with other endings are counted, and the log says how many there are of each. What a large folder holds is
    kept, and looked up again where none of its folders has changed since.

    Raises:
        ValueError: there is no such folder, it cannot be listed, or it holds no picture.
    """
    root = check_folder(root)
    # By which a kept listing was made.
    rule = " ".join((_FORM, *endings))
    listing = _kept_listing(root, rule)
    if listing is None:
        began = time.time_ns()
        listing = _list(root, endings)
        # A folder that changed just now may change again without another time.
        if len(listing.paths) >= index_cache.LEAST and listing.states[:, 1].max() < began - _SETTLED_NS:
            index_cache.keep("folder", root, listing.arrays(rule))
    left_out = ", ".join(f"{count} {ending}" for ending, count in Counter(listing.others).most_common(8))
    if not len(listing.paths):
        there = f" It holds files that end in {left_out}." if left_out else ""
        raise ValueError(f"{root} holds no picture.{there} Files that are read: {', '.join(endings)}.")
    if left_out:
        logger.warning(f"{root}: files left out for their endings: {left_out}.")
    return listing


def _kept_listing(root: str, rule: str) -> Listing | None:
    arrays = index_cache.kept("folder", root)
    if arrays is None or str(arrays.get("rule")) != rule:
        return None
    listing = Listing.from_arrays(arrays)
    try:
        states = [_state(os.stat(os.path.join(root, folder))) for folder in listing.folders]
    except OSError:
        return None
    return listing if np.array_equal(states, listing.states) else None


def _state(status: os.stat_result) -> tuple[int, int]:
    # As numbers with a sign, which an inode may not be.
    return status.st_ino & (2**63 - 1), status.st_mtime_ns


def _list(root: str, endings: tuple[str, ...]) -> Listing:
    paths, folders, states, runs, others = [], [], [], [], Counter()
    # A link back up would never end.
    visited = set()

    def enter(below: str) -> None:
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
        number = len(folders)
        folders.append(below)
        states.append(_state(status))
        for name, is_folder in entries:
            path = os.path.join(below, name) if below else name
            if is_folder:
                enter(path)
            elif name.lower().endswith(endings):
                if not runs or runs[-1][0] != number:
                    runs.append([number, 0])
                runs[-1][1] += 1
                paths.append(os.fsencode(path))
            else:
                others[os.path.splitext(name)[1].lower() or "no ending"] += 1

    enter("")
    run_folders, run_lengths = np.array(runs, dtype=np.int64).reshape(-1, 2).T
    return Listing(np.array(paths), run_folders, run_lengths, folders, np.array(states), dict(others))


def _encoded(paths: list[str]) -> np.ndarray:
    return np.array([os.fsencode(path) for path in paths])


def find_first(root: str, endings: tuple[str, ...]) -> str | None:
    """The path of a file of one of these endings, the first that is come by; None where there is none."""
    visited = set()
    for folder, below, names in os.walk(root, followlinks=True):
        status = os.stat(folder)
        # A link back up would never end.
        seen = (status.st_dev, status.st_ino) in visited
        visited.add((status.st_dev, status.st_ino))
        below[:] = [] if seen else sorted(name for name in below if not name.startswith("."))
        for name in sorted(names):
            if not name.startswith(".") and name.lower().endswith(endings):
                return os.path.join(folder, name)
    return None


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
