"""From flags to pictures: `load_pictures`, and what has to be checked or computed before training."""

import contextlib
import os
from dataclasses import dataclass, replace

import numpy as np
import torch
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from transformers.utils import logging

from .arguments import AUTO, TORCHVISION_PREFIX, DataArguments
from .clevr import from_clevr, is_clevr
from .hub_sources import from_datasets, from_stream, from_torchvision, load_splits
from .pictures import BrokenPictureError
from .sources import UNNAMED, PictureDataset, PictureStream, check_folder, from_folder, from_idx, has_idx_files
from .splits import HELD_OUT, TRAINING, choose_splits, find_split, folder_splits, sibling_split

logger = logging.get_logger(__name__)

_DEFAULT_SCENES = {"train": 12000, "validation": 2000}
_SCENE_SIZE = 64
_MEMORY_FOR_SCENES = 1 << 30  # bytes
_STREAMED_VALIDATION = 2000


@dataclass
class PictureSplits:
    """Pictures to train on, and pictures held out to see how good the features are."""

    train: PictureDataset | PictureStream
    validation: PictureDataset


def load_pictures(args: DataArguments, *, seed: int = 0) -> PictureSplits:
    """Finds the pictures that the flags name.

    Args:
        args (`DataArguments`): the flags; `num_channels` None is 3.
        seed (`int`): of a stream's order. Nothing else depends on it, neither which scenes are drawn nor which
            pictures are held out or left out: runs of several seeds see the same.

    Returns:
        `PictureSplits`: `train` is a `PictureStream` with `--streaming`, else both are `PictureDataset`s.

    Raises:
        ValueError: nothing there, or not what it should be; the message says what to do.
    """
    if args.num_channels is None:
        args = replace(args, num_channels=3)
    if args.dataset_name is None and args.train_dir is None:
        train, validation = _load_scenes(args)
    elif args.dataset_name is None:
        train, validation = _load_folders(args)
    elif args.dataset_name.startswith(TORCHVISION_PREFIX):
        train, validation = from_torchvision(
            args.dataset_name,
            args.train_dir,
            args.num_channels,
            train_split=args.train_split,
            validation_split=args.validation_split,
        )
    else:
        train, validation = _load_dataset(args, seed)

    if isinstance(train, PictureStream):
        return PictureSplits(train, validation)
    for split in (train, validation):
        if split is not None:
            split.max_image_pixels = args.max_image_pixels
            if args.label_column_names is not None:
                split.keep_labels(args.label_column_names)
    if len(train) == 0:
        raise ValueError(f"{train.source} is empty: there is nothing to train on.")
    if validation is None:
        train, validation = _hold_out(train, args.validation_fraction)
    train = _subset(train, args.max_train_samples)
    return PictureSplits(train, _subset(validation, args.max_eval_samples))


def _load_scenes(args: DataArguments):
    from .scenes import scenes

    numbers = {
        "train": args.max_train_samples or _DEFAULT_SCENES["train"],
        "validation": args.max_eval_samples or _DEFAULT_SCENES["validation"],
    }
    splits = {
        split: scenes(
            split,
            number,
            image_size=args.image_height_width or _SCENE_SIZE,
            num_proc=min(os.cpu_count() or 1, 8),
            cache_dir=args.data_cache_dir,
        )
        for split, number in numbers.items()
    }
    pictures = from_datasets(splits, args.num_channels, source="scenes", label_columns=args.label_column_names)
    return tuple(_decode_once(pictures[split]) for split in numbers)


def _decode_once(pictures: PictureDataset) -> PictureDataset:
    """The same pictures, all of one size, decoded in memory, if they fit: reading them is then ten times as fast."""
    first = pictures[0]
    shape = (len(pictures), *first.shape[1:], first.shape[0])
    if np.prod(shape, dtype=np.int64) > _MEMORY_FOR_SCENES:
        return pictures
    decoded = np.empty(shape, dtype=np.uint8)
    for index in range(len(pictures)):
        decoded[index] = pictures[index].permute(1, 2, 0).numpy()
    return PictureDataset(
        decoded,
        pictures.num_channels,
        source=pictures.source,
        labels=pictures.labels,
        label_names=pictures.label_names,
    )


def _load_folders(args: DataArguments):
    roots = [check_folder(path) for path in (args.train_dir, args.validation_dir) if path]
    if is_clevr(roots[0]):
        return from_clevr(roots[0], args.num_channels)
    if has_idx_files(roots[0]):
        train, held_out = _choose_idx(roots[0], args)
        return train, _choose_idx(roots[1], args, held_out=True) if len(roots) == 2 else held_out
    train, held_out = _choose_folders(roots[0], args)
    if len(roots) == 2:
        splits = folder_splits(roots[1])
        held_out = (
            roots[1] if splits is None else splits[find_split(splits, args.validation_split, HELD_OUT + TRAINING)]
        )
    elif held_out is not None:
        logger.warning(f"Training pictures are those of {train}; held out are those of {held_out}.")
    train, *validation = from_folder([train] + [held_out] * (held_out is not None), args.num_channels)
    return train, validation[0] if validation else None


def open_folder(root: str, num_channels: int) -> PictureDataset:
    """The pictures of a folder, of pictures or of idx files; where it holds splits, those to train on."""
    args = DataArguments(train_dir=root, num_channels=num_channels)
    if has_idx_files(root):
        return _choose_idx(root, args)[0]
    return from_folder([_choose_folders(root, args)[0]], num_channels)[0]


def _choose_folders(root: str, args: DataArguments) -> tuple[str, str | None]:
    splits = folder_splits(root)
    if splits is None:
        return root, sibling_split(root, args.validation_split)
    train, held_out = choose_splits(list(splits), root, args.train_split, args.validation_split)
    return splits[train], None if held_out is None else splits[held_out]


def _choose_idx(root: str, args: DataArguments, held_out: bool = False):
    found = from_idx(root, args.num_channels)
    if held_out:
        return found[find_split(found, args.validation_split, HELD_OUT + TRAINING)]
    if list(found) == [UNNAMED]:
        return found[UNNAMED], None
    train, validation = choose_splits(list(found), root, args.train_split, args.validation_split)
    return found[train], None if validation is None else found[validation]


def _load_dataset(args: DataArguments, seed: int):
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


def _hold_out(pictures: PictureDataset, fraction: float) -> tuple[PictureDataset, PictureDataset]:
    if len(pictures) < 2:
        raise ValueError(f"{pictures.source} has 1 picture, and no split to hold out: expected at least 2.")
    order = _fixed_order(len(pictures))
    num_held_out = min(len(pictures) - 1, max(1, round(len(pictures) * fraction)))
    return pictures.select(np.sort(order[num_held_out:])), pictures.select(np.sort(order[:num_held_out]))


def _subset(pictures: PictureDataset, num: int | None) -> PictureDataset:
    if num is None or num >= len(pictures):
        return pictures
    return pictures.select(np.sort(_fixed_order(len(pictures))[:num]))


def spread_indices(length: int, num: int) -> list[int]:
    """`num` indices below `length` (all, where there are fewer), the same each time, from anywhere, in order."""
    return np.sort(_fixed_order(length)[:num]).tolist()


def _fixed_order(length: int) -> np.ndarray:
    """An order that never changes: a folder sorted by class must not lose its last classes to a limit."""
    return np.random.Generator(np.random.PCG64(0)).permutation(length)


def check_pictures(pictures: PictureDataset | PictureStream, *, skip_broken: bool = False) -> torch.Tensor:
    """Reads the first picture, so that a wrong number of channels or an unreadable file shows before training.

    Args:
        skip_broken (`bool`): be content with the first picture that can be read.

    Returns:
        `torch.Tensor` of shape `(num_channels, height, width)`: that picture.

    Raises:
        ValueError: there is none, or it is not as it should be.
    """
    if isinstance(pictures, PictureStream):
        readable = iter(pictures)
    else:
        readable = _read(pictures, range(len(pictures)), skip_broken)
    first = next(readable, None)
    if first is None:
        hint = (
            " Of a stream the first are held out: --max_eval_samples." if isinstance(pictures, PictureStream) else ""
        )
        raise ValueError(f"{pictures.source} holds no picture that can be read.{hint}")
    return first


def without_broken(pictures: PictureDataset) -> PictureDataset:
    """The pictures that can be read: each is, once. For evaluation, where no other may stand in for a broken one."""
    readable = []
    for index in range(len(pictures)):
        with contextlib.suppress(BrokenPictureError):
            pictures[index]
            readable.append(index)
    return pictures.select(np.array(readable, dtype=np.int64))


def compute_mean_std(
    pictures: PictureDataset | PictureStream, num: int = 1000, *, skip_broken: bool = False
) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of each channel over `num` pictures, each counting as much as any other.

    Values are 0 to 1 for integers and as they are for floats. A channel that never changes gets the standard
    deviation 1.
    """
    if isinstance(pictures, PictureStream):
        pictures = pictures.take(num)
    count, first, second = 0, 0.0, 0.0
    for picture in _read(pictures, np.sort(_fixed_order(len(pictures))[:num]), skip_broken):
        picture = picture.to(torch.float64) / (255 if picture.dtype == torch.uint8 else 1)
        count += 1
        first = first + picture.mean(dim=(1, 2))
        second = second + picture.square().mean(dim=(1, 2))
    if count == 0:
        raise ValueError(f"{pictures.source} holds no picture to compute --image_mean and --image_std from.")
    mean = first / count
    std = (second / count - mean.square()).clamp(min=0).sqrt()
    std = torch.where(std > 1e-6 * mean.abs().clamp(min=1e-6), std, 1.0)
    return mean.tolist(), std.tolist()


def _read(pictures: PictureDataset, indices, skip_broken: bool):
    for index in indices:
        try:
            yield pictures[index]
        except BrokenPictureError:
            if not skip_broken:
                raise


def resolve_mean_std(
    args: DataArguments,
    pictures: PictureDataset | PictureStream,
    trained: tuple[list[float] | None, list[float] | None] = (None, None),
) -> tuple[list[float], list[float]]:
    """
    The mean and standard deviation that the flags ask for: given, or computed. Where they do not say: what the weights
    were `trained` with, if that is known; else ImageNet's for 3 channels, computed for any other number.
    """
    if args.image_mean is None and trained[0] is not None and len(trained[0]) in (1, pictures.num_channels):
        # One number for all channels, or one each.
        return tuple(list(values) * (pictures.num_channels // len(values)) for values in trained)
    if args.image_mean is None and pictures.num_channels == 3:
        return list(IMAGENET_DEFAULT_MEAN), list(IMAGENET_DEFAULT_STD)
    computed = (None, None)
    if args.image_mean in (None, AUTO) or args.image_std in (None, AUTO):
        computed = compute_mean_std(pictures, skip_broken=args.skip_broken_images)
    mean = computed[0] if args.image_mean in (None, AUTO) else args.image_mean
    std = computed[1] if args.image_std in (None, AUTO) else args.image_std
    return mean, std
