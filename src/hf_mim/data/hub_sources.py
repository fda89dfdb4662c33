"""Pictures out of `datasets` data sets (Hub or local), and out of torchvision's."""

import hashlib
import inspect
import os
from pathlib import Path

import numpy as np

from .arguments import TORCHVISION_PREFIX
from .clevr import with_clevr_tasks
from .pictures import BrokenPictureError
from .sources import PictureDataset, PictureStream, check_folder

VALIDATION_SPLITS = ("validation", "valid", "val", "test")


def load_splits(name: str, config_name: str | None, *, streaming: bool, cache_dir: str | None) -> dict:
    """A data set of the Hub, a folder written by `save_to_disk`, or files that `load_dataset` knows, by split.

    Raises:
        ValueError: there is no such data set, or `datasets` cannot read it.
    """
    import datasets

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
            f"--dataset_name {name} could not be loaded: {error} Expected a data set of the Hub, a folder that "
            "save_to_disk wrote, or a folder or file of parquet, arrow or pictures. (A folder of pictures alone is "
            "--train_dir.)"
        ) from error
    return dict(loaded) if isinstance(loaded, dict) else {"train": loaded}


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
) -> dict[str, PictureDataset]:
    """Splits of a `datasets.DatasetDict` as pictures, by name.

    Labels are the columns of type `ClassLabel`, or `label_columns`. The classes of a column of any other type are the
    values that occur in it, in any of the splits, in order. CLEVR's annotations become the labels count and distance.
    """
    splits = {name: with_clevr_tasks(split) for name, split in splits.items()}
    columns, labels = {}, {}
    for name, split in splits.items():
        columns[name] = find_image_column(split.features, image_column, f"{source} ({name})")
        labels[name] = _find_label_columns(split.features, label_columns, f"{source} ({name})")
    classes = {
        key: _find_classes(key, [splits[name] for name in splits if key in labels[name]])
        for key in {key for keys in labels.values() for key in keys}
    }
    return {
        name: PictureDataset(
            _Column(_undecoded(split, columns[name]), columns[name]),
            num_channels,
            source=f"{source} ({name})",
            labels={key: _label_numbers(split, key, classes[key]) for key in labels[name]},
            label_names={key: classes[key] for key in labels[name]},
        )
        for name, split in splits.items()
    }


def from_stream(
    split,
    num_channels: int,
    *,
    source: str,
    image_column: str | None = None,
    label_columns: list[str] | None = None,
    skip_broken: bool = False,
) -> PictureStream:
    """A `datasets.IterableDataset` as pictures. Its labels are columns of type `ClassLabel`: of others, the classes
    would be known only at the stream's end."""
    features = split.features
    if features is None:  # files that do not say their types
        features = dict.fromkeys(next(iter(split), {}))
    column = find_image_column(features, image_column, source)
    label_names = {}
    for key in _find_label_columns(features, label_columns, source):
        if not hasattr(features[key], "names"):
            raise ValueError(f"--label_column_names {key}: with --streaming it must be a ClassLabel ({source}).")
        label_names[key] = features[key].names
    return PictureStream(
        _undecoded(split, column),
        column,
        num_channels,
        dtype=_number_type(features[column]),
        source=source,
        label_names=label_names,
        skip_broken=skip_broken,
    )


def _undecoded(split, column: str):
    import datasets

    if split.features is not None and isinstance(split.features[column], datasets.Image):
        return split.cast_column(column, datasets.Image(decode=False))  # read_picture decodes
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
        return [key for key, feature in features.items() if isinstance(feature, datasets.ClassLabel)]
    for key in wanted:
        if key not in features:
            raise ValueError(
                f"--label_column_names {key}: {source} has no such column. It has: {', '.join(features)}."
            )
    return wanted


def _find_classes(key: str, splits: list) -> list[str]:
    names = getattr(splits[0].features[key], "names", None)
    if names is not None:
        return names
    values = {value for split in splits for value in split.unique(key)}
    return [str(value) for value in sorted(values)]


def _label_numbers(split, key: str, names: list[str]) -> np.ndarray:
    values = split.select_columns([key])[:][key]
    if hasattr(split.features[key], "names"):
        return np.array([-1 if value is None else value for value in values], dtype=np.int64)
    numbers = {name: number for number, name in enumerate(names)}
    return np.array([numbers[str(value)] for value in values], dtype=np.int64)


class _Column:
    """One column of a `datasets.Dataset` by row. Alone, it is read ten times as fast as with all the others."""

    def __init__(self, dataset, column: str):
        self.column = column
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


# --- torchvision


def from_torchvision(
    name: str, root: str | None, num_channels: int, *, train_split: str, validation_split: str | None
) -> tuple[PictureDataset, PictureDataset | None]:
    """A torchvision data set that is on disk, `torchvision:CIFAR10` with its root: training and validation pictures.

    Raises:
        ValueError: unknown, not on disk, or no data set of pictures with an index.
    """
    from torchvision import datasets

    class_name = name.removeprefix(TORCHVISION_PREFIX)
    dataset_class = getattr(datasets, class_name, None)
    if class_name not in datasets.__all__ or not inspect.isclass(dataset_class):
        near = [known for known in datasets.__all__ if known.lower() == class_name.lower()]
        hint = f"Did you mean torchvision:{near[0]}?" if near else "See torchvision.datasets for the names."
        raise ValueError(f"--dataset_name {name}: torchvision has no data set {class_name}. {hint}")
    if root is None:
        raise ValueError(f"--dataset_name {name} needs --train_dir: the root that torchvision downloaded it to.")
    root = check_folder(root)

    parameters = inspect.signature(dataset_class.__init__).parameters
    key = next((key for key in ("train", "split", "image_set") if key in parameters), None)
    if key is None:
        pictures = _torchvision_split(dataset_class, name, root, {}, num_channels)
        return pictures, None
    if key == "train":
        # Such data sets have two splits, which they tell by a bool.
        splits = {"train": True, "test": False}
        validation_split = validation_split or next(split for split in splits if split != train_split)
        for flag, split in (("--train_split", train_split), ("--validation_split", validation_split)):
            if split not in splits:
                raise ValueError(f"{flag} {split}: {name} has the splits {', '.join(splits)}.")
        train, *others = ({"train": splits[split]} for split in (train_split, validation_split))
    else:
        train = {key: train_split}
        others = [{key: split} for split in ([validation_split] if validation_split else VALIDATION_SPLITS)]
    pictures = _torchvision_split(dataset_class, name, root, train, num_channels)
    for number, other in enumerate(others):
        try:
            return pictures, _torchvision_split(dataset_class, name, root, other, num_channels)
        except ValueError:
            # A split that was asked for, or that every such data set has, must be there; of guesses, one has to be.
            if validation_split:
                raise
            if number == len(others) - 1:
                return pictures, None
    return pictures, None


def _torchvision_split(dataset_class, name: str, root: str, which: dict, num_channels: int) -> PictureDataset:
    try:
        dataset = dataset_class(root, **which)
    except (RuntimeError, OSError, ValueError, TypeError, ImportError) as error:
        raise ValueError(
            f"--dataset_name {name} with --train_dir {root} ({which or 'all of it'}): {error} Nothing is downloaded "
            f"here; once, by hand: torchvision.datasets.{dataset_class.__name__}({root!r}, download=True)."
        ) from error
    if not hasattr(dataset, "__len__"):
        raise ValueError(f"--dataset_name {name}: not a data set of pictures with an index.")
    labels = next(
        (getattr(dataset, key) for key in ("targets", "labels", "_labels", "y") if hasattr(dataset, key)), None
    )
    column = None if labels is None else np.asarray(labels)
    if column is None or column.shape != (len(dataset),) or column.dtype.kind not in "iu":
        column = None
    names = getattr(dataset, "classes", None)
    if column is not None and (names is None or len(names) <= column.max(initial=-1)):
        names = [str(number) for number in range(column.max(initial=-1) + 1)]
    where = f"{name} {' '.join(str(value) for value in which.values())}".strip()
    return PictureDataset(
        _FirstOfEach(dataset),
        num_channels,
        source=where,
        labels=None if column is None else {"label": column},
        label_names=None if column is None else {"label": [str(entry) for entry in names]},
    )


class _FirstOfEach:
    """The pictures of a torchvision data set, whose items are (picture, target)."""

    def __init__(self, dataset):
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int):
        try:
            item = self.dataset[index]
        except (OSError, SyntaxError) as error:  # what PIL raises of a damaged file
            raise BrokenPictureError(f"picture {index} of {type(self.dataset).__name__}: {error}") from error
        return item[0] if isinstance(item, tuple) else item
