"""How good the encoder's features are while it is being pretrained."""

import functools
from statistics import fmean

from accelerate import PartialState

from ..data.dataset import ImageStream
from ..data.loading import ImageSplits
from .encoders import FeatureEncoder
from .features import extract_features, labelled_splits, shared_labels
from .knn import knn_accuracy
from .linear import linear_probe_accuracy
from .report import labelled


class OnlineEvaluation:
    """
    k-NN and linear accuracy of an encoder, for every label, on at most 10,000 training and 4,000 held-out pictures.

    The linear probe is a logistic regression fitted anew at each evaluation, on features of the encoder as it is at
    that moment: no gradient reaches the encoder, and no classifier lags behind it, as one trained along would.

    Args:
        pictures (`ImageSplits`): With labels.
        processor: The image processor: features are those of whole pictures, without augmentation.
        knn, linear (`bool`): Which of the two.
        pooling (`str`, *optional*): See [`blocks_read`]; [CLS] if None, the mean of the patches where there is none.
        skip_broken (`bool`): Read all pictures now, and leave out those that cannot be read; else one stops it.

    Raises:
        ValueError: If the pictures have no labels, or are a stream.
    """

    def __init__(
        self,
        pictures: ImageSplits,
        processor,
        *,
        knn: bool,
        linear: bool,
        pooling: str | None = None,
        num_workers: int = 0,
        bf16: bool = False,
        skip_broken: bool = False,
    ):
        if isinstance(pictures.train, ImageStream):
            raise ValueError(
                "--eval_knn and --online_probe look at the training pictures again, which a stream does not allow: "
                "leave out --streaming, or these two."
            )
        self.train, self.test = labelled_splits(pictures, skip_broken=skip_broken)
        self.train_labels, self.test_labels = shared_labels(self.train, self.test, multi_label=True)
        check_labelled(pictures, self.train_labels, "--eval_knn and --online_probe need them")
        self.processor, self.pooling = processor, pooling
        self.num_workers, self.bf16 = num_workers, bf16
        self.scores = {
            name: score
            for name, score, wanted in (
                ("knn_accuracy", functools.partial(knn_accuracy, device=PartialState().device), knn),
                ("linear_accuracy", linear_probe_accuracy, linear),
            )
            if wanted
        }

    @property
    def names(self) -> list[str]:
        """What the metrics are called: `knn_accuracy_LABEL`, and `knn_accuracy` for the mean over the labels."""
        return [name for score in self.scores for name in (*(f"{score}_{key}" for key in self.train_labels), score)]

    def __call__(self, encoder) -> dict[str, float]:
        """Percent by name, of a model in eval mode; on all processes, each of which computes its share of features."""
        network = FeatureEncoder(encoder)
        pooling = self.pooling or network.poolings[0]
        train, test = (
            extract_features(
                {"": network}, split, self.processor, [pooling], num_workers=self.num_workers, bf16=self.bf16
            )[""][pooling]
            for split in (self.train, self.test)
        )
        metrics = {}
        for name, score in self.scores.items():
            by_label = {}
            for label in self.train_labels:
                split = (
                    *labelled(train, self.train_labels[label]),
                    *labelled(test, self.test_labels[label]),
                )
                by_label[f"{name}_{label}"] = score(*split)
            metrics |= by_label | {name: fmean(by_label.values())}
        return metrics


def check_labelled(pictures: ImageSplits, labels: dict, why: str) -> None:
    """Raises ValueError, which says what could be done, if `labels` (those of both splits) is empty."""
    if labels:
        return
    train, test = (sorted(split.labels) or "none" for split in (pictures.train, pictures.validation))
    raise ValueError(
        f"{pictures.train.source} has no labels that both splits share (training: {train}, held out: {test}), and "
        f"{why}. Name the columns by --label_column_names, or give a folder with one sub-folder for each class."
    )
