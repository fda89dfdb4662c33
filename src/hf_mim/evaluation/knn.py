"""How good frozen features are, without training anything."""

import torch
from torch import nn

from .multi_label import mean_average_precision


@torch.no_grad()
def nearest_neighbours(
    train_features: torch.Tensor,
    test_features: torch.Tensor,
    k: int,
    *,
    chunk_size: int = 1024,
    max_bytes: int = 256 * 2**20,
    device: torch.device | str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    The `k` training features of the highest cosine similarity to each test feature; of equal ones the first.

    Never are there more similarities than those of one chunk of test features to one block of training features:
    the best `k` so far are kept from block to block, and no neighbour is lost by it.

    Args:
        train_features (`torch.Tensor` of shape `(num_train, dim)`), test_features (`(num_test, dim)`).
        k (`int`): From 1 to `num_train`.
        chunk_size (`int`, defaults to 1024): Test features at a time.
        max_bytes (`int`, defaults to 256 MiB): Of a block with its similarities to a chunk. A block has at least 1,024
            features, and all have it in common that smaller ones change no result.
        device (*optional*): Where to compute; by default where `train_features` are.

    Returns:
        Similarities, float32, and rows of `train_features`, int64, each of shape `(num_test, k)`, the nearest first,
        on `device`.
    """
    device = train_features.device if device is None else torch.device(device)
    num_test, dim = test_features.shape
    best = torch.empty(num_test, 0, device=device), torch.empty(num_test, 0, dtype=torch.int64, device=device)
    if num_test == 0:
        return best[0].expand(0, k), best[1].expand(0, k)
    size = max(1024, max_bytes // (4 * (min(chunk_size, num_test) + dim)))
    for start in range(0, len(train_features), size):
        block = _normalised(train_features[start : start + size], device)
        found = []
        for rows in torch.arange(num_test).split(chunk_size):
            chunk = _normalised(test_features[rows[0] : rows[-1] + 1], device)
            similarity, places = _highest(chunk @ block.T, k)
            # What was found before comes first, so that it stays where the similarities are equal.
            similarity = torch.cat([best[0][rows[0] : rows[-1] + 1], similarity], dim=1)
            places = torch.cat([best[1][rows[0] : rows[-1] + 1], places + start], dim=1)
            similarity, order = similarity.sort(dim=1, descending=True, stable=True)
            found.append((similarity[:, :k], places.gather(1, order[:, :k])))
        best = torch.cat([pair[0] for pair in found]), torch.cat([pair[1] for pair in found])
    return best


def _normalised(features: torch.Tensor, device) -> torch.Tensor:
    return nn.functional.normalize(features.to(device=device, dtype=torch.float32), dim=1)


def _highest(values: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The `k` highest of each row and their columns, of equal ones the first: `topk` takes any of them."""
    k = min(k, values.shape[1])
    highest, places = values.topk(k)
    tied = (values >= highest[:, -1:]).sum(dim=1) > k
    if tied.any():
        ordered, columns = values[tied].sort(dim=1, descending=True, stable=True)
        highest[tied], places[tied] = ordered[:, :k], columns[:, :k]
    return highest, places


@torch.no_grad()
def knn_predict(
    train_features: torch.Tensor,
    train_labels: torch.Tensor,
    test_features: torch.Tensor,
    *,
    k: int = 20,
    temperature: float = 0.07,
    chunk_size: int = 1024,
    **kwargs,
) -> torch.Tensor:
    """
    Weighted nearest neighbours by cosine similarity, as DINO's: each of the `k` nearest training features votes for
    its label with the weight `exp(similarity / temperature)`.

    Args:
        train_features (`torch.Tensor` of shape `(num_train, dim)`), test_features (`(num_test, dim)`).
        train_labels (`torch.LongTensor` of shape `(num_train,)`): Classes, from 0; or, of pictures that may have
            several labels, of shape `(num_train, num_labels)`: 1 where a picture has the label, 0 where not.
        k (`int`, defaults to 20): Neighbours, at most `num_train`.
        temperature (`float`, defaults to 0.07).
        chunk_size, max_bytes, device: As in [`nearest_neighbours`].

    Returns:
        `torch.LongTensor` of shape `(num_test,)`: predicted classes; of several labels a picture, float32 of shape
        `(num_test, num_labels)`: the share of the votes, in [0, 1], that is for each. Where `train_labels` are.

    Raises:
        ValueError: If there are no training features, or not as many labels, or if `k` is below 1.
    """
    if len(train_features) == 0 or len(train_features) != len(train_labels):
        raise ValueError(
            f"k-NN needs training features with one label each; got {len(train_features)} and {len(train_labels)}."
        )
    if k < 1:
        raise ValueError(f"k is {k}; expected at least 1.")
    k = min(k, len(train_features))
    similarity, neighbours = nearest_neighbours(train_features, test_features, k, chunk_size=chunk_size, **kwargs)
    weights, neighbours = (similarity / temperature).exp().to(train_labels.device), neighbours.to(train_labels.device)
    if train_labels.ndim == 2:
        shares = weights / weights.sum(dim=1, keepdim=True)
        return torch.einsum("nk,nkl->nl", shares, train_labels[neighbours].float())
    num_classes = int(train_labels.max()) + 1
    predictions = []
    for votes, voters in zip(weights.split(chunk_size), neighbours.split(chunk_size), strict=True):
        counts = votes.new_zeros(len(votes), num_classes)
        predictions.append(counts.scatter_add_(1, train_labels[voters], votes).argmax(dim=1))
    return torch.cat(predictions)


def knn_accuracy(train_features, train_labels, test_features, test_labels, **kwargs) -> float:
    """
    Share of `test_labels`, in percent, that [`knn_predict`] gets right; of several labels a picture, labels being of
    shape (num_pictures, num_labels), the mean average precision of its shares.
    """
    predicted = knn_predict(train_features, train_labels, test_features, **kwargs)
    if predicted.ndim == 2:
        return mean_average_precision(predicted, test_labels)
    return 100.0 * (predicted == test_labels).double().mean().item()


@torch.no_grad()
def rank_me(features: torch.Tensor) -> float:
    """
    RankMe (Garrido et al., 2023), the effective rank of features (num_pictures, dim): with singular values s,
    `p = s / sum(s) + 1e-7`, it is `exp(-sum(p * log p))`. From 1 (collapsed) to `dim`.
    """
    singular_values = torch.linalg.svdvals(features.float())
    p = singular_values / singular_values.sum() + 1e-7
    return (-(p * p.log()).sum()).exp().item()
