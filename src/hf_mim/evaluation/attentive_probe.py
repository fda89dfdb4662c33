"""
The attentive probe: one learned query looks at the frozen patch tokens, and a linear layer at what it gathers.

[CLS] and the mean of the patches undersell an encoder that was trained to tell patches apart: what a class can be told
by may lie in a few of them. Protocol of AIM (El-Nouby et al., 2024) and V-JEPA (Bardes et al., 2024).
"""

from collections.abc import Mapping

import torch
from torch import nn

from ..data.dataset import ImageDataset
from .encoders import PATCHES, FeatureEncoder
from .features import extract_features
from .linear_probe import Probe, train_probes

# Bounded in time and memory: 20 epochs, of so many pictures that their tokens fit into a gigabyte.
LEARNING_RATES = (3e-4, 1e-3, 3e-3)
NUM_EPOCHS = 20
_BATCH_SIZE = 256
_MAX_BYTES = 1 << 30
_HEAD_SIZE = 64


class AttentiveProbe(Probe):
    """
    As many classifiers as learning rates, which start equal. Each has a query, one cross-attention of it over the
    patch tokens, in heads of 64 (of a width that 64 does not divide: in the most heads of at least 64; below: in one),
    and a linear layer. Tokens go through a BatchNorm without affine first, as AIM's. AdamW.

    Args:
        dim (`int`): Of the tokens.
        num_classes (`int`).
        learning_rates (`list[float]`): Peak of each head.
        weight_decay (`float`): Of AdamW, for matrices.
        seed (`int`): Of the first weights.
    """

    chunk_size = 256

    def __init__(
        self, dim: int, num_classes: int, learning_rates: list[float], *, weight_decay: float = 0.01, seed: int = 0
    ):
        super().__init__()
        self.learning_rates = list(learning_rates)
        self.num_heads = max(number for number in range(1, max(1, dim // _HEAD_SIZE) + 1) if dim % number == 0)
        self.norm = nn.BatchNorm1d(dim, affine=False, eps=1e-6)
        generator = torch.Generator().manual_seed(seed)
        shape = (self.num_heads, dim // self.num_heads, dim)
        bound = dim**-0.5
        start = {
            "queries": 0.02 * torch.randn(*shape[:2], generator=generator),
            "keys": torch.empty(shape).uniform_(-bound, bound, generator=generator),
            "values": torch.empty(shape).uniform_(-bound, bound, generator=generator),
            "weights": nn.init.trunc_normal_(torch.empty(num_classes, dim), std=0.01, generator=generator),
            "biases": torch.zeros(num_classes),
        }
        for name, value in start.items():
            setattr(self, name, nn.ParameterList(nn.Parameter(value.clone()) for _ in self.learning_rates))
        groups = []
        for head, peak in enumerate(self.learning_rates):
            matrices = [getattr(self, name)[head] for name in ("keys", "values", "weights")]
            groups.append({"params": matrices, "peak": peak, "weight_decay": weight_decay})
            groups.append({"params": [self.queries[head], self.biases[head]], "peak": peak, "weight_decay": 0.0})
        self.optimizer = torch.optim.AdamW(groups, lr=0.0)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Logits (num_rates, batch_size, num_classes) of tokens (batch_size, num_patches, dim)."""
        queries, keys, values, weights, biases = (
            torch.stack(list(getattr(self, name))) for name in ("queries", "keys", "values", "weights", "biases")
        )
        tokens = self.norm(tokens.float().flatten(0, 1)).view(tokens.shape)
        # One query for all pictures: its keys' matrix is applied to it and not to every token, and the values' matrix
        # to what is gathered. The same numbers, for a small part of the work.
        directions = torch.einsum("rhe,rhed->rhd", queries, keys) * keys.shape[2] ** -0.5
        attention = (tokens @ directions.flatten(0, 1).T).softmax(dim=1)
        gathered = (attention.transpose(1, 2) @ tokens).unflatten(1, directions.shape[:2])
        gathered = torch.einsum("brhd,rhed->rbhe", gathered, values).flatten(2)
        return torch.baddbmm(biases.unsqueeze(1), gathered, weights.transpose(1, 2))


def attentive_accuracies(
    train_tokens: torch.Tensor,
    train_labels: dict[str, torch.Tensor],
    test_tokens: torch.Tensor,
    test_labels: dict[str, torch.Tensor],
    *,
    device: torch.device | str = "cpu",
    num_epochs: int = NUM_EPOCHS,
    seed: int = 0,
) -> dict[str, float]:
    """
    Accuracy of an [`AttentiveProbe`] for every label: that of the learning rate which is best on a tenth of the
    training pictures, on which none is trained.

    Args:
        train_tokens (`torch.Tensor` of shape `(num_train, num_patches, dim)`), test_tokens (`(num_test, ...)`).
        train_labels, test_labels: By name, `torch.LongTensor` of shape `(num_pictures,)`; -1 where there is none.
        num_epochs (`int`): Each of batches of 256; a tenth of them is warm-up.

    Returns:
        By name, percent of the test pictures.
    """
    order = torch.randperm(len(train_tokens), generator=torch.Generator().manual_seed(seed))
    chosen_on, trained_on = order.split([len(order) // 10, len(order) - len(order) // 10])
    if len(chosen_on) == 0:
        chosen_on = trained_on
    size = min(_BATCH_SIZE, len(trained_on))
    probes = {
        label: AttentiveProbe(
            train_tokens.shape[2],
            int(max(train_labels[label].max(), test_labels[label].max())) + 1,
            list(LEARNING_RATES),
            seed=seed,
        ).to(device)
        for label in train_labels
    }

    def batches(epoch: int):
        order = torch.randperm(len(trained_on), generator=torch.Generator().manual_seed(seed + 1 + epoch))
        for rows in trained_on[order][: len(order) // size * size].split(size):
            labels = {name: column[rows].to(device) for name, column in train_labels.items()}
            yield train_tokens[rows].to(device), labels

    chosen_labels = {name: column[chosen_on] for name, column in train_labels.items()}
    results = train_probes(
        probes,
        batches,
        len(trained_on) // size,
        train_tokens[chosen_on],
        chosen_labels,
        num_epochs=num_epochs,
        warmup_epochs=num_epochs / 10,
    )
    accuracies = {}
    for label, probe in probes.items():
        rates = [head["last"] for head in results[label]]
        accuracies[label] = probe.accuracies(test_tokens, test_labels[label])[rates.index(max(rates))]
    return accuracies


def evaluate_attentively(
    encoders: Mapping[str, FeatureEncoder],
    train: ImageDataset,
    test: ImageDataset,
    train_labels: dict[str, torch.Tensor],
    test_labels: dict[str, torch.Tensor],
    processor,
    *,
    device: torch.device | str = "cpu",
    seed: int = 0,
    **kwargs,
) -> dict:
    """
    [`attentive_accuracies`] of encoders, one after the other, on pictures whose tokens fit into a gigabyte.

    Args:
        train, test, processor: As for [`extract_features`].
        train_labels, test_labels: By name, of all the pictures; those with several labels a picture are left out.
        kwargs: To [`extract_features`].

    Returns:
        `dict` for JSON: `num_train`, `num_test`, `num_epochs`, and `accuracy`: by encoder, percent by label.
    """
    names = [name for name, column in train_labels.items() if column.ndim == 1]
    results = {"num_train": 0, "num_test": 0, "num_epochs": NUM_EPOCHS, "accuracy": {}}
    if not names:
        return results
    for encoder_name, encoder in encoders.items():
        first = extract_features({"": encoder}, test.select([0]), processor, [PATCHES], **kwargs)[""][PATCHES]
        most = max(2, _MAX_BYTES // (first.numel() * first.element_size()))
        # In the same shares as there are pictures.
        share = min(1.0, most / (len(train) + len(test)))
        numbers = [max(1, int(share * len(split))) for split in (train, test)]
        tokens = [
            extract_features({"": encoder}, split.select(list(range(number))), processor, [PATCHES], **kwargs)[""][
                PATCHES
            ]
            for split, number in zip((train, test), numbers, strict=True)
        ]
        labels = [
            {name: columns[name][:number] for name in names}
            for columns, number in zip((train_labels, test_labels), numbers, strict=True)
        ]
        results |= {"num_train": numbers[0], "num_test": numbers[1]}
        if all(part.isfinite().all() for part in tokens):
            found = attentive_accuracies(tokens[0], labels[0], tokens[1], labels[1], device=device, seed=seed)
        else:
            found = dict.fromkeys(names)
        results["accuracy"][encoder_name] = found
    return results
