"""The job of `examples/run_semantic_segmentation.py`: from flags to a segmenter, and to how often it is right."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from accelerate import PartialState
from transformers import set_seed

from ..data.arguments import DataArguments
from ..data.image_processing import MIMImageProcessor
from ..data.loading import check_images, hold_out, load_images, resolve_mean_std, spread_indices, subset
from ..data.segmentation import (
    MaskArguments,
    Masks,
    SegmentationDataset,
    SegmentationTransform,
    WholePictures,
    add_masks,
    check_masks,
)
from ..data.sources.datasets import sibling_column
from ..data.sources.folder import check_folder, from_folder
from ..evaluation.dense import class_colours
from ..evaluation.pictures import draw_loss_curves, label_rows, to_rgb, unnormalise
from ..evaluation.segmentation import sliding_logits
from ..files import replacing, write_json
from ..hub.cards import write_segmenter_card
from ..hub.sharing import push_run
from ..models.vit.sizes import as_pair
from ..training.arguments import ViTTrainingArguments
from ..training.building import build_segmenter, build_segmenter_config, trained_normalization
from ..training.callbacks import SaveOnInterrupt
from ..training.checkpoints import checkpoint_to_resume
from ..training.command import ClassifierArguments, parse_arguments, say
from ..training.errors import run_job
from ..training.presets import SEGMENTATION_PRESETS
from ..training.run_lock import only_run_in
from ..training.segmentation_trainer import SegmentationTrainer
from ..training.trainable import describe_trainable, set_trainable

_NUM_SHOWN = 8


@dataclass
class SegmentationArguments(ViTTrainingArguments):
    """
    [`ViTTrainingArguments`] with the defaults of fine-tuning a segmenter, its head and its augmentation.

    Raises:
        ValueError: If a number is out of its range.
    """

    _deciding: ClassVar[tuple[str, ...]] = (
        *ViTTrainingArguments._deciding,
        "layer_decay",
        "ema_decay",
        "scale_jitter",
        "photometric_jitter",
    )

    segmentation_head: str = field(
        default="linear", metadata={"help": "linear (BatchNorm and a 1 x 1 convolution on the patches), or upernet."}
    )
    segmentation_head_size: int = field(default=512, metadata={"help": "Channels of upernet."})
    base_learning_rate: float = field(
        default=1e-3, metadata={"help": "Of the head per 256 pictures. Not used if learning_rate is given."}
    )
    layer_decay: float = field(
        default=0.65, metadata={"help": "Each block learns at the next one's rate times this; 1: all at the head's."}
    )
    adam_beta2: float = field(default=0.999, metadata={"help": "AdamW's beta2."})
    scale_jitter: list[float] = field(
        default_factory=lambda: [0.5, 2.0],
        metadata={"help": "Lowest and highest factor by which a picture is resized before it is cropped."},
    )
    photometric_jitter: bool = field(
        default=True, metadata={"help": "Change brightness, contrast, saturation and hue, by chance."}
    )
    ema_decay: float | None = field(
        default=None,
        metadata={"help": "Average the weights over steps by this decay; evaluated and saved are the averages."},
    )

    def __post_init__(self):
        if not 0 < self.layer_decay <= 1:
            raise ValueError(f"--layer_decay is {self.layer_decay}; expected a number above 0 and at most 1.")
        if len(self.scale_jitter) != 2 or not 0 < self.scale_jitter[0] <= self.scale_jitter[1]:
            raise ValueError(f"--scale_jitter is {self.scale_jitter}; expected two numbers above 0, the lower first.")
        if self.ema_decay is not None and not 0 <= self.ema_decay < 1:
            raise ValueError(f"--ema_decay is {self.ema_decay}; expected a number in [0, 1).")
        if self.segmentation_head == "upernet" and self.per_device_train_batch_size < 2:
            raise ValueError("UperNet's BatchNorm over one number a picture needs --per_device_train_batch_size 2.")
        super().__post_init__()
        if self.fsdp_plugin_args is not None:
            raise ValueError("Segmenters are trained with whole weights in each process: leave --fsdp out.")
        self.prediction_loss_only = False
        self.label_names = ["labels"]


CLASSES = (ClassifierArguments, DataArguments, MaskArguments, SegmentationArguments)


def main(argv: list[str] | None = None) -> int:
    """`examples/run_semantic_segmentation.py`: reads the flags, trains, and tests. Returns the exit status."""
    return run_job(lambda: segment(*parse_arguments(CLASSES, argv, SEGMENTATION_PRESETS)))


def segment(
    model_args: ClassifierArguments, data_args: DataArguments, mask_args: MaskArguments, args: SegmentationArguments
) -> int:
    """
    Trains a segmenter, saves it and its image processor, and says how often it is right.

    Everything that can be wrong with the input is looked at before the first step.

    Returns:
        `int`: 0, or 130 after an interrupt.
    """
    with only_run_in(args.output_dir):
        return _segment(model_args, data_args, mask_args, args)


def _segment(model_args, data_args, mask_args, args) -> int:
    if data_args.streaming or data_args.skip_broken_images or model_args.lora_rank is not None:
        raise ValueError("Segmenters take no --streaming, --skip_broken_images or --lora_rank: leave them out.")
    config, encoder = build_segmenter_config(model_args, data_args.image_height_width, data_args.num_channels)
    size, channels = as_pair(config.image_size), config.num_channels
    # Scenes are drawn at this size; other pictures keep theirs.
    data_args = data_args.for_model(channels, size)
    with PartialState().main_process_first():
        train, validation, names = load_masked(data_args, mask_args, args.seed)
    config.id2label = dict(enumerate(names))
    config.label2id = {name: number for number, name in enumerate(names)}
    config.segmentation_head = args.segmentation_head
    config.segmentation_head_size = args.segmentation_head_size
    set_seed(args.seed)
    model = build_segmenter(model_args, config, encoder)
    if model_args.trainable != "all":
        set_trainable(model, model_args.trainable)
    checkpoint = checkpoint_to_resume(args.output_dir, args.resume_from_checkpoint, model.config)
    mean, std = resolve_mean_std(data_args, train, trained_normalization(model_args))
    processor = MIMImageProcessor(
        num_channels=channels,
        size={"height": size[0], "width": size[1]},
        image_mean=list(map(float, mean)),
        image_std=list(map(float, std)),
    )
    transform = SegmentationTransform(
        size,
        mean,
        std,
        scale_jitter=args.scale_jitter,
        horizontal_flip=data_args.horizontal_flip,
        photometric_jitter=args.photometric_jitter,
        seed=args.seed if args.data_seed is None else args.data_seed,
    )
    held_out = SegmentationDataset(validation, WholePictures(size, mean, std))
    trainer = SegmentationTrainer(
        model=model,
        args=args,
        train_dataset=SegmentationDataset(train, transform),
        eval_dataset=held_out,
        processing_class=processor,
        run_settings={
            "start": model_args.model_name_or_path or "untrained",
            "classes": list(names),
            "trainable": model_args.trainable,
            "drop_path_rate": model_args.drop_path_rate,
            "horizontal_flip": data_args.horizontal_flip,
            "image_mean": list(map(float, mean)),
            "image_std": list(map(float, std)),
        },
    )
    trainer.check_output_dir()
    interrupt = SaveOnInterrupt(trainer)
    trainer.add_callback(interrupt)
    say(
        f"{type(model).__name__} ({args.segmentation_head}): {describe_trainable(model)}; {len(train)} training and "
        f"{len(validation)} held-out pictures, {len(names)} classes; effective batch {args.effective_batch_size}, "
        f"peak learning rate {args.learning_rate:.2e}, {args.precision} on {args.device}."
    )
    if checkpoint is not None:
        say(f"Resuming from {checkpoint}.")
    try:
        trainer.train(resume_from_checkpoint=checkpoint)
    finally:
        interrupt.restore()
    if checkpoint is not None and not trainer.num_steps_trained:
        say(f"Nothing is left to train: {args.output_dir} holds all {trainer.state.global_step} steps of this run.")
    if interrupt.stopped:
        say(f"Stopped after step {trainer.state.global_step}; the same command goes on from there.")
        return 130
    trainer.save_model(_internal_call=True)
    trainer.save_state()
    metrics = trainer.evaluate()
    results = {name: metrics[f"eval_{name}"] for name in ("miou", "mean_accuracy", "pixel_accuracy", "loss")}
    results |= {"iou": dict(zip(names, trainer.iou, strict=True)), "num_train": len(train), "num_test": len(held_out)}
    if trainer.is_world_process_zero():
        write_results(trainer, model_args, data_args, results)
    PartialState().wait_for_everyone()
    if args.push_to_hub:
        push_run(trainer)
    return 0


def load_masked(data_args: DataArguments, mask_args: MaskArguments, seed: int):
    """
    Training and held-out pictures with masks that were all read once, and the names of the classes.

    Raises:
        ValueError: If there are no masks, or one of them is not as it should be.
    """
    if bool(mask_args.train_mask_dir) != bool(data_args.train_dir):
        raise ValueError("--train_dir and --train_mask_dir go together: a folder of pictures, and one of their masks.")
    if mask_args.train_mask_dir and bool(mask_args.validation_mask_dir) != bool(data_args.validation_dir):
        raise ValueError("--validation_dir and --validation_mask_dir go together: give both, or neither.")
    if mask_args.train_mask_dir:
        train, validation = _of_folders(data_args, mask_args)
    else:
        pictures = load_images(data_args, seed=seed)
        train, validation = pictures.train, pictures.validation
        if data_args.dataset_name:
            for split in (train, validation):
                column = sibling_column(
                    split, mask_args.mask_column_name, ["mask", "label", "annotation"], "--mask_column_name"
                )
                split.annotations["mask"] = Masks(column, mask_args)
        elif mask_args.reduce_labels:
            raise ValueError("--reduce_labels is of masks of your own; the scenes' begin with class 0.")
    for split in (train, validation):
        check_images(split)
    names = mask_args.class_names or train.mask_names
    if not data_args.train_dir and not data_args.dataset_name:
        # Drawn by the renderer, which cannot be wrong about them.
        return train, validation, names
    counts = sum(check_masks(split, None if names is None else len(names)) for split in (train, validation))
    if names is None:
        names = [str(number) for number in range(int(np.flatnonzero(counts[:255]).max()) + 1)]
    if len(names) < 2:
        raise ValueError("The masks have one class: there is nothing to tell apart.")
    return train, validation, names


def _of_folders(data_args, mask_args):
    train, *held_out = from_folder(
        [check_folder(folder) for folder in (data_args.train_dir, data_args.validation_dir) if folder],
        data_args.num_channels,
    )
    for split, folder in zip(
        (train, *held_out), (mask_args.train_mask_dir, mask_args.validation_mask_dir), strict=False
    ):
        split.max_image_pixels = data_args.max_image_pixels
        split.labels = {}
        add_masks(split, check_folder(folder), mask_args)
    train, validation = (train, held_out[0]) if held_out else hold_out(train, data_args.validation_fraction)
    return subset(train, data_args.max_train_samples), subset(validation, data_args.max_eval_samples)


def draw_segmentation(trainer, mean, std, names) -> None:
    """Writes `segmentation.png`: held-out pictures, what they show, and what is told of them."""
    model, window = trainer.model, as_pair(trainer.model.config.image_size)
    data = trainer.eval_dataset
    colour = class_colours(len(names))
    rows = {"picture": [], "truth": [], "told": []}
    model.eval()
    for index in spread_indices(len(data), _NUM_SHOWN):
        item = data[0, index]
        with torch.no_grad(), trainer.averaged_weights():
            logits = sliding_logits(model, item["pixel_values"].to(trainer.args.device), window).cpu()
        # Of one size, that of a window: the middle of each picture.
        told, truth = (
            _middle(maps[None], window) for maps in (logits.argmax(dim=0), _at_size(item["labels"], logits.shape[1:]))
        )
        rows["picture"].append(to_rgb(unnormalise(_middle(item["pixel_values"], window)[None], mean, std))[0])
        rows["truth"].append(colour(truth)[0])
        rows["told"].append(colour(told)[0])
    sheet = label_rows({name: np.stack(images) for name, images in rows.items()})
    with replacing(Path(trainer.args.output_dir) / "segmentation.png") as temporary:
        sheet.save(temporary, format="PNG")


def _at_size(mask: torch.Tensor, size) -> torch.Tensor:
    return torch.nn.functional.interpolate(mask[None, None].float(), size=tuple(size), mode="nearest")[0, 0].long()


def _middle(maps: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    top, left = ((side - wanted) // 2 for side, wanted in zip(maps.shape[-2:], size, strict=True))
    return maps[..., top : top + size[0], left : left + size[1]]


def write_results(trainer, model_args, data_args, results: dict) -> None:
    """Writes `results.json`, pictures and the card, and says how good the segmenter is and where it lies."""
    args, folder, run = trainer.args, Path(trainer.args.output_dir), trainer.run_record["decides"]
    write_json(folder / "results.json", results)
    draw_loss_curves(trainer.state.log_history, folder / "loss_curves.png")
    draw_segmentation(trainer, run["image_mean"], run["image_std"], run["classes"])
    training = {
        "start": run["start"],
        "data": f"{data_args.dataset_name or data_args.train_dir or 'scenes (embedded)'}, {results['num_train']} "
        "training pictures",
        "steps": f"{trainer.state.global_step}, of {run['effective_batch_size']} pictures",
        "peak learning rate": f"{run['learning_rate']:.3g}, times {run['layer_decay']:g} a block below the head",
        "augmentation": f"resized by {run['scale_jitter'][0]:g} to {run['scale_jitter'][1]:g}, cropped"
        f"{', flipped' if run['horizontal_flip'] else ''}{', colours changed' if run['photometric_jitter'] else ''}",
        "parameters": describe_trainable(trainer.model),
        "precision": run["precision"],
        "seed": str(run["seed"]),
    }
    write_segmenter_card(folder, args.hub_model_id or str(folder), trainer.model.config, training, results)
    say(
        f"\nmIoU: {results['miou']:.2f} %; mean accuracy: {results['mean_accuracy']:.2f} %; pixel accuracy: "
        f"{results['pixel_accuracy']:.2f} % of {results['num_test']} held-out pictures."
    )
    say(f"The segmenter is in {folder}: pipeline('image-segmentation', {str(folder)!r}) after `import hf_mim`.")
