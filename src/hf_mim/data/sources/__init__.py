"""Where pictures come from: a module for each kind of source, and the choice among them.

Each module has an `open_splits` that takes the flags and gives the training pictures, and those held out (None where
the source has none); both are of the kinds in `dataset`.
"""

from ..arguments import TORCHVISION_PREFIX, DataArguments
from ..dataset import ImageDataset, ImageStream
from ..images import IMAGE_EXTENSIONS
from . import clevr, datasets, dicom, folder, geotiff, idx, packed, scenes, tars, torchvision, volumes


def open_splits(args: DataArguments, seed: int) -> tuple[ImageDataset | ImageStream, ImageDataset | None]:
    """The pictures that the flags name; `args.num_channels` is set.

    Args:
        seed (`int`): of a stream's order.

    Raises:
        ValueError: nothing there, or not what it should be; the message says what to do.
    """
    if args.dataset_name is None and args.train_dir is None:
        kind = scenes
    elif args.dataset_name is None:
        kind = _of_folder(args)
    else:
        kind = torchvision if args.dataset_name.startswith(TORCHVISION_PREFIX) else datasets
    _refuse_flags_of_others(kind, args)
    return kind.open_splits(args, seed) if kind is datasets else kind.open_splits(args)


def open_folder(root: str, num_channels: int) -> ImageDataset:
    """The pictures of a folder; where it holds splits, those to train on."""
    args = DataArguments(train_dir=root, num_channels=num_channels)
    return _of_folder(args).open_splits(args)[0]


# The flags that only some kinds of files know.
_FLAGS = {
    geotiff: ("tile_size", "bands", "value_range"),
    volumes: ("slice_axis", "value_range"),
    dicom: ("group_by", "value_range"),
}


def _refuse_flags_of_others(kind, args: DataArguments) -> None:
    for flag in dict.fromkeys(flag for flags in _FLAGS.values() for flag in flags):
        if getattr(args, flag) is not None and flag not in _FLAGS.get(kind, ()):
            of = " or ".join(module.__name__.rpartition(".")[2] for module in _FLAGS if flag in _FLAGS[module])
            what = args.dataset_name or args.train_dir or "the data"
            raise ValueError(f"--{flag} is of {of} files; {what} is read as {kind.__name__.rpartition('.')[2]}.")


def _of_folder(args: DataArguments):
    """The kind of source that `--train_dir` is, by what lies in it. Raises ValueError if there is no such folder."""
    root = folder.check_folder(args.train_dir)
    if clevr.is_clevr(root):
        return clevr
    if packed.is_packed(root):
        return packed
    if tars.has_tars(root):
        return tars
    if idx.has_idx_files(root):
        return idx
    # TIFF and .npy are pictures too: a flag says that they are more.
    if args.tile_size is not None:
        return geotiff
    if args.slice_axis is not None:
        return volumes
    first = folder.find_first(root, (*IMAGE_EXTENSIONS, *dicom.ENDINGS, *volumes.NIFTI)) or ""
    if first.lower().endswith(dicom.ENDINGS):
        return dicom
    return volumes if first.lower().endswith(volumes.NIFTI) else folder
