"""Data sets of `datasets`, of the Hub or local, whole or streamed."""

import hashlib
import math
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ..arguments import DataArguments
from ..dataset import ImageDataset, ImageStream, label_numbers
from ..splits import choose_splits
from .clevr import with_clevr_tasks
from .folder import refuse_archive

# Held out of a stream by default: they are kept in memory.
_STREAMED_VALIDATION = 2000


def open_splits(args: DataArguments, seed: int) -> tuple[ImageDataset | ImageStream, ImageDataset | None]:
    """The pictures of `--dataset_name`, of two of its splits; with `--streaming` the first is a stream.

    Args:
        seed (`int`): of the stream's order.

    Raises:
        ValueError: there is no such data set, split or column, or `datasets` cannot read it.
    """
    splits = load_splits(
        args.dataset_name, args.dataset_config_name, streaming=args.streaming, cache_dir=args.data_cache_dir
    )
    train_name, held_out = choose_splits(list(splits), args.dataset_name, args.train_split, args.validation_split)
    settings = {
        "num_channels": args.num_channels,
        "source": args.dataset_name,
        "image_column": args.image_column_name,
        "label_columns": args.label_column_names,
    }
    if not args.streaming:
        used = {name: splits[name] for name in (train_name, held_out) if name}
        pictures = from_datasets(used, **settings)
        return pictures[train_name], pictures.get(held_out)

    settings["max_image_pixels"] = args.max_image_pixels
    train = splits[train_name]
    num_held_out = args.max_eval_samples or _STREAMED_VALIDATION
    if held_out:
        validation = splits[held_out]
    else:  # the first pictures, which training then leaves out
        validation, train = train.take(num_held_out), train.skip(num_held_out)
    if args.max_train_samples:
        train = train.take(args.max_train_samples)
    train = train.shuffle(seed=seed, buffer_size=args.shuffle_buffer_size)
    train = from_stream(train, **settings, skip_broken=args.skip_broken_images)
    return train, from_stream(validation, **settings).take(num_held_out)


def load_splits(name: str, config_name: str | None, *, streaming: bool, cache_dir: str | None) -> dict:
    """A data set of the Hub, a folder written by `save_to_disk`, or files that `load_dataset` knows, by split.

    Raises:
        ValueError: there is no such data set, or `datasets` cannot read it.
    """
    import datasets

    refuse_archive("--dataset_name", name)
    path = Path(os.path.expanduser(name))
    saved = (path / "dataset_dict.json").is_file() or (path / "state.json").is_file()
    if saved and streaming:
        raise ValueError(f"{name} was written by save_to_disk: leave out --streaming, it is read as it is needed.")
    try:
        if saved:
            loaded = datasets.load_from_disk(str(path))
        elif path.is_file():
            kind = path.suffix.removeprefix(".")
            loaded = datasets.load_dataset(kind, data_files=str(path), streaming=streaming, cache_dir=cache_dir)
        else:
            local = str(path) if path.is_dir() else name
            loaded = datasets.load_dataset(local, config_name, streaming=streaming, cache_dir=cache_dir)
    except (OSError, ValueError, IndexError, datasets.exceptions.DatasetsError) as error:
        raise ValueError(
            f"--dataset_name {name} could not be loaded: {_with_causes(error)} Expected a data set of the Hub, a "
            "folder that save_to_disk wrote, or a folder or file of parquet, arrow or pictures. (A folder of pictures "
            "alone is --train_dir.)"
        ) from error
    return dict(loaded) if isinstance(loaded, dict) else {"train": loaded}


def _with_causes(error: BaseException) -> str:
    """The messages of an error and of those that led to it, the true cause last."""
    messages = []
    while error is not None:
        text = " ".join(str(error).split()) or type(error).__name__
        if not any(text in message for message in messages):
            messages.append(text)
        error = error.__cause__ or error.__context__
    return " Cause: ".join(messages)


def find_image_column(features, wanted: str | None, source: str) -> str:
    """The column of the pictures: the one asked for, or the only one of type `Image`, or else of an array type.

    Raises:
        ValueError: there is none, or more than one; names the columns that there are.
    """
    import datasets

    columns = ", ".join(f"{name} ({type(feature).__name__})" for name, feature in features.items())
    if wanted is not None:
        if wanted not in features:
            raise ValueError(f"--image_column_name {wanted}: {source} has no such column. It has: {columns}.")
        return wanted
    arrays = (datasets.Array2D, datasets.Array3D)
    for types in (datasets.Image, arrays):
        found = [name for name, feature in features.items() if isinstance(feature, types)]
        if len(found) == 1:
            return found[0]
        if found:
            raise ValueError(f"{source} has pictures in {', '.join(found)}. Choose one by --image_column_name.")
    raise ValueError(
        f"{source} has no column of pictures (type Image, or an array). It has: {columns}. If one of them holds "
        "pictures, pass it as --image_column_name."
    )


def from_datasets(
    splits: dict,
    num_channels: int,
    *,
    source: str,
    image_column: str | None = None,
    label_columns: list[str] | None = None,
) -> dict[str, ImageDataset]:
    """Splits of a `datasets.DatasetDict` as pictures, by name.

    Labels are the columns of type `ClassLabel` and of lists of them, or `label_columns`. The classes of a column of
    any other type are the values that occur in it, in any of the splits, in order. A column of lists, of classes or of
    a 0 or 1 for each class, is a multi-label one. CLEVR's annotations become the labels count and distance.
    """
    splits = {name: with_clevr_tasks(split) for name, split in splits.items()}
    columns, labels, classes = {}, {name: {} for name in splits}, {}
    with_label: dict[str, dict] = {}
    for name, split in splits.items():
        columns[name] = find_image_column(split.features, image_column, f"{source} ({name})")
        for key in _find_label_columns(split.features, label_columns, f"{source} ({name})"):
            with_label.setdefault(key, {})[name] = split.select_columns([key])
    for key, having in with_label.items():
        classes[key], numbers = _read_labels(having)
        for name, column in numbers.items():
            labels[name][key] = column
    return {
        name: ImageDataset(
            _Column(_undecoded(split, columns[name]), columns[name]),
            num_channels,
            source=f"{source} ({name})",
            labels=labels[name],
            label_names={key: classes[key] for key in labels[name]},
        )
        for name, split in splits.items()
    }


def sibling_column(pictures: ImageDataset, wanted: str | None, usual: list[str], flag: str) -> Sequence:
    """
    Another column of the data set that pictures are of, by its row, as `annotations` has them. Pictures in it are as
    they are stored.

    Args:
        wanted (`str`, *optional*): Its name.
        usual (`list[str]`): The names to look for, in this order, where None is wanted.
        flag (`str`): By which a user names it, for the message.

    Raises:
        ValueError: The pictures are of no data set with columns, or it has no such column.
    """
    rows = getattr(pictures._values, "rows", None)
    if rows is None:
        raise ValueError(f"{pictures.source} has no columns to read: {flag} is of a data set of `datasets`.")
    names = usual if wanted is None else [wanted]
    found = next((name for name in names if name in rows.features), None)
    if found is None:
        raise ValueError(
            f"{pictures.source} has no column {' or '.join(names)}; it has {', '.join(rows.features)}. Name it by "
            f"{flag}."
        )
    return _Column(_undecoded(rows, found), found)


def from_stream(
    split,
    num_channels: int,
    *,
    source: str,
    image_column: str | None = None,
    label_columns: list[str] | None = None,
    skip_broken: bool = False,
    max_image_pixels: int | None = None,
) -> ImageStream:
    """A `datasets.IterableDataset` as pictures. Its labels are columns of type `ClassLabel`, or of lists of them: of
    others, the classes would be known only at the stream's end."""
    features = split.features
    if features is None:  # files that do not say their types
        features = dict.fromkeys(next(iter(split), {}))
    column = find_image_column(features, image_column, source)
    label_names = {}
    for key in _find_label_columns(features, label_columns, source):
        feature = _of_list(features[key])
        if not hasattr(feature, "names"):
            raise ValueError(f"--label_column_names {key}: with --streaming it must be a ClassLabel ({source}).")
        label_names[key] = feature.names
    return ImageStream(
        _undecoded(split, column),
        column,
        num_channels,
        dtype=_number_type(features[column]),
        source=source,
        label_names=label_names,
        skip_broken=skip_broken,
        max_image_pixels=max_image_pixels,
    )


def _undecoded(split, column: str):
    import datasets

    if split.features is not None and isinstance(split.features[column], datasets.Image):
        return split.cast_column(column, datasets.Image(decode=False))  # read_image decodes
    return split


def _number_type(feature) -> np.dtype | None:
    """The type of the numbers of an array column; None for pictures in files, whose values are bytes or paths."""
    while getattr(feature, "feature", None) is not None:  # a list of lists of lists
        feature = feature.feature
    try:
        dtype = np.dtype(getattr(feature, "dtype", None) or "object")
    except TypeError:  # "string", "binary"
        return None
    return dtype if dtype.kind in "biuf" else None


def _find_label_columns(features, wanted: list[str] | None, source: str) -> list[str]:
    import datasets

    if wanted is None:
        return [key for key, feature in features.items() if isinstance(_of_list(feature), datasets.ClassLabel)]
    for key in wanted:
        if key not in features:
            raise ValueError(
                f"--label_column_names {key}: {source} has no such column. It has: {', '.join(features)}."
            )
        if not isinstance(_of_list(features[key]), datasets.ClassLabel | datasets.Value):
            raise ValueError(
                f"--label_column_names {key}: {source} has {type(features[key]).__name__} there, expected classes "
                "(numbers or names), or lists of them."
            )
    return wanted


def _of_list(feature):
    """What a column of lists is of; the column's own type, where it is none of lists."""
    import datasets

    return feature.feature if isinstance(feature, datasets.List) else feature


def _read_labels(splits: dict) -> tuple[list[str], dict[str, np.ndarray]]:
    """The names of the classes of a column, and by split its labels.

    Args:
        splits: by name, `datasets.Dataset`s of this one column.
    """
    (key,) = next(iter(splits.values())).column_names
    feature = _of_list(next(iter(splits.values())).features[key])
    # NaN is how tables write a missing number.
    columns = {name: [_or_none(value) for value in split[:][key]] for name, split in splits.items()}
    if hasattr(feature, "names"):
        return feature.names, {name: label_numbers(values, feature.names) for name, values in columns.items()}
    rows = [value for values in columns.values() for value in values if value is not None]
    if rows and isinstance(rows[0], list):
        if _is_multi_hot(rows):
            names = [str(number) for number in range(len(rows[0]))]
            missing = [-1] * len(names)
            return names, {
                name: np.array([missing if value is None else value for value in values], dtype=np.int8)
                for name, values in columns.items()
            }
        found = sorted({entry for row in rows for entry in row if entry is not None})
    else:
        found = sorted(set(rows))
    numbers = {value: number for number, value in enumerate(found)}
    numbers[None] = None
    numbered = {
        name: [[numbers[entry] for entry in value] if isinstance(value, list) else numbers[value] for value in values]
        for name, values in columns.items()
    }
    names = [str(value) for value in found]
    return names, {name: label_numbers(values, names) for name, values in numbered.items()}


def _or_none(value):
    return None if isinstance(value, float) and math.isnan(value) else value


def _is_multi_hot(rows: list[list]) -> bool:
    """Whether lists say yes or no of each class (as [0, 1, 1, 0]), and do not name classes, which none does twice."""
    if len({len(row) for row in rows}) != 1 or any(entry not in (0, 1) for row in rows for entry in row):
        return False
    return any(isinstance(entry, bool) for entry in rows[0]) or any(len(set(row)) < len(row) for row in rows)


class _Column:
    """One column of a `datasets.Dataset` by row. Alone, it is read ten times as fast as with all the others."""

    def __init__(self, dataset, column: str):
        self.column = column
        # All columns: `sibling_column` reads another one.
        self.rows = dataset
        self.dataset = dataset.select_columns([column])
        dtype = _number_type(dataset.features[column])
        if dtype is not None:  # or else every integer would come as int64
            self.dataset = self.dataset.with_format("numpy", dtype=dtype)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int):
        return self.dataset[index][self.column]

    def fingerprint(self, rows: np.ndarray) -> str:
        return hashlib.sha256(f"{self.dataset._fingerprint} {self.column}".encode() + rows.tobytes()).hexdigest()
