"""Reading one picture: every row of the conversion table in `hf_mim.data.images`, from real files."""

import io
import pickle
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as st_numpy
from PIL import Image

from hf_mim.data import images
from hf_mim.data.images import BrokenImageError, read_image

pytestmark = pytest.mark.filterwarnings("ignore:Corrupt EXIF")  # PIL, before it gives up on a broken TIFF


def rgb(height=5, width=7, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def luma(array):
    """ITU-R 601, rounded, by hand."""
    return np.floor(array @ [0.299, 0.587, 0.114] + 0.5)


# --- pictures


def test_rgb_is_kept_and_turned_into_channels_first(tmp_path):
    array = rgb()
    Image.fromarray(array).save(tmp_path / "a.png")
    picture = read_image(tmp_path / "a.png")
    assert picture.dtype == torch.uint8
    assert np.array_equal(picture.numpy(), array.transpose(2, 0, 1))


def test_rgb_to_one_channel_is_luma():
    array = rgb()
    picture = read_image(Image.fromarray(array), 1)
    assert picture.shape == (1, 5, 7)
    assert np.abs(picture[0].numpy() - luma(array)).max() <= 1


def test_grey_is_repeated(tmp_path):
    array = rgb()[..., 0]
    Image.fromarray(array).save(tmp_path / "a.png")
    assert np.array_equal(read_image(tmp_path / "a.png").numpy(), np.stack([array] * 3))
    assert np.array_equal(read_image(tmp_path / "a.png", 1).numpy(), array[None])


def test_one_bit_becomes_black_and_white(tmp_path):
    Image.fromarray(np.array([[0, 255], [255, 0]], dtype=np.uint8)).convert("1").save(tmp_path / "a.png")
    assert read_image(tmp_path / "a.png", 1).tolist() == [[[0, 255], [255, 0]]]


def test_alpha_is_laid_over_white(tmp_path):
    pixels = np.array([[[200, 100, 0, 255], [200, 100, 0, 0], [200, 100, 0, 51]]], dtype=np.uint8)
    Image.fromarray(pixels, "RGBA").save(tmp_path / "a.png")
    found = read_image(tmp_path / "a.png").numpy()[:, 0].T
    # 51 / 255 is a fifth: 0.2 * 200 + 0.8 * 255 = 244, 0.2 * 100 + 0.8 * 255 = 224, 0.8 * 255 = 204
    assert found.tolist() == [[200, 100, 0], [255, 255, 255], [244, 224, 204]]


def test_grey_with_alpha(tmp_path):
    pixels = np.array([[[100, 255], [100, 0], [100, 51]]], dtype=np.uint8)
    Image.fromarray(pixels, "LA").save(tmp_path / "a.png")
    assert read_image(tmp_path / "a.png", 1).tolist() == [[[100, 255, 224]]]
    assert read_image(tmp_path / "a.png", 3).tolist() == [[[100, 255, 224]]] * 3
    assert read_image(tmp_path / "a.png", 2).tolist() == [[[100, 100, 100]], [[255, 0, 51]]]


def test_palette_with_and_without_transparency(tmp_path):
    picture = Image.new("P", (2, 1))
    picture.putpalette([10, 20, 30, 40, 50, 60])
    picture.putpixel((1, 0), 1)
    picture.save(tmp_path / "plain.png")
    picture.save(tmp_path / "clear.png", transparency=1)
    picture.save(tmp_path / "clear.gif", transparency=1)
    assert read_image(tmp_path / "plain.png")[:, 0].T.tolist() == [[10, 20, 30], [40, 50, 60]]
    for name in ("clear.png", "clear.gif"):
        assert read_image(tmp_path / name)[:, 0].T.tolist() == [[10, 20, 30], [255, 255, 255]]


def test_rgb_with_a_transparent_colour(tmp_path):
    Image.fromarray(np.array([[[1, 2, 3], [4, 5, 6]]], dtype=np.uint8)).save(
        tmp_path / "a.png", transparency=(4, 5, 6)
    )
    assert read_image(tmp_path / "a.png")[:, 0].T.tolist() == [[1, 2, 3], [255, 255, 255]]


def test_cmyk_jpeg(tmp_path):
    Image.new("CMYK", (16, 16), (0, 255, 255, 0)).save(tmp_path / "a.jpg", quality=100)
    picture = read_image(tmp_path / "a.jpg")
    assert picture.shape == (3, 16, 16)
    assert torch.allclose(picture[:, 8, 8].float(), torch.tensor([255.0, 0.0, 0.0]), atol=3)
    assert read_image(tmp_path / "a.jpg", 4).shape == (4, 16, 16)


def test_16_bit_grey_is_scaled_and_not_clipped(tmp_path):
    array = np.array([[0, 257, 4096, 65535]], dtype=np.uint16)
    Image.fromarray(array).save(tmp_path / "a.png")
    for value in (tmp_path / "a.png", Image.fromarray(array.astype(np.int32), "I")):
        picture = read_image(value, 1)
        assert picture.dtype == torch.float32
        assert torch.allclose(picture, torch.tensor([[[0, 1 / 255, 4096 / 65535, 1]]]))
        assert torch.equal(read_image(value, 3), picture.expand(3, -1, -1))


def test_32_bit_integers_beyond_16_are_refused():
    with pytest.raises(ValueError, match="from 0 to 70000, expected 0 to 65535"):
        read_image(Image.fromarray(np.array([[0, 70000]], dtype=np.int32), "I"))


def test_float_picture_keeps_its_values(tmp_path):
    array = np.array([[-2.5, 0.0, 1e4]], dtype=np.float32)
    Image.fromarray(array, "F").save(tmp_path / "a.tif")
    assert torch.equal(read_image(tmp_path / "a.tif", 1), torch.from_numpy(array[None]))


@pytest.mark.parametrize("suffix", ["jpg", "tif"])
def test_exif_orientation_is_applied(tmp_path, suffix):
    array = np.zeros((16, 32, 3), dtype=np.uint8)
    array[:, :16] = 255  # white on the left
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    Image.fromarray(array).save(tmp_path / f"a.{suffix}", exif=exif)
    picture = read_image(tmp_path / f"a.{suffix}")
    assert picture.shape == (3, 32, 16)
    assert picture[:, :15].float().mean() > 250 and picture[:, 17:].float().mean() < 5  # white on top


def test_every_way_to_give_a_picture_gives_the_same(tmp_path):
    image = Image.fromarray(rgb())
    path = tmp_path / "a.png"
    image.save(path)
    data = path.read_bytes()
    expected = read_image(image)
    values = [
        path,
        str(path),
        data,
        {"bytes": data, "path": None},
        {"bytes": None, "path": str(path)},
        f"file://{path}",
    ]
    for value in [*values, rgb(), torch.from_numpy(rgb())]:
        assert torch.equal(read_image(value), expected)


# --- arrays, .npy and TIFF


@pytest.mark.parametrize("shape", [(5, 8, 9), (8, 9, 5)])
@pytest.mark.parametrize("suffix", ["npy", "tif"])
def test_five_bands(tmp_path, shape, suffix):
    tifffile = pytest.importorskip("tifffile")
    array = np.random.default_rng(0).integers(0, 65536, shape, dtype=np.uint16)
    path = tmp_path / f"a.{suffix}"
    if suffix == "npy":
        np.save(path, array)
    else:
        tifffile.imwrite(path, array, photometric="minisblack", planarconfig="separate" if shape[0] == 5 else "contig")
    picture = read_image(path, 5)
    expected = array if shape[0] == 5 else array.transpose(2, 0, 1)
    assert picture.shape == (5, 8, 9)
    assert np.allclose(picture.numpy(), expected / 65535)
    with pytest.raises(ValueError, match=r"a\.(npy|tif): has .*5.* expected 3. Pass --num_channels 5") as caught:
        read_image(path, 3)
    assert not isinstance(caught.value, BrokenImageError)  # not to be skipped


def test_float_colour_tiff_that_pil_refuses(tmp_path):
    tifffile = pytest.importorskip("tifffile")
    array = np.random.default_rng(0).normal(size=(6, 7, 3)).astype(np.float32)
    tifffile.imwrite(tmp_path / "a.tif", array, photometric="rgb")
    assert np.array_equal(read_image(tmp_path / "a.tif").numpy(), array.transpose(2, 0, 1))


def test_multiband_tiff_without_tifffile_says_what_to_install(tmp_path, monkeypatch):
    tifffile = pytest.importorskip("tifffile")
    tifffile.imwrite(tmp_path / "a.tif", np.zeros((5, 8, 8), dtype=np.uint8), photometric="minisblack")
    monkeypatch.setitem(sys.modules, "tifffile", None)
    with pytest.raises(ImportError, match=r"pip install tifffile imagecodecs"):
        read_image(tmp_path / "a.tif", 5)


@given(
    array=st_numpy.arrays(np.uint8, st.tuples(st.integers(1, 6), st.integers(1, 6), st.integers(1, 6))),
    num_channels=st.integers(1, 6),
)
@settings(max_examples=200, deadline=None)
def test_the_channel_axis_is_the_one_that_fits(array, num_channels):
    """NumPy prefers the last axis and torch the first; no other axis is ever taken for channels."""
    for value, axes in ((array, (2, 0)), (torch.from_numpy(array), (0, 2))):
        fitting = [axis for axis in axes if array.shape[axis] == num_channels]
        if num_channels == 3 and not fitting:
            fitting = [axis for axis in axes if array.shape[axis] == 1]
        if not fitting:
            with pytest.raises(ValueError, match="--num_channels"):
                read_image(value, num_channels)
            continue
        expected = np.moveaxis(array, fitting[0], 0)
        found = read_image(value, num_channels).numpy()
        assert found.shape[0] == num_channels
        assert np.array_equal(found, np.broadcast_to(expected, found.shape))


def test_types_of_arrays():
    assert read_image(np.array([[True, False]]), 1).tolist() == [[[255, 0]]]
    assert read_image(np.array([[0.5, 3.0]]), 1).dtype == torch.float32
    with pytest.raises(ValueError, match="type int64, expected uint8"):
        read_image(np.array([[1, 2]]), 1)
    with pytest.raises(ValueError, match=r"expected a picture of shape .* got \(3,\)"):
        read_image(np.zeros(3, dtype=np.uint8))
    with pytest.raises(ValueError, match="got int"):
        read_image(3)


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e39])
def test_values_that_are_not_finite_are_a_broken_picture(value):
    with pytest.raises(BrokenImageError, match="row 3: holds values that are not finite"):
        read_image(np.full((4, 4), value), 1, name="row 3")


def test_rgb_picture_for_five_channels_names_the_flag():
    with pytest.raises(ValueError, match=r"x: has 3 \(RGB\) channels, expected 5. Pass --num_channels 3"):
        read_image(Image.fromarray(rgb()), 5, name="x")


# --- broken files


def broken_files(folder):
    buffer = io.BytesIO()
    Image.fromarray(rgb(64, 64)).save(buffer, "JPEG")
    jpeg = buffer.getvalue()
    buffer = io.BytesIO()
    Image.fromarray(rgb(64, 64)).save(buffer, "PNG")
    png = buffer.getvalue()
    np.save(folder / "whole.npy", rgb(64, 64))
    files = {
        "cut.jpg": jpeg[: len(jpeg) // 2],
        "cut.png": png[: len(png) // 2],
        "damaged.png": png[:60] + bytes(20) + png[80:],
        "cut.npy": (folder / "whole.npy").read_bytes()[:500],
        "empty.jpg": b"",
        "text.png": b"this is no picture",
        "cut.tif": b"II*\0\x08\0\0\0\xff\xff",
    }
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return [folder / name for name in files] + [folder / "missing.jpg"]


@pytest.mark.parametrize("num_channels", [1, 3, 5])
def test_broken_files_say_which_and_why(tmp_path, num_channels):
    for path in broken_files(tmp_path):
        with pytest.raises(BrokenImageError) as caught:
            read_image(path, num_channels)
        assert str(path) in str(caught.value)
        assert len(str(caught.value)) > len(str(path)) + 10


def test_a_lazily_opened_broken_picture(tmp_path):
    path = broken_files(tmp_path)[0]
    with pytest.raises(BrokenImageError, match="row 1: broken or cut off: OSError"):
        read_image(Image.open(path), name="row 1")


def test_the_error_survives_pickling_and_a_worker():
    error = BrokenImageError("a.jpg: broken")
    assert str(pickle.loads(pickle.dumps(error))) == "a.jpg: broken"
    assert str(type(error)("again")) == "again"  # what a DataLoader does


@given(
    st.binary(max_size=200),
    st.sampled_from([b"", b"\x93NUMPY", b"II*\0", b"\xff\xd8\xff\xe0", b"\x89PNG\r\n\x1a\n", b"BM"]),
)
@settings(max_examples=200, deadline=None)
def test_no_bytes_raise_anything_else(data, magic):
    with pytest.raises(ValueError):
        read_image(magic + data + b"\x01")


# --- what is too large, missing, or of another kind


def test_pixel_limit(tmp_path):
    path = tmp_path / "large.png"
    Image.new("L", (300, 200)).save(path)
    message = "large.png: 300 x 200 are 60000 pixels, .* more than 59999 .*--max_image_pixels 60000"
    with pytest.raises(BrokenImageError, match=message):
        read_image(str(path), max_image_pixels=59999)
    assert read_image(str(path), max_image_pixels=60000).shape == (3, 200, 300)


def test_our_limit_stands_for_that_of_pillow(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    path = tmp_path / "a.png"
    Image.new("L", (30, 20)).save(path)
    assert read_image(str(path)).shape == (3, 20, 30)
    assert Image.MAX_IMAGE_PIXELS == 100
    monkeypatch.setattr("hf_mim.data.images.MAX_IMAGE_PIXELS", 599)
    with pytest.raises(BrokenImageError, match="600 pixels"):
        read_image(str(path))


@pytest.mark.parametrize("value", [None, {"bytes": None, "path": None}])
def test_no_picture(value):
    with pytest.raises(BrokenImageError, match=r"row 3: the picture is missing \(None\)"):
        read_image(value, name="row 3")


def test_formats_that_are_known_and_not_read():
    with pytest.raises(BrokenImageError, match="a HEIC picture, which PIL cannot read: convert it"):
        read_image(b"\0\0\0\x18ftypheic" + bytes(40))


@pytest.mark.parametrize("options", [{}, {"subsampling": 0}, {"progressive": True}, {"quality": 30, "optimize": True}])
@pytest.mark.parametrize("size", [(64, 48), (37, 51)])
def test_jpeg_is_decoded_as_pillow_does(options, size, monkeypatch):
    small = np.random.default_rng(0).integers(0, 256, (9, 11, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(small).resize(size, Image.Resampling.BICUBIC).save(file, "JPEG", **options)
    pixels = read_image(file.getvalue())
    monkeypatch.setattr(images, "_decode_jpeg", lambda *args: None)
    pillow = read_image(file.getvalue())
    assert pixels.shape == pillow.shape == (3, size[1], size[0]) and pixels.dtype == torch.uint8
    # Two builds of one library; a step of rounding would be no harm.
    assert (pixels.int() - pillow.int()).abs().max() <= 1
    # The memory is ordered (H, W, C), for which resizing is fast.
    assert pixels.stride(0) == 1


def test_jpegs_that_are_left_to_pillow(monkeypatch):
    """Grey, CMYK, turned by EXIF, cut off, or to be read as grey."""
    decoded, decode = [], images._decode_jpeg
    monkeypatch.setattr(images, "_decode_jpeg", lambda *args: [decoded.append(decode(*args)), decoded[-1]][1])
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8))
    turned = image.getexif()
    turned[0x0112] = 6
    for picture, options, shape in (
        (image.convert("L"), {}, (3, 20, 30)),
        (image.convert("CMYK"), {}, (3, 20, 30)),
        (image, {"exif": turned}, (3, 30, 20)),
    ):
        file = io.BytesIO()
        picture.save(file, "JPEG", **options)
        assert read_image(file.getvalue()).shape == shape
    file = io.BytesIO()
    image.save(file, "JPEG")
    assert read_image(file.getvalue(), 1).shape == (1, 20, 30)
    with pytest.raises(BrokenImageError, match="broken or cut off"):
        read_image(file.getvalue()[:-200])
    assert decoded == [None] * 4
