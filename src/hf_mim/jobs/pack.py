"""Packs pictures into few large files, small enough to be read as fast as they are trained on."""

import hashlib
import io
import json
import os
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from torch.utils.data import DataLoader, Dataset

from ..data.arguments import DataArguments
from ..data.dataset import ImageDataset, ImageStream, stored_bytes
from ..data.images import BrokenImageError, read_image
from ..data.pretraining import WINDOW_SHARDS
from ..data.sources import open_splits
from ..data.sources.packed import FORMAT, GROUP_ROWS, INDEX
from ..files import replacing, write_json
from ..training.command import parse_arguments, say
from ..training.errors import run_job
from ..training.machine import process_cores
from ..training.run_lock import only_run_in
from .check import _name_data

_JPEG, _JPEG_QUALITY = b"\xff\xd8\xff", 95


@dataclass
class PackArguments:
    """How pictures are packed."""

    output_dir: str = field(metadata={"help": "The folder that is written; then a --train_dir."})
    short_side: int | None = field(
        default=None,
        metadata={"help": "Pictures are made smaller until their shorter side has so many pixels. Default: as is."},
    )
    rows_per_shard: int = field(default=4096, metadata={"help": "Pictures a file."})
    num_workers: int = field(
        default=process_cores() - 1, metadata={"help": "Processes that read and resize. Default: the cores less one."}
    )

    def __post_init__(self):
        for flag, least in (("short_side", 1), ("rows_per_shard", 1), ("num_workers", 0)):
            value = getattr(self, flag)
            if value is not None and value < least:
                raise ValueError(f"--{flag} is {value}; expected at least {least}.")


def main(argv: list[str] | None = None) -> int:
    """`hf_mim pack DATA DIR`: DATA is a folder or a data set of the Hub. Returns the exit status."""
    return run_job(lambda: pack(*parse_arguments((DataArguments, PackArguments), name_both(argv), presets={})))


def name_both(argv: list[str] | None) -> list[str]:
    """The command line, its first two words as the flags that they stand for."""
    argv = list(argv or [])
    if len(argv) > 1 and not argv[1].startswith("-"):
        argv[1] = f"--output_dir={argv[1]}"
    return _name_data(argv)


def pack(data_args: DataArguments, args: PackArguments) -> int:
    """
    Writes the shards that are not there yet, then the index. A picture that cannot be read is listed and left out.

    Raises:
        ValueError: If the data is a stream, no picture can be read, one has no 8-bit pixels in 1 or 3 channels, or the
            folder holds shards of other pictures or settings.
    """
    if data_args.streaming:
        raise ValueError("What is packed is read by index: leave out --streaming.")
    if data_args.num_channels not in (None, 1, 3):
        raise ValueError(f"--num_channels is {data_args.num_channels}; 8-bit pictures of 1 or 3 channels are packed.")
    data_args.num_channels = data_args.num_channels or 3
    folder = Path(args.output_dir).expanduser()
    with only_run_in(folder):
        return _pack(data_args, args, folder)


def _pack(data_args: DataArguments, args: PackArguments, folder: Path) -> int:
    train, validation = open_splits(data_args, seed=0)
    splits = {"train": train} | ({} if validation is None else {"validation": validation})
    index = {"format": FORMAT, "short_side": args.short_side, "splits": {}, "broken": [], "labels": {}}
    if any(isinstance(images, ImageStream) for images in splits.values()):
        raise ValueError("What is packed is read by index, and this is a stream.")
    expected = {path for name, images in splits.items() for path in _shards(folder, name, len(images), args)}
    # A reader of the folder would take them for the new ones, or read both.
    for path in sorted(set(folder.glob("*.parquet")) - expected):
        raise ValueError(f"{path} is of other pictures or settings: choose another folder, or delete it.")
    for name, images in splits.items():
        images.max_image_pixels = data_args.max_image_pixels
        index["labels"] |= images.label_names
        shards, broken = _pack_split(folder, name, images, args)
        index["splits"][name] = shards
        index["broken"] += broken
    rows = sum(shard["rows"] for shards in index["splits"].values() for shard in shards)
    if rows == 0:
        raise ValueError(f"{train.source} holds no picture that can be read. The first: {index['broken'][0]}")
    write_json(folder / INDEX, index)
    size = sum(shard["file_bytes"] for shards in index["splits"].values() for shard in shards)
    say(f"Packed {rows} pictures, {size / 2**20:.0f} MiB, into {folder}; --train_dir {folder} trains on them.")
    if index["broken"]:
        say(f"Left out: {len(index['broken'])} pictures that cannot be read, named in {folder / INDEX} (broken).")
    return 0


def _shards(folder: Path, name: str, num_images: int, args: PackArguments) -> list[Path]:
    number = -(-num_images // args.rows_per_shard)
    return [folder / f"{name}-{shard:05}-of-{number:05}.parquet" for shard in range(number)]


def _describe(images: ImageDataset, args: PackArguments) -> dict:
    """What decides what is in the shards, by which one of an interrupted command is known again."""
    labels = hashlib.sha256(json.dumps(images.label_names, sort_keys=True).encode())
    for name, column in sorted(images.labels.items()):
        labels.update(name.encode() + np.ascontiguousarray(column).tobytes())
    return {
        "pictures": images.content_fingerprint(),
        "labels": labels.hexdigest(),
        "max_image_pixels": images.max_image_pixels,
        "short_side": args.short_side,
        "rows": args.rows_per_shard,
    }


def _pack_split(folder: Path, name: str, images: ImageDataset, args: PackArguments) -> tuple[list[dict], list[str]]:
    import pyarrow.parquet as pq

    of, paths, order = _describe(images, args), _shards(folder, name, len(images), args), np.arange(len(images))
    if len(paths) > WINDOW_SHARDS:
        # Training shuffles so many shards at a time, of which each should be like the whole: a folder's order is that
        # of its classes.
        order = np.random.Generator(np.random.PCG64(0)).permutation(order)
        of["order"] = "mixed"
    shards, broken = [], []
    for shard, path in enumerate(paths):
        rows = order[shard * args.rows_per_shard : (shard + 1) * args.rows_per_shard]
        if not path.is_file():
            _write_shard(path, images.select(rows), of, args)
        told = json.loads(pq.read_schema(path).metadata[b"hf_mim"])
        if told["of"] != of:
            raise ValueError(f"{path} is of other pictures or settings: choose another folder, or delete it.")
        metadata = pq.read_metadata(path)
        shards.append({"name": path.name, "rows": metadata.num_rows, "file_bytes": path.stat().st_size})
        broken += told["broken"]
    return shards, broken


def _write_shard(path: Path, pictures: ImageDataset, of: dict, args: PackArguments) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    encoded = _Encoded(pictures, args.short_side)
    images, kept, broken = [], [], []
    for row, (data, name, error) in enumerate(DataLoader(encoded, batch_size=None, num_workers=args.num_workers)):
        if error is not None:
            broken.append(error)
            continue
        images.append({"bytes": data, "path": name})
        kept.append(row)
    columns = {name: _label_values(column[kept]) for name, column in pictures.labels.items()}
    schema = _features(pictures).arrow_schema
    schema = schema.with_metadata({**schema.metadata, b"hf_mim": json.dumps({"of": of, "broken": broken}).encode()})
    table = pa.table({"image": images} | columns, schema=schema)
    with replacing(path) as temporary:
        # Pictures are compressed already, and a row is read where it lies.
        pq.write_table(table, temporary, row_group_size=GROUP_ROWS, compression="none", use_dictionary=False)


def _features(images: ImageDataset):
    from datasets import ClassLabel, Features, Image, List, Value

    features = {"image": Image()}
    for name, column in images.labels.items():
        classes = images.label_names.get(name)
        kind = Value("int64") if classes is None else ClassLabel(names=classes)
        features[name] = List(kind) if column.ndim == 2 else kind
    return Features(features)


def _label_values(column: np.ndarray) -> list:
    """Labels as `label_numbers` reads them: numbers of classes, lists of them, None where it is not known."""
    if column.ndim == 1:
        return [None if value < 0 else int(value) for value in column]
    return [None if (row < 0).any() else row.nonzero()[0].tolist() for row in column]


class _Encoded(Dataset):
    """The bytes of a file for each picture, its name, and None; or what is wrong with it in the place of None."""

    def __init__(self, images: ImageDataset, short_side: int | None):
        self.images, self.short_side = images, short_side

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[bytes | None, str, str | None]:
        name = self.images.name(index)
        try:
            return self._encode(index, name), os.path.basename(name), None
        except BrokenImageError as error:
            return None, name, str(error)

    def _encode(self, index: int, name: str) -> bytes:
        from PIL import Image

        value = self.images.stored(index)
        limits = {"name": name, "max_image_pixels": self.images.max_image_pixels}
        picture = read_image(value, self.images.num_channels, **limits)
        if picture.is_floating_point():
            raise ValueError(f"{name}: has more than 8 bits a channel, which packing would lose.")
        height, width = picture.shape[1:]
        share = 1.0 if self.short_side is None else self.short_side / min(height, width)
        is_file = isinstance(value, dict | str | os.PathLike | bytes)
        data = stored_bytes(value) if is_file else b""
        if share >= 1 and is_file and not data.startswith(b"\x93NUMPY"):
            return data
        pixels = picture.permute(1, 2, 0).numpy()
        image = Image.fromarray(pixels if pixels.shape[2] == 3 else pixels[:, :, 0])
        if share < 1:
            size = (max(self.short_side, round(width * share)), max(self.short_side, round(height * share)))
            image = image.resize(size, Image.Resampling.BICUBIC)
        file = io.BytesIO()
        if data.startswith(_JPEG):
            image.save(file, "JPEG", quality=_JPEG_QUALITY)
        else:
            image.save(file, "PNG")
        return file.getvalue()
