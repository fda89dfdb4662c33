"""The augmentation: a function of (seed, epoch, index) alone, distributed as torchvision's own."""

import math
import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.transforms import InterpolationMode, RandomResizedCrop
from torchvision.transforms.v2 import functional as F

from hf_mim.data.transforms import PretrainingTransform, random_crop_box, sample_generator


def picture(height=20, width=30, channels=3):
    return torch.from_numpy(
        np.random.default_rng(0).integers(0, 256, (height, width, channels), dtype=np.uint8)
    ).permute(2, 0, 1)


def transform(**kwargs):
    settings = {"image_size": (16, 16), "num_patches": 16, "mean": [0.4, 0.5, 0.6], "std": [0.1, 0.2, 0.3]}
    return PretrainingTransform(**{**settings, **kwargs})


def test_shapes_types_and_range():
    item = transform(image_size=(8, 24), num_patches=12)(picture(), 0, 0)
    assert item["pixel_values"].shape == (3, 8, 24) and item["pixel_values"].dtype == torch.float32
    assert item["noise"].shape == (12,) and item["noise"].dtype == torch.float32
    assert item["noise"].min() >= 0 and item["noise"].max() < 1


def test_what_is_computed_is_torchvisions():
    """The same box and flip through torchvision by hand."""
    image = picture()
    flips = set()
    for index in range(20):
        draws = sample_generator(7, 2, index).random(41)
        top, left, height, width = random_crop_box(draws[1:], 20, 30, (0.2, 1.0), (3 / 4, 4 / 3))
        expected = F.resized_crop(image, top, left, height, width, [16, 16], InterpolationMode.BICUBIC, antialias=True)
        if draws[0] < 0.5:
            expected = F.horizontal_flip(expected)
        flips.add(bool(draws[0] < 0.5))
        expected = F.normalize(F.to_dtype(expected, torch.float32, scale=True), [0.4, 0.5, 0.6], [0.1, 0.2, 0.3])
        assert torch.allclose(transform(seed=7)(image, 2, index)["pixel_values"], expected, atol=1e-5)
    assert flips == {True, False}


def test_whole_picture_by_hand():
    image = torch.tensor([[[0, 255], [51, 102]]], dtype=torch.uint8)
    simple = transform(
        image_size=(2, 2), mean=[0.5], std=[0.25], crop_scale=(1.0, 1.0), horizontal_flip=False, num_patches=1
    )
    # area 4 with an aspect ratio in range is 2 x 2: the picture as it is; (v / 255 - 0.5) / 0.25
    assert torch.allclose(simple(image, 0, 0)["pixel_values"], torch.tensor([[[-2.0, 2.0], [-1.2, -0.4]]]), atol=1e-6)


def test_float_and_uint8_agree():
    image = picture(64, 64)
    smooth = F.gaussian_blur(image, [9, 9])  # no overshoot, which uint8 clamps
    a = transform()(smooth, 0, 3)["pixel_values"]
    b = transform()(smooth.to(torch.float32) / 255, 0, 3)["pixel_values"]
    assert (a - b).abs().max() < 1 / 255 / 0.1  # one grey level: rows and columns are each rounded


def test_nothing_else_decides():
    image = picture()
    first = transform(seed=3)(image, 1, 5)
    torch.manual_seed(99), np.random.seed(99), random.seed(99)
    state = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    second = transform(seed=3)(image, 1, 5)
    assert torch.equal(first["pixel_values"], second["pixel_values"]) and torch.equal(first["noise"], second["noise"])
    assert torch.equal(torch.get_rng_state(), state[0])  # nor is anything global touched
    assert np.array_equal(np.random.get_state()[1], state[1]) and random.getstate() == state[2]


def test_crops_do_not_depend_on_the_number_of_patches():
    a, b = (transform(num_patches=num)(picture(), 0, 0)["pixel_values"] for num in (4, 400))
    assert torch.equal(a, b)


@given(st.lists(st.tuples(*[st.integers(0, 2**63)] * 3), min_size=2, max_size=2, unique=True))
@settings(max_examples=100, deadline=None)
def test_any_two_samples_differ(triples):
    a, b = (sample_generator(*triple).random(8) for triple in triples)
    assert not np.array_equal(a, b)


def test_streams_do_not_overlap():
    """Not even when shifted: the end of one sample's stream is not the beginning of the next one's."""
    draws = [sample_generator(0, 0, i).random(400) for i in range(50)]
    assert len(np.unique(np.concatenate(draws))) == 50 * 400


def test_samples_are_uniform_and_uncorrelated():
    """Neighbours in seed, epoch and index, which a sum of the three would confuse."""
    draws = np.array(
        [sample_generator(s, e, i).random(4) for s in range(4) for e in range(4) for i in range(500)]
    ).reshape(4, 4, 500, 4)
    flat = draws.reshape(-1, 4)
    assert np.abs(flat.mean(0) - 0.5).max() < 4 * math.sqrt(1 / 12 / len(flat))
    assert np.abs(np.corrcoef(flat.T) - np.eye(4)).max() < 4 / math.sqrt(len(flat))
    pairs = [(draws[0, 0], draws[1, 0]), (draws[0, 0], draws[0, 1]), (draws[0, 1], draws[1, 0])]
    pairs.append((draws[0, 0, 1:], draws[0, 0, :-1]))
    for a, b in pairs:
        assert abs(np.corrcoef(a.ravel(), b.ravel())[0, 1]) < 4 / math.sqrt(a.size)


def test_boxes_are_distributed_as_torchvisions():
    ours = np.array(
        [
            random_crop_box(sample_generator(0, 0, i).random(40), 48, 80, (0.2, 1.0), (3 / 4, 4 / 3))
            for i in range(4000)
        ]
    )
    torch.manual_seed(0)
    image = torch.empty(3, 48, 80)
    theirs = np.array([RandomResizedCrop.get_params(image, [0.2, 1.0], [3 / 4, 4 / 3]) for _ in range(4000)])
    error = np.sqrt((ours.var(0) + theirs.var(0)) / 4000)
    assert (np.abs(ours.mean(0) - theirs.mean(0)) < 4 * error).all()
    assert np.allclose(ours.std(0), theirs.std(0), rtol=0.08)


@given(
    st.integers(1, 50),
    st.integers(1, 50),
    st.tuples(st.floats(0.01, 1), st.floats(0.01, 1)).map(sorted),
    st.integers(0, 1000),
)
@settings(max_examples=200, deadline=None)
def test_boxes_lie_inside_the_picture(height, width, scale, index):
    top, left, h, w = random_crop_box(sample_generator(0, 0, index).random(40), height, width, scale, (3 / 4, 4 / 3))
    assert h >= 1 and w >= 1 and top >= 0 and left >= 0 and top + h <= height and left + w <= width


def test_fallback_is_the_largest_central_box():
    # a strip of 10 x 1000 cannot hold an aspect ratio of at most 4 / 3 at half its area
    assert random_crop_box(np.full(40, 0.5), 10, 1000, (0.5, 1.0), (3 / 4, 4 / 3)) == (0, 493, 10, 13)
    assert random_crop_box(np.full(40, 0.5), 1000, 10, (0.5, 1.0), (3 / 4, 4 / 3)) == (493, 0, 13, 10)


def test_a_rectangular_result_keeps_proportions():
    boxes = [
        random_crop_box(
            sample_generator(0, 0, i).random(40), 100, 200, (0.2, 0.5), transform(image_size=(8, 16)).ratio
        )
        for i in range(200)
    ]
    aspects = [width / height for _, _, height, width in boxes]
    assert 1.45 < min(aspects) < 1.6 and 2.5 < max(aspects) < 2.75  # 2 * 3/4 to 2 * 4/3, rounded to pixels


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"crop_scale": (0.0, 1.0)}, "crop_scale must be"),
        ({"crop_scale": (0.8, 0.2)}, "crop_scale must be"),
        ({"std": [0.1, 0.0, 0.1]}, "std above 0"),
        ({"mean": [0.5]}, "equal length"),
        ({"seed": -1}, "seed must not be negative"),
    ],
)
def test_bad_settings(kwargs, message):
    with pytest.raises(ValueError, match=message):
        transform(**kwargs)


def test_wrong_number_of_channels():
    with pytest.raises(ValueError, match="1 channels, but mean and std of 3"):
        transform()(picture(channels=1), 0, 0)
