"""The job of `examples/run_semantic_segmentation.py`: from flags to a segmenter, and to how often it is right."""

from dataclasses import dataclass, field
from pathlib import Path

import torch

from ..data.arguments import DataArguments
from ..data.segmentation import MaskArguments, load_masked
from ..evaluation.dense import class_colours
from ..hub.cards import write_segmenter_card
from ..training.command import ClassifierArguments, parse_arguments
from ..training.dense_trainers import SegmentationTrainer
from ..training.errors import run_job
from ..training.presets import SEGMENTATION_PRESETS
from .dense import DenseArguments, DenseTask, train_dense


@dataclass
class SegmentationArguments(DenseArguments):
    """
    [`DenseArguments`] of a segmenter, with its head.

    Raises:
        ValueError: If a number is out of its range.
    """

    segmentation_head: str = field(
        default="linear", metadata={"help": "linear (BatchNorm and a 1 x 1 convolution on the patches), or upernet."}
    )
    segmentation_head_size: int = field(default=512, metadata={"help": "Channels of upernet."})

    def __post_init__(self):
        if self.segmentation_head == "upernet" and self.per_device_train_batch_size < 2:
            raise ValueError("UperNet's BatchNorm over one number a picture needs --per_device_train_batch_size 2.")
        super().__post_init__()


CLASSES = (ClassifierArguments, DataArguments, MaskArguments, SegmentationArguments)


class SegmentationTask(DenseTask):
    """The class of each pixel."""

    suffix = "ForSemanticSegmentation"
    trainer_class = SegmentationTrainer
    picture = "segmentation.png"

    def load(self, data_args, map_args, seed):
        train, validation, self.names = load_masked(data_args, map_args, seed)
        self.ignored = map_args.unknown
        return train, validation

    def configure(self, config, args: SegmentationArguments) -> None:
        config.id2label = dict(enumerate(self.names))
        config.label2id = {name: number for number, name in enumerate(self.names)}
        config.semantic_loss_ignore_index = self.ignored
        config.segmentation_head = args.segmentation_head
        config.segmentation_head_size = args.segmentation_head_size

    def settings(self) -> dict:
        return {"classes": list(self.names)}

    def results(self, scores: dict) -> dict:
        return scores | {"iou": dict(zip(self.names, scores["iou"], strict=True))}

    def colours(self, truths: list[torch.Tensor]):
        return class_colours(len(self.names))

    def write_card(self, folder, name, config, training, results, context) -> None:
        write_segmenter_card(folder, name, config, training, results, context)

    def summary(self, results: dict, folder: Path) -> str:
        return (
            f"\nmIoU: {results['miou']:.2f} %; mean accuracy: {results['mean_accuracy']:.2f} %; pixel accuracy: "
            f"{results['pixel_accuracy']:.2f} % of {results['num_test']} held-out pictures.\n"
            f"The segmenter is in {folder}: pipeline('image-segmentation', {str(folder)!r}) after `import hf_mim`."
        )


def main(argv: list[str] | None = None) -> int:
    """`examples/run_semantic_segmentation.py`: reads the flags, trains, and tests. Returns the exit status."""
    return run_job(lambda: train_dense(SegmentationTask(), *parse_arguments(CLASSES, argv, SEGMENTATION_PRESETS)))
