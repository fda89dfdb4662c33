"""The saved image processor: what it computes, how it is loaded, and that pipelines and evaluation agree."""

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as F
from transformers import AutoImageProcessor, BitImageProcessor, ViTImageProcessor

import hf_mim  # noqa: F401  (registers our processor)
from hf_mim.data.image_processing import MIMImageProcessor, build_image_processor, evaluation_transform
from hf_mim.data.images import read_image

SIZES = [(32, 32), (160, 160), (16, 32)]


def image(height=50, width=70, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def build(size, num_channels):
    return build_image_processor(size, num_channels, [0.4] * num_channels, [0.2] * num_channels)


def by_hand(picture, size):
    """Resize the shorter edge (bicubic), crop the middle, scale, normalise."""
    height, width = size
    if height == width:
        shorter = round(height / 0.875) if height >= 128 else height
        picture = F.resize(picture, [shorter], InterpolationMode.BICUBIC, antialias=True)
        top, left = (picture.shape[1] - height) // 2, (picture.shape[2] - width) // 2  # torchvision rounds otherwise
        picture = picture[:, top : top + height, left : left + width]
    else:
        picture = F.resize(picture, [height, width], InterpolationMode.BICUBIC, antialias=True)
    if picture.dtype == torch.uint8:
        picture = picture / 255
    return (picture - 0.4) / 0.2


def test_classes():
    assert type(build((32, 32), 3)) is BitImageProcessor
    assert type(build((16, 32), 3)) is ViTImageProcessor
    assert type(build((32, 32), 1)) is type(build((16, 32), 5)) is MIMImageProcessor
    with pytest.raises(ValueError, match=r"one number per channel \(3\), got 1 and 1"):
        build_image_processor((32, 32), 3, [0.5], [0.5])


@pytest.mark.parametrize("num_channels", [1, 3])
@pytest.mark.parametrize("size", SIZES)
def test_pictures(size, num_channels):
    processor = build(size, num_channels)
    found = processor(image(), return_tensors="pt")["pixel_values"]
    assert found.shape == (1, num_channels, *size) and found.dtype == torch.float32
    expected = by_hand(read_image(image(), num_channels).contiguous(), size)
    assert torch.allclose(found[0], expected, atol=1e-5)
    assert torch.allclose(evaluation_transform(processor, num_channels)(image()), found[0], atol=1e-6)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
def test_five_channels(size, dtype):
    array = (np.random.default_rng(0).random((50, 70, 5)) * {np.uint8: 255, np.uint16: 65535}.get(dtype, 7)).astype(
        dtype
    )
    processor = build(size, 5)
    found = processor([array, array], return_tensors="pt")["pixel_values"]
    assert found.shape == (2, 5, *size)
    assert torch.allclose(found[1], by_hand(read_image(array, 5).contiguous(), size), atol=1e-5)
    assert torch.equal(evaluation_transform(processor, 5)(array), found[0])


def test_floats_mean_the_same_to_every_processor():
    """16-bit pictures are floats from 0 to 1; transformers' own processors divide everything by 255."""
    array = np.random.default_rng(0).integers(0, 65536, (40, 40), dtype=np.uint16)
    three, one = (evaluation_transform(build((40, 40), num), num)(array) for num in (3, 1))
    assert torch.allclose(three, one.expand(3, -1, -1), atol=1e-5)
    assert torch.allclose(one[0], torch.from_numpy((array / 65535 - 0.4) / 0.2).float(), atol=1e-5)


def test_what_can_be_given(tmp_path):
    processor = build((32, 32), 1)
    image().save(tmp_path / "a.png")
    expected = processor(image(), return_tensors="pt")["pixel_values"]
    grey = read_image(image(), 1)
    for value in (str(tmp_path / "a.png"), [tmp_path / "a.png"], grey, [grey], grey[None], grey[0].numpy()):
        assert torch.equal(processor(value, return_tensors="pt")["pixel_values"], expected)
    assert isinstance(processor(image(), return_tensors="np")["pixel_values"], np.ndarray)
    assert len(processor([image(), image(30, 90)])["pixel_values"]) == 2  # pictures of several sizes
    assert processor(image(), do_normalize=False, return_tensors="pt")["pixel_values"].min() >= 0
    with pytest.raises(ValueError, match="picture 1: has 4 .* expected 1"):
        processor([grey, np.zeros((8, 8, 4), dtype=np.uint8)])


@pytest.mark.parametrize("num_channels", [1, 3, 5])
@pytest.mark.parametrize("size", [(32, 32), (16, 32)])
def test_save_and_load(tmp_path, size, num_channels):
    processor = build(size, num_channels)
    processor.save_pretrained(tmp_path)
    loaded = AutoImageProcessor.from_pretrained(tmp_path)
    assert type(loaded) is type(processor)
    assert loaded.to_dict() == processor.to_dict()
    value = np.random.default_rng(0).integers(0, 256, (50, 70, num_channels), dtype=np.uint8)
    a, b = (each(value, return_tensors="pt")["pixel_values"] for each in (loaded, processor))
    assert torch.equal(a, b)


def test_three_channels_need_no_hf_mim(tmp_path):
    build((32, 32), 3).save_pretrained(tmp_path)
    assert "hf_mim" not in (tmp_path / "preprocessor_config.json").read_text()


def test_a_pipelines_picture_is_the_evaluations(tmp_path):
    """Pipelines turn a file to RGB and the right way up before they call the processor."""
    from transformers.image_utils import load_image

    exif = Image.Exif()
    exif[0x0112] = 6
    image().save(tmp_path / "a.jpg", exif=exif)
    for num_channels in (1, 3):
        processor = build((32, 32), num_channels)
        pipeline = processor(load_image(str(tmp_path / "a.jpg")), return_tensors="pt")["pixel_values"][0]
        assert torch.equal(evaluation_transform(processor, num_channels)(tmp_path / "a.jpg"), pipeline)
