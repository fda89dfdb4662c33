"""From flags to pictures: `load_images`, and what has to be checked or computed before training."""

import contextlib
from dataclasses import dataclass, replace

import numpy as np
import torch
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from .arguments import AUTO, DataArguments
from .dataset import ImageDataset, ImageStream
from .images import BrokenImageError
from .sources import open_splits


@dataclass
class ImageSplits:
    """Pictures to train on, and pictures held out to see how good the features are."""

    train: ImageDataset | ImageStream
    validation: ImageDataset


def load_images(args: DataArguments, *, seed: int = 0) -> ImageSplits:
    """Finds the pictures that the flags name.

    Args:
        args (`DataArguments`): the flags; `num_channels` None is 3.
        seed (`int`): of a stream's order. Nothing else depends on it, neither which scenes are drawn nor which
            pictures are held out or left out: runs of several seeds see the same.

    Returns:
        `ImageSplits`: `train` is a `ImageStream` with `--streaming`, else both are `ImageDataset`s.

    Raises:
        ValueError: nothing there, or not what it should be; the message says what to do.
    """
    train, validation = _open_splits(args, seed)
    if isinstance(train, ImageStream):
        return ImageSplits(train, validation)
    if len(train) == 0:
        raise ValueError(f"{train.source} is empty: there is nothing to train on.")
    if validation is None:
        train, validation = hold_out(train, args.validation_fraction)
    train = subset(train, args.max_train_samples)
    return ImageSplits(train, subset(validation, args.max_eval_samples))


def load_all_images(args: DataArguments) -> ImageDataset:
    """All pictures of the split that the flags name to train on, in order, with none held out.

    Raises:
        ValueError: nothing there, or not what it should be; the message says what to do.
    """
    pictures, _ = _open_splits(args, seed=0)
    if len(pictures) == 0:
        raise ValueError(f"{pictures.source} is empty.")
    return subset(pictures, args.max_train_samples)


def _open_splits(args: DataArguments, seed: int) -> tuple[ImageDataset | ImageStream, ImageDataset | None]:
    if args.num_channels is None:
        args = replace(args, num_channels=3)
    splits = open_splits(args, seed)
    for split in splits:
        if isinstance(split, ImageDataset):
            split.max_image_pixels = args.max_image_pixels
            if args.label_column_names is not None:
                split.keep_labels(args.label_column_names)
    return splits


def hold_out(pictures: ImageDataset, fraction: float) -> tuple[ImageDataset, ImageDataset]:
    """
    The pictures to train on, and that share of them (at least one) to hold out: the same each time, from anywhere.

    Raises:
        ValueError: there is one picture only.
    """
    if len(pictures) < 2:
        raise ValueError(f"{pictures.source} has 1 picture, and no split to hold out: expected at least 2.")
    num_held_out = min(len(pictures) - 1, max(1, round(len(pictures) * fraction)))
    held_out = np.zeros(len(pictures), dtype=bool)
    names, groups = (None, None) if pictures.groups is None else np.unique(pictures.groups, return_inverse=True)
    if groups is None or len(names) == 1:
        # Images of one file alone have nothing to be kept apart from.
        held_out[_fixed_order(len(pictures))[:num_held_out]] = True
    else:
        order, sizes = _fixed_order(len(names)), np.bincount(groups)
        # Whole groups, as many as it takes and not all.
        enough = 1 + int(np.searchsorted(np.cumsum(sizes[order]), num_held_out))
        held_out[np.isin(groups, order[: min(enough, len(names) - 1)])] = True
    return pictures.select(np.flatnonzero(~held_out)), pictures.select(np.flatnonzero(held_out))


def subset(pictures: ImageDataset, num: int | None) -> ImageDataset:
    """`num` of the pictures (all, where None or more than there are), the same each time, from anywhere, in order."""
    if num is None or num >= len(pictures):
        return pictures
    return pictures.select(np.sort(_fixed_order(len(pictures))[:num]))


def spread_indices(length: int, num: int) -> list[int]:
    """`num` indices below `length` (all, where there are fewer), the same each time, from anywhere, in order."""
    return np.sort(_fixed_order(length)[:num]).tolist()


def _fixed_order(length: int) -> np.ndarray:
    """An order that never changes: a folder sorted by class must not lose its last classes to a limit."""
    return np.random.Generator(np.random.PCG64(0)).permutation(length)


def check_images(pictures: ImageDataset | ImageStream, *, skip_broken: bool = False) -> torch.Tensor:
    """Reads the first picture, so that a wrong number of channels or an unreadable file shows before training.

    Args:
        skip_broken (`bool`): be content with the first picture that can be read.

    Returns:
        `torch.Tensor` of shape `(num_channels, height, width)`: that picture.

    Raises:
        ValueError: there is none, or it is not as it should be.
    """
    if isinstance(pictures, ImageStream):
        readable = iter(pictures)
    else:
        readable = _read(pictures, range(len(pictures)), skip_broken)
    first = next(readable, None)
    if first is None:
        hint = " Of a stream the first are held out: --max_eval_samples." if isinstance(pictures, ImageStream) else ""
        raise ValueError(f"{pictures.source} holds no picture that can be read.{hint}")
    return first


def without_broken(pictures: ImageDataset) -> ImageDataset:
    """The pictures that can be read: each is, once. For evaluation, where no other may stand in for a broken one."""
    readable = []
    for index in range(len(pictures)):
        with contextlib.suppress(BrokenImageError):
            pictures[index]
            readable.append(index)
    return pictures.select(np.array(readable, dtype=np.int64))


def compute_mean_std(
    pictures: ImageDataset | ImageStream, num: int = 1000, *, skip_broken: bool = False
) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of each channel over `num` pictures, each counting as much as any other.

    Values are 0 to 1 for integers and as they are for floats. A channel that never changes gets the standard
    deviation 1.
    """
    if isinstance(pictures, ImageStream):
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


def _read(pictures: ImageDataset, indices, skip_broken: bool):
    for index in indices:
        try:
            yield pictures[index]
        except BrokenImageError:
            if not skip_broken:
                raise


def resolve_mean_std(
    args: DataArguments,
    pictures: ImageDataset | ImageStream,
    trained: tuple[list[float] | None, list[float] | None] = (None, None),
) -> tuple[list[float], list[float]]:
    """
    The mean and standard deviation that the flags ask for: given, or computed. Where they do not say: what the weights
    were `trained` with, if that is known; else ImageNet's for 3 channels, computed for any other number.
    """
    if args.image_mean is None and trained[0] is not None and len(trained[0]) in (1, pictures.num_channels):
        # One number for all channels, or one each.
        trained = tuple(list(values) * (pictures.num_channels // len(values)) for values in trained)
        if None not in trained[0]:
            return trained
        # Of channels that the weights do not have.
        computed = compute_mean_std(pictures, skip_broken=args.skip_broken_images)
        return tuple(
            [other if value is None else value for value, other in zip(*pair, strict=True)]
            for pair in zip(trained, computed, strict=True)
        )
    if args.image_mean is None and pictures.num_channels == 3:
        return list(IMAGENET_DEFAULT_MEAN), list(IMAGENET_DEFAULT_STD)
    computed = (None, None)
    if args.image_mean in (None, AUTO) or args.image_std in (None, AUTO):
        computed = compute_mean_std(pictures, skip_broken=args.skip_broken_images)
    mean = computed[0] if args.image_mean in (None, AUTO) else args.image_mean
    std = computed[1] if args.image_std in (None, AUTO) else args.image_std
    return mean, std
