"""What a user gives a trainer, as the data sets that pretraining reads: cropped, flipped, normalised, with noise."""

from collections.abc import Mapping

import torch
from torch.utils.data import Dataset
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from ..data.dataset import ImageStream
from ..data.image_processing import build_image_processor, evaluation_transform
from ..data.loading import check_images, compute_mean_std
from ..data.plain import holds_pixel_values, open_images
from ..data.pretraining import PretrainingDataset, StreamingPretrainingDataset
from ..data.transforms import PretrainingTransform, sample_generator
from ..models.vit.sizes import as_pair

# Images of a stream that are evaluated.
_STREAMED_EVALUATION = 2000


class HeldOutTransform:
    """A picture as the image processor gives it, with noise that is a function of (seed, index)."""

    def __init__(self, processor, num_channels: int, num_patches: int, seed: int):
        self.transform = evaluation_transform(processor, num_channels)
        self.num_patches, self.seed = num_patches, seed

    def __call__(self, image: torch.Tensor, epoch: int, index: int) -> dict[str, torch.Tensor]:
        noise = sample_generator(self.seed, 0, index).random(self.num_patches, dtype="float32")
        return {"pixel_values": self.transform(image), "noise": torch.from_numpy(noise)}


class TransformedDataset(Dataset):
    """
    A user's own data set of `pixel_values`, as they are, with noise that is a function of (seed, epoch, index).

    Args:
        data: Map-style, of dicts with `pixel_values` (num_channels, height, width), an array or a tensor.
        num_patches (`int`): Length of the noise.
        seed (`int`): Not negative.
        train (`bool`): False gives the same noise in every epoch.
    """

    def __init__(self, data, num_patches: int, seed: int, train: bool):
        self.data, self.num_patches, self.seed, self.train = data, num_patches, seed, train

    # As of the data sets of pictures; whether one is broken the user's own transform knows.
    num_broken = 0

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, epoch_and_index: tuple[int, int]) -> dict[str, torch.Tensor]:
        epoch, index = epoch_and_index
        pixel_values = torch.as_tensor(self.data[index]["pixel_values"]).to(torch.float32)
        generator = sample_generator(self.seed, epoch if self.train else 0, index)
        noise = generator.random(self.num_patches, dtype="float32")
        return {"pixel_values": pixel_values, "noise": torch.from_numpy(noise)}


def is_prepared(data) -> bool:
    """Whether a data set is one that the trainer reads as it is (or none at all)."""
    return data is None or isinstance(data, PretrainingDataset | StreamingPretrainingDataset | TransformedDataset)


def prepare_images(data, config, args, processor, *, train: bool, image_column: str | None = None):
    """
    What a user gives as training or evaluation data, and the image processor that goes with it.

    Args:
        data: As `open_images` takes it; dicts with `pixel_values`, which are left as they are; or what `is_prepared`.
        config: The model's; its size and channels decide the pictures'.
        args (`MIMTrainingArguments`): For seed and share of the processes.
        processor: The image processor, whose mean and standard deviation are used; None to build one by `config` and
            the pictures.
        train (`bool`): Whether pictures are cropped and flipped at random.

    Returns:
        The data set, and the processor (None where none is needed).

    Raises:
        ValueError: If there are no images in it, or they have other channels than the model.
    """
    if is_prepared(data):
        return data, processor
    seed = args.seed if args.data_seed is None else args.data_seed
    if holds_pixel_values(data):
        return TransformedDataset(data, config.num_patches, seed, train), processor
    images = open_images(data, config.num_channels, image_column=image_column)
    first = check_images(images)
    if processor is None:
        mean, std = _mean_std(config, images)
        processor = build_image_processor(
            as_pair(config.image_size), config.num_channels, mean, std, floating_point=first.is_floating_point()
        )
    if not train:
        held_out = HeldOutTransform(processor, config.num_channels, config.num_patches, seed)
        return PretrainingDataset(images, held_out), processor
    mean, std = list(processor.image_mean), list(processor.image_std)
    augment = PretrainingTransform(as_pair(config.image_size), config.num_patches, mean, std, seed=seed)
    if isinstance(images, ImageStream):
        rank, processes = args.process_index, args.world_size
        return StreamingPretrainingDataset(images, augment, rank=rank, num_processes=processes), processor
    return PretrainingDataset(images, augment), processor


def prepare_evaluation(data, config, args, processor, image_column: str | None = None):
    """As [`prepare_images`] for one data set or several by name; a stream gives its first 2,000 images."""
    if isinstance(data, Mapping) and not is_prepared(data):
        prepared = {}
        for name, part in data.items():
            prepared[name], processor = prepare_evaluation(part, config, args, processor, image_column)
        return prepared, processor
    if not is_prepared(data) and not holds_pixel_values(data):
        data = open_images(data, config.num_channels, image_column=image_column)
        if isinstance(data, ImageStream):
            data = data.take(_STREAMED_EVALUATION)
    return prepare_images(data, config, args, processor, train=False)


def _mean_std(config, images) -> tuple[list[float], list[float]]:
    """The mean and standard deviation that the config names; else ImageNet's for 3 channels, computed for others."""
    if getattr(config, "image_mean", None) is not None:
        return config.image_mean, config.image_std
    if config.num_channels == 3:
        return list(IMAGENET_DEFAULT_MEAN), list(IMAGENET_DEFAULT_STD)
    return compute_mean_std(images)
