"""The job of `examples/run_depth_estimation.py`: from flags to an estimator of depth, and to how wrong it is."""

from dataclasses import dataclass, field
from pathlib import Path

import torch

from ..data.arguments import DataArguments
from ..data.depth import DepthMapArguments, load_depths
from ..evaluation.pictures import depth_colours
from ..hub.cards import write_depth_card
from ..training.command import ClassifierArguments, parse_arguments
from ..training.dense_trainers import DepthTrainer
from ..training.errors import run_job
from ..training.presets import DEPTH_PRESETS
from .dense import DenseArguments, DenseTask, train_dense


@dataclass
class DepthArguments(DenseArguments):
    """
    [`DenseArguments`] of an estimator of depth, with its head.

    Raises:
        ValueError: If a number is out of its range.
    """

    depth_head: str = field(
        default="linear", metadata={"help": "linear (BatchNorm and a 1 x 1 convolution on the patches), or dpt."}
    )
    depth_head_size: int = field(default=256, metadata={"help": "Channels of dpt."})
    scale_invariance: float = field(
        default=0.5,
        metadata={"help": "0 to 1: how little a factor that all depths of a picture are wrong by costs."},
    )
    scale_jitter: list[float] = field(
        default_factory=lambda: [1.0, 1.0],
        metadata={
            "help": "Lowest and highest factor by which a picture is resized before it is cropped. What is enlarged "
            "looks nearer than its depth says."
        },
    )


CLASSES = (ClassifierArguments, DataArguments, DepthMapArguments, DepthArguments)


class DepthTask(DenseTask):
    """How far away each pixel is."""

    suffix = "ForDepthEstimation"
    trainer_class = DepthTrainer
    picture = "depth.png"

    def load(self, data_args, map_args, seed):
        train, validation, self.log_depth_mean = load_depths(data_args, map_args, seed)
        self.depth_scale = map_args.depth_scale
        return train, validation

    def configure(self, config, args: DepthArguments) -> None:
        config.depth_head = args.depth_head
        config.depth_head_size = args.depth_head_size
        config.scale_invariance = args.scale_invariance
        config.log_depth_mean = self.log_depth_mean

    def settings(self) -> dict:
        return {"depth_scale": self.depth_scale}

    def results(self, scores: dict) -> dict:
        return dict(scores)

    def colours(self, truths: list[torch.Tensor]):
        return depth_colours(truths)

    def write_card(self, folder, name, config, training, results, context) -> None:
        write_depth_card(folder, name, config, training, results, context)

    def summary(self, results: dict, folder: Path) -> str:
        return (
            f"\nRMSE: {results['rmse']:.4g}; relative error: {results['abs_rel']:.2f} %; within a factor of 1.25 "
            f"(delta_1): {results['delta1']:.2f} % of the pixels of {results['num_test']} held-out pictures.\n"
            f"The model is in {folder}: pipeline('depth-estimation', {str(folder)!r}) after `import hf_mim`."
        )


def main(argv: list[str] | None = None) -> int:
    """`examples/run_depth_estimation.py`: reads the flags, trains, and tests. Returns the exit status."""
    return run_job(lambda: train_dense(DepthTask(), *parse_arguments(CLASSES, argv, DEPTH_PRESETS)))
