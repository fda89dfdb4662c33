"""How good the encoder's features are while it is being pretrained."""

import functools
from statistics import fmean

import torch
from accelerate import PartialState

from ..data.dataset import ImageStream
from ..data.loading import ImageSplits
from .encoders import FeatureEncoder
from .features import extract_features, labelled_splits, shared_labels
from .knn import knn_predict
from .linear import linear_probe_predict
from .report import accuracy, label_notes, labelled, tells_apart, told


class OnlineEvaluation:
    """
    k-NN and linear accuracy of an encoder, for every label, on at most 10,000 training and 4,000 held-out pictures.

    The linear probe is a logistic regression fitted anew at each evaluation, on features of the encoder as it is at
    that moment: no gradient reaches the encoder, and no classifier lags behind it, as one trained along would.

    Args:
        images (`ImageSplits`): With labels.
        processor: The image processor: features are those of whole pictures, without augmentation.
        knn, linear (`bool`): Which of the two.
        pooling (`str`, *optional*): See [`blocks_read`]; [CLS] if None, the mean of the patches where there is none.
        skip_broken (`bool`): Read all pictures now, and leave out those that cannot be read; else one stops it.

    Raises:
        ValueError: If the pictures have no labels, or are a stream.
    """

    def __init__(
        self,
        images: ImageSplits,
        processor,
        *,
        knn: bool,
        linear: bool,
        pooling: str | None = None,
        num_workers: int = 0,
        bf16: bool = False,
        skip_broken: bool = False,
    ):
        if isinstance(images.train, ImageStream):
            raise ValueError(
                "--eval_knn and --online_probe look at the training pictures again, which a stream does not allow: "
                "leave out --streaming, or these two."
            )
        self.train, self.test = labelled_splits(images, skip_broken=skip_broken)
        self.train_labels, self.test_labels = shared_labels(self.train, self.test, multi_label=True)
        check_labelled(images, self.train_labels, "--eval_knn and --online_probe need them")
        # What is to be known of the numbers.
        self.notes = [
            note for label in self.train_labels for note in label_notes(label, self.train_labels, self.test_labels)
        ]
        self.processor, self.pooling = processor, pooling
        self.num_workers, self.bf16 = num_workers, bf16
        self.scores = {
            name: predict
            for name, predict, wanted in (
                ("knn", functools.partial(knn_predict, device=PartialState().device), knn),
                ("linear", linear_probe_predict, linear),
            )
            if wanted
        }

    @property
    def names(self) -> list[str]:
        """What the metrics are called: `knn_accuracy_LABEL`, and `knn_accuracy` for the mean over the labels."""
        scores = [f"{score}_accuracy" for score in self.scores]
        return [name for score in scores for name in (*(f"{score}_{key}" for key in self.train_labels), score)]

    def __call__(self, encoder) -> dict[str, float]:
        """Percent by name, of a model in eval mode; on all processes, each of which computes its share of features."""
        metrics, self.last_features, self.last_answers = self.measure(encoder)
        return metrics

    def measure(self, encoder) -> tuple[dict[str, float], dict[str, torch.Tensor], dict]:
        """Percent by name; and of the held-out pictures features by pooling, and which are told, as
        [`evaluate_features`] fills them in (without the encoder's name). NaN of features that are not finite."""
        network = FeatureEncoder(encoder)
        pooling = self.pooling or network.poolings[0]
        train, test = (
            extract_features(
                {"": network}, split, self.processor, [pooling], num_workers=self.num_workers, bf16=self.bf16
            )[""][pooling]
            for split in (self.train, self.test)
        )
        metrics, answers = {}, {}
        finite = bool(train.isfinite().all() and test.isfinite().all())
        for name, predict in self.scores.items():
            by_label = {}
            for label in self.train_labels:
                if not finite:
                    by_label[f"{name}_accuracy_{label}"] = float("nan")
                    continue
                known = labelled(train, self.train_labels[label])
                asked, right = labelled(test, self.test_labels[label])
                predicted = predict(*known, asked)
                by_label[f"{name}_accuracy_{label}"] = accuracy(predicted, right)
                if tells_apart(right):
                    answers.setdefault(name, {})[label] = told(predicted, self.test_labels[label])
            metrics |= by_label | {f"{name}_accuracy": fmean(by_label.values())}
        return metrics, {pooling: test}, {pooling: answers}


def check_labelled(images: ImageSplits, labels: dict, why: str) -> None:
    """Raises ValueError, which says what could be done, if `labels` (those of both splits) is empty."""
    if labels:
        return
    train, test = (sorted(split.labels) or "none" for split in (images.train, images.validation))
    raise ValueError(
        f"{images.train.source} has no labels that both splits share (training: {train}, held out: {test}), and "
        f"{why}. Name the columns by --label_column_names, or give a folder with one sub-folder for each class."
    )
