"""Frozen features of pictures."""

from collections.abc import Callable

import torch
from torch.utils.data import DataLoader, Dataset
from transformers import PreTrainedModel


class _Transformed(Dataset):
    def __init__(self, pictures, transform):
        self.pictures, self.transform = pictures, transform

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, index: int) -> torch.Tensor:
        return self.transform(self.pictures[index])


def transformed_pictures(pictures, transform: Callable, batch_size: int = 64, num_workers: int = 0) -> DataLoader:
    """Batches (batch_size, channels, height, width) of `transform(picture)`, in order, the last one maybe smaller."""
    return DataLoader(_Transformed(pictures, transform), batch_size=batch_size, num_workers=num_workers)


@torch.no_grad()
def extract_features(model: PreTrainedModel | None, batches) -> torch.Tensor:
    """
    One feature vector a picture: the model's `pooler_output`, or the pixels themselves.

    Args:
        model: An encoder (`XModel`, or any with a `pooler_output`); None for raw pixels.
        batches: Iterable of `pixel_values` (batch_size, channels, height, width).

    Returns:
        float32 `torch.Tensor` of shape `(num_pictures, dim)`, on the CPU.
    """
    if model is None:
        return torch.cat([batch.flatten(1) for batch in batches])
    was_training = model.training
    model.eval()
    features = [model(batch.to(model.device)).pooler_output.float().cpu() for batch in batches]
    model.train(was_training)
    return torch.cat(features)
