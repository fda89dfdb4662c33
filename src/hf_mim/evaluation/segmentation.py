"""How right a segmenter is."""

import torch


class Confusion:
    """
    How often each class was told where each is: exact counts, which add up over processes.

    Args:
        num_classes (`int`).
    """

    def __init__(self, num_classes: int, device="cpu"):
        self.counts = torch.zeros(num_classes, num_classes, dtype=torch.int64, device=device)

    def add(self, truth: torch.Tensor, told: torch.Tensor) -> None:
        """Counts pixels: class indices of one shape; those outside of the classes, in `truth`, do not count."""
        num_classes = len(self.counts)
        known = (truth >= 0) & (truth < num_classes)
        pairs = truth[known].long() * num_classes + told[known].long()
        self.counts += torch.bincount(pairs, minlength=num_classes**2).view(num_classes, num_classes)

    def scores(self) -> dict[str, float | list[float | None]]:
        """
        In percent: `miou`, over the classes that are there or told; `mean_accuracy`, over those that are there;
        `pixel_accuracy`; and `iou` by class, None of one that is neither there nor told.
        """
        counts = self.counts.double().cpu()
        right, there, told = counts.diag(), counts.sum(dim=1), counts.sum(dim=0)
        iou = [
            100 * (one / union).item() if union > 0 else None
            for one, union in zip(right, there + told - right, strict=True)
        ]
        known = [value for value in iou if value is not None]
        return {
            "miou": sum(known) / max(1, len(known)),
            "mean_accuracy": 100 * (right / there)[there > 0].mean().item() if there.sum() else 0.0,
            "pixel_accuracy": 100 * (right.sum() / there.sum().clamp(min=1)).item(),
            "iou": iou,
        }
