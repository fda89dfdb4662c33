"""How well several labels a picture are told: mean average precision and F1, in percent."""

import torch


def mean_average_precision(scores: torch.Tensor, targets: torch.Tensor) -> float:
    """
    The mean over labels of the average precision, in percent.

    With a label's pictures in the order of falling scores, the precision at each picture that has the label is the
    share, among the pictures up to it, of those that have it; their mean is the average precision. Pictures of equal
    scores stand in one place: each has the precision at the last of them. A label that no picture has is left out.

    Args:
        scores (`torch.Tensor` of shape `(num_pictures, num_labels)`): Higher for pictures that rather have the label.
        targets (`torch.Tensor` of the same shape): 1 where a picture has the label, 0 where not.

    Raises:
        ValueError: If no picture has any label.
    """
    precisions = []
    for score, target in zip(scores.double().T, targets.double().T, strict=True):
        if not target.any():
            continue
        score, order = score.sort(descending=True, stable=True)
        target = target[order]
        # The last place of all pictures with the same score.
        last = torch.searchsorted(-score, -score, right=True) - 1
        precision = target.cumsum(0)[last] / (last + 1)
        precisions.append((precision * target).sum() / target.sum())
    if not precisions:
        raise ValueError("No picture has any of the labels: there is no average precision.")
    return 100.0 * torch.stack(precisions).mean().item()


def f1_score(predicted: torch.Tensor, targets: torch.Tensor) -> float:
    """
    F1 over all labels and pictures together (micro-averaged), in percent; 0 where nothing is predicted and true.

    Args:
        predicted, targets (`torch.Tensor` of shape `(num_pictures, num_labels)`): 1 or 0.
    """
    predicted, targets = predicted.bool(), targets.bool()
    right = (predicted & targets).sum().item()
    return 100.0 * 2 * right / max((predicted.sum() + targets.sum()).item(), 1)
