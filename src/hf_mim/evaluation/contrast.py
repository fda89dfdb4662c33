"""How two views' features spread over the sphere: alignment and uniformity (Wang and Isola, 2020)."""

import torch
from torch import nn


@torch.no_grad()
def alignment(first: torch.Tensor, second: torch.Tensor) -> float:
    """Mean squared distance of the views' normalised features (num_pictures, dim): from 0 (equal) to 4 (opposite)."""
    first, second = (nn.functional.normalize(view.float(), dim=-1) for view in (first, second))
    return (first - second).square().sum(dim=-1).mean().item()


@torch.no_grad()
def uniformity(features: torch.Tensor) -> float:
    """
    Log of the mean of `exp(-2 * squared distance)` over all pairs of normalised features (num_pictures, dim), at least
    two: 0 where they are one point, towards -4 where they fill the sphere.
    """
    distances = torch.pdist(nn.functional.normalize(features.float(), dim=-1))
    return (-2 * distances.square()).exp().mean().log().item()
