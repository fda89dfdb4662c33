"""
The augmentation of fine-tuning: crop, flip, RandAugment, erasing, and mixtures of pictures with their labels.

All are functions of (seed, epoch, index): timm's augmentations draw from global generators, which are set for the
length of a call, and put back.
"""

import contextlib
import random
from collections.abc import Iterator

import numpy as np
import torch
from PIL import Image
from timm.data.auto_augment import posterize, rand_augment_transform
from timm.data.mixup import Mixup, mixup_target
from timm.data.random_erasing import RandomErasing
from torch.utils.data import default_collate
from torchvision.transforms.v2 import functional as F

from .pretraining import PretrainingDataset
from .transforms import _NUM_DRAWS, PretrainingTransform, sample_generator


@contextlib.contextmanager
def global_seed(seed: int) -> Iterator[None]:
    """Within, the global generators of Python, numpy and torch (on the CPU) start from `seed`; then as before."""
    states = random.getstate(), np.random.get_state(), torch.default_generator.get_state()
    random.seed(seed)
    np.random.seed(seed)
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.default_generator.set_state(states[2])


class FineTuningTransform(PretrainingTransform):
    """
    A picture to what a classifier is trained on: random crop, flip, RandAugment, normalised, a part erased.

    Args:
        image_size, mean, std, crop_scale, horizontal_flip, seed: As `PretrainingTransform`.
        auto_augment (`str`, *optional*): RandAugment in timm's words, e.g. "rand-m9-mstd0.5-inc1"; for pictures of 8
            bits with 1 or 3 channels. None for none.
        random_erasing (`float`): Probability that a rectangle is replaced by noise.

    Raises:
        ValueError: If `auto_augment` is not understood, or the pictures have another number of channels.
    """

    def __init__(
        self, image_size, mean, std, *, auto_augment: str | None = None, random_erasing: float = 0.0, **kwargs
    ):
        super().__init__(image_size, 0, mean, std, **kwargs)
        self.augment = None if auto_augment is None else build_rand_augment(auto_augment, self.image_size, mean)
        self.erase = RandomErasing(random_erasing, mode="pixel", device="cpu") if random_erasing > 0 else None

    def __call__(self, image: torch.Tensor, epoch: int, index: int) -> dict[str, torch.Tensor | int]:
        """
        Returns:
            `pixel_values`: float32 of shape `(channels, *image_size)`; `mixing_seed`: for the collator.
        """
        generator = sample_generator(self.seed, epoch, index)
        draws = generator.random(_NUM_DRAWS)
        augment_seed, mixing_seed = generator.integers(2**32, size=2).tolist()
        image = self.crop_and_flip(image, draws)
        with global_seed(augment_seed):
            # Floats have no range that the operations could know.
            if self.augment is not None and image.dtype == torch.uint8:
                image = F.pil_to_tensor(self.augment(F.to_pil_image(image)))
            pixel_values = self.normalise(image)
            if self.erase is not None:
                pixel_values = self.erase(pixel_values)
        return {"pixel_values": pixel_values, "mixing_seed": mixing_seed}


def build_rand_augment(policy: str, image_size: tuple[int, int], mean):
    """timm's RandAugment for grey or RGB pictures; what it moves in is filled with the mean."""
    if len(mean) not in (1, 3):
        raise ValueError(f"RandAugment knows pictures of 1 or 3 channels, not of {len(mean)}: --auto_augment none.")
    fill = tuple(min(255, max(0, round(255 * value))) for value in mean)
    # Of the crop, as timm has it for training.
    settings = {"translate_const": int(0.45 * min(image_size)), "img_mean": fill if len(fill) == 3 else fill[0]}
    try:
        augment = rand_augment_transform(policy, settings)
    except (AssertionError, ValueError, IndexError, KeyError) as error:
        raise ValueError(
            f"--auto_augment {policy}: timm does not understand it. Expected e.g. rand-m9-mstd0.5-inc1, or none."
        ) from error
    for operation in augment.ops:
        if operation.name.startswith("Posterize"):
            operation.aug_fn = _posterize
    return augment


def _posterize(image, bits: int, **kwargs):
    """As timm's, which may ask for no bits at all: black, as Pillow gave before it refused that (from 13)."""
    return posterize(image, bits) if bits > 0 else Image.new(image.mode, image.size)


class LabelledDataset(PretrainingDataset):
    """
    `dataset[epoch, index]` is a transformed picture with its label.

    Args:
        images, transform, skip_broken: As `PretrainingDataset`.
        labels (`np.ndarray` of shape `(len(pictures),)`): Classes, from 0; or, where a picture may have several, of
            shape `(len(pictures), num_labels)`: 1 where it has the label, 0 where not.
    """

    def __init__(self, images, labels: np.ndarray, transform, *, skip_broken: bool = False):
        super().__init__(images, transform, skip_broken=skip_broken)
        self.labels = torch.as_tensor(labels)

    def __getitem__(self, epoch_and_index: tuple[int, int]) -> dict[str, torch.Tensor]:
        epoch, index = epoch_and_index
        place, image = self._read(index)
        return self.transform(image, epoch, index) | {"labels": self.labels[place]}


class EvaluationTransform:
    """A picture as the image processor gives it, whatever the epoch."""

    def __init__(self, transform):
        self.transform = transform

    def __call__(self, image: torch.Tensor, epoch: int, index: int) -> dict[str, torch.Tensor]:
        return {"pixel_values": self.transform(image)}


class MixingCollator:
    """
    Batches; those of training with soft labels (batch_size, num_labels), smoothed, and mixed by mixup or cutmix (each
    for half of the batches where both are on). Of several labels a picture nothing is mixed or smoothed.

    Args:
        num_labels (`int`).
        mixup, cutmix (`float`): Alphas of the Beta distributions that shares are drawn from; 0 for none.
        label_smoothing (`float`): Share of the label that all classes are given evenly.
    """

    def __init__(self, num_labels: int, *, mixup: float = 0.0, cutmix: float = 0.0, label_smoothing: float = 0.0):
        self.num_labels = num_labels
        self.label_smoothing = label_smoothing
        mixes = mixup > 0 or cutmix > 0
        settings = {"label_smoothing": label_smoothing, "num_classes": num_labels}
        self.mix = Mixup(mixup_alpha=mixup, cutmix_alpha=cutmix, **settings) if mixes else None

    def __call__(self, items: list[dict]) -> dict[str, torch.Tensor]:
        batch = default_collate([{key: item[key] for key in ("pixel_values", "labels")} for item in items])
        if batch["labels"].ndim == 2:
            return batch | {"labels": batch["labels"].float()}
        if "mixing_seed" not in items[0]:
            return batch
        pixel_values, labels = batch["pixel_values"], batch["labels"]
        if self.mix is None:
            return batch | {"labels": mixup_target(labels, self.num_labels, smoothing=self.label_smoothing)}
        with global_seed(items[0]["mixing_seed"]):
            pixel_values, labels = self.mix(pixel_values, labels)
        return {"pixel_values": pixel_values, "labels": labels}
