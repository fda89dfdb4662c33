"""The verdict on a run: what it is compared with, and where it is said."""

import json
from collections.abc import Callable
from pathlib import Path

from transformers import TrainerCallback

from ..data.dataset import ImageDataset
from ..data.loading import spread_indices, without_broken
from ..evaluation.appraisal import MAX_PICTURES, Appraisal
from ..evaluation.verdict import describe_reference, read_curves
from ..training.arguments import MIMTrainingArguments
from ..training.command import ModelArguments, say
from ..training.trainer import MIMTrainer


def reference_of(model_args: ModelArguments, model_type: str) -> Callable[[int], str]:
    """From images seen to what the preset's reference curve says; or why there is none of this run."""
    curves = read_curves()
    changed = [
        f"--{name} is {value}"
        for name in ("patch_size", "mask_ratio", "config_overrides", "model_name_or_path")
        if (value := getattr(model_args, name)) is not None
    ]
    preset = None if changed else model_args.preset
    why_not = f"the run is not that of the preset {model_args.preset} ({', '.join(changed)})"
    return lambda images: describe_reference(curves, preset, model_type, images, why_not)


def images_before(stages: list[MIMTrainingArguments], stage: int) -> int:
    """Images that the stages before one have seen, which are finished."""
    number = 0
    for args in stages[:stage]:
        state = json.loads((Path(args.output_dir) / "trainer_state.json").read_text())
        number += state["global_step"] * args.effective_batch_size
    return number


def appraise(
    trainer: MIMTrainer,
    images: ImageDataset,
    held_out,
    processor,
    *,
    before: int,
    reference: Callable[[int], str],
    skip_broken: bool,
) -> Appraisal | None:
    """Has a trainer say its verdict after each evaluation; None under FSDP, where no process has the whole encoder."""
    args = trainer.args
    if args.fsdp_plugin_args is not None:
        return None
    images = images.select(spread_indices(len(images), MAX_PICTURES))
    trainer.appraisal = Appraisal(
        without_broken(images) if skip_broken else images,
        held_out,
        processor,
        seed=args.seed,
        images_per_step=args.effective_batch_size,
        images_before=before,
        reference=reference,
        feature_evaluation=trainer.feature_evaluation,
        num_workers=args.dataloader_num_workers,
        bf16=args.bf16,
    )
    trainer.add_callback(SayVerdict(trainer.appraisal))
    return trainer.appraisal


class SayVerdict(TrainerCallback):
    """After each evaluation, below its numbers."""

    def __init__(self, appraisal: Appraisal):
        self.appraisal = appraisal

    def on_evaluate(self, args, state, control, **kwargs):
        if self.appraisal.last is not None:
            say(f"Step {state.global_step}. {self.appraisal.last}")
