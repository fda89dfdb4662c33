"""Files that hold several images each: what DICOM, GeoTIFF and volumes share."""

import hashlib

import numpy as np

from ..images import BrokenImageError
from .folder import FileImages


class PartImages:
    """
    Images by row, of files that hold one or several, file after file. A file is opened anew for each image, by the
    process that reads it: none is shared with a worker. Only numbers and names are held.

    A kind of file is a subclass with `list_parts`, `read` and `describe`.

    Args:
        root (`str`): the folder.
        paths (`list[str]`): of the files, below it.
        value_range (pair of `float`, *optional*): what becomes 0 and 1; values beyond are clipped.
        settings: what else decides what is read.
    """

    # Numbers that tell an image within its file.
    part_size = 1

    def __init__(self, root: str, paths: list[str], value_range=None, settings: tuple = ()):
        self.files = FileImages(root, paths)
        self.value_range = None if value_range is None else tuple(value_range)
        self.settings = (type(self).__name__, self.value_range, *settings)
        parts = [self._list_or_placeholder(path) for path in self.files]
        self.counts = np.array([len(found) for found in parts])
        self.file_numbers = np.repeat(np.arange(len(parts)), self.counts)
        self.parts = np.concatenate(parts)
        # What stays on one side of a split, by file: the file.
        self.file_groups = np.arange(len(parts))

    def list_parts(self, path: str) -> np.ndarray:
        """What the images of a file are, integers of shape (number, `part_size`). Raises BrokenImageError."""
        raise NotImplementedError

    def read(self, path: str, part: np.ndarray) -> np.ndarray:
        """One image of shape (height, width) or (height, width, channels). May raise anything of a damaged file."""
        raise NotImplementedError

    def describe(self, part: np.ndarray) -> str:
        """What an image is within its file, in words."""
        raise NotImplementedError

    def _list_or_placeholder(self, path: str) -> np.ndarray:
        try:
            return np.asarray(self.list_parts(path), dtype=np.int64).reshape(-1, self.part_size)
        except BrokenImageError:
            # One image, which says so when it is read, and can be skipped.
            return np.zeros((1, self.part_size), dtype=np.int64)

    def __len__(self) -> int:
        return len(self.file_numbers)

    def __getitem__(self, row: int) -> np.ndarray:
        name = self.name(row)
        try:
            image = self.read(self.files[self.file_numbers[row]], self.parts[row])
        except (BrokenImageError, ImportError):
            raise
        # As of pictures: a damaged file can raise nearly anything out of a codec, and all of it means the same.
        except Exception as error:
            told = " ".join(str(error.__cause__ or error).split())
            raise BrokenImageError(f"{name}: broken or cut off: {type(error).__name__}: {told}") from error
        if self.value_range is not None:
            low, high = self.value_range
            return ((image.astype(np.float32) - low) / (high - low)).clip(0, 1)
        if image.dtype.kind in "iu" and (image.dtype.kind, image.dtype.itemsize) not in (("u", 1), ("u", 2)):
            raise ValueError(
                f"{name}: values of type {image.dtype}, whose range says nothing about what is black or white: give "
                "--value_range LOW HIGH, what becomes 0 and 1."
            )
        return image.astype(image.dtype.newbyteorder("="))

    def name(self, row: int) -> str:
        """The file, and which of its images."""
        number = self.file_numbers[row]
        within = f" ({self.describe(self.parts[row])})" if self.counts[number] > 1 else ""
        return f"{self.files[number]}{within}"

    def groups(self) -> np.ndarray:
        """A number for each image: images of the same one stay on one side of a split."""
        return np.unique(self.file_groups, return_inverse=True)[1][self.file_numbers]

    def fingerprint(self, rows: np.ndarray) -> str:
        digest = hashlib.sha256(repr(self.settings).encode())
        digest.update(self.files.fingerprint(np.unique(self.file_numbers[rows])).encode())
        digest.update(self.file_numbers[rows].tobytes() + self.parts[rows].tobytes())
        return digest.hexdigest()
