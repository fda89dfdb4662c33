"""How good an encoder's features are, beside the same network untrained and raw pixels."""

from collections.abc import Iterable

import torch
from torch import nn
from transformers import PreTrainedModel

from .knn import knn_accuracy, rank_me
from .linear import linear_probe_accuracy

# Raw pixels of larger pictures are averaged down to this, so that 10,000 of them fit into memory.
_MAX_PIXELS = 32


@torch.no_grad()
def extract_features(encoders: dict[str, PreTrainedModel], batches: Iterable[torch.Tensor]) -> dict[str, torch.Tensor]:
    """
    One feature vector a picture, for several encoders in one pass over the pictures.

    Args:
        encoders: By name; in eval mode, with a `last_hidden_state` that has [CLS] first.
        batches: `pixel_values` (batch_size, channels, height, width).

    Returns:
        `"raw pixels"` (averaged down to 32 x 32), and for every encoder `"NAME, [CLS]"` and `"NAME, mean"` (of the
        patches): float32 `torch.Tensor` of shape `(num_pictures, dim)`, on the CPU.
    """
    features: dict[str, list[torch.Tensor]] = {}
    for batch in batches:
        size = [min(side, _MAX_PIXELS) for side in batch.shape[2:]]
        pixels = nn.functional.adaptive_avg_pool2d(batch, size).flatten(1)
        features.setdefault("raw pixels", []).append(pixels)
        for name, encoder in encoders.items():
            hidden_states = encoder(batch.to(encoder.device)).last_hidden_state.float()
            features.setdefault(f"{name}, [CLS]", []).append(hidden_states[:, 0].cpu())
            features.setdefault(f"{name}, mean", []).append(hidden_states[:, 1:].mean(dim=1).cpu())
    return {name: torch.cat(parts) for name, parts in features.items()}


def evaluate_features(
    train: dict[str, torch.Tensor],
    test: dict[str, torch.Tensor],
    train_labels: dict[str, torch.Tensor],
    test_labels: dict[str, torch.Tensor],
) -> dict:
    """
    k-NN and linear accuracy for every label, and RankMe of the test features.

    Args:
        train, test: As `extract_features` gives.
        train_labels, test_labels: By name, `torch.LongTensor` of shape `(num_pictures,)`.

    Returns:
        `dict` for JSON: `num_train`, `num_test`, and `features`: by name, `knn` and `linear` (percent by label) and
        `rank_me` (None for raw pixels).
    """
    results = {"num_train": len(train["raw pixels"]), "num_test": len(test["raw pixels"]), "features": {}}
    for name in train:
        scores = {"knn": {}, "linear": {}, "rank_me": None if name == "raw pixels" else rank_me(test[name])}
        for label in train_labels:
            split = (train[name], train_labels[label], test[name], test_labels[label])
            scores["knn"][label] = knn_accuracy(*split)
            scores["linear"][label] = linear_probe_accuracy(*split)
        results["features"][name] = scores
    return results


def results_table(results: dict) -> list[list[str]]:
    """Rows of text, the head first: features; k-NN and linear accuracy as `knn / linear` for each label; RankMe."""
    labels = list(next(iter(results["features"].values()))["knn"])
    rows = [["features", *labels, "RankMe"]]
    for name, scores in results["features"].items():
        rank = "" if scores["rank_me"] is None else f"{scores['rank_me']:.1f}"
        rows.append([name, *(f"{scores['knn'][label]:.1f} / {scores['linear'][label]:.1f}" for label in labels), rank])
    return rows


def describe_results(results: dict) -> str:
    """What the numbers of `results_table` are."""
    train, test = results["num_train"], results["num_test"]
    if not next(iter(results["features"].values()))["knn"]:
        return f"The data has no labels: RankMe of the features of {test} held-out pictures"
    return f"k-NN / linear accuracy in % ({train} labelled pictures, tested on {test} held out)"
