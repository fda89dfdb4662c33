"""The job of training a model that tells something of each pixel, whatever that is: from flags to how right it is."""

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from accelerate import PartialState
from transformers import set_seed

from ..data.arguments import DataArguments
from ..data.dataset import ImageDataset
from ..data.dense import DenseDataset, DenseTransform, MapArguments, WholePictures
from ..data.image_processing import MIMImageProcessor
from ..data.images import BrokenImageError
from ..data.loading import resolve_mean_std, spread_indices
from ..evaluation.pictures import draw_loss_curves, label_rows, to_rgb, unnormalise
from ..files import replacing, write_json
from ..hub.cards import CardContext
from ..hub.sharing import push_run
from ..models.vit.sizes import as_pair
from ..training.arguments import ViTTrainingArguments
from ..training.checkpoints import checkpoint_to_resume
from ..training.command import ClassifierArguments, say
from ..training.dense_trainers import DenseTrainer
from ..training.run_lock import only_run_in
from ..training.task_models import build_dense, build_dense_config
from ..training.trainable import describe_trainable, set_trainable
from ..training.weights import trained_normalization
from .sharing import card_context, card_name
from .training import train_to_the_end

_NUM_SHOWN = 8


@dataclass
class DenseArguments(ViTTrainingArguments):
    """
    [`ViTTrainingArguments`] with the defaults of fine-tuning a model of pixels, and its augmentation.

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
        super().__post_init__()
        if self.fsdp_plugin_args is not None:
            raise ValueError("Models of pixels are trained with whole weights in each process: leave --fsdp out.")
        self.prediction_loss_only = False
        self.label_names = ["labels"]


class DenseTask(ABC):
    """
    What one task differs in from others.

    Attributes:
        suffix (`str`): Of the model's class.
        trainer_class: The Trainer.
        picture (`str`): Name of the sheet of held-out pictures.
    """

    suffix: ClassVar[str]
    trainer_class: ClassVar[type[DenseTrainer]]
    picture: ClassVar[str]

    @abstractmethod
    def load(self, data_args: DataArguments, map_args: MapArguments, seed: int) -> tuple[ImageDataset, ImageDataset]:
        """Training and held-out pictures with their maps, all of which is right."""

    @abstractmethod
    def configure(self, config, args: DenseArguments) -> None:
        """Writes the head, and what `load` has found, into the model's config."""

    @abstractmethod
    def settings(self) -> dict:
        """What decides about a run, besides what all tasks have."""

    @abstractmethod
    def results(self, scores: dict) -> dict:
        """The scores of an evaluation, as `results.json` has them."""

    @abstractmethod
    def colours(self, truths: list[torch.Tensor]):
        """What makes RGB, uint8 (height, width, 3), of maps (height, width), in view of the `truths`."""

    @abstractmethod
    def write_card(
        self, folder: Path, name: str, config, training: dict[str, str], results: dict, context: CardContext
    ) -> None:
        """Writes README.md of a run."""

    @abstractmethod
    def summary(self, results: dict, folder: Path) -> str:
        """How right the model is, and how it is used, in two lines."""


def train_dense(
    task: DenseTask,
    model_args: ClassifierArguments,
    data_args: DataArguments,
    map_args: MapArguments,
    args: DenseArguments,
) -> int:
    """
    Trains a model of pixels, saves it and its image processor, and says how right it is.

    Everything that can be wrong with the input is looked at before the first step.

    Returns:
        `int`: 0, or 130 after an interrupt.
    """
    with only_run_in(args.output_dir):
        return _train_dense(task, model_args, data_args, map_args, args)


def _train_dense(task: DenseTask, model_args, data_args, map_args, args) -> int:
    if data_args.streaming or data_args.skip_broken_images or model_args.lora_rank is not None:
        raise ValueError("Models of pixels take no --streaming, --skip_broken_images or --lora_rank: leave them out.")
    config, encoder = build_dense_config(model_args, data_args.image_height_width, data_args.num_channels)
    size, channels = as_pair(config.image_size), config.num_channels
    # Scenes are drawn at this size; other pictures keep theirs.
    data_args = data_args.for_model(channels, size)
    try:
        with PartialState().main_process_first():
            train, validation = task.load(data_args, map_args, args.seed)
    except BrokenImageError as error:
        raise ValueError(f"{error} Remove it and its {map_args.kind}: models of pixels skip no picture.") from error
    task.configure(config, args)
    set_seed(args.seed)
    model = build_dense(model_args, config, encoder, task.suffix)
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
    transform = DenseTransform(
        map_args.kind,
        map_args.unknown,
        size,
        mean,
        std,
        scale_jitter=args.scale_jitter,
        horizontal_flip=data_args.horizontal_flip,
        photometric_jitter=args.photometric_jitter,
        seed=args.seed if args.data_seed is None else args.data_seed,
    )
    held_out = DenseDataset(validation, WholePictures(map_args.kind, size, mean, std))
    trainer = task.trainer_class(
        model=model,
        args=args,
        train_dataset=DenseDataset(train, transform),
        eval_dataset=held_out,
        processing_class=processor,
        run_settings={
            "start": model_args.model_name_or_path or "untrained",
            **task.settings(),
            "trainable": model_args.trainable,
            "drop_path_rate": model_args.drop_path_rate,
            "horizontal_flip": data_args.horizontal_flip,
            "image_mean": list(map(float, mean)),
            "image_std": list(map(float, std)),
        },
    )
    described = (
        f"{type(model).__name__}: {describe_trainable(model)}; {len(train)} training and {len(validation)} held-out "
        f"pictures; effective batch {args.effective_batch_size}, peak learning rate {args.learning_rate:.2e}, "
        f"{args.precision} on {args.device}."
    )
    if not train_to_the_end(trainer, checkpoint, described):
        return 130
    trainer.save_model(_internal_call=True)
    trainer.save_state()
    trainer.evaluate()
    if trainer.is_world_process_zero():
        results = task.results(trainer.scores) | {"num_train": len(train), "num_test": len(held_out)}
        write_results(task, trainer, data_args, results)
    PartialState().wait_for_everyone()
    if args.push_to_hub:
        say(f"Pushed to {push_run(trainer, None)}.")
    return 0


def write_results(task: DenseTask, trainer: DenseTrainer, data_args: DataArguments, results: dict) -> None:
    """Writes `results.json`, pictures and the card, and says how right the model is and where it lies."""
    folder, run = Path(trainer.args.output_dir), trainer.run_record["decides"]
    write_json(folder / "results.json", results)
    curves = folder / "loss_curves.png"
    drawn = [curves] if draw_loss_curves(trainer.state.log_history, curves) else []
    draw_held_out(task, trainer, run["image_mean"], run["image_std"])
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
    # Stock segmenters and estimators of depth have other heads: the repository's root is the model itself.
    context = card_context(trainer, data_args, [folder / task.picture, *drawn], None)
    task.write_card(folder, card_name(trainer), trainer.model.config, training, results, context)
    say(task.summary(results, folder))


def draw_held_out(task: DenseTask, trainer: DenseTrainer, mean, std) -> None:
    """Writes the task's sheet: held-out pictures, what they show, and what is told of them."""
    window, data = as_pair(trainer.model.config.image_size), trainer.eval_dataset
    pictures, truths, told = [], [], []
    trainer.model.eval()
    for index in spread_indices(len(data), _NUM_SHOWN):
        item = data[0, index]
        with torch.no_grad(), trainer.averaged_weights():
            maps = trainer.predict_picture(item["pixel_values"]).cpu()
        # Of one size, that of a window: the middle of each picture.
        pictures.append(to_rgb(unnormalise(_middle(item["pixel_values"], window)[None], mean, std))[0])
        truths.append(_middle(_at_size(item["labels"], maps.shape[1:]), window))
        told.append(_middle(trainer.told(maps), window))
    colour = task.colours(truths)
    rows = {"picture": pictures, "truth": list(map(colour, truths)), "told": list(map(colour, told))}
    sheet = label_rows({name: np.stack(images) for name, images in rows.items()})
    with replacing(Path(trainer.args.output_dir) / task.picture) as temporary:
        sheet.save(temporary, format="PNG")


def _at_size(numbers: torch.Tensor, size) -> torch.Tensor:
    resized = torch.nn.functional.interpolate(numbers[None, None].float(), size=tuple(size), mode="nearest")[0, 0]
    return resized.to(numbers.dtype)


def _middle(maps: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    top, left = ((side - wanted) // 2 for side, wanted in zip(maps.shape[-2:], size, strict=True))
    return maps[..., top : top + size[0], left : left + size[1]]
