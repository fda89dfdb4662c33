"""Data sets of torchvision that are on disk."""

import inspect

import numpy as np

from ..arguments import TORCHVISION_PREFIX, DataArguments
from ..dataset import ImageDataset
from ..images import BrokenImageError
from ..splits import HELD_OUT, is_split
from .folder import check_folder


def open_splits(args: DataArguments) -> tuple[ImageDataset, ImageDataset | None]:
    """A torchvision data set that is on disk, `torchvision:CIFAR10` with its root: training and validation pictures.

    Raises:
        ValueError: unknown, not on disk, or no data set of pictures with an index.
    """
    name, root, num_channels = args.dataset_name, args.train_dir, args.num_channels
    train_split, validation_split = args.train_split, args.validation_split
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
        others = [{key: split} for split in ([validation_split] if validation_split else HELD_OUT)]
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


def _torchvision_split(dataset_class, name: str, root: str, which: dict, num_channels: int) -> ImageDataset:
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
    if dataset_class.__name__ == "ImageFolder" and names and all(map(is_split, names)):
        raise ValueError(f"{name}: {root} holds splits ({', '.join(names)}), not classes: --train_dir {root} alone.")
    if column is not None and (names is None or len(names) <= column.max(initial=-1)):
        names = [str(number) for number in range(column.max(initial=-1) + 1)]
    where = f"{name} {' '.join(str(value) for value in which.values())}".strip()
    return ImageDataset(
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
        from PIL import Image

        name = f"picture {index} of {type(self.dataset).__name__}"
        try:
            item = self.dataset[index]
        except (OSError, SyntaxError) as error:  # what PIL raises of a damaged file
            raise BrokenImageError(f"{name}: {error}") from error
        except Image.DecompressionBombError as error:
            raise BrokenImageError(
                f"{name}: {error} torchvision's data sets do not take --max_image_pixels: use --train_dir."
            ) from error
        return item[0] if isinstance(item, tuple) else item
