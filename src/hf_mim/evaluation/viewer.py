"""What a model makes of one picture, as pictures: mask and reconstruction, attention, patch features, neighbours."""

import os
import threading
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn
from transformers import AutoConfig, AutoImageProcessor

from ..data.image_processing import build_image_processor, evaluation_transform
from ..data.images import read_image
from ..models.vit.masking import random_masking
from ..models.vit.repository import locate
from ..models.vit.sizes import as_pair
from ..registry import MODEL_TYPES, method_class, method_name
from .encoders import load_encoder
from .knn import nearest_neighbours
from .pictures import to_rgb, unnormalise
from .representation import attention_pictures, enlarge, patch_colours

# The shorter side of what is shown is at least this, where whole multiples reach it.
_SIDE = 256
# Examples whose patches decide, with those of the picture, what the colours mean.
_COLOURED = 32


@dataclass
class View:
    """
    One picture seen by a model; each array is uint8 (height, width, 3), or None where the model cannot give it.

    Args:
        picture: As the model gets it.
        masked: The same, in grey what the encoder would not see in pretraining.
        reconstructed: The model's own prediction in its place.
        attention: Of [CLS] in the last block, as heat.
        colours: The first three principal components of the patch features.
        neighbours: Rows of the examples, the nearest first, each with the cosine of its features and the picture's,
            less the examples' mean.
    """

    picture: np.ndarray
    masked: np.ndarray | None
    reconstructed: np.ndarray | None
    attention: np.ndarray | None
    colours: np.ndarray
    neighbours: list[tuple[int, float]]


class Viewer:
    """
    A model that is shown pictures.

    Args:
        path: A run, a folder or a repository of the Hub with any Vision Transformer. Only safetensors are read.

    Raises:
        ValueError: If there is no such model.
    """

    def __init__(self, path: str | os.PathLike):
        path = locate(path)
        self.encoder = load_encoder(path, use_safetensors=True)
        config = AutoConfig.from_pretrained(path)
        # Where there are decoders to show.
        self.model = None
        if config.model_type in MODEL_TYPES and any("ForPreTraining" in name for name in config.architectures or ()):
            self.model = method_class(config.model_type, "ForPreTraining").from_pretrained(
                path, dtype=torch.float32, use_safetensors=True
            )
        config = self.encoder.model.config
        self.num_channels = config.num_channels
        try:
            self.processor = AutoImageProcessor.from_pretrained(path)
        except (OSError, ValueError):
            # Without one no mean is known.
            half = [0.5] * self.num_channels
            self.processor = build_image_processor(as_pair(config.image_size), self.num_channels, half, half)
        self.transform = evaluation_transform(self.processor, self.num_channels)
        # One picture at a time: the mask's share is a field of the config.
        self._lock = threading.Lock()
        self.examples: list[torch.Tensor] = []
        self._features, self._patches = torch.empty(0, config.hidden_size), []

    def add_examples(self, pictures: Iterable) -> None:
        """
        Pictures to find neighbours among, as [`read_image`] takes them.

        Raises:
            BrokenImageError: If one cannot be read.
            ValueError: If one has other channels than the model's.
        """
        for picture in pictures:
            example = read_image(picture, self.num_channels)
            patches = self.encoder.patches(self.transform(example)[None])
            self.examples.append(example)
            self._features = torch.cat((self._features, patches.mean(dim=(1, 2))))
            if len(self._patches) < _COLOURED:
                self._patches.append(patches)

    @property
    def title(self) -> str:
        """What the model is, in a line."""
        config = self.encoder.model.config
        name = method_name(config.model_type) if config.model_type in MODEL_TYPES else config.model_type
        height, width = as_pair(config.image_size)
        return f"{name}, {config.hidden_size} wide, {config.num_hidden_layers} blocks, {height} x {width} pixels"

    @property
    def mask_ratio(self) -> float | None:
        """The share of patches that was hidden in training; None of a model without a method."""
        return None if self.model is None else float(self.model.config.mask_ratio)

    @torch.no_grad()
    def view(self, picture, *, mask_ratio: float | None = None, seed: int = 0, num_neighbours: int = 6) -> View:
        """
        Args:
            picture: As [`read_image`] takes it.
            mask_ratio (`float`, *optional*): Share of the patches to hide, in (0, 1); default: that of training.
            seed (`int`, defaults to 0): Of the mask.

        Raises:
            BrokenImageError: If the picture cannot be read.
            ValueError: If it has other channels than the model's, or the ratio leaves nothing to see or to hide.
        """
        pixel_values = self.transform(read_image(picture, self.num_channels))[None]
        with self._lock:
            masked, reconstructed = self._masked(pixel_values, mask_ratio, seed)
            looked_at = self.encoder.cls_attention(pixel_values)
            patches = self.encoder.patches(pixel_values)
        shown = self._shown(pixel_values)
        size = tuple(shown.shape[2:])
        return View(
            to_rgb(shown)[0],
            masked,
            reconstructed,
            None if looked_at is None else attention_pictures(shown, looked_at)[0],
            patch_colours(torch.cat([patches, *self._patches]), 1, size)[0],
            self._neighbours(patches.mean(dim=(1, 2)), num_neighbours),
        )

    def example(self, row: int) -> np.ndarray:
        """An example as the model gets it, uint8 (height, width, 3)."""
        return to_rgb(self._shown(self.transform(self.examples[row])[None]))[0]

    def _shown(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Normalised pixels as pictures in [0, 1], large enough to be looked at."""
        height, width = pixel_values.shape[2:]
        scale = max(1, -(-_SIDE // min(height, width)))
        mean, std = self.processor.image_mean, self.processor.image_std
        return enlarge(unnormalise(pixel_values, mean, std), (height * scale, width * scale))

    def _masked(self, pixel_values, mask_ratio: float | None, seed: int):
        if self.model is None:
            return None, None
        config, own = self.model.config, self.model.config.mask_ratio
        noise = torch.rand(1, config.num_patches, generator=torch.Generator().manual_seed(seed))
        try:
            config.mask_ratio = own if mask_ratio is None else mask_ratio
            if not 0 < config.num_keep < config.num_patches:
                raise ValueError(
                    f"mask_ratio is {config.mask_ratio}, which keeps {config.num_keep} of {config.num_patches} "
                    "patches: something has to be seen, and something hidden."
                )
            found = self.model.reconstruct(pixel_values, noise)
            if found is None:
                found = self._mask_alone(pixel_values, noise), None
        finally:
            config.mask_ratio = own
        mask, predicted = found
        shown = self._shown(pixel_values)
        mask = nn.functional.interpolate(mask.float(), size=shown.shape[2:], mode="nearest")
        masked = to_rgb(shown * (1 - mask) + 0.5 * mask)[0]
        if predicted is None:
            return masked, None
        return masked, to_rgb(shown * (1 - mask) + self._shown(predicted) * mask)[0]

    def _mask_alone(self, pixel_values: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """The mask (1, 1, rows, columns) of a method that predicts no pixels."""
        config = self.model.config
        if getattr(self.model, "pairwise_loss", False):
            # A loss of pairs has none of a picture alone. In neither half is what is hidden.
            mask = random_masking(noise, config.num_keep).mask
        else:
            mask = self.model(pixel_values, noise=noise).mask
        return mask.reshape(1, 1, *config.grid_size)

    def _neighbours(self, features: torch.Tensor, number: int) -> list[tuple[int, float]]:
        if not self.examples:
            return []
        mean = self._features.mean(dim=0)
        k = min(number, len(self.examples))
        similarities, rows = nearest_neighbours(self._features - mean, features - mean, k)
        return list(zip(rows[0].tolist(), similarities[0].tolist(), strict=True))
