"""Images as Python users hold them: any data set, list or folder as what the trainer reads."""

import os
from collections.abc import Mapping, Sized

import numpy as np
import torch

from .dataset import ImageDataset, ImageStream
from .sources import open_folder
from .sources.datasets import from_datasets, from_stream

# Where a dict has its image, if it has more than one value that could be.
_USUAL_KEYS = ("image", "img", "images", "picture")


def open_images(data, num_channels: int, *, image_column: str | None = None) -> ImageDataset | ImageStream:
    """
    The images of what a user has, read by the rule of `read_image`.

    Args:
        data: A folder (of images, with or without sub-folders, or of idx files; of splits, that to train on); a list
            of paths, PIL images, arrays or tensors; an array (N, height, width[, channels]); a `datasets.Dataset` or
            `IterableDataset`; or any map-style data set whose items are an image (PIL, array, tensor, path), a tuple
            that begins with one, or a dict that holds one.
        num_channels (`int`): Of every image.
        image_column (`str`, *optional*): Where dicts have several values that could be the image.

    Raises:
        ValueError: If there are none, or it cannot be told what is the image; names what was found.
    """
    if isinstance(data, ImageDataset | ImageStream):
        return data
    if isinstance(data, str | os.PathLike):
        return open_folder(data, num_channels)
    source = f"the data ({type(data).__name__})"
    if isinstance(data, torch.utils.data.IterableDataset) and type(data).__module__.split(".")[0] == "datasets":
        return from_stream(data, num_channels, source=source, image_column=image_column)
    if not isinstance(data, Sized) or not hasattr(data, "__getitem__"):
        raise ValueError(
            f"The images are given as {type(data).__name__}, which has no length or no items by index. Expected a "
            "folder, a list, an array, a `datasets` data set (streams too), or a data set with both."
        )
    if len(data) == 0:
        raise ValueError(f"The data ({type(data).__name__}) is empty: there are no images to read.")
    # A transform that was set on it (with_transform) is what the user wants to see applied.
    if type(data).__module__.split(".")[0] == "datasets" and data.format["type"] != "custom":
        return from_datasets({"train": data}, num_channels, source=source, image_column=image_column)["train"]
    if isinstance(data, np.ndarray):
        return ImageDataset(data, num_channels, source=source)
    return ImageDataset(_ImageOfEach(data, image_column), num_channels, source=source)


def holds_pixel_values(data) -> bool:
    """Whether the items are dicts with `pixel_values`: images that the user has transformed already."""
    if isinstance(data, str | os.PathLike | np.ndarray | ImageDataset):
        return False
    if not isinstance(data, Sized) or not hasattr(data, "__getitem__") or not len(data):
        return False
    first = data[0]
    return isinstance(first, Mapping) and "pixel_values" in first


class _ImageOfEach:
    """The image in each item of a map-style data set."""

    def __init__(self, data, key: str | None):
        self.data = data
        # A user's data set may crop by chance: what it gives once tells nothing of what it gives next.
        self.is_stored = isinstance(data, list | tuple)
        first = data[0]
        self.place: int | str | None = None
        if isinstance(first, Mapping) and not ({"bytes", "path"} & set(first) and len(first) <= 2):
            self.place = _key_of_image(first, key)
        elif isinstance(first, tuple | list):
            if not first or not _could_be_image(first[0]):
                found = ", ".join(type(value).__name__ for value in first) or "nothing"
                raise ValueError(f"Items are tuples of {found}; expected an image (PIL, array, tensor, path) first.")
            self.place = 0
        elif not _could_be_image(first):
            raise ValueError(
                f"Items are of type {type(first).__name__}; expected an image (PIL, array, tensor, path), a tuple "
                "that begins with one, or a dict that holds one."
            )

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int):
        item = self.data[index]
        value = item if self.place is None else item[self.place]
        return os.fspath(value) if isinstance(value, os.PathLike) else value


def _key_of_image(item: Mapping, wanted: str | None) -> str:
    found = {name: type(value).__name__ for name, value in item.items()}
    described = ", ".join(f"{name} ({kind})" for name, kind in found.items())
    if wanted is not None:
        if wanted not in item:
            raise ValueError(f"image_column is {wanted!r}, and the items have {described}.")
        return wanted
    candidates = [name for name, value in item.items() if _could_be_image(value) and not isinstance(value, str)]
    usual = [name for name in _USUAL_KEYS if name in item]
    if len(candidates) == 1:
        return candidates[0]
    if len(usual) == 1:
        return usual[0]
    if not candidates:
        raise ValueError(f"Items hold no image (PIL, array, tensor): they have {described}.")
    raise ValueError(f"Items hold several values that could be the image: {described}. Choose one by image_column.")


def _could_be_image(value) -> bool:
    if isinstance(value, np.ndarray | torch.Tensor):
        return value.ndim in (2, 3)
    if isinstance(value, str | os.PathLike | bytes):
        return True
    if isinstance(value, Mapping):
        return "bytes" in value or "path" in value
    # PIL's, without importing it.
    return hasattr(value, "convert") and hasattr(value, "getbands")
