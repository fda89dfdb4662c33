"""k-NN accuracy, linear accuracy and RankMe as `evaluate.Metric`: no network, and no code fetched at run time."""

import datasets
import evaluate
import torch

from .knn import knn_accuracy, rank_me
from .linear import linear_probe_accuracy
from .multi_label import f1_score, mean_average_precision

_FEATURES = datasets.Sequence(datasets.Value("float32"))
_LABELLED_INPUTS = """
Args:
    predictions: Features of the test pictures, (num_test, dim).
    references: Their classes, (num_test,), from 0.
    train_features: Features of the training pictures, (num_train, dim).
    train_labels: Their classes, (num_train,).
"""


class _LabelledMetric(evaluate.Metric):
    """A metric of test features with labels, given training features with labels."""

    purpose: str
    citation_text: str = ""

    def _info(self):
        return evaluate.MetricInfo(
            description=self.purpose,
            citation=self.citation_text,
            inputs_description=_LABELLED_INPUTS,
            features=datasets.Features({"predictions": _FEATURES, "references": datasets.Value("int64")}),
        )

    @staticmethod
    def _tensors(predictions, references, train_features, train_labels) -> tuple[torch.Tensor, ...]:
        return (
            torch.as_tensor(train_features, dtype=torch.float32),
            torch.as_tensor(train_labels, dtype=torch.int64),
            torch.tensor(predictions, dtype=torch.float32),
            torch.tensor(references, dtype=torch.int64),
        )


class KNNAccuracy(_LabelledMetric):
    """
    `KNNAccuracy().compute(predictions=..., references=..., train_features=..., train_labels=..., k=20,
    temperature=0.07)` -> `{"knn_accuracy": percent}`. See [`knn_predict`].
    """

    purpose = "Accuracy in percent of DINO's weighted k-NN classifier by cosine similarity, on frozen features."
    citation_text = "Caron et al., Emerging Properties in Self-Supervised Vision Transformers, ICCV 2021"

    def _compute(self, predictions, references, train_features, train_labels, k=20, temperature=0.07):
        split = self._tensors(predictions, references, train_features, train_labels)
        return {"knn_accuracy": knn_accuracy(*split, k=k, temperature=temperature)}


class LinearProbeAccuracy(_LabelledMetric):
    """
    `LinearProbeAccuracy().compute(predictions=..., references=..., train_features=..., train_labels=...,
    weight_decay=1e-3)` -> `{"linear_accuracy": percent}`. See [`linear_probe_accuracy`].
    """

    purpose = "Accuracy in percent of a logistic regression on standardised frozen features."

    def _compute(self, predictions, references, train_features, train_labels, weight_decay=1e-3):
        split = self._tensors(predictions, references, train_features, train_labels)
        return {"linear_accuracy": linear_probe_accuracy(*split, weight_decay=weight_decay)}


class RankMe(evaluate.Metric):
    """`RankMe().compute(predictions=features)` -> `{"rank_me": from 1 to dim}`. See [`rank_me`]."""

    def _info(self):
        return evaluate.MetricInfo(
            description="RankMe, the effective rank of features: exp of the entropy of their singular values.",
            citation="Garrido et al., RankMe: Assessing the Downstream Performance of Pretrained Self-Supervised "
            "Representations by Their Rank, ICML 2023",
            inputs_description="\nArgs:\n    predictions: Features, (num_pictures, dim).\n",
            features=datasets.Features({"predictions": _FEATURES}),
        )

    def _compute(self, predictions):
        return {"rank_me": rank_me(torch.tensor(predictions, dtype=torch.float32))}


class MeanAveragePrecision(evaluate.Metric):
    """
    `MeanAveragePrecision().compute(predictions=scores, references=targets)` -> `{"mean_average_precision": percent}`,
    of several labels a picture. See [`mean_average_precision`].
    """

    def _info(self):
        return evaluate.MetricInfo(
            description="The mean over labels of the average precision, in percent.",
            citation="",
            inputs_description="\nArgs:\n    predictions: Scores, (num_pictures, num_labels).\n"
            "    references: 1 where a picture has the label, 0 where not, (num_pictures, num_labels).\n",
            features=datasets.Features({"predictions": _FEATURES, "references": _FEATURES}),
        )

    def _compute(self, predictions, references):
        scores, targets = torch.tensor(predictions), torch.tensor(references)
        return {"mean_average_precision": mean_average_precision(scores, targets)}


class MultiLabelF1(evaluate.Metric):
    """
    `MultiLabelF1().compute(predictions=predicted, references=targets)` -> `{"f1": percent}`, micro-averaged. See
    [`f1_score`].
    """

    def _info(self):
        return evaluate.MetricInfo(
            description="F1 over all labels and pictures together, in percent.",
            citation="",
            inputs_description="\nArgs:\n    predictions, references: 1 or 0, (num_pictures, num_labels).\n",
            features=datasets.Features({"predictions": _FEATURES, "references": _FEATURES}),
        )

    def _compute(self, predictions, references):
        return {"f1": f1_score(torch.tensor(predictions), torch.tensor(references))}
