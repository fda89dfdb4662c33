"""How good frozen features are, without training anything."""

import torch
from torch import nn


@torch.no_grad()
def knn_predict(
    train_features: torch.Tensor,
    train_labels: torch.Tensor,
    test_features: torch.Tensor,
    *,
    k: int = 20,
    temperature: float = 0.07,
    chunk_size: int = 1024,
) -> torch.Tensor:
    """
    Weighted nearest neighbours by cosine similarity, as DINO's: each of the `k` nearest training features votes for
    its label with the weight `exp(similarity / temperature)`.

    Args:
        train_features (`torch.Tensor` of shape `(num_train, dim)`), test_features (`(num_test, dim)`).
        train_labels (`torch.LongTensor` of shape `(num_train,)`): Classes, from 0.
        k (`int`, defaults to 20): Neighbours, at most `num_train`.
        temperature (`float`, defaults to 0.07).

    Returns:
        `torch.LongTensor` of shape `(num_test,)`: predicted classes.

    Raises:
        ValueError: If there are no training features, or not as many labels, or if `k` is below 1.
    """
    if len(train_features) == 0 or len(train_features) != len(train_labels):
        raise ValueError(
            f"k-NN needs training features with one label each; got {len(train_features)} and {len(train_labels)}."
        )
    if k < 1:
        raise ValueError(f"k is {k}; expected at least 1.")
    train = nn.functional.normalize(train_features.float(), dim=1)
    num_classes = int(train_labels.max()) + 1
    predictions = []
    for chunk in test_features.split(chunk_size):
        similarity, neighbours = (nn.functional.normalize(chunk.float(), dim=1) @ train.T).topk(min(k, len(train)))
        votes = similarity.new_zeros(len(chunk), num_classes)
        votes.scatter_add_(1, train_labels[neighbours], (similarity / temperature).exp())
        predictions.append(votes.argmax(dim=1))
    return torch.cat(predictions) if predictions else train_labels.new_empty(0)


def knn_accuracy(train_features, train_labels, test_features, test_labels, **kwargs) -> float:
    """Share of `test_labels`, in percent, that [`knn_predict`] gets right."""
    predicted = knn_predict(train_features, train_labels, test_features, **kwargs)
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
