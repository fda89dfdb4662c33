"""
The papers' linear probe: a BatchNorm without affine and a linear layer on frozen features, trained by LARS.

Several learning rates are tried at once: as many heads are trained side by side on the same batches, for the price of
one pass over the data. What each head learns is what it would learn alone.
"""

import math
from collections.abc import Callable, Iterable

import torch
from timm.optim import Lars
from torch import nn


class Probe(nn.Module):
    """
    As many classifiers on frozen features as learning rates, trained side by side: what is common to all kinds.

    A kind has a `forward` that gives logits (num_heads, batch_size, num_classes), and an `optimizer` whose groups have
    their `peak` learning rate.
    """

    # Features that are looked at at once, where nothing is trained.
    chunk_size = 4096
    learning_rates: list[float]
    optimizer: torch.optim.Optimizer

    def step(self, features: torch.Tensor, labels: torch.Tensor, factor: float) -> torch.Tensor:
        """
        One step of the optimiser for every head.

        Args:
            features (`torch.Tensor` of shape `(batch_size, ...)`).
            labels (`torch.LongTensor` of shape `(batch_size,)`): -1 where there is none.
            factor (`float`): Times the peak learning rates.

        Returns:
            `torch.Tensor` of shape `(num_heads,)`: the losses before the step.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak"] * factor
        logits = self(features)
        losses = nn.functional.cross_entropy(
            logits.flatten(0, 1), labels.repeat(len(logits)), reduction="none", ignore_index=-1
        )
        losses = losses.view(len(logits), -1).sum(dim=1) / (labels >= 0).sum().clamp(min=1)
        self.optimizer.zero_grad()
        losses.sum().backward()
        self.optimizer.step()
        return losses.detach()

    @torch.no_grad()
    def accuracies(self, features: torch.Tensor, labels: torch.Tensor) -> list[float]:
        """Percent that each head gets right, with the BatchNorm's running statistics; labels of -1 do not count."""
        self.eval()
        device = next(self.parameters()).device
        right = torch.zeros(len(self.learning_rates), dtype=torch.int64, device=device)
        for chunk, answers in zip(features.split(self.chunk_size), labels.split(self.chunk_size), strict=True):
            right += (self(chunk.to(device)).argmax(dim=2) == answers.to(device)).sum(dim=1)
        self.train()
        return (100.0 * right / (labels >= 0).sum()).tolist()


class LinearProbe(Probe):
    """
    As many linear classifiers as learning rates, which start equal and share one BatchNorm (it learns nothing).

    Args:
        dim (`int`): Of the features.
        num_classes (`int`).
        learning_rates (`list[float]`): Peak of each head.
        momentum, weight_decay (`float`): Of LARS. As in MAE, its trust ratio (0.001) is for the weights; the biases
            are trained by plain momentum, without weight decay.
        seed (`int`): Of the first weights.
    """

    def __init__(
        self,
        dim: int,
        num_classes: int,
        learning_rates: list[float],
        *,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        seed: int = 0,
    ):
        super().__init__()
        self.learning_rates = list(learning_rates)
        self.norm = nn.BatchNorm1d(dim, affine=False, eps=1e-6)
        start = torch.empty(num_classes, dim)
        nn.init.trunc_normal_(start, std=0.01, generator=torch.Generator().manual_seed(seed))
        self.weights = nn.ParameterList(nn.Parameter(start.clone()) for _ in self.learning_rates)
        self.biases = nn.ParameterList(nn.Parameter(torch.zeros(num_classes)) for _ in self.learning_rates)
        groups = []
        for weight, bias, peak in zip(self.weights, self.biases, self.learning_rates, strict=True):
            # timm adapts only what decays, unless told otherwise.
            groups.append({"params": [weight], "peak": peak, "weight_decay": weight_decay, "always_adapt": True})
            groups.append({"params": [bias], "peak": peak})
        self.optimizer = Lars(groups, lr=0.0, momentum=momentum)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Logits (num_heads, batch_size, num_classes) of features (batch_size, dim)."""
        weight, bias = torch.stack(list(self.weights)), torch.stack(list(self.biases))
        logits = nn.functional.linear(self.norm(features.to(weight.dtype)), weight.flatten(0, 1), bias.flatten())
        return logits.unflatten(1, bias.shape).transpose(0, 1)


def learning_rate_factor(epoch: float, num_epochs: float, warmup_epochs: float) -> float:
    """Linear from 0 to 1 over the warm-up, then half a cosine to 0; `epoch` with its fraction, from 0."""
    if epoch < warmup_epochs:
        return epoch / warmup_epochs
    return 0.5 * (1.0 + math.cos(math.pi * (epoch - warmup_epochs) / (num_epochs - warmup_epochs)))


def train_probes(
    probes: dict[str, Probe],
    batches: Callable[[int], Iterable[tuple[torch.Tensor, dict[str, torch.Tensor]]]],
    steps_per_epoch: int,
    test_features: torch.Tensor,
    test_labels: dict[str, torch.Tensor],
    *,
    num_epochs: int,
    warmup_epochs: float,
    on_epoch: Callable[[int, dict[str, list[float]]], None] | None = None,
) -> dict[str, list[dict]]:
    """
    Trains a probe for every label, on the same batches.

    Args:
        probes: By label.
        batches: Of an epoch (from 0): `steps_per_epoch` pairs of features (batch_size, ...) and, by label, classes.
        test_features (`torch.Tensor` of shape `(num_test, ...)`), test_labels: By label, `(num_test,)`.
        on_epoch: Called after every epoch with its number and the accuracies by label.

    Returns:
        By label, one `dict` a head: `learning_rate`, `last` and `best` (test accuracy in percent after the last and
        the best epoch), `best_epoch` (from 1), `accuracies` (of every epoch) and `loss` (mean of the last epoch).
    """
    history: dict[str, list[list[float]]] = {label: [] for label in probes}
    for epoch in range(num_epochs):
        losses = {label: [] for label in probes}
        for step, (features, labels) in enumerate(batches(epoch)):
            factor = learning_rate_factor(epoch + step / steps_per_epoch, num_epochs, warmup_epochs)
            for label, probe in probes.items():
                losses[label].append(probe.step(features, labels[label], factor))
        now = {label: probe.accuracies(test_features, test_labels[label]) for label, probe in probes.items()}
        for label, accuracies in now.items():
            history[label].append(accuracies)
        if on_epoch is not None:
            on_epoch(epoch, now)
    results = {}
    for label, probe in probes.items():
        loss = torch.stack(losses[label]).mean(dim=0).tolist()
        results[label] = []
        for head, learning_rate in enumerate(probe.learning_rates):
            accuracies = [row[head] for row in history[label]]
            best = max(range(num_epochs), key=accuracies.__getitem__)
            results[label].append(
                {
                    "learning_rate": learning_rate,
                    "last": accuracies[-1],
                    "best": accuracies[best],
                    "best_epoch": best + 1,
                    "loss": loss[head],
                    "accuracies": accuracies,
                }
            )
    return results
