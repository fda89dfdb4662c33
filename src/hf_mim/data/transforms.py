"""The augmentation of pretraining: a random crop, a flip, and the noise that decides which patches are hidden.

All three are functions of (seed, epoch, index) and of nothing else: neither resuming, nor the number of workers or
processes, nor anything that draws from a global generator changes them. The draws come from Philox, a counter-based
generator: (seed, epoch) is its key and the index a part of its counter, so every sample of every epoch has a stream of
its own, and none has to be stored.
"""

import copy
import math

import numpy as np
import torch
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as F

_ASPECT_RATIO = (3 / 4, 4 / 3)
_CROP_ATTEMPTS = 10  # as many as torchvision's RandomResizedCrop makes
_NUM_DRAWS = 1 + 4 * _CROP_ATTEMPTS


def sample_generator(seed: int, epoch: int, index: int) -> np.random.Generator:
    """The random stream of one sample in one epoch; any two of them are independent.

    Args:
        seed, epoch, index (`int`): not negative, below 2**64.
    """
    key = np.array([seed, epoch], dtype=np.uint64)
    counter = np.array([0, index, 0, 0], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=counter))


def random_crop_box(
    draws: np.ndarray,
    height: int,
    width: int,
    scale: tuple[float, float],
    ratio: tuple[float, float],
) -> tuple[int, int, int, int]:
    """The box of torchvision's `RandomResizedCrop`, from given uniform draws.

    Args:
        draws (`np.ndarray` of shape `(4 * attempts,)`): uniform in [0, 1); four make one attempt.
        height, width (`int`): of the picture.
        scale: lowest and highest share of the picture's area.
        ratio: lowest and highest width / height of the box; its logarithm is uniform.

    Returns:
        `(top, left, height, width)`; where no attempt fits into the picture, or all of it is wanted, the largest
        central box with a ratio in range.
    """
    log_low, log_high = math.log(ratio[0]), math.log(ratio[1])
    # The whole is no matter of chance, which would round its sides now and then.
    attempts = [] if scale[0] == 1 else draws.reshape(-1, 4).tolist()
    for area_draw, ratio_draw, top_draw, left_draw in attempts:
        area = height * width * (scale[0] + (scale[1] - scale[0]) * area_draw)
        aspect = math.exp(log_low + (log_high - log_low) * ratio_draw)
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            return int(top_draw * (height - h + 1)), int(left_draw * (width - w + 1)), h, w
    w, h = width, height
    if width / height < ratio[0]:
        h = max(1, min(height, round(width / ratio[0])))
    elif width / height > ratio[1]:
        w = max(1, min(width, round(height * ratio[1])))
    return (height - h) // 2, (width - w) // 2, h, w


class PretrainingTransform:
    """A picture to what a `ForPreTraining` model takes: `pixel_values` and `noise`.

    Args:
        image_size (`tuple[int, int]`): height and width of the result.
        num_patches (`int`): length of the noise.
        mean, std: one number per channel, in the units that the model sees before them (0 to 1 for pictures).
        crop_scale (`tuple[float, float]`): lowest and highest share of the picture's area that a crop covers.
        horizontal_flip (`bool`): mirror every second picture, by chance.
        seed (`int`): not negative.

    The crop's aspect ratio lies within 3/4 and 4/3 of the result's own, so a rectangular result is not squeezed more
    than a square one.
    """

    def __init__(
        self,
        image_size: tuple[int, int],
        num_patches: int,
        mean,
        std,
        *,
        crop_scale: tuple[float, float] = (0.2, 1.0),
        horizontal_flip: bool = True,
        seed: int = 0,
    ):
        if not 0 < crop_scale[0] <= crop_scale[1] <= 1:
            raise ValueError(f"crop_scale must be 0 < low <= high <= 1 (shares of the area), got {tuple(crop_scale)}.")
        if len(mean) != len(std) or min(std) <= 0:
            raise ValueError(f"mean and std must be of equal length and std above 0, got {mean} and {std}.")
        if seed < 0:
            raise ValueError(f"seed must not be negative, got {seed}.")
        self.image_size, self.mean, self.std = tuple(image_size), list(mean), list(std)
        self.num_patches = num_patches
        self.crop_scale = tuple(crop_scale)
        self.ratio = tuple(bound * self.image_size[1] / self.image_size[0] for bound in _ASPECT_RATIO)
        self.horizontal_flip = horizontal_flip
        self.seed = seed
        # Whether `pixel_values` are normalised, float32, or left to `normalise`; see `raw`.
        self.normalises = True
        self._scale = 1 / torch.tensor(std, dtype=torch.float32).view(-1, 1, 1)
        self._scale_uint8 = self._scale / 255
        self._shift = -torch.tensor(mean, dtype=torch.float32).view(-1, 1, 1) * self._scale

    def __call__(self, image: torch.Tensor, epoch: int, index: int) -> dict[str, torch.Tensor]:
        """
        Args:
            image (`torch.Tensor` of shape `(channels, height, width)`): uint8 or float32, as `read_image` gives.
            epoch, index (`int`): which sample of which epoch this is.

        Returns:
            `pixel_values`: float32 of shape `(channels, *image_size)`, normalised (of a `raw` transform as they are,
            of the picture's dtype); `noise`: float32 of shape `(num_patches,)`, uniform in [0, 1).
        """
        if image.shape[0] != self._scale.shape[0]:
            raise ValueError(f"A picture of {image.shape[0]} channels, but mean and std of {self._scale.shape[0]}.")
        generator = sample_generator(self.seed, epoch, index)
        # A fixed number of draws first, so that the crops do not depend on the number of patches.
        draws = generator.random(_NUM_DRAWS)
        noise = torch.from_numpy(generator.random(self.num_patches, dtype=np.float32))
        pixel_values = self.crop_and_flip(image, draws)
        return {"pixel_values": self.normalise(pixel_values) if self.normalises else pixel_values, "noise": noise}

    def raw(self) -> "PretrainingTransform":
        """The same crops, flips and noise; pixels are left as they are, for `normalise` where they are wanted."""
        raw = copy.copy(self)
        raw.normalises = False
        return raw

    def crop_and_flip(self, image: torch.Tensor, draws: np.ndarray) -> torch.Tensor:
        """The crop, resized to `image_size`, by `_NUM_DRAWS` uniform draws; of the picture's dtype."""
        top, left, height, width = random_crop_box(draws[1:], *image.shape[1:], self.crop_scale, self.ratio)
        # uint8 in, uint8 out: the fast path of torch's resize on a CPU
        image = F.resized_crop(
            image, top, left, height, width, list(self.image_size), InterpolationMode.BICUBIC, antialias=True
        )
        if self.horizontal_flip and draws[0] < 0.5:
            image = F.horizontal_flip(image)
        return image

    def normalise(self, images: torch.Tensor) -> torch.Tensor:
        """float32, by mean and std, of one picture or several `(..., channels, height, width)`, on their device."""
        if self._scale.device != images.device:
            # Once: a copy at every step would have the host wait for the device.
            self._scale, self._scale_uint8, self._shift = (
                numbers.to(images.device) for numbers in (self._scale, self._scale_uint8, self._shift)
            )
        scale = self._scale_uint8 if images.dtype == torch.uint8 else self._scale
        return images.to(torch.float32).mul(scale).add_(self._shift)
