"""Noticing features that collapse, as those of contrastive learning can."""

import torch
from transformers.utils import logging

from ..evaluation.contrast import alignment, uniformity
from ..evaluation.knn import rank_me
from ..evaluation.verdict import has_collapsed

logger = logging.get_logger(__name__)

# Enough to tell a collapse, and soon computed.
MAX_PICTURES = 1024


class CollapseWatch:
    """
    Alignment, uniformity and RankMe of what a model offers as `watched_features`; warns once where RankMe falls under
    a tenth of what it was first.

    A batch of n pictures has a RankMe of at most n: with fewer than 10 pictures there is nothing to warn of.

    Args:
        warns (`bool`, defaults to True): False for all but one of several processes, which all measure the same.
    """

    def __init__(self, *, warns: bool = True):
        self.warns = warns
        self.start: float | None = None
        self.last: dict[str, float] = {}
        self.warned = False

    def begin(self, log_history: list[dict]) -> None:
        """Forgets the last training; of one that is resumed, the first number logged is the start."""
        self.start = next((log["rank_me"] for log in log_history if "rank_me" in log), None)
        self.last, self.warned = {}, False

    def measure(self, features: torch.Tensor, step: int) -> None:
        """
        Args:
            features (`torch.Tensor` of shape `(batch_size, 2, dim)`): Of two views of each picture.
            step (`int`): To name in the warning.
        """
        first, second = features.detach()[:MAX_PICTURES].float().unbind(dim=1)
        if not first.isfinite().all():
            return  # the loss is not finite either, which the trainer says
        rank = rank_me(first)
        self.last = {"alignment": alignment(first, second), "uniformity": uniformity(first), "rank_me": rank}
        if self.start is None:
            self.start = rank
        elif has_collapsed(rank, self.start) and not self.warned:
            self.warned = True
            if self.warns:
                logger.warning(
                    f"Step {step}: the features' RankMe is {rank:.2f}, under a tenth of the {self.start:.2f} at the "
                    "start. They are collapsing: lower the learning rate, lengthen the warm-up, or enlarge the batch."
                )
