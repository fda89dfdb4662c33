"""
Pictures that `hf_mim pack` wrote: parquet shards with an index, which is written last.

`DIR/index.json` names the shards of each split with their rows and bytes; a shard has a column `image` of `bytes` and
`path`, as `datasets` reads it, and one for each label. Row groups are small, so that one picture is read without its
neighbours costing much.
"""

import contextlib
import hashlib
import json
import logging
import os
import time
from pathlib import Path

import numpy as np

from ..arguments import DataArguments
from ..dataset import ImageDataset, label_numbers
from ..pretraining import WINDOW_SHARDS
from ..splits import HELD_OUT, TRAINING, choose_splits, find_split

INDEX = "index.json"
FORMAT = "hf_mim pack 1"
# Of a row group: what is read for one picture, about 600 kB of 256 x 256 pixels.
GROUP_ROWS = 32

# Before a shard that cannot be read is tried again: a file server may be away for a moment.
_RETRY_SECONDS = (1.0, 5.0, 25.0)
_WAY_OUT = "Copy the folder again, or delete the shard and let the `hf_mim pack` of before write it anew."

logger = logging.getLogger(__name__)


def is_packed(root: str | os.PathLike) -> bool:
    """
    Whether `hf_mim pack` wrote the folder.

    Raises:
        ValueError: it did, and has not finished, or the index has been damaged since.
    """
    folder = Path(os.path.expanduser(root))
    try:
        if json.loads((folder / INDEX).read_text()).get("format") == FORMAT:
            return True
        wrong = f"is of another format than {FORMAT!r}"
    except FileNotFoundError:
        wrong = "is missing"
    except (OSError, ValueError, AttributeError) as error:
        wrong = f"cannot be read ({error})"
    if _holds_shards(folder):
        raise ValueError(
            f"{folder / INDEX} {wrong}, and there are shards beside it. It is written last: start the same "
            "`hf_mim pack` again, which keeps the shards that are whole."
        )
    return False


def _holds_shards(folder: Path) -> bool:
    import pyarrow as pa
    import pyarrow.parquet as pq

    for path in folder.glob("*-of-*.parquet"):
        with contextlib.suppress(OSError, pa.ArrowInvalid):
            # Others name parquet files alike.
            return b"hf_mim" in (pq.read_schema(path).metadata or {})
    return False


def open_splits(args: DataArguments) -> tuple[ImageDataset, ImageDataset | None]:
    """The pictures of `--train_dir`, and of `--validation_dir` or the split beside them.

    Raises:
        ValueError: a shard is missing, cut short or not of this index; a split that is asked for is not there; or
            `--validation_dir` is not packed.
    """
    root = args.train_dir
    name, held_out = choose_splits(_split_names(root), root, args.train_split, args.validation_split)
    train = _open(root, name, args)
    if args.validation_dir is None:
        return train, None if held_out is None else _open(root, held_out, args)
    if not is_packed(args.validation_dir):
        raise ValueError(f"--validation_dir {args.validation_dir} is not packed, as --train_dir is: pack it too.")
    name = find_split(_split_names(args.validation_dir), args.validation_split, HELD_OUT + TRAINING)
    return train, _open(args.validation_dir, name, args)


def _split_names(root: str) -> list[str]:
    return list(_read_index(root)["splits"])


def _read_index(root: str | os.PathLike) -> dict:
    return json.loads((Path(os.path.expanduser(root)) / INDEX).read_text())


def _open(root: str, split: str, args: DataArguments) -> ImageDataset:
    import pyarrow.parquet as pq

    index = _read_index(root)
    values = PackedImages(os.path.expanduser(root), index["splits"][split])
    names = index["labels"]
    columns: dict[str, list] = {name: [] for name in names}
    if names:
        for path in values.shard_paths:
            table = pq.read_table(path, columns=list(names))
            for name in names:
                columns[name] += table[name].to_pylist()
    labels = {name: label_numbers(columns[name], classes) for name, classes in names.items()}
    return ImageDataset(values, args.num_channels, source=str(root), labels=labels, label_names=names)


class PackedImages:
    """
    What `read_image` takes, by row, of shards whose rows are counted in order. Only numbers are held: a worker opens
    the shards that it reads, and has as many open as are shuffled together.

    Args:
        root (`str`): the folder.
        shards: of the index, in order: dicts of `name`, `rows` and `file_bytes`.

    Raises:
        ValueError: a shard is missing, or is not as long as the index says.
    """

    def __init__(self, root: str, shards: list[dict]):
        self.shard_paths = [os.path.join(root, shard["name"]) for shard in shards]
        self.ends = np.cumsum([shard["rows"] for shard in shards], dtype=np.int64)
        self._told = json.dumps(shards)
        self._process, self._files = os.getpid(), {}
        for path, shard in zip(self.shard_paths, shards, strict=True):
            size = os.path.getsize(path) if os.path.isfile(path) else None
            if size != shard["file_bytes"]:
                found = "is missing" if size is None else f"has {size} bytes"
                raise ValueError(f"{path} {found}, where {INDEX} says {shard['file_bytes']}. {_WAY_OUT}")

    def __len__(self) -> int:
        return int(self.ends[-1]) if len(self.ends) else 0

    def __getitem__(self, row: int) -> dict:
        shard = int(np.searchsorted(self.ends, row, side="right"))
        row -= int(self.ends[shard - 1]) if shard else 0
        for seconds in (*_RETRY_SECONDS, None):
            try:
                group = self._file(shard).read_row_group(row // GROUP_ROWS, columns=["image"])
                return group["image"][row % GROUP_ROWS].as_py()
            # Arrow's word for a file that was cut short is a ValueError.
            except (OSError, _arrow_invalid()) as error:
                self._files.pop(shard, None)
                if seconds is None:
                    raise OSError(
                        f"{self.shard_paths[shard]} can no longer be read ({error}). Was it moved, or cut short?"
                    ) from error
                logger.warning("%s: %s. Trying again in %g s.", self.shard_paths[shard], error, seconds)
                time.sleep(seconds)

    def _file(self, shard: int):
        import pyarrow.parquet as pq

        if self._process != os.getpid():
            # A worker shares no open file, nor its position, with the process that it came from.
            self._process, self._files = os.getpid(), {}
        if shard not in self._files:
            # Not mapped: of a mapped file that is cut short the system kills the reader.
            file = pq.ParquetFile(self.shard_paths[shard])
            rows = int(self.ends[shard]) - (int(self.ends[shard - 1]) if shard else 0)
            if file.metadata.num_rows != rows:
                raise ValueError(
                    f"{self.shard_paths[shard]} has {file.metadata.num_rows} rows, where {INDEX} says {rows}. "
                    f"{_WAY_OUT}"
                )
            while len(self._files) >= WINDOW_SHARDS:
                # The one that was opened first.
                self._files.pop(next(iter(self._files))).close()
            self._files[shard] = file
        return self._files[shard]

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_files": {}}

    def fingerprint(self, rows: np.ndarray) -> str:
        return hashlib.sha256(self._told.encode() + np.ascontiguousarray(rows).tobytes()).hexdigest()


def _arrow_invalid() -> type[Exception]:
    import pyarrow

    return pyarrow.ArrowInvalid
