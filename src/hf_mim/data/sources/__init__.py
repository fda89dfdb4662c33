"""Where pictures come from: a module for each kind of source, and the choice among them.

Each module has an `open_splits` that takes the flags and gives the training pictures, and those held out (None where
the source has none); both are of the kinds in `dataset`.
"""

from ..arguments import TORCHVISION_PREFIX, DataArguments
from ..dataset import ImageDataset, ImageStream
from . import clevr, datasets, folder, idx, packed, scenes, tars, torchvision


def open_splits(args: DataArguments, seed: int) -> tuple[ImageDataset | ImageStream, ImageDataset | None]:
    """The pictures that the flags name; `args.num_channels` is set.

    Args:
        seed (`int`): of a stream's order.

    Raises:
        ValueError: nothing there, or not what it should be; the message says what to do.
    """
    if args.dataset_name is None and args.train_dir is None:
        return scenes.open_splits(args)
    if args.dataset_name is None:
        return _of_folder(folder.check_folder(args.train_dir)).open_splits(args)
    if args.dataset_name.startswith(TORCHVISION_PREFIX):
        return torchvision.open_splits(args)
    return datasets.open_splits(args, seed)


def open_folder(root: str, num_channels: int) -> ImageDataset:
    """The pictures of a folder; where it holds splits, those to train on."""
    root = folder.check_folder(root)
    return _of_folder(root).open_splits(DataArguments(train_dir=root, num_channels=num_channels))[0]


def _of_folder(root: str):
    """The kind of source that a folder is, by what lies in it."""
    if clevr.is_clevr(root):
        return clevr
    if packed.is_packed(root):
        return packed
    if tars.has_tars(root):
        return tars
    return idx if idx.has_idx_files(root) else folder
