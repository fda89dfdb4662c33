"""The job of `examples/run_image_classification.py`: from flags to a classifier, and to how often it is right."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import numpy as np
from accelerate import PartialState
from transformers import set_seed

from ..data.arguments import DataArguments
from ..data.dataset import ImageDataset
from ..data.finetuning import EvaluationTransform, FineTuningTransform, LabelledDataset, MixingCollator
from ..data.image_processing import build_image_processor, evaluation_transform
from ..data.loading import ImageSplits, check_images, load_images, resolve_mean_std, without_broken
from ..data.sources.folder import check_folder, from_folder
from ..evaluation.pictures import draw_loss_curves
from ..evaluation.report import few_pictures
from ..evaluation.robustness import match_classes
from ..files import write_json
from ..hub.cards import main_score, write_classifier_card
from ..hub.export import stock_format
from ..hub.sharing import push_run
from ..models.vit.sizes import as_pair
from ..training.arguments import ViTTrainingArguments
from ..training.checkpoints import checkpoint_to_resume
from ..training.command import ClassifierArguments, parse_arguments, say
from ..training.errors import run_job
from ..training.finetuning_trainer import FineTuningTrainer
from ..training.presets import FINE_TUNING_PRESETS
from ..training.run_lock import only_run_in
from ..training.task_models import build_classifier, build_classifier_config
from ..training.trainable import add_lora, describe_trainable, set_trainable
from ..training.weights import trained_normalization
from .sharing import card_context, card_name
from .training import train_to_the_end


@dataclass
class FineTuningArguments(ViTTrainingArguments):
    """
    [`ViTTrainingArguments`] with the defaults of fine-tuning ViT-B (MAE's), and its augmentation.

    Raises:
        ValueError: If a number is out of its range, or mixing meets batches that cannot be paired.
    """

    _deciding: ClassVar[tuple[str, ...]] = (
        *ViTTrainingArguments._deciding,
        "layer_decay",
        "label_smoothing_factor",
        "mixup",
        "cutmix",
        "random_erasing",
        "auto_augment",
        "ema_decay",
    )

    base_learning_rate: float = field(
        default=5e-4,
        metadata={
            "help": "Learning rate of the head per 256 pictures: the peak is base_learning_rate * effective batch / "
            "256. Not used if learning_rate is given."
        },
    )
    layer_decay: float = field(
        default=0.65, metadata={"help": "Each block learns at the next one's rate times this; 1: all at the head's."}
    )
    adam_beta2: float = field(default=0.999, metadata={"help": "AdamW's beta2."})
    label_smoothing_factor: float = field(
        default=0.1, metadata={"help": "Share of the label that all classes are given evenly, in training."}
    )
    mixup: float = field(default=0.8, metadata={"help": "Alpha of mixup; 0 for none."})
    cutmix: float = field(default=1.0, metadata={"help": "Alpha of cutmix; 0 for none. With mixup: by turns."})
    random_erasing: float = field(
        default=0.25, metadata={"help": "Probability that a rectangle of a picture is replaced by noise."}
    )
    auto_augment: str = field(
        default="rand-m9-mstd0.5-inc1", metadata={"help": "RandAugment in timm's words, or none."}
    )
    ema_decay: float | None = field(
        default=None,
        metadata={"help": "Average the weights over steps by this decay; evaluated and saved are the averages."},
    )
    robustness_sets: list[str] | None = field(
        default=None,
        metadata={
            "help": "Further test sets, NAME=FOLDER: a folder a class, named by the model's labels or WordNet ids. "
            "Classes may be missing; only those that are there are then looked for."
        },
    )
    label_column_name: str | None = field(
        default=None, metadata={"help": "The label to learn, where the data has several. Default: the only one."}
    )

    def __post_init__(self):
        ranges = {
            "layer_decay": (0 < self.layer_decay <= 1, "above 0 and at most 1"),
            "label_smoothing_factor": (0 <= self.label_smoothing_factor < 1, "in [0, 1)"),
            "mixup": (self.mixup >= 0, "at least 0"),
            "cutmix": (self.cutmix >= 0, "at least 0"),
            "random_erasing": (0 <= self.random_erasing <= 1, "in [0, 1]"),
            "ema_decay": (self.ema_decay is None or 0 <= self.ema_decay < 1, "in [0, 1)"),
        }
        for name, (fits, expected) in ranges.items():
            if not fits:
                raise ValueError(f"--{name} is {getattr(self, name)}; expected a number {expected}.")
        if self.mixup or self.cutmix:
            if self.per_device_train_batch_size % 2:
                raise ValueError(
                    f"mixup and cutmix mix pictures in pairs; --per_device_train_batch_size is "
                    f"{self.per_device_train_batch_size}. Choose an even one, or --mixup 0 --cutmix 0."
                )
            if not self.dataloader_drop_last:
                raise ValueError("mixup and cutmix need whole batches: leave --dataloader_drop_last true.")
        if self.ema_decay is not None and self.load_best_model_at_end:
            raise ValueError("--load_best_model_at_end takes a checkpoint's weights, not the averages of --ema_decay.")
        super().__post_init__()
        if self.ema_decay is not None and self.fsdp_plugin_args is not None:
            raise ValueError("--ema_decay needs whole weights in each process: not with --fsdp.")
        # Only a few indices a picture are kept of the predictions.
        self.prediction_loss_only = False
        self.label_names = ["labels"]


def main(argv: list[str] | None = None) -> int:
    """`examples/run_image_classification.py`: reads the flags, trains, and tests. Returns the exit status."""
    classes = (ClassifierArguments, DataArguments, FineTuningArguments)
    return run_job(lambda: finetune(*parse_arguments(classes, argv, FINE_TUNING_PRESETS)))


def finetune(model_args: ClassifierArguments, data_args: DataArguments, args: FineTuningArguments) -> int:
    """
    Fine-tunes, saves the classifier and its image processor, and says how often it is right.

    Everything that can be wrong with the input is looked at before the first step.

    Returns:
        `int`: 0, or 130 after an interrupt.
    """
    with only_run_in(args.output_dir):
        return _finetune(model_args, data_args, args)


def _finetune(model_args: ClassifierArguments, data_args: DataArguments, args: FineTuningArguments) -> int:
    if data_args.streaming:
        raise ValueError("Fine-tuning goes through its labelled pictures in epochs: leave --streaming out.")
    if model_args.lora_rank is not None and args.ema_decay is not None:
        raise ValueError("--ema_decay averages the network's own weights, not --lora_rank's: leave one out.")
    robustness = dict(_name_and_folder(text) for text in args.robustness_sets or ())
    if len(robustness) < len(args.robustness_sets or ()):
        raise ValueError(f"--robustness_sets has a name twice: {' '.join(args.robustness_sets)}.")
    config = build_classifier_config(model_args, data_args.image_height_width, data_args.num_channels)
    data_args = data_args.for_model(config.num_channels, as_pair(config.image_size))
    if args.label_column_name is not None and data_args.label_column_names is None:
        data_args.label_column_names = [args.label_column_name]
    with PartialState().main_process_first():
        pictures = load_images(data_args, seed=args.seed)
    label = choose_label(pictures, args.label_column_name)
    names = pictures.train.label_names[label]
    config.id2label = dict(enumerate(names))
    config.label2id = {name: number for number, name in config.id2label.items()}
    multi_label = pictures.train.multi_label(label)
    config.problem_type = "multi_label_classification" if multi_label else None
    if multi_label:
        if args.robustness_sets:
            raise ValueError(f"--robustness_sets are of one class a picture, and {label!r} may have several.")
        if args.mixup or args.cutmix or args.label_smoothing_factor:
            say(f"Pictures may have several classes of {label!r}: mixup, cutmix and label smoothing are left out.")
            args.mixup = args.cutmix = args.label_smoothing_factor = 0.0
    checkpoint = checkpoint_to_resume(args.output_dir, args.resume_from_checkpoint, config)
    first = check_images(pictures.train, skip_broken=data_args.skip_broken_images)
    check_images(pictures.validation, skip_broken=data_args.skip_broken_images)
    if args.auto_augment != "none" and (data_args.num_channels not in (1, 3) or first.is_floating_point()):
        say("RandAugment is left out: it knows pictures of 8 bits with 1 or 3 channels (--auto_augment none).")
        args.auto_augment = "none"
    mean, std = resolve_mean_std(data_args, pictures.train, trained_normalization(model_args))
    processor = build_image_processor(
        as_pair(config.image_size), config.num_channels, mean, std, floating_point=first.is_floating_point()
    )
    train_data, held_out = build_datasets(data_args, args, config, pictures, label, processor, mean, std)
    tests = {name: load_robustness_set(folder, names, data_args, processor) for name, folder in robustness.items()}

    set_seed(args.seed)
    model = build_classifier(model_args, config)
    set_trainable(model, model_args.trainable)
    tuner = None if model_args.lora_rank is None else add_lora(model, model_args.lora_rank)
    collator = MixingCollator(
        len(names), mixup=args.mixup, cutmix=args.cutmix, label_smoothing=args.label_smoothing_factor
    )
    trainer = FineTuningTrainer(
        model=model,
        args=args,
        data_collator=collator,
        train_dataset=train_data,
        eval_dataset=held_out,
        processing_class=processor,
        run_settings={
            "start": model_args.model_name_or_path or "untrained",
            "label": label,
            "trainable": model_args.trainable,
            "lora_rank": model_args.lora_rank,
            "drop_path_rate": model_args.drop_path_rate,
            "crop_scale_min": data_args.crop_scale_min,
            "horizontal_flip": data_args.horizontal_flip,
            "image_mean": list(map(float, mean)),
            "image_std": list(map(float, std)),
        },
    )
    seen = pictures.train.labels[label]
    unseen = len(names) - (int(seen.any(axis=0).sum()) if multi_label else len(np.unique(seen)))
    described = (
        f"{type(model).__name__}: {describe_trainable(model)}; {len(pictures.train)} training and "
        f"{len(pictures.validation)} held-out pictures, {len(names)} classes of {label!r}"
        f"{', several a picture' if multi_label else ''}"
        f"{f' ({unseen} without a training picture)' if unseen else ''}; effective batch "
        f"{args.effective_batch_size}, peak learning rate {args.learning_rate:.2e}, "
        f"{args.precision} on {args.device}."
    )
    is_done = train_to_the_end(trainer, checkpoint, described)
    if train_data.num_broken:
        say(f"Skipped {train_data.num_broken} broken pictures (--skip_broken_images).")
    if not is_done:
        return 130
    trained = describe_trainable(model)
    if tuner is not None:
        tuner.merge_and_unload()
    # Before the tests, which may meet a broken picture. "Internal": without pushing, which waits for the card.
    trainer.save_model(_internal_call=True)
    trainer.save_state()
    results = {"label": label, "num_train": len(pictures.train), "num_test": len(held_out)}
    results |= _plain_metrics(trainer.evaluate())
    results["robustness"] = {
        name: _plain_metrics(trainer.evaluate(data, metric_key_prefix=f"eval_{name}", classes=classes), name)
        for name, (data, classes) in tests.items()
    }
    form = None
    if trainer.is_world_process_zero():
        form = stock_format(args.output_dir) if args.push_to_hub else None
        write_results(trainer, data_args, results | {"trained": trained}, form)
    PartialState().wait_for_everyone()
    if args.push_to_hub:
        say(f"Pushed to {push_run(trainer, form)}.")
    return 0


def choose_label(pictures: ImageSplits, wanted: str | None) -> str:
    """
    The label to learn: the one asked for, or the only one.

    Raises:
        ValueError: If there is none, or several and none is asked for, fewer than two classes, or pictures without it.
    """
    train, validation = pictures.train, pictures.validation
    there = [name for name in train.labels if name in validation.labels]
    if not there:
        raise ValueError(
            f"{train.source} has no labels to learn: put the pictures into a folder a class, or name a column by "
            "--label_column_name."
        )
    if wanted is None and len(there) > 1:
        raise ValueError(f"The data has the labels {', '.join(there)}: choose one by --label_column_name.")
    label = there[0] if wanted is None else wanted
    if label not in there:
        raise ValueError(f"--label_column_name {label}: the data has the labels {', '.join(there)}.")
    names = train.label_names[label]
    if len(names) < 2:
        raise ValueError(f"The label {label!r} has one class ({', '.join(names)}): there is nothing to tell apart.")
    others = validation.label_names[label]
    if others != names:
        raise ValueError(
            f"The label {label!r} has the classes {', '.join(names[:5])}, ... in {train.source}, and "
            f"{', '.join(others[:5])}, ... in {validation.source}. Make them the same."
        )
    for split in (train, validation):
        values = split.labels[label]
        # Of several labels a picture, a row of -1 where none is known.
        values = values.min(axis=1) if split.multi_label(label) else values
        if values.min() < 0 or values.max() >= len(names):
            wrong = int(((values < 0) | (values >= len(names))).sum())
            raise ValueError(f"{wrong} of {len(values)} pictures of {split.source} have no class of {label!r}.")
    return label


def build_datasets(data_args, args, config, pictures: ImageSplits, label: str, processor, mean, std):
    """The augmented training data, and the held-out pictures as the image processor gives them."""
    augment = FineTuningTransform(
        as_pair(config.image_size),
        mean,
        std,
        crop_scale=(data_args.crop_scale_min, 1.0),
        horizontal_flip=data_args.horizontal_flip,
        seed=args.seed if args.data_seed is None else args.data_seed,
        auto_augment=None if args.auto_augment == "none" else args.auto_augment,
        random_erasing=args.random_erasing,
    )
    skip = data_args.skip_broken_images
    train = LabelledDataset(pictures.train, pictures.train.labels[label], augment, skip_broken=skip)
    held_out = without_broken(pictures.validation) if skip else pictures.validation
    return train, _test_data(held_out, label, processor)


def load_robustness_set(
    folder: str, label_names: list[str], args: DataArguments, processor
) -> tuple[LabelledDataset, list[int]]:
    """
    The pictures of a folder with a sub-folder a class, labelled as the model does, and the classes among them.

    Raises:
        ValueError: If the folder has no classes, or one that is none of the model's.
    """
    (pictures,) = from_folder([check_folder(folder)], args.num_channels)
    if "label" not in pictures.labels:
        raise ValueError(f"--robustness_sets: {folder} has no sub-folder for each of several classes.")
    try:
        classes = match_classes(pictures.label_names["label"], label_names)
    except ValueError as error:
        raise ValueError(f"--robustness_sets: {folder}: {error}") from error
    pictures.labels["label"] = np.array(classes)[pictures.labels["label"]]
    check_images(pictures, skip_broken=args.skip_broken_images)
    if args.skip_broken_images:
        pictures = without_broken(pictures)
    return _test_data(pictures, "label", processor), classes


def _test_data(pictures: ImageDataset, label: str, processor) -> LabelledDataset:
    transform = EvaluationTransform(evaluation_transform(processor, pictures.num_channels))
    return LabelledDataset(pictures, pictures.labels[label], transform)


def _name_and_folder(text: str) -> tuple[str, str]:
    name, equals, folder = text.partition("=")
    if not (name and equals and folder):
        raise ValueError(f"--robustness_sets is {text!r}; expected NAME=FOLDER.")
    return name, folder


def _plain_metrics(metrics: dict[str, float], name: str | None = None) -> dict[str, float]:
    prefix = "eval_" if name is None else f"eval_{name}_"
    wanted = ("loss", "accuracy", "top5_accuracy", "mean_average_precision", "f1")
    return {key: metrics[prefix + key] for key in wanted if prefix + key in metrics}


def write_results(trainer, data_args, results: dict, form: str | None) -> None:
    """
    Writes `results.json`, the loss curves and the card, for a repository in the stock format `form` or for the folder;
    says how good the classifier is and where it lies.
    """
    folder, run = Path(trainer.args.output_dir), trainer.run_record["decides"]
    write_json(folder / "results.json", results)
    curves = folder / "loss_curves.png"
    drawn = [curves] if draw_loss_curves(trainer.state.log_history, curves) else []
    training = {
        "start": run["start"],
        "data": f"{data_args.dataset_name or data_args.train_dir or 'scenes (embedded)'}, label {results['label']!r}, "
        f"{results['num_train']} training pictures",
        "steps": f"{trainer.state.global_step}, of {run['effective_batch_size']} pictures",
        "peak learning rate": f"{run['learning_rate']:.3g}, times {run['layer_decay']:g} a block below the head",
        "augmentation": f"smallest crop {run['crop_scale_min']:g}, {run['auto_augment']}, erasing "
        f"{run['random_erasing']:g}, mixup {run['mixup']:g}, cutmix {run['cutmix']:g}, label smoothing "
        f"{run['label_smoothing_factor']:g}",
        "parameters": results["trained"],
        "precision": run["precision"],
        "seed": str(run["seed"]),
    }
    context = card_context(trainer, data_args, drawn, form)
    write_classifier_card(folder, card_name(trainer), trainer.model.config, training, results, context)
    tested = results["num_test"]
    score = f"{main_score(results):.2f} % of {tested} held-out pictures{few_pictures(tested)}"
    if "f1" in results:
        say(f"\nMean average precision: {score}; F1: {results['f1']:.2f} %.")
    else:
        say(f"\nAccuracy: {score}.")
    for name, metrics in results["robustness"].items():
        say(f"{name}: {metrics['accuracy']:.2f} %.")
    say(f"The classifier is in {folder}: pipeline('image-classification', {str(folder)!r}) after `import hf_mim`.")
