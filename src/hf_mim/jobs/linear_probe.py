"""Linear probing: from flags to the accuracy of linear classifiers on frozen features."""

import math
import os
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import gather
from huggingface_hub.constants import HF_HOME
from torch.utils.data import DataLoader

from ..data.arguments import DataArguments
from ..data.pretraining import EpochSampler, PretrainingDataset
from ..data.transforms import PretrainingTransform
from ..evaluation.attentive_probe import LEARNING_RATES, NUM_EPOCHS, AttentiveProbe
from ..evaluation.encoders import PATCHES, blocks_read
from ..evaluation.features import extract_features, shared_labels
from ..evaluation.linear_probe import LinearProbe, Probe, train_probes
from ..evaluation.online import check_labelled
from ..evaluation.report import few_pictures, label_notes, text_table
from ..files import write_json
from ..training.arguments import ViTTrainingArguments
from ..training.command import parse_arguments, say
from ..training.errors import run_job
from ..training.run_lock import only_run_in
from ..training.run_record import check_same_run, circumstances, describe_images, set_record_aside, write_record
from .loading import Subject, load_subject

# The papers' crops are torchvision's own (8% of the area or more), and nothing is mirrored.
# Batches are ImageNet's unless said otherwise.
_PAPER = {"augment": True, "crop_scale_min": 0.08, "horizontal_flip": False}
_PILAMIM = _PAPER | {"learning_rate": [3.0], "num_train_epochs": 100}
_MAE = _PAPER | {"base_learning_rate": [0.1], "num_train_epochs": 90, "warmup_epochs": 10, "batch_size": 16384}
PRESETS = {
    # Minutes on a CPU.
    "tiny": {
        "learning_rate": [1.0, 3.0, 10.0, 30.0, 100.0],
        "num_train_epochs": 30,
        "batch_size": 256,
        "augment": False,
    },
    # PiLaMIM's appendix A.5 (CIFAR, CLEVR; ImageNet and Places365; iNaturalist 2021).
    "pilamim": _PILAMIM | {"batch_size": 1024},
    "pilamim_imagenet": _PILAMIM | {"batch_size": 16384},
    "pilamim_inat21": _PILAMIM | {"batch_size": 8192},
    # TEC's table 11, OCL's table 11.
    "tec": _MAE,
    "ocl": _MAE,
    "ocl_large": _MAE | {"num_train_epochs": 50, "batch_size": 1024},
    # AIM's and V-JEPA's, for minutes on a CPU.
    "attentive": {
        "probe": "attentive",
        "learning_rate": list(LEARNING_RATES),
        "num_train_epochs": NUM_EPOCHS,
        "batch_size": 256,
        "weight_decay": 0.01,
        "augment": False,
    },
}

_RESULTS = "linear_probe.json"
# Of the arguments, what decides the probes' accuracy.
_DECIDING = (
    "model_name_or_path",
    "probe",
    "pooling",
    "augment",
    "batch_size",
    "learning_rate",
    "num_train_epochs",
    "warmup_epochs",
    "momentum",
    "weight_decay",
    "seed",
)


@dataclass
class ProbeArguments(ViTTrainingArguments):
    """
    What is probed, and how. Of transformers' `TrainingArguments` those of devices, precision, seed and data loading
    count, and the ones named here; optimiser (LARS; AdamW of an attentive probe) and schedule (cosine) are the
    protocol's.
    """

    model_name_or_path: str | None = field(
        default=None, metadata={"help": "Any ViT with a [CLS] token: hf_mim's, ViT, ViTMAE, DINOv2, DINOv3, CLIP."}
    )
    preset: str = field(default="tiny", metadata={"help": f"The protocol: {', '.join(PRESETS)}."})
    probe: str = field(
        default="linear",
        metadata={
            "help": "linear, on --pooling; or attentive: one learned query over all patch tokens, then linear (see "
            "--preset attentive)."
        },
    )
    pooling: str = field(
        default="cls",
        metadata={"help": "cls, mean (of the patches) or last_N ([CLS] of the last N blocks, concatenated)."},
    )
    augment: bool = field(
        default=True,
        metadata={
            "help": "Encode random crops and flips of the training pictures at every epoch. False: features of the "
            "whole pictures, computed once and kept in --feature_cache_dir."
        },
    )
    batch_size: int = field(
        default=1024,
        metadata={
            "help": "Pictures of one step over all processes. --per_device_train_batch_size is how many the encoder "
            "takes at once, and changes no result."
        },
    )
    learning_rate: list[float] | None = field(
        default=None, metadata={"help": "Peak learning rates as they are, one or several: trained side by side."}
    )
    base_learning_rate: list[float] = field(
        default_factory=lambda: [0.1],
        metadata={"help": "Peak learning rates per 256 pictures; not used if learning_rate is given."},
    )
    num_train_epochs: int = field(default=90, metadata={"help": "Passes over the training pictures."})
    warmup_epochs: float | None = field(
        default=None, metadata={"help": "Linear warm-up in epochs. Default: a tenth of num_train_epochs."}
    )
    momentum: float = field(default=0.9, metadata={"help": "LARS' momentum."})
    weight_decay: float = field(default=0.0, metadata={"help": "The optimiser's weight decay, of the weights."})
    per_device_train_batch_size: int = field(
        default=64, metadata={"help": "Pictures that the encoder of each process takes at once."}
    )
    feature_cache_dir: str = field(
        default=os.path.join(HF_HOME, "hf_mim", "features"), metadata={"help": "Where features are kept."}
    )

    def __post_init__(self):
        if self.preset not in PRESETS:
            raise ValueError(f"preset is {self.preset!r}; expected one of {', '.join(PRESETS)}.")
        if self.model_name_or_path is None:
            raise ValueError("--model_name_or_path is missing: the folder or the repository of the model to probe.")
        if self.output_dir is None:
            raise ValueError("--output_dir is missing: where linear_probe.json goes.")
        blocks_read(self.pooling)
        if self.probe not in ("linear", "attentive"):
            raise ValueError(f"--probe is {self.probe!r}; expected linear or attentive.")
        if self.batch_size < 2 or self.num_train_epochs < 1:
            raise ValueError(
                f"--batch_size must be at least 2 and --num_train_epochs at least 1, got {self.batch_size} and "
                f"{self.num_train_epochs}."
            )
        if self.warmup_epochs is None:
            self.warmup_epochs = self.num_train_epochs / 10
        if not 0 <= self.warmup_epochs < self.num_train_epochs:
            raise ValueError(
                f"--warmup_epochs must be at least 0 and below --num_train_epochs ({self.num_train_epochs}), got "
                f"{self.warmup_epochs} (of the preset {self.preset}, where it was not given)."
            )
        if self.max_steps > 0:
            raise ValueError("The probe is counted in epochs: give --num_train_epochs instead of --max_steps.")
        scale = self.batch_size / 256
        rates = self.learning_rate or [rate * scale for rate in self.base_learning_rate]
        if not rates or not all(math.isfinite(rate) and rate > 0 for rate in rates):
            raise ValueError(f"The learning rates must be above 0, got {rates}.")
        # The parent would scale a single one by a batch that is not the probe's.
        self.learning_rate = 0.0
        super().__post_init__()
        self.learning_rate = rates
        if self.batch_size % self.world_size:
            raise ValueError(
                f"--batch_size {self.batch_size} cannot be shared equally by {self.world_size} processes."
            )


def main(argv: list[str] | None = None) -> int:
    """`examples/run_linear_probe.py`: reads the flags, trains the probes, prints a table. Returns the exit status."""
    return run_job(lambda: probe(*parse_arguments((ProbeArguments, DataArguments), argv, PRESETS)))


def probe(args: ProbeArguments, data_args: DataArguments) -> int:
    """
    Trains the linear probes, writes `output_dir/linear_probe.json`, and prints what is in it; `run.json` has what
    decided it.

    Raises:
        ValueError: If model or pictures do not fit, or if the folder holds another run.
    """
    with only_run_in(args.output_dir):
        return _probe(args, data_args)


def _probe(args: ProbeArguments, data_args: DataArguments) -> int:
    subject = load_subject(args.model_name_or_path, data_args, seed=args.seed, device=args.device)
    train, test = subject.pictures.train, subject.pictures.validation
    train_labels, test_labels = shared_labels(train, test)
    check_labelled(subject.pictures, train_labels, "a linear probe needs them")
    if len(train) < args.batch_size:
        raise ValueError(
            f"{train.source} has {len(train)} pictures, fewer than the {args.batch_size} of one step. Choose a "
            "smaller --batch_size."
        )
    say(
        f"{_what(args)} of {args.model_name_or_path}: {len(train)} training and {len(test)} "
        f"held-out pictures, {'crops and flips' if args.augment else 'whole pictures'}, {args.num_train_epochs} "
        f"epochs of batches of {args.batch_size}, {len(args.learning_rate)} learning rates side by side."
    )
    record = _record(subject, args, data_args)
    if str(args.resume_from_checkpoint).lower() != "false":
        check_same_run(args.output_dir, record)
    notes = [note for label in train_labels for note in label_notes(label, train_labels, test_labels, 0)]
    for note in notes:
        say(note)
    test_features = _features(subject, test, args)
    if not test_features.isfinite().all():
        raise ValueError(
            f"The features of {args.model_name_or_path} are not finite: there is nothing to probe. Look at its "
            "weights, and at --bf16."
        )
    if args.augment:
        batches = _AugmentedBatches(subject, train_labels, args, data_args)
    else:
        batches = _CachedBatches(_features(subject, train, args), train_labels, args)
    probes = {
        label: _build_probe(
            args, test_features.shape[-1], int(max(train_labels[label].max(), test_labels[label].max())) + 1
        )
        for label in train_labels
    }
    results = train_probes(
        probes,
        batches,
        len(train) // args.batch_size,
        test_features,
        test_labels,
        num_epochs=args.num_train_epochs,
        warmup_epochs=args.warmup_epochs,
        on_epoch=lambda epoch, now: _say_epoch(epoch, now, args.num_train_epochs),
    )
    if PartialState().is_main_process:
        path = Path(args.output_dir) / _RESULTS
        set_record_aside(args.output_dir, record, _RESULTS)
        write_record(args.output_dir, record)
        write_json(path, _describe(args, data_args, record["decides"]) | {"notes": notes, "results": results})
        few = few_pictures(len(test))
        print(f"\nAccuracy in % on {len(test)} held-out pictures{few}: last epoch / best epoch (which)")
        print(text_table(probe_table(results)))
        print(f"\nAll epochs are in {path}.", flush=True)
    PartialState().wait_for_everyone()
    return 0


def _what(args: ProbeArguments) -> str:
    return "Attentive probe" if args.probe == "attentive" else f"Linear probe, pooling {args.pooling},"


def _build_probe(args: ProbeArguments, dim: int, num_classes: int) -> Probe:
    settings = {"weight_decay": args.weight_decay, "seed": args.seed}
    if args.probe == "attentive":
        probe = AttentiveProbe(dim, num_classes, args.learning_rate, **settings)
    else:
        probe = LinearProbe(dim, num_classes, args.learning_rate, momentum=args.momentum, **settings)
    return probe.to(args.device)


def probe_table(results: dict[str, list[dict]]) -> list[list[str]]:
    """Rows of text, the head first: for each learning rate and label, accuracy after the last / the best epoch."""
    rows = [["learning rate", *results]]
    for heads in zip(*results.values(), strict=True):
        cells = [f"{head['last']:.1f} / {head['best']:.1f} ({head['best_epoch']})" for head in heads]
        rows.append([f"{heads[0]['learning_rate']:g}", *cells])
    return rows


def _say_epoch(epoch: int, now: dict[str, list[float]], num_epochs: int) -> None:
    if (epoch + 1) % max(1, num_epochs // 10) == 0:
        say(f"epoch {epoch + 1}: " + ", ".join(f"{label} {max(values):.1f}" for label, values in now.items()))


def _record(subject: Subject, args: ProbeArguments, data_args: DataArguments) -> dict:
    """What decides the probes' accuracy, and what else is worth knowing; as [`run_record`] is of a training."""
    decides = {"job": "probe", "model_type": subject.encoder.model.config.model_type}
    decides |= describe_images(_Told(subject.pictures.train))
    held_out = describe_images(_Told(subject.pictures.validation))
    decides |= {"num_held_out": held_out["num_pictures"], "held_out_fingerprint": held_out["fingerprint"]}
    decides |= {"weights": subject.encoder.digest(), "image_size": list(subject.image_size)}
    decides |= {"image_mean": list(map(float, subject.mean)), "image_std": list(map(float, subject.std))}
    decides |= {name: getattr(args, name) for name in _DECIDING} | {"precision": args.precision}
    if args.augment:
        decides |= {name: getattr(data_args, name) for name in ("crop_scale_min", "horizontal_flip")}
    return {"decides": decides, "also": circumstances(args)}


class _Told:
    """Pictures and all that is to be told of them, as `describe_images` takes them."""

    def __init__(self, images):
        self.pictures, self.labels = images, images.labels

    def __len__(self) -> int:
        return len(self.pictures)


def _describe(args: ProbeArguments, data_args: DataArguments, run: dict) -> dict:
    """What `linear_probe.json` says of its accuracies, by the record's `decides`."""
    return {name: run[name] for name in _DECIDING if name != "learning_rate"} | {
        "preset": args.preset,
        "bf16": run["precision"] == "bfloat16",
        "data": data_args.dataset_name or data_args.train_dir or "scenes (embedded)",
        "num_train": run["num_pictures"],
        "num_test": run["num_held_out"],
    }


def _features(subject: Subject, images, args: ProbeArguments) -> torch.Tensor:
    features = extract_features(
        {"": subject.encoder},
        images,
        subject.processor,
        [_pooling(args)],
        batch_size=args.per_device_train_batch_size,
        num_workers=args.dataloader_num_workers,
        bf16=args.bf16,
        cache_dir=args.feature_cache_dir,
    )
    return features[""][_pooling(args)]


def _pooling(args: ProbeArguments) -> str:
    return PATCHES if args.probe == "attentive" else args.pooling


class _CachedBatches:
    """Batches of features that are there already; every process takes all, so that all have the same probe."""

    def __init__(self, features: torch.Tensor, labels: dict[str, torch.Tensor], args: ProbeArguments):
        self.features, self.labels, self.args = features, labels, args
        self.order = EpochSampler(len(features), seed=args.seed)

    def __call__(self, epoch: int) -> Iterator[tuple[torch.Tensor, dict[str, torch.Tensor]]]:
        size, device = self.args.batch_size, self.args.device
        self.order.set_epoch(epoch)
        order = torch.tensor([index for _, index in self.order])
        for rows in order[: len(order) // size * size].split(size):
            yield (
                self.features[rows].to(device),
                {name: column[rows].to(device) for name, column in self.labels.items()},
            )


class _AugmentedBatches:
    """
    Batches of features of random crops and flips, which are functions of (seed, epoch, index).

    Each process encodes its share of a batch and gets the features of all: the probes of all processes stay equal, and
    their BatchNorm is that of the whole batch, as with one process.
    """

    def __init__(self, subject: Subject, labels: dict[str, torch.Tensor], args: ProbeArguments, data_args):
        transform = PretrainingTransform(
            subject.image_size,
            0,
            subject.mean,
            subject.std,
            crop_scale=(data_args.crop_scale_min, 1.0),
            horizontal_flip=data_args.horizontal_flip,
            seed=args.seed,
        )
        self.data = PretrainingDataset(subject.pictures.train, transform)
        self.encoder, self.labels, self.args = subject.encoder, labels, args
        self.order = EpochSampler(len(self.data), seed=args.seed)

    def __call__(self, epoch: int) -> Iterator[tuple[torch.Tensor, dict[str, torch.Tensor]]]:
        args, state = self.args, PartialState()
        self.order.set_epoch(epoch)
        order = list(self.order)
        steps = [order[i : i + args.batch_size] for i in range(0, len(order), args.batch_size)]
        steps = [step for step in steps if len(step) == args.batch_size]
        share = args.batch_size // state.num_processes
        size = args.per_device_train_batch_size
        mine = [step[state.process_index * share :][:share] for step in steps]
        loader = DataLoader(
            self.data,
            batch_sampler=[part[i : i + size] for part in mine for i in range(0, share, size)],
            num_workers=args.dataloader_num_workers,
            generator=torch.Generator(),
        )
        encoded = (self._encode(batch["pixel_values"]) for batch in loader)
        for step in steps:
            parts = [next(encoded) for _ in range(0, share, size)]
            features = torch.cat(parts)
            if state.num_processes > 1:
                features = gather(features)
            rows = torch.tensor([index for _, index in step])
            yield features, {name: column[rows].to(args.device) for name, column in self.labels.items()}

    def _encode(self, pixel_values: torch.Tensor) -> torch.Tensor:
        with torch.autocast(self.args.device.type, torch.bfloat16) if self.args.bf16 else nullcontext():
            return self.encoder.features(pixel_values, [_pooling(self.args)])[_pooling(self.args)]
