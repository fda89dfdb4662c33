"""Every augmentation of fine-tuning, drawn thousands of times, on whatever Pillow is installed."""

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from hf_mim.data.finetuning import FineTuningTransform, build_rand_augment, global_seed

POLICIES = ["rand-m9-mstd0.5-inc1", "rand-m9-mstd0.5", "rand-m10-n3-mstd101-inc1", "rand-m0-inc1", "rand-m10"]


def noise(channels):
    array = np.random.default_rng(0).integers(0, 256, (8, 8, channels), dtype=np.uint8)
    return Image.fromarray(array.squeeze())


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("policy", POLICIES)
def test_every_operation_at_every_strength(policy, channels):
    augment = build_rand_augment(policy, (8, 8), [0.5] * channels)
    picture = noise(channels)
    assert len(augment.ops) == 15
    for operation in augment.ops:
        operation.prob = 1.0
        with global_seed(0):
            for _ in range(200):
                changed = operation(picture)
                assert changed.size == picture.size and changed.mode == picture.mode


def test_the_default_as_training_draws_it():
    transform = FineTuningTransform((8, 8), [0.5] * 3, [0.25] * 3, auto_augment=POLICIES[0], random_erasing=0.25)
    picture = torch.from_numpy(np.array(noise(3))).permute(2, 0, 1)
    assert all(transform(picture, 0, index)["pixel_values"].isfinite().all() for index in range(2000))


def test_posterize_to_no_bits_is_black_and_to_others_pillows():
    augment = build_rand_augment("rand-m9-inc1", (8, 8), [0.5] * 3)
    (operation,) = (op for op in augment.ops if op.name.startswith("Posterize"))
    picture = noise(3)
    for bits in range(9):
        expected = ImageOps.posterize(picture, bits) if bits else Image.new("RGB", picture.size)
        assert np.array_equal(operation.aug_fn(picture, bits), expected)
