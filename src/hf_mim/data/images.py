"""Reading one picture into a tensor, by one stated rule.

`read_image` returns (C, H, W), either **uint8** (0 to 255, divided by 255 later) or **float32** (used as it is). So
the number that a model sees, before mean and standard deviation, is value / 255 for uint8, the value for float32.

| found                        | `num_channels=3`           | `num_channels=1`           | any other number n      |
|------------------------------|----------------------------|----------------------------|-------------------------|
| RGB                          | as it is                   | luma (ITU-R 601)           | error                   |
| grey, 1 bit                  | repeated, uint8            | as it is, uint8            | error                   |
| palette                      | its colours                | luma of its colours        | error                   |
| RGBA, grey + alpha, palette  | laid over white            | laid over white, then luma | RGBA: n = 4, as it is;  |
| or RGB with transparency     |                            |                            | grey + alpha: n = 2     |
| CMYK, YCbCr, HSV             | PIL's conversion to RGB    | luma of that               | CMYK: n = 4, as it is   |
| 16-bit grey (`I;16`, `I`)    | value / 65535, repeated    | value / 65535, float32     | error                   |
| float (`F`)                  | repeated, float32          | as it is, float32          | error                   |
| array or `.npy`: (H, W)      | repeated                   | as it is                   | error                   |
| (H, W, C) or (C, H, W)       | C = 3, or C = 1 repeated   | C = 1                      | C = n                   |
| TIFF                         | as above, by PIL; what PIL | as for 3                   | as an array, by         |
|                              | cannot: array, by tifffile |                            | tifffile                |

* Arrays: bool and uint8 become uint8, uint16 becomes value / 65535 in float32, floats become float32 with the values
  they have (which must be finite). Other integers are refused: their range says nothing about what is black or white.
* Which axis holds the channels: the one whose length fits `num_channels`. Where both ends fit, a NumPy array is taken
  as (H, W, C) and a torch tensor as (C, H, W).
* The EXIF orientation (and TIFF's) is applied. Colour profiles are not. Of an animation or a multi-page file the first
  picture is read. 16-bit colour PNG is read with its upper 8 bits, as PIL does.
* White, because transformers' own processors lay transparency over white. (Its pipelines drop alpha before they call
  the processor, so transparent pictures should be flattened before they are given to a pipeline.)
"""

import contextlib
import io
import os
import warnings
from collections.abc import Iterator, Mapping

import numpy as np
import torch

# Read by PIL, besides .npy (numpy). AVIF: by those builds of PIL that can.
IMAGE_EXTENSIONS = (
    ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".avif", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm",
    ".pbm", ".npy",
)  # fmt: skip
# Where PIL stops by default: a small file that unpacks to more is more often an attack than a picture.
MAX_IMAGE_PIXELS = 178_956_970

_TIFF_MAGIC = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_NPY_MAGIC = b"\x93NUMPY"
_EXIF_ORIENTATION = 0x0112


class BrokenImageError(ValueError):
    """A picture that cannot be read: cut off, empty, missing, too large, or not a picture at all.

    Its message holds the file's name and the cause. The constructor takes one string, because a `DataLoader` raises a
    worker's exception anew in the main process as `type(error)(message)`.
    """


class MissingImageError(BrokenImageError):
    """There is no picture: a row without one, or a file that is not there."""


class OversizedImageError(BrokenImageError):
    """A picture of more pixels than are decoded."""


def read_image(
    value, num_channels: int = 3, *, name: str | None = None, max_image_pixels: int | None = None
) -> torch.Tensor:
    """Reads one picture by the rule at the top of this file.

    Args:
        value: a `PIL.Image.Image`, a NumPy array, a torch tensor, a path, the bytes of a file, or the
            `{"bytes": ..., "path": ...}` that a `datasets.Image(decode=False)` column gives.
        num_channels (`int`): channels of the result; 1 and 3 convert, any other number takes what has precisely that.
        name (`str`, *optional*): what to call the picture in an error; its path by default.
        max_image_pixels (`int`, *optional*): height times width above which a file is not decoded;
            `MAX_IMAGE_PIXELS` by default.

    Returns:
        `torch.Tensor` of shape `(num_channels, height, width)`: uint8 in 0..255, or float32. It may be a view whose
        memory is ordered (H, W, C), or one that repeats a channel: do not write into it.

    Raises:
        BrokenImageError: there is no picture (None), it cannot be read, is larger than `max_image_pixels`, or holds
            values that are not finite.
        ValueError: it can be read, but has other channels than asked for, or a type or a shape that is no picture's.
        ImportError: a multiband TIFF, and tifffile is not installed.
    """
    from PIL import Image

    if isinstance(value, Mapping):
        path = value.get("path")
        name = name or path
        value = value["bytes"] if value.get("bytes") is not None else path
    if value is None:
        raise MissingImageError(f"{name or 'picture'}: the picture is missing (None).")
    if isinstance(value, str | os.PathLike):
        name = name or os.fspath(value)
        value = _read_file(value, name)
    name = name or "picture"

    if isinstance(value, bytes | bytearray | memoryview):
        value = _decode(bytes(value), num_channels, name, max_image_pixels)
    if isinstance(value, Image.Image):
        return _from_pil(value, num_channels, name)
    if isinstance(value, torch.Tensor):
        return _from_array(value.detach().cpu().numpy(), num_channels, name, channels_first=True)
    if isinstance(value, np.ndarray):
        return _from_array(value, num_channels, name, channels_first=False)
    raise ValueError(
        f"{name}: expected a PIL image, an array, a tensor, a path, bytes or a dict of bytes and path, "
        f"got {type(value).__name__}."
    )


def _read_file(path: str | os.PathLike, name: str) -> bytes:
    try:
        if "://" in os.fspath(path):  # a streamed data set's zip://a.jpg::hf://... or http://...
            import fsspec

            with fsspec.open(os.fspath(path), "rb") as file:
                return file.read()
        with open(path, "rb") as file:
            return file.read()
    except FileNotFoundError as error:
        raise MissingImageError(f"{name}: there is no such file.") from error
    except OSError as error:
        raise BrokenImageError(f"{name}: cannot be read: {error}") from error


@contextlib.contextmanager
def pixel_limit(name: str, limit: int | None = None) -> Iterator:
    """Within, PIL's own limit is off; what is yielded has to be called with each picture before it is decoded.

    Raises:
        OversizedImageError: by that call, with the picture's size and the way out.
    """
    from PIL import Image

    limit = limit or MAX_IMAGE_PIXELS

    def check(image) -> None:
        width, height = image.size
        if width * height > limit:
            raise OversizedImageError(
                f"{name}: {width} x {height} are {width * height} pixels, and pictures of more than {limit} are not "
                f"decoded. If you trust it: --max_image_pixels {width * height}."
            )

    before, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
    try:
        yield check
    finally:
        Image.MAX_IMAGE_PIXELS = before


def _decode(data: bytes, num_channels: int, name: str, max_image_pixels: int | None):
    """The bytes of a file to a loaded PIL image or an array."""
    from PIL import Image, UnidentifiedImageError

    if not data:
        raise BrokenImageError(f"{name}: the file is empty (0 bytes).")
    is_tiff = data.startswith(_TIFF_MAGIC)
    # A damaged file can raise nearly anything out of a codec (OSError, SyntaxError, struct.error, IndexError, ...),
    # and all of it means the same here.
    try:
        if data.startswith(_NPY_MAGIC):
            return np.load(io.BytesIO(data), allow_pickle=False)
        if is_tiff and num_channels not in (1, 3):
            return _decode_tiff(data)
        with pixel_limit(name, max_image_pixels) as check_size:
            try:
                image = Image.open(io.BytesIO(data))
            except UnidentifiedImageError:
                if is_tiff:  # float or multiband: PIL does not know it
                    return _decode_tiff(data)
                raise BrokenImageError(f"{name}: {_unknown_format(data)}") from None
            check_size(image)
            pixels = _decode_jpeg(data, image) if num_channels == 3 else None
            if pixels is not None:
                return pixels
            image.load()
        return image
    except (BrokenImageError, ImportError):
        raise
    except Exception as error:
        raise BrokenImageError(f"{name}: broken or cut off: {type(error).__name__}: {error}") from error


def _decode_jpeg(data: bytes, image) -> torch.Tensor | None:
    """
    The pixels of an upright JPEG in colour, (3, height, width), within 1/255 of PIL's and a quarter sooner; None of
    any other picture, and of one that is broken, of which PIL is left to say what is wrong.
    """
    if image.format != "JPEG" or image.mode != "RGB" or image.getexif().get(_EXIF_ORIENTATION, 1) != 1:
        return None
    try:
        from torchvision.io import ImageReadMode, decode_jpeg

        return decode_jpeg(torch.frombuffer(bytearray(data), dtype=torch.uint8), ImageReadMode.RGB)
    except (ImportError, RuntimeError):  # or torchvision has it no more, as it says since 0.29, or was built without
        return None


def _unknown_format(data: bytes) -> str:
    brand = data[8:12] if data[4:8] == b"ftyp" else b""
    if brand in (b"heic", b"heix", b"heif", b"mif1", b"msf1", b"hevc"):
        return "a HEIC picture, which PIL cannot read: convert it to JPEG or PNG."
    if brand in (b"avif", b"avis"):
        return "an AVIF picture, which this build of PIL cannot read: pip install -U pillow, or convert it."
    return "not a picture in a format that can be read."


def _decode_tiff(data: bytes) -> np.ndarray:
    advice = "Multiband TIFF needs two more packages: pip install tifffile imagecodecs."
    try:
        import tifffile
    except ImportError as error:
        raise ImportError(advice) from error
    try:
        return tifffile.imread(io.BytesIO(data))
    except ValueError as error:
        if "imagecodecs" in str(error):  # LZW and other compressions
            raise ImportError(f"{advice} ({error})") from error
        raise


def _from_pil(image, num_channels: int, name: str) -> torch.Tensor:
    from PIL import ImageOps

    try:
        image.load()  # TIFF turns itself upright here
        if image.getexif().get(_EXIF_ORIENTATION, 1) != 1:
            image = ImageOps.exif_transpose(image)
    except Exception as error:  # a lazily opened file: see _decode
        raise BrokenImageError(f"{name}: broken or cut off: {type(error).__name__}: {error}") from error

    bands = image.getbands()
    if image.mode == "F" or image.mode.startswith("I"):
        array = np.array(image)
        if array.dtype.kind == "i":  # mode I: 32 bits that hold 16
            if array.min() < 0 or array.max() > 65535:
                raise ValueError(
                    f"{name}: 32-bit integers from {array.min()} to {array.max()}, expected 0 to 65535. Store the "
                    "picture as float32 (.npy or TIFF), scaled as you need it."
                )
            array = array.astype(np.uint16)
        return _from_array(array, num_channels, name, channels_first=False)
    if num_channels not in (1, 3):
        if len(bands) != num_channels or image.mode == "P":
            raise _channel_error(name, f"{len(bands)} ({image.mode})", num_channels, len(bands))
        return torch.from_numpy(np.array(image)).permute(2, 0, 1)

    try:
        if "A" in bands or "a" in bands or image.info.get("transparency") is not None:
            image = _over_white(image)
        if image.mode == "1":
            image = image.convert("L")
        if image.mode not in ("L", "RGB"):
            image = image.convert("RGB")
    except ValueError as error:  # LAB, for one
        raise ValueError(
            f"{name}: PIL cannot convert mode {image.mode} to RGB ({error}). Convert it first."
        ) from error
    if image.mode == "RGB" and num_channels == 1:
        image = image.convert("L")
    array = torch.from_numpy(np.array(image))
    return array.permute(2, 0, 1) if array.ndim == 3 else array.expand(num_channels, -1, -1)


def _over_white(image):
    from PIL import Image

    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, (255, 255, 255, 255)), image).convert("RGB")


def _from_array(array: np.ndarray, num_channels: int, name: str, channels_first: bool) -> torch.Tensor:
    array = _to_uint8_or_float32(array, name)
    if array.size == 0 or array.ndim not in (2, 3):
        raise ValueError(f"{name}: expected a picture of shape (H, W), (H, W, C) or (C, H, W), got {array.shape}.")
    if array.ndim == 2:
        array = array[None]
    else:
        axis = _channel_axis(array.shape, num_channels, channels_first)
        if axis is None:
            found = min(array.shape[0], array.shape[2])  # most likely: pictures are larger than they have channels
            raise _channel_error(name, f"{found} (shape {array.shape})", num_channels, found)
        array = np.moveaxis(array, axis, 0)
    image = torch.from_numpy(array)
    if image.shape[0] == num_channels:
        return image
    if image.shape[0] == 1 and num_channels == 3:
        return image.expand(3, -1, -1)
    raise _channel_error(name, "1 (grey)", num_channels, 1)


def _channel_axis(shape: tuple[int, ...], num_channels: int, channels_first: bool) -> int | None:
    axes = (0, 2) if channels_first else (2, 0)
    for wanted in (num_channels, 1) if num_channels == 3 else (num_channels,):
        for axis in axes:
            if shape[axis] == wanted:
                return axis
    return None


def _to_uint8_or_float32(array: np.ndarray, name: str) -> np.ndarray:
    kind, size = array.dtype.kind, array.dtype.itemsize
    if kind == "b":
        return array.astype(np.uint8) * 255
    if kind == "u" and size == 1:
        return np.require(array, requirements="W")  # torch warns about memory that cannot be written
    if kind == "u" and size == 2:
        return array.astype(np.float32) / 65535
    if kind == "f":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # float64 beyond float32's range: caught as infinite below
            array = np.require(array, dtype=np.float32, requirements="W")
        if not np.isfinite(array).all():
            raise BrokenImageError(f"{name}: holds values that are not finite (NaN or infinity).")
        return array
    raise ValueError(
        f"{name}: pixels of type {array.dtype}, expected uint8 (0 to 255), uint16 (0 to 65535), or floats with the "
        "values the model should see. Convert the array first."
    )


def _channel_error(name: str, found: str, expected: int, suggestion: int) -> ValueError:
    return ValueError(
        f"{name}: has {found} channels, expected {expected}. Pass --num_channels {suggestion} if all pictures are "
        "like it, or convert or remove it. `hf_mim check` with the same flags lists all such pictures."
    )
