"""Pictures as an image processor gives them, in batches."""

from collections.abc import Callable

import torch
from torch.utils.data import DataLoader, Dataset


class _Transformed(Dataset):
    def __init__(self, images, transform):
        self.images, self.transform = images, transform

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> torch.Tensor:
        return self.transform(self.images[index])


def transformed_pictures(images, transform: Callable, batch_size: int = 64, num_workers: int = 0) -> DataLoader:
    """Batches (batch_size, channels, height, width) of `transform(picture)`, in order, the last one maybe smaller."""
    # A worker without a batch is started for nothing.
    num_workers = min(num_workers, max(1, len(images) // batch_size))
    # With a generator of its own: drawing the seed of its workers must not move the draws of a training under way.
    return DataLoader(
        _Transformed(images, transform), batch_size=batch_size, num_workers=num_workers, generator=torch.Generator()
    )
