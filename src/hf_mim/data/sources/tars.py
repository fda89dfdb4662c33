"""
A folder of tar files as WebDataset has them, read as they are: a picture is a member, at a place that is known.

Members of one sample share their name up to the first dot of its last part: `0001.jpg`, `0001.cls`. A `.cls` is the
number of the picture's class; members of other endings are left alone.
"""

import hashlib
import os
import tarfile
from collections import Counter

import numpy as np
from transformers.utils import logging

from ..arguments import DataArguments
from ..dataset import ImageDataset
from ..images import IMAGE_EXTENSIONS
from . import index_cache
from .folder import check_folder

logger = logging.get_logger(__name__)

_RULE = " ".join(("1", *IMAGE_EXTENSIONS))


def has_tars(root: str) -> bool:
    """Whether a folder holds tar files, and no other but hidden ones, texts and tables."""
    with os.scandir(root) as scan:
        names = [entry.name.lower() for entry in scan if not entry.name.startswith(".")]
    beside = (".json", ".txt", ".md", ".csv", ".tsv")
    return any(name.endswith(".tar") for name in names) and all(name.endswith((".tar", *beside)) for name in names)


def open_splits(args: DataArguments) -> tuple[ImageDataset, ImageDataset | None]:
    """The pictures of `--train_dir` and, where it is given, of `--validation_dir`.

    Raises:
        ValueError: a file is no tar file, is cut short, or none holds a picture; or `--validation_dir` holds none.
    """
    train = _open(args.train_dir, args.num_channels)
    if args.validation_dir is None:
        return train, None
    if not has_tars(check_folder(args.validation_dir)):
        raise ValueError(f"--validation_dir {args.validation_dir} holds no tar files, as --train_dir does.")
    return train, _open(args.validation_dir, args.num_channels)


def _open(root: str, num_channels: int) -> ImageDataset:
    root = os.path.expanduser(root)
    paths = sorted(os.path.join(root, name) for name in os.listdir(root) if name.lower().endswith(".tar"))
    index = _index(root, paths)
    if not len(index["offsets"]):
        raise ValueError(f"{root}: the tar files hold no picture. Read are {', '.join(IMAGE_EXTENSIONS)}.")
    values = TarImages(paths, index)
    classes = index["classes"]
    if (classes < 0).any():
        return ImageDataset(values, num_channels, source=root)
    names = [str(number) for number in range(int(classes.max()) + 1)]
    return ImageDataset(values, num_channels, source=root, labels={"label": classes}, label_names={"label": names})


class TarImages:
    """
    What `read_image` takes, by row, of tar files whose pictures are counted in order. Only numbers are held: a worker
    opens a file when it reads of it.

    Args:
        paths (`list[str]`): of the files.
        index: arrays: `ends` of each file, the row after its last; `offsets`, `sizes` and `names` of each picture.
    """

    def __init__(self, paths: list[str], index: dict[str, np.ndarray]):
        self.tars = paths
        self.ends, self.offsets, self.sizes, self.paths = (
            index[name] for name in ("ends", "offsets", "sizes", "names")
        )

    def __len__(self) -> int:
        return len(self.offsets)

    def __getitem__(self, row: int) -> dict:
        path, size = self.tars[int(np.searchsorted(self.ends, row, side="right"))], int(self.sizes[row])
        with open(path, "rb") as file:
            file.seek(int(self.offsets[row]))
            data = file.read(size)
        if len(data) < size:
            raise OSError(f"{path} has been cut short since it was indexed: a picture ends beyond its end.")
        return {"bytes": data, "path": os.fsdecode(bytes(self.paths[row]))}

    def fingerprint(self, rows: np.ndarray) -> str:
        digest = hashlib.sha256()
        for path in self.tars:
            status = os.stat(path)
            digest.update(f"{os.path.realpath(path)} {status.st_size} {status.st_mtime_ns} ".encode())
        return hashlib.sha256(digest.digest() + np.ascontiguousarray(rows).tobytes()).hexdigest()


def _index(root: str, paths: list[str]) -> dict[str, np.ndarray]:
    """Where the pictures lie, read from all the files' headers, or kept since, where no file has changed."""
    of = hashlib.sha256(_RULE.encode())
    for path in paths:
        status = os.stat(path)
        of.update(f"{os.path.basename(path)} {status.st_size} {status.st_mtime_ns} ".encode(errors="surrogateescape"))
    kept = index_cache.kept("tars", root)
    if kept is not None and str(kept.get("of")) == of.hexdigest():
        return kept
    ends, rows = [], []
    for path in paths:
        rows += _pictures(path)
        ends.append(len(rows))
    names, offsets, sizes, classes = zip(*rows, strict=True) if rows else ([], [], [], [])
    index = {"names": np.array([os.fsencode(name) for name in names]), "of": np.array(of.hexdigest())}
    numbers = {"ends": ends, "offsets": offsets, "sizes": sizes, "classes": classes}
    index |= {name: np.array(column, dtype=np.int64) for name, column in numbers.items()}
    if len(rows) >= index_cache.LEAST:
        index_cache.keep("tars", root, index)
    return index


def _pictures(path: str) -> list[tuple[str, int, int, int]]:
    """Name, offset, size and class (-1 where there is none) of each picture in a tar file."""
    pictures, classes, others = [], {}, Counter()
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                if not member.isfile():
                    continue
                if member.offset_data + member.size > os.path.getsize(path):
                    raise tarfile.ReadError(f"{member.name} ends beyond the end of the file")
                folder, _, name = member.name.rpartition("/")
                key, _, ending = name.partition(".")
                if ending.lower() == "cls":
                    classes[folder, key] = int(tar.extractfile(member).read())
                elif name.lower().endswith(IMAGE_EXTENSIONS) and not name.startswith("."):
                    pictures.append((member.name, member.offset_data, member.size, (folder, key)))
                else:
                    others[ending.lower() or "no ending"] += 1
                # What is read is not remembered a second time.
                tar.members = []
            if os.path.getsize(path) < tar.offset + tarfile.BLOCKSIZE:
                raise tarfile.ReadError("the zeros at its end are missing")
    except (OSError, ValueError, tarfile.TarError) as error:
        raise ValueError(
            f"{path} cannot be read ({error}). It must be a tar file that is not compressed, and whole: copy it again."
        ) from error
    if others:
        logger.info(f"{path}: left out {dict(others.most_common(8))}.")
    return [(name, offset, size, classes.get(key, -1)) for name, offset, size, key in pictures]
