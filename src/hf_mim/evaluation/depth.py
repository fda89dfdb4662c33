"""How wrong told depths are."""

import torch

from ..models.vit.depth import known_depths


class DepthErrors:
    """Sums over the pixels whose depth is known, which add up over processes."""

    def __init__(self, device="cpu"):
        # Pixels; squared differences; differences as shares of the true depth; pixels within a factor of 1.25.
        self.counts = torch.zeros(4, dtype=torch.float64, device=device)

    def add(self, truth: torch.Tensor, told: torch.Tensor) -> None:
        """Counts pixels: depths of one shape; where `truth` is 0 or not finite they do not count."""
        known = known_depths(truth)
        truth, told = truth[known].double(), told[known].double()
        away = (told - truth).abs()
        within = torch.maximum(told / truth, truth / told) < 1.25
        self.counts += torch.stack([known.sum(), away.square().sum(), (away / truth).sum(), within.sum()])

    def scores(self) -> dict[str, float]:
        """
        `rmse`, in the unit of the depths; `abs_rel`, the mean of |told - true| / true, and `delta1`, the share of the
        pixels that are told within a factor of 1.25, both in percent.
        """
        number, squared, relative, within = self.counts.tolist()
        number = max(1.0, number)
        return {
            "rmse": (squared / number) ** 0.5,
            "abs_rel": 100 * relative / number,
            "delta1": 100 * within / number,
        }
