"""
Volumes, cut into slices: NIfTI along its third axis, stacks of `.npy` along `--slice_axis`.

What is left of a volume of three axes is (height, width); the fourth axis of one of four holds channels. NIfTI's
values are scaled as the file says. A slice of a `.npy` or a `.nii` is read without the rest; a `.nii.gz` has to be
unpacked up to it, each time.
"""

import numpy as np

from ..arguments import DataArguments
from ..dataset import ImageDataset
from ..images import BrokenImageError, MissingImageError
from . import folder
from .parts import PartImages

NIFTI = (".nii", ".nii.gz")
ENDINGS = (*NIFTI, ".npy")
_NIFTI_AXIS = 2


def open_splits(args: DataArguments) -> tuple[ImageDataset, ImageDataset | None]:
    """The slices of `--train_dir`, and of `--validation_dir` or the split beside them.

    Raises:
        ValueError: there are none.
        ImportError: of NIfTI, where nibabel is not installed.
    """
    # Without --slice_axis a .npy is a picture, not a stack.
    endings = NIFTI if args.slice_axis is None else ENDINGS
    return folder.open_splits(
        args, endings, lambda root, paths: VolumeSlices(root, paths, args.slice_axis, args.value_range)
    )


class VolumeSlices(PartImages):
    """
    Slices of volumes.

    Args:
        slice_axis (`int`, *optional*): the axis that counts them, 0 to 2; NIfTI's third if None.
    """

    def __init__(self, root: str, paths: list[str], slice_axis: int | None = None, value_range=None):
        self.axis = _NIFTI_AXIS if slice_axis is None else slice_axis
        super().__init__(root, paths, value_range, (self.axis,))

    def list_parts(self, path: str) -> np.ndarray:
        return np.arange(_open(path).shape[self.axis])

    def read(self, path: str, part: np.ndarray) -> np.ndarray:
        return np.array(_open(path)[(slice(None),) * self.axis + (int(part[0]),)])

    def describe(self, part: np.ndarray) -> str:
        return f"slice {part[0]} of axis {self.axis}"


def _open(path: str):
    """A volume on disk, of which only what is asked for is read. Raises BrokenImageError if it is none."""
    volume = _open_array(path)
    if len(volume.shape) not in (3, 4) or 0 in volume.shape:
        raise BrokenImageError(
            f"{path}: an array of shape {volume.shape}, expected three axes, or four with channels last."
        )
    return volume


def _open_array(path: str):
    try:
        if not path.lower().endswith(NIFTI):
            return np.load(path, mmap_mode="r", allow_pickle=False)
        import nibabel

        return nibabel.load(path).dataobj
    except ImportError:
        raise
    except FileNotFoundError as error:
        raise MissingImageError(f"{path}: there is no such file.") from error
    except Exception as error:
        told = " ".join(str(error).split())
        if "Python objects" in told:
            told = "it holds Python objects, as of slices of other sizes: save those of one size, or each as a file."
        raise BrokenImageError(f"{path}: cannot be read as a volume: {told}") from error
