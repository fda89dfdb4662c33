"""
DICOM files, each frame an image.

What a grey image holds is float32 from 0 to 1: stored values times the rescale slope, plus the intercept; then the
file's first window (linear, linear exact or sigmoid), or `--value_range` in its place, or where there is neither the
range of the stored bits (floats stay as they are); MONOCHROME1, in which 0 is white, turned round. Colour is RGB, from
0 to 1 too. Tables (modality and VOI LUT sequences) are not applied; those of palettes are.
"""

import numpy as np

from ..arguments import DataArguments
from ..dataset import ImageDataset
from ..images import BrokenImageError, MissingImageError
from . import folder
from .parts import PartImages

ENDINGS = (".dcm", ".dicom", ".ima")
_GREY = ("MONOCHROME1", "MONOCHROME2")
# Float, double float and pixel data.
_PIXELS = (0x7FE00008, 0x7FE00009, 0x7FE00010)


def open_splits(args: DataArguments) -> tuple[ImageDataset, ImageDataset | None]:
    """The frames of `--train_dir`, and of `--validation_dir` or the split beside them.

    Raises:
        ValueError: there are none; pixels are compressed in a way that nothing installed can read; a file does not
            tell what `--group_by` names; or the splits that are there share one of these.
        ImportError: pydicom is not installed.
    """
    opened = []

    def open_files(root: str, paths: list[str]) -> DicomImages:
        opened.append(DicomImages(root, paths, args.value_range, args.group_by))
        return opened[-1]

    splits = folder.open_splits(args, ENDINGS, open_files)
    if args.group_by is not None and len(opened) == 2:
        shared = sorted(set.intersection(*(set(files.file_groups.tolist()) for files in opened)))
        if shared:
            raise ValueError(
                f"--group_by {args.group_by}: {len(shared)} are in both {splits[0].source} and {splits[1].source}, "
                f"{shared[0]} among them. Move the files, or let the split be made: --train_dir of all, without "
                "--validation_dir."
            )
    return splits


class DicomImages(PartImages):
    """
    Frames of DICOM files. Headers are read once, when it is made; pixels one frame at a time.

    Args:
        value_range (pair of `float`, *optional*): in the place of the files' windows, after the rescale slope.
        group_by (`str`, *optional*): the attribute (`PatientID`) of which images of one value stay on one side of a
            split; by file if None.
    """

    def __init__(self, root: str, paths: list[str], value_range=None, group_by: str | None = None):
        # Here, so that a folder is refused before it is gone through.
        import pydicom  # noqa: F401

        self.group_by, self._groups = group_by, []
        super().__init__(root, paths, value_range)
        # How values are scaled depends on each file: see `read`.
        self.window, self.value_range = self.value_range, None
        if group_by is not None:
            self.file_groups = np.array(self._groups)

    def list_parts(self, path: str) -> np.ndarray:
        self._groups.append(path)
        header = _read_header(path)
        _refuse_undecodable(path, header)
        if self.group_by is not None:
            value = header.get(self.group_by)
            if not value:
                raise ValueError(f"--group_by {self.group_by}: {path} does not tell it.")
            self._groups[-1] = str(value)
        return np.arange(int(header.get("NumberOfFrames") or 1))

    def read(self, path: str, part: np.ndarray) -> np.ndarray:
        from pydicom.pixels import apply_color_lut, pixel_array

        frame = int(part[0])
        header = _read_header(path)
        image = pixel_array(path, index=frame)
        kind, bits = header.PhotometricInterpretation, header.get("BitsStored")
        if kind == "PALETTE COLOR":
            image = apply_color_lut(image, header)
            bits = 8 * image.dtype.itemsize
        if kind not in _GREY:
            return image.astype(np.float32) / (2**bits - 1)
        slope = float(_of_frame(header, frame, "PixelValueTransformationSequence", "RescaleSlope", 1))
        intercept = float(_of_frame(header, frame, "PixelValueTransformationSequence", "RescaleIntercept", 0))
        centre = _of_frame(header, frame, "FrameVOILUTSequence", "WindowCenter", None)
        width = _of_frame(header, frame, "FrameVOILUTSequence", "WindowWidth", None)
        values = image.astype(np.float32) * slope + intercept
        if self.window is not None:
            low, high = self.window
            values = ((values - low) / (high - low)).clip(0, 1)
        elif centre is not None and width is not None:
            function = _of_frame(header, frame, "FrameVOILUTSequence", "VOILUTFunction", "LINEAR")
            values = apply_window(values, float(centre), float(width), function)
        elif bits is not None:
            lowest = -(2 ** (bits - 1)) if header.get("PixelRepresentation") else 0
            ends = np.array([lowest, lowest + 2**bits - 1], dtype=np.float32) * slope + intercept
            values = (values - ends.min()) / (ends.max() - ends.min())
        return 1 - values if kind == "MONOCHROME1" else values

    def describe(self, part: np.ndarray) -> str:
        return f"frame {part[0]}"


def apply_window(values: np.ndarray, centre: float, width: float, function: str = "LINEAR") -> np.ndarray:
    """
    What a window shows, from 0 to 1, by part 3, C.11.2.1.2 and C.11.2.1.3 of the standard.

    Args:
        values: rescaled, float32.
        width (`float`): at least 1 for `"LINEAR"`, above 0 for the others.
        function (`str`): `"LINEAR"`, `"LINEAR_EXACT"` or `"SIGMOID"`.

    Raises:
        ValueError: there is no such function or width.
    """
    if width < 1 if function == "LINEAR" else width <= 0:
        raise ValueError(f"a window of width {width:g}")
    if function == "LINEAR":
        if width == 1:
            return (values > centre - 0.5).astype(np.float32)
        return ((values - (centre - 0.5)) / (width - 1) + 0.5).clip(0, 1)
    if function == "LINEAR_EXACT":
        return ((values - centre) / width + 0.5).clip(0, 1)
    if function == "SIGMOID":
        return 1 / (1 + np.exp(-4 * (values - centre) / width))
    raise ValueError(f"a window by the function {function!r}, expected LINEAR, LINEAR_EXACT or SIGMOID")


def _read_header(path: str):
    """All that stands before the pixels, which have to be there."""
    from pydicom.filereader import read_partial

    found = []

    def at_pixels(tag, vr, length) -> bool:
        if tag in _PIXELS:
            found.append(tag)
        return bool(found)

    try:
        with open(path, "rb") as file:
            header = read_partial(file, at_pixels)
    except FileNotFoundError as error:
        raise MissingImageError(f"{path}: there is no such file.") from error
    except Exception as error:
        told = " ".join(str(error).split())
        raise BrokenImageError(f"{path}: cannot be read as DICOM: {type(error).__name__}: {told}") from error
    if not found:
        raise BrokenImageError(f"{path}: holds no pixel data: cut off, or a report, a directory or the like.")
    return header


def _refuse_undecodable(path: str, header) -> None:
    from pydicom.pixels import get_decoder

    syntax = header.file_meta.get("TransferSyntaxUID")
    if syntax is None:
        raise BrokenImageError(f"{path}: does not say how its pixels are stored (no transfer syntax).")
    try:
        decoder = get_decoder(syntax)
    except NotImplementedError as error:
        raise BrokenImageError(f"{path}: pixels of the transfer syntax {syntax.name}, which is not read.") from error
    if not decoder.is_available:
        needs = "; ".join(missing.partition("requires ")[2] for missing in decoder.missing_dependencies)
        raise ValueError(
            f"{path}: pixels are compressed as {syntax.name}, for which no decoder is installed. pip install one of: "
            f"{needs}."
        )


def _of_frame(header, frame: int, sequence: str, keyword: str, default):
    """An attribute of a frame: its own, that of all frames, or the file's; the first of several values."""
    for groups in ("PerFrameFunctionalGroupsSequence", "SharedFunctionalGroupsSequence"):
        found = header.get(groups)
        if found:
            inner = found[frame if groups.startswith("Per") else 0].get(sequence)
            if inner and keyword in inner[0]:
                return _first(inner[0].get(keyword), default)
    return _first(header.get(keyword), default)


def _first(value, default):
    from pydicom.multival import MultiValue

    if isinstance(value, MultiValue):
        value = value[0] if value else None
    return default if value in (None, "") else value
