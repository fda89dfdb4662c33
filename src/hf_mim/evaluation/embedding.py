"""Features of a whole collection of images as one Parquet file, in parts that a run that was cut off goes on from."""

import json
import shutil
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from ..data.dataset import ImageDataset
from ..data.image_processing import evaluation_transform
from ..files import remove_leftovers, replacing, write_json
from .encoders import PATCHES, FeatureEncoder
from .features import describe_processor

# Columns besides those of labels.
COLUMNS = ("image", "row", "cls", "mean", PATCHES)
# Rows of a part, and bytes of its patch features, at most.
_ROWS, _BYTES = 4096, 2**28
# Raise it whenever the same model and images would give other parts.
_VERSION = 1


def parts_of(output: Path) -> Path:
    """The folder in which the beginning of a table lies."""
    return output.with_name(output.name + ".parts")


class _Read(Dataset):
    """(row, what the transform makes of the image, or the message where it cannot be read)."""

    def __init__(self, images: ImageDataset, rows: range, transform):
        self.images, self.rows, self.transform = images, rows, transform

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int):
        row = self.rows[index]
        try:
            return row, self.transform(self.images[row])
        except ValueError as error:
            return row, str(error)


def write_embeddings(
    encoder: FeatureEncoder,
    images: ImageDataset,
    image_processor,
    output: Path,
    *,
    patches: bool = False,
    batch_size: int = 64,
    num_workers: int = 0,
    bf16: bool = False,
    settings: dict | None = None,
) -> list[str]:
    """
    Writes a row an image, in order: `image`, its file or row in the data set; `row`, its number; `cls` and `mean`, of
    the patches, float32 (D,); with `patches` those, float16 (L, D); and each label by the names of its classes, None
    where there is none.

    Parts of up to 4,096 rows lie in `output` + ".parts" until all are there: the same call goes on from them. Several
    processes take turns. Memory holds one part.

    Args:
        encoder: On the device where it is to run; without [CLS] there is no `cls`.
        settings (`dict`, *optional*): Kept in the file's metadata, under `hf_mim`.

    Returns:
        `list[str]`: messages, in order, of the images that cannot be read, which have no row.

    Raises:
        ValueError: If the parts that lie there are of another model, other images or other settings.
    """
    import pyarrow.parquet as pq

    state = PartialState()
    transform = evaluation_transform(image_processor, images.num_channels)
    schema, poolings, row_bytes = _schema(encoder, images, transform, patches, settings)
    size = max(1, min(_ROWS, _BYTES // row_bytes)) if patches else _ROWS
    parts = parts_of(output)
    key = {
        "model": encoder.digest(),
        "images": [images.fingerprint(), images.content_fingerprint()],
        "image_processor": describe_processor(image_processor),
        "bf16": bf16,
        "columns": schema.names,
        "rows": size,
        "version": _VERSION,
    }
    if (parts / "key.json").is_file():
        known = json.loads((parts / "key.json").read_text(encoding="utf-8"))
        if known != key:
            different = ", ".join(name for name in key if known.get(name) != key[name])
            raise ValueError(
                f"{parts} holds the beginning of a table of another {different}: remove it, or name another file."
            )
    state.wait_for_everyone()
    if state.is_main_process:
        parts.mkdir(parents=True, exist_ok=True)
        remove_leftovers(parts)
        write_json(parts / "key.json", key)
    state.wait_for_everyone()
    files = [parts / f"{start:09d}.parquet" for start in range(0, len(images), size)]
    # By number, whatever is there already: another process may be writing.
    share = range(state.process_index, len(files), state.num_processes)
    for number in tqdm(share, disable=not state.is_main_process, unit="part"):
        if files[number].is_file():
            continue
        rows = range(number * size, min(len(images), (number + 1) * size))
        table = _embed(encoder, images, rows, transform, schema, poolings, batch_size, num_workers, bf16)
        with replacing(files[number]) as temporary:
            pq.write_table(table, temporary)
    state.wait_for_everyone()
    broken = [line for file in files for line in json.loads(pq.read_schema(file).metadata[b"broken"])]
    state.wait_for_everyone()
    if state.is_main_process:
        with replacing(output) as temporary, pq.ParquetWriter(temporary, schema) as writer:
            for file in files:
                # Less the list of broken images.
                writer.write_table(pq.read_table(file).replace_schema_metadata(schema.metadata))
        shutil.rmtree(parts)
    state.wait_for_everyone()
    return broken


def _schema(encoder: FeatureEncoder, images: ImageDataset, transform, patches: bool, settings: dict | None):
    """The table's schema, what is taken of the encoder, and the bytes of an image's patches."""
    import pyarrow as pa

    first = next(
        found
        for _, found in map(_Read(images, range(len(images)), transform).__getitem__, range(len(images)))
        if isinstance(found, torch.Tensor)
    )[None]
    tokens = encoder.tokens(first.to(encoder.device))[-1]
    num_prefix, width = encoder.num_prefix(tokens, first), tokens.shape[2]
    poolings = ["cls"] * (num_prefix > 0) + ["mean"] + [PATCHES] * patches
    length = tokens.shape[1] - num_prefix
    types = {
        "cls": pa.list_(pa.float32(), width),
        "mean": pa.list_(pa.float32(), width),
        PATCHES: pa.list_(pa.list_(pa.float16(), width), length),
    }
    fields = [("image", pa.string()), ("row", pa.int64()), *((pooling, types[pooling]) for pooling in poolings)]
    for name in images.labels:
        fields.append((_label_column(name), pa.list_(pa.string()) if images.multi_label(name) else pa.string()))
    metadata = {"hf_mim": json.dumps(settings or {})}
    return pa.schema(fields, metadata=metadata), poolings, 2 * length * width


def _label_column(name: str) -> str:
    return f"label_{name}" if name in COLUMNS else name


@torch.no_grad()
def _embed(encoder, images, rows, transform, schema, poolings, batch_size, num_workers, bf16):
    """The table of these rows, with the messages of broken images in its metadata."""
    import pyarrow as pa

    reader = DataLoader(
        _Read(images, rows, transform),
        batch_size=batch_size,
        num_workers=num_workers,
        collate_fn=list,
        generator=torch.Generator(),
    )
    found, broken, features = [], [], {pooling: [] for pooling in poolings}
    for batch in reader:
        read = [(row, image) for row, image in batch if isinstance(image, torch.Tensor)]
        broken += [message for _, message in batch if isinstance(message, str)]
        if not read:
            continue
        found += [row for row, _ in read]
        pixel_values = torch.stack([image for _, image in read])
        with torch.autocast(encoder.device.type, torch.bfloat16) if bf16 else nullcontext():
            pooled = encoder.features(pixel_values, poolings)
        for pooling, values in pooled.items():
            features[pooling].append(values.cpu().numpy())
    columns = {"image": [images.name(row) for row in found], "row": found}
    for pooling in poolings:
        columns[pooling] = _as_lists(features[pooling], schema.field(pooling).type)
    for name in images.labels:
        columns[_label_column(name)] = [_label(images, name, row) for row in found]
    arrays = [
        column if isinstance(column, pa.Array) else pa.array(column, field.type)
        for column, field in zip(columns.values(), schema, strict=True)
    ]
    metadata = {**schema.metadata, b"broken": json.dumps(broken)}
    return pa.Table.from_arrays(arrays, schema=schema.with_metadata(metadata))


def _as_lists(parts: list[np.ndarray], kind):
    """Arrays (n, ...) one after the other as a column of lists of fixed lengths."""
    import pyarrow as pa

    sizes = []
    while pa.types.is_fixed_size_list(kind):
        sizes.append(kind.list_size)
        kind = kind.value_type
    flat = np.concatenate([part.reshape(-1) for part in parts]) if parts else np.zeros(0, kind.to_pandas_dtype())
    column = pa.array(flat, kind)
    for size in reversed(sizes):
        column = pa.FixedSizeListArray.from_arrays(column, size)
    return column


def _label(images: ImageDataset, name: str, row: int) -> str | list[str] | None:
    value, names = images.labels[name][row], images.label_names.get(name)
    if (value < 0).any():
        return None
    found = np.flatnonzero(value) if images.multi_label(name) else [value]
    found = [str(number) if names is None else str(names[number]) for number in found]
    return found if images.multi_label(name) else found[0]
