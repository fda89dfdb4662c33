"""
Pictures with a number at each pixel, its class or its depth: finding and checking these maps, and what a model is
trained and judged on.

The augmentation is a function of (seed, epoch, index): torchvision's transforms draw from the global generators, which
are set for the length of a call, and put back.
"""

import hashlib
import os
from collections.abc import Iterator, Sequence
from typing import ClassVar

import numpy as np
import torch
from torch.utils.data import Dataset
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from .arguments import DataArguments
from .dataset import ImageDataset
from .finetuning import global_seed
from .images import IMAGE_EXTENSIONS
from .loading import check_images, hold_out, load_images, subset
from .sources.datasets import sibling_column
from .sources.folder import check_folder, find_images, from_folder
from .transforms import sample_generator

# Maps that a fingerprint looks into.
_SAMPLED = 256


class MapArguments:
    """
    What the flags of a kind of maps have in common: `train_KIND_dir`, `validation_KIND_dir` and `KIND_column_name`.

    Attributes:
        kind (`str`): Of the maps, as `ImageDataset.annotations` has them.
        usual_columns (`list[str]`): Of a data set, where none is named.
        unknown: The number of pixels of which nothing is known, in what `read` gives.
    """

    kind: ClassVar[str]
    usual_columns: ClassVar[list[str]]
    unknown: int | float

    def __post_init__(self):
        if self.folder("validation") and not self.folder("train"):
            raise ValueError(f"--validation_{self.kind}_dir goes with --train_{self.kind}_dir: give both, or neither.")

    def folder(self, split: str) -> str | None:
        """The folder of the maps of "train" or "validation", if the flags name one."""
        return getattr(self, f"{split}_{self.kind}_dir")

    def read(self, value, name: str) -> np.ndarray:
        """
        The map (height, width) of a picture; `name` is what an error calls it.

        Args:
            value: A path, the bytes of a file, `{"bytes": ..., "path": ...}`, a `PIL.Image.Image` or an array.

        Raises:
            ValueError: If it cannot be read, or is no such map.
        """
        raise NotImplementedError


class Maps:
    """Maps by index, read when they are asked for."""

    def __init__(self, values: Sequence, args: MapArguments):
        self.values, self.args = values, args

    def name(self, index: int) -> str:
        """The map's file, or its row."""
        value = self.values[index]
        path = value.get("path") if isinstance(value, dict) else value
        return path if isinstance(path, str) else f"{self.args.kind} {index}"

    def __getitem__(self, index: int) -> np.ndarray:
        return self.args.read(self.values[index], self.name(index))


def load_maps(data_args: DataArguments, args: MapArguments, seed: int) -> tuple[ImageDataset, ImageDataset]:
    """
    Training and held-out pictures with their maps: of folders, of a column, or of the embedded scenes. Of maps that
    are not the renderer's nothing has been read yet.

    Raises:
        ValueError: If there are none, or a picture has no map, or a map no picture.
    """
    kind = args.kind
    if bool(args.folder("train")) != bool(data_args.train_dir):
        raise ValueError(
            f"--train_dir and --train_{kind}_dir go together: a folder of pictures, and one of their {kind} maps."
        )
    if args.folder("train") and bool(args.folder("validation")) != bool(data_args.validation_dir):
        raise ValueError(f"--validation_dir and --validation_{kind}_dir go together: give both, or neither.")
    if args.folder("train"):
        train, validation = _of_folders(data_args, args)
    else:
        images = load_images(data_args, seed=seed)
        train, validation = images.train, images.validation
        if data_args.dataset_name:
            flag = f"{kind}_column_name"
            for split in (train, validation):
                column = sibling_column(split, getattr(args, flag), args.usual_columns, f"--{flag}")
                split.annotations[kind] = Maps(column, args)
    for split in (train, validation):
        check_images(split)
    return train, validation


def _of_folders(data_args: DataArguments, args: MapArguments) -> tuple[ImageDataset, ImageDataset]:
    train, *held_out = from_folder(
        [check_folder(folder) for folder in (data_args.train_dir, data_args.validation_dir) if folder],
        data_args.num_channels,
    )
    for split, name in zip((train, *held_out), ("train", "validation"), strict=False):
        split.max_image_pixels = data_args.max_image_pixels
        split.labels = {}
        split.annotations[args.kind] = Maps(_files_of(split, check_folder(args.folder(name)), args.kind), args)
    train, validation = (train, held_out[0]) if held_out else hold_out(train, data_args.validation_fraction)
    return subset(train, data_args.max_train_samples), subset(validation, data_args.max_eval_samples)


def _files_of(images: ImageDataset, folder: str, kind: str) -> list[str]:
    """The files below `folder` of the same stems as the pictures of another folder, in their order."""
    values = images._values
    found = find_images(folder)
    paths = {os.path.splitext(path)[0]: path for path in found}
    twice = sorted(path for path in found if paths[os.path.splitext(path)[0]] != path)
    if twice:
        other = paths[os.path.splitext(twice[0])[0]]
        raise ValueError(
            f"{os.path.join(folder, twice[0])} and {os.path.join(folder, other)} are of one stem, and a picture has "
            f"one {kind}. Take one of them away ({len(twice)} are too many)."
        )
    stems = [os.path.splitext(os.path.relpath(values[row], values.root))[0] for row in range(len(values))]
    without = [stem for stem in stems if stem not in paths]
    if without:
        raise ValueError(
            f"{values[stems.index(without[0])]} has no {kind} {os.path.join(folder, without[0])}.png ({len(without)} "
            f"of {len(stems)} pictures have none). Add it, or take the picture away."
        )
    over = sorted(set(paths) - set(stems))
    if over:
        raise ValueError(
            f"{os.path.join(folder, paths[over[0]])} has no picture of its stem in {values.root} ({len(over)} such "
            f"files have none; pictures end in {', '.join(IMAGE_EXTENSIONS[:5])}, ...). Add it, or take this one away."
        )
    return [os.path.join(folder, paths[stem]) for stem in stems]


def read_maps(images: ImageDataset, kind: str) -> Iterator[tuple[str, np.ndarray]]:
    """
    The name and the map of each picture, read.

    Raises:
        ValueError: If a map cannot be read, or is of another size than its picture.
    """
    maps = images.annotations[kind]
    for index in range(len(images)):
        row = int(images._rows[index])
        name, found = maps.name(row), maps[row]
        size = tuple(images[index].shape[1:])
        if found.shape != size:
            raise ValueError(
                f"{name} has {found.shape[0]} x {found.shape[1]} pixels, and its picture, {images.name(index)}, "
                f"{size[0]} x {size[1]} (height x width). Make them the same."
            )
        yield name, found


def open_map(value, name: str, kind: str):
    """
    A stored map as an array or a `PIL.Image.Image`.

    Raises:
        ValueError: If it is missing, or cannot be read.
    """
    import io

    from PIL import Image

    if isinstance(value, dict):
        value = io.BytesIO(value["bytes"]) if value.get("bytes") is not None else value.get("path")
    if value is None:
        raise ValueError(f"{name}: the {kind} is missing (None).")
    if isinstance(value, np.ndarray | Image.Image):
        return value
    try:
        if isinstance(value, str | os.PathLike) and os.fspath(value).lower().endswith(".npy"):
            return np.load(value)
        image = Image.open(value)
        image.load()
    except (OSError, SyntaxError, ValueError) as error:
        raise ValueError(f"{name}: the {kind} cannot be read: {error}") from error
    return image


class DenseTransform:
    """
    A picture and its map to what a model is trained on: resized by a random factor, cropped, flipped, its colours
    changed.

    Args:
        kind (`str`): Of the map, in the items that it is called with.
        unknown: The map's number where nothing is known.
        image_size (`tuple[int, int]`): (height, width) of the crop. A picture that is not enlarged just covers it.
        mean, std: One number a channel.
        scale_jitter (`tuple[float, float]`): Lowest and highest factor. Where the picture is then smaller than the
            crop, what is missing is 0, and unknown.
        horizontal_flip (`bool`): Mirror every second picture, by chance.
        photometric_jitter (`bool`): Change brightness, contrast, saturation and hue, of pictures of 8 bits with three
            channels.
        seed (`int`).
    """

    def __init__(
        self,
        kind,
        unknown,
        image_size,
        mean,
        std,
        *,
        scale_jitter=(0.5, 2.0),
        horizontal_flip=True,
        photometric_jitter=True,
        seed=0,
    ):
        self.kind, self.image_size, self.mean, self.std = kind, tuple(image_size), list(mean), list(std)
        self.scale_jitter, self.seed = tuple(scale_jitter), seed
        fill = {tv_tensors.Image: 0, tv_tensors.Mask: unknown}
        steps = [v2.RandomCrop(self.image_size, pad_if_needed=True, fill=fill)]
        if horizontal_flip:
            steps.append(v2.RandomHorizontalFlip())
        self.augment = v2.Compose(steps)
        self.change_colours = v2.RandomPhotometricDistort() if photometric_jitter else None

    def __call__(self, item: dict[str, torch.Tensor], epoch: int, index: int) -> dict[str, torch.Tensor]:
        generator = sample_generator(self.seed, epoch, index)
        low, high = self.scale_jitter
        scale = low + (high - low) * generator.random()
        image, numbers = tv_tensors.Image(item["image"]), tv_tensors.Mask(item[self.kind])
        size = covering_size(image.shape[1:], self.image_size, scale)
        if size != tuple(image.shape[1:]):
            image, numbers = F.resize(image, list(size), antialias=True), F.resize(numbers, list(size))
        with global_seed(int(generator.integers(2**32))):
            image, numbers = self.augment(image, numbers)
            if self.change_colours is not None and image.dtype == torch.uint8 and image.shape[0] == 3:
                image = self.change_colours(image)
        return {"pixel_values": normalised(image, self.mean, self.std), "labels": _labels(numbers)}


def _labels(numbers: torch.Tensor) -> torch.Tensor:
    numbers = numbers.as_subclass(torch.Tensor)
    return numbers.float() if numbers.is_floating_point() else numbers.long()


def covering_size(size, wanted: tuple[int, int], scale: float = 1.0) -> tuple[int, int]:
    """The (height, width) of a picture of `size` that just covers `wanted`, in its proportions, times `scale`."""
    factor = scale * max(wanted[0] / size[0], wanted[1] / size[1])
    least = wanted if scale == 1 else (1, 1)
    return tuple(max(one, round(side * factor)) for one, side in zip(least, size, strict=True))


def normalised(image: torch.Tensor, mean, std) -> torch.Tensor:
    """float32, by mean and std, of pictures of 8 bits or floats."""
    image = image.as_subclass(torch.Tensor)
    return F.normalize(image.float() / 255 if image.dtype == torch.uint8 else image.float(), list(mean), list(std))


class DenseDataset(Dataset):
    """`dataset[epoch, index]` is a picture and its map as `transform(item, epoch, index)` makes them."""

    num_broken = 0

    def __init__(self, images: ImageDataset, transform):
        self.pictures, self.transform = images, transform

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, epoch_and_index: tuple[int, int]) -> dict[str, torch.Tensor]:
        epoch, index = epoch_and_index
        return self.transform(self.pictures.annotated(index, [self.transform.kind]), epoch, index)

    def labels_fingerprint(self) -> str:
        """A hash of 256 maps, from everywhere, as they are read; of scenes none, whose maps follow from them."""
        maps, rows = self.pictures.annotations[self.transform.kind], self.pictures._rows
        digest = hashlib.sha256()
        if isinstance(maps, Maps):
            for index in np.unique(np.linspace(0, len(self) - 1, _SAMPLED).round().astype(np.int64)).tolist():
                found = np.ascontiguousarray(maps[int(rows[index])])
                digest.update(f"{found.dtype} {found.shape}".encode() + found.tobytes())
        return digest.hexdigest()


class WholePictures:
    """A picture, resized so that it just covers `image_size`, as `pixel_values`, and its map as it is as `labels`."""

    def __init__(self, kind: str, image_size: tuple[int, int], mean, std):
        self.kind, self.image_size, self.mean, self.std = kind, tuple(image_size), mean, std

    def __call__(self, item: dict[str, torch.Tensor], epoch: int, index: int) -> dict[str, torch.Tensor]:
        image = item["image"].contiguous()
        image = F.resize(image, list(covering_size(image.shape[1:], self.image_size)), antialias=True)
        return {"pixel_values": normalised(image, self.mean, self.std), "labels": _labels(item[self.kind])}
