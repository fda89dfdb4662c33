"""A quick linear probe: logistic regression on frozen features."""

from collections.abc import Callable

import torch
from torch import nn

from .multi_label import mean_average_precision


def linear_probe_predict(
    train_features: torch.Tensor,
    train_labels: torch.Tensor,
    test_features: torch.Tensor,
    *,
    weight_decay: float = 1e-3,
    max_iterations: int = 100,
) -> torch.Tensor:
    """
    Multinomial logistic regression on standardised features (a BatchNorm without affine, as in the papers' probes),
    to convergence by L-BFGS: seconds instead of the papers' 100 epochs, and no learning rate to choose.

    Args:
        train_features (`torch.Tensor` of shape `(num_train, dim)`), test_features (`(num_test, dim)`).
        train_labels (`torch.LongTensor` of shape `(num_train,)`): Classes, from 0; or, of several labels a picture, of
            shape `(num_train, num_labels)`, 1 or 0: a logistic regression a label.
        weight_decay (`float`, defaults to 1e-3): Times half the squared weights, added to the mean cross-entropy.
        max_iterations (`int`, defaults to 100): Of L-BFGS.

    Returns:
        `torch.LongTensor` of shape `(num_test,)`: predicted classes; of several labels a picture, logits of shape
        `(num_test, num_labels)`.
    """
    multi_label = train_labels.ndim == 2
    num_classes = train_labels.shape[1] if multi_label else int(train_labels.max()) + 1
    cross_entropy = nn.functional.binary_cross_entropy_with_logits if multi_label else nn.functional.cross_entropy
    targets = train_labels.to(train_features.dtype) if multi_label else train_labels
    weight, bias = fit_linear(
        train_features, targets, num_classes, cross_entropy, weight_decay=weight_decay, max_iterations=max_iterations
    )
    logits = nn.functional.linear(test_features, weight, bias)
    return logits if multi_label else logits.argmax(dim=1)


def linear_probe_accuracy(train_features, train_labels, test_features, test_labels, **kwargs) -> float:
    """
    Share of `test_labels`, in percent, that [`linear_probe_predict`] gets right; of several labels a picture, labels
    being of shape (num_pictures, num_labels), the mean average precision of its logits.
    """
    predicted = linear_probe_predict(train_features, train_labels, test_features, **kwargs)
    if predicted.ndim == 2:
        return mean_average_precision(predicted, test_labels)
    return 100.0 * (predicted == test_labels).double().mean().item()


def fit_linear(
    features: torch.Tensor,
    targets: torch.Tensor,
    num_outputs: int,
    loss_function: Callable = nn.functional.cross_entropy,
    *,
    weight_decay: float = 1e-3,
    max_iterations: int = 100,
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    The linear layer of [`linear_probe_accuracy`], on the features as they are: it is fitted on standardised ones, and
    their mean and deviation are folded in.

    Args:
        features (`torch.Tensor` of shape `(num, dim)`).
        targets (`torch.Tensor`): What `loss_function(outputs, targets)` takes beside outputs of (num, num_outputs).

    Returns:
        Weights (num_outputs, dim) and biases (num_outputs,).
    """
    mean, std = features.mean(dim=0), features.std(dim=0, correction=0)
    # A feature that never changes says nothing, and must not be divided by zero.
    std = torch.where(std > 1e-6, std, 1.0)
    features = (features - mean) / std
    weight = torch.zeros(num_outputs, features.shape[1], device=features.device, requires_grad=True)
    bias = torch.zeros(num_outputs, device=features.device, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=max_iterations, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = loss_function(nn.functional.linear(features, weight, bias), targets)
        loss = loss + 0.5 * weight_decay * weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    weight = weight.detach() / std
    return weight, bias.detach() - weight @ mean
