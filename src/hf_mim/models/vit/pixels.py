"""Pictures normalised for one network as another wants them."""

from collections.abc import Sequence

import torch
from torch import nn
from transformers import initialization as init


class PixelRenormalization(nn.Module):
    """
    An affine map of the pixels, one a channel, from one normalisation to another; nothing where either is not known.

    Args:
        num_channels (`int`): Channels of the pictures.
        source_mean, source_std (sequence of `float`, *optional*): Of what comes in, one number a channel or one for
            all, for pixel values from 0 to 1.
        target_mean, target_std (sequence of `float`, *optional*): Of what goes out.

    Raises:
        ValueError: If there are neither one nor `num_channels` numbers.
    """

    def __init__(
        self,
        num_channels: int,
        source_mean: Sequence[float] | None = None,
        source_std: Sequence[float] | None = None,
        target_mean: Sequence[float] | None = None,
        target_std: Sequence[float] | None = None,
    ):
        super().__init__()
        self.numbers = (source_mean, source_std, target_mean, target_std)
        self.known = all(numbers is not None for numbers in self.numbers)
        if self.known:
            for numbers in self.numbers:
                if len(numbers) not in (1, num_channels):
                    raise ValueError(
                        f"A mean or standard deviation of {len(numbers)} numbers, {list(numbers)}, does not fit "
                        f"pictures of {num_channels} channels. Give one number a channel."
                    )
            # Not saved: they follow from the config, and are written again after loading.
            for name, value in zip(("scale", "shift"), self._scale_and_shift(), strict=True):
                self.register_buffer(name, value.to(torch.get_default_device()), persistent=False)

    def _scale_and_shift(self) -> tuple[torch.Tensor, torch.Tensor]:
        tensors = [torch.tensor(list(numbers), dtype=torch.float32, device="cpu") for numbers in self.numbers]
        source_mean, source_std, target_mean, target_std = (tensor.view(1, -1, 1, 1) for tensor in tensors)
        return source_std / target_std, (source_mean - target_mean) / target_std

    def reset(self) -> None:
        """Writes the buffers, which hold uninitialised memory after loading."""
        if self.known:
            scale, shift = self._scale_and_shift()
            init.copy_(self.scale, scale)
            init.copy_(self.shift, shift)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """`pixel_values` (batch_size, num_channels, height, width) in the other normalisation."""
        return pixel_values * self.scale + self.shift if self.known else pixel_values
