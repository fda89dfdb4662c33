"""Training arguments whose defaults fit Vision Transformers and masked image modelling."""

import math
import os
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from transformers import TrainingArguments
from transformers.trainer_utils import SchedulerType
from transformers.utils import logging

from .machine import default_workers, process_cores

logger = logging.get_logger(__name__)

_FROM_ZERO = (lambda value: value >= 0, "at least 0")
_ABOVE_ZERO = (lambda value: value > 0, "above 0")
_BELOW_ONE = (lambda value: 0 <= value < 1, "in [0, 1)")
_STEPS = (lambda value: 0 < value < 1 or (value >= 1 and value == int(value)), "a whole number, or a share below 1")
# The numbers that an argument may be.
_RANGES = {
    "per_device_train_batch_size": _ABOVE_ZERO,
    "per_device_eval_batch_size": _ABOVE_ZERO,
    "gradient_accumulation_steps": _ABOVE_ZERO,
    "learning_rate": _FROM_ZERO,
    "base_learning_rate": _FROM_ZERO,
    "warmup_epochs": _FROM_ZERO,
    "warmup_steps": _FROM_ZERO,
    "weight_decay": _FROM_ZERO,
    "adam_beta1": _BELOW_ONE,
    "adam_beta2": _BELOW_ONE,
    "adam_epsilon": _FROM_ZERO,
    "max_grad_norm": _FROM_ZERO,
    "seed": _FROM_ZERO,
    "data_seed": _FROM_ZERO,
    "logging_steps": _STEPS,
    "save_steps": _STEPS,
    "eval_steps": _STEPS,
    "save_total_limit": _ABOVE_ZERO,
    "dataloader_num_workers": _FROM_ZERO,
    "cpu_threads": _ABOVE_ZERO,
}


@dataclass
class ViTTrainingArguments(TrainingArguments):
    """
    transformers' `TrainingArguments` with MAE's recipe as defaults, a learning rate that scales with the effective
    batch, and warm-up in epochs: what pretraining, fine-tuning and probing share.

    Raises:
        ValueError: If a number is out of its range, or `auto_find_batch_size` is combined with a scaled learning rate.
    """

    # What besides length, warm-up, batch and precision decides the result.
    _deciding: ClassVar[tuple[str, ...]] = (
        "seed",
        "data_seed",
        "learning_rate",
        "lr_scheduler_type",
        "lr_scheduler_kwargs",
        "optim",
        "optim_args",
        "weight_decay",
        "adam_beta1",
        "adam_beta2",
        "adam_epsilon",
        "max_grad_norm",
        "dataloader_drop_last",
    )

    base_learning_rate: float = field(
        default=1.5e-4,
        metadata={
            "help": "Learning rate per 256 pictures: the peak is base_learning_rate * effective batch / 256, where "
            "the effective batch is per-device batch x devices x accumulation. Not used if learning_rate is given."
        },
    )
    learning_rate: float | None = field(
        default=None, metadata={"help": "Peak learning rate as it is. Default: scaled from base_learning_rate."}
    )
    warmup_epochs: float | None = field(
        default=None, metadata={"help": "Linear warm-up in epochs; takes precedence over warmup_steps."}
    )
    warmup_steps: float = field(
        default=0.05, metadata={"help": "Linear warm-up in steps, or below 1 as a share of all (40 of 800 epochs)."}
    )
    lr_scheduler_type: SchedulerType | str = field(
        default="cosine", metadata={"help": "Half a cosine to 0, updated every step."}
    )
    weight_decay: float = field(
        default=0.05, metadata={"help": "AdamW's weight decay, on matrices (not biases, norms, tokens, positions)."}
    )
    adam_beta2: float = field(default=0.95, metadata={"help": "AdamW's beta2."})
    max_grad_norm: float = field(default=0.0, metadata={"help": "Gradient clipping; 0 for none."})
    bf16: bool | None = field(
        default=None,
        metadata={
            "help": "Train in bfloat16 autocast. Default: as the run in output_dir began, else where the hardware "
            "multiplies matrices in it."
        },
    )
    cpu_threads: int | None = field(
        default=None,
        metadata={
            "help": "Threads of each process on a CPU. Default: under accelerate launch and torchrun, which set 1, "
            "the cores divided by the processes; else as torch has it."
        },
    )
    logging_steps: float = field(default=50, metadata={"help": "Log every so many steps (below 1: share of all)."})
    logging_nan_inf_filter: bool = field(
        default=False, metadata={"help": "Hides a loss that is not finite, at the price of a sync each step."}
    )
    save_total_limit: int | None = field(default=2, metadata={"help": "How many checkpoints are kept."})
    dataloader_drop_last: bool = field(default=True, metadata={"help": "Leave out the last, smaller batch."})
    dataloader_num_workers: int | None = field(
        default=None,
        metadata={
            "help": "Processes that load data, beside each that trains. Default: with a GPU the cores less one, at "
            "most 16; on a CPU one for each four cores, at most 4; for a stream 0, since its order depends on them."
        },
    )
    dataloader_persistent_workers: bool = field(
        default=True, metadata={"help": "Keep workers from epoch to epoch: each sample is asked for with its epoch."}
    )
    remove_unused_columns: bool = field(default=False, metadata={"help": "Pictures come as tensors already."})
    ddp_find_unused_parameters: bool | None = field(
        default=False, metadata={"help": "Every trained parameter gets a gradient, so nothing needs to be found."}
    )
    report_to: None | str | list[str] = field(
        default="none", metadata={"help": "Where logs go besides the output directory: tensorboard, trackio, ..."}
    )

    hub_strategy: str = field(
        default="end",
        metadata={
            "help": "What is pushed: end, all of a run but its checkpoints, once it is finished; checkpoint, besides "
            "at each save the checkpoint, with the optimiser, as last-checkpoint/; all_checkpoints, each by its own "
            "name; every_save as transformers has it."
        },
    )
    hub_create_pr: bool = field(
        default=False, metadata={"help": "Open a pull request with what is pushed, and leave the branch as it is."}
    )
    hub_license: str | None = field(
        default=None,
        metadata={
            "help": "Licence of the weights, as the Hub names it, e.g. apache-2.0. Default: that of the weights that "
            "the run began from, where their card says it."
        },
    )

    def __post_init__(self):
        self._check_ranges()
        if isinstance(self.fsdp, str) and self.fsdp.lower() in ("true", "false"):
            # transformers reads the words as names of FSDP's version 1.
            self.fsdp = self.fsdp.lower() == "true"
        if not torch.accelerator.is_available():
            self.use_cpu = True
        if self.bf16 is None:
            # `accelerate launch` always sets the variable, to "no" if it was not asked for anything.
            launched = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
            free = launched == "no" and not self.fp16
            self.bf16 = launched == "bf16" or (free and self._prefers_bf16())
        self.workers_by_default = self.dataloader_num_workers is None
        if self.workers_by_default:
            self.dataloader_num_workers = default_workers(on_cpu=self.use_cpu)
        has_own_settings = self.accelerator_config is not None
        # torch refuses to keep workers that there are not.
        self.dataloader_persistent_workers &= self.dataloader_num_workers > 0
        asked_for_float32 = not self.bf16 and not self.fp16
        super().__post_init__()
        if self.device.type == "cpu":
            # With several processes accelerate names it cpu:0, where torch before 2.11 cannot load a checkpoint to.
            self.__dict__["_setup_devices"] = torch.device("cpu")
        # Memory that a GPU reads from by itself, without the host waiting until it has.
        self.dataloader_pin_memory &= self.device.type == "cuda"
        if self.dataloader_pin_memory and not has_own_settings:
            self.accelerator_config.non_blocking = True
        if self.n_gpu > 1:
            # The Trainer would wrap the network in DataParallel, whose shares of a batch know nothing of each other.
            logger.warning(f"One process uses one of the {self.n_gpu} GPUs: for all, start by `accelerate launch`.")
            self._n_gpu = 1
        if asked_for_float32 and self.mixed_precision == "bf16":
            self.mixed_precision = "no"
        threads = self.cpu_threads or default_cpu_threads()
        if self.use_cpu and threads is not None:
            torch.set_num_threads(threads)
        if self.learning_rate is None:
            if self.auto_find_batch_size:
                raise ValueError(
                    "auto_find_batch_size changes the batch that the learning rate is scaled by. Give learning_rate, "
                    "or choose per_device_train_batch_size yourself."
                )
            self.learning_rate = self.base_learning_rate * self.effective_batch_size / 256

    def _prefers_bf16(self) -> bool:
        # Here, because a record tells of arguments.
        from .run_record import precision_of_run

        begun = None
        if str(self.resume_from_checkpoint).lower() != "false" and self.output_dir:
            # On another machine, with other instructions, a run goes on as it began.
            begun = precision_of_run(self.output_dir)
        return begun == "bfloat16" if begun is not None else supports_bf16(self.use_cpu)

    def _check_ranges(self) -> None:
        for name, value in vars(self).items():
            fits, expected = _RANGES.get(name, (None, None))
            # The probe has several learning rates, which it checks itself.
            if fits is not None and isinstance(value, int | float) and not (math.isfinite(value) and fits(value)):
                raise ValueError(f"--{name} is {value}; expected {expected}.")
        if self.max_steps <= 0 and self.max_steps != -1:
            raise ValueError(f"--max_steps is {self.max_steps}; expected at least 1, or -1 for --num_train_epochs.")
        by_epochs = self.max_steps == -1
        if by_epochs and self.num_train_epochs <= 0:
            raise ValueError(f"--num_train_epochs is {self.num_train_epochs}; expected above 0.")
        warmup, flag, length, unit = (
            (self.warmup_epochs, "warmup_epochs", self.num_train_epochs if by_epochs else math.inf, "epochs")
            if self.warmup_epochs is not None
            else (self.warmup_steps, "warmup_steps", math.inf if by_epochs else self.max_steps, "steps")
        )
        if warmup > length:
            raise ValueError(
                f"--{flag} is {warmup:g}, more than the {length:g} {unit} of training: the learning rate would never "
                f"reach its peak. Give a smaller --{flag}."
            )

    def deciding(self) -> dict:
        """What of the arguments decides the result of training, by name, as JSON has it."""
        length = "max_steps" if self.max_steps > 0 else "num_train_epochs"
        warmup = "warmup_steps" if self.warmup_epochs is None else "warmup_epochs"
        values = {name: getattr(self, name) for name in (length, warmup, *self._deciding)}
        values = {name: getattr(value, "value", value) for name, value in values.items()}
        return values | {"effective_batch_size": self.effective_batch_size, "precision": self.precision}

    @property
    def precision(self) -> str:
        """What matrices are multiplied in."""
        return "bfloat16" if self.bf16 else "float16" if self.fp16 else "float32"

    @property
    def effective_batch_size(self) -> int:
        """Pictures per optimiser step: per-device batch x devices x accumulation."""
        return self.train_batch_size * self.gradient_accumulation_steps * self.world_size


@dataclass
class MIMTrainingArguments(ViTTrainingArguments):
    """
    The arguments of pretraining.

    With several stages (`num_stages`) every other argument describes one stage: its length, its warm-up, its schedule.

    Raises:
        ValueError: If `contrastive_chunk_size` does not divide the per-device batch, or if the stages do not fit.
    """

    _deciding: ClassVar[tuple[str, ...]] = (*ViTTrainingArguments._deciding, "keep_optimizer_state")

    num_stages: int | None = field(
        default=None,
        metadata={
            "help": "Stages of a method that has them (dBOT): each trains a new network that learns from the stage "
            "before. Every other flag describes one stage: num_train_epochs or max_steps is the length of each. "
            "Default: 1, or as many as stage_epochs or stage_steps has numbers."
        },
    )
    stage_epochs: list[float] | None = field(
        default=None, metadata={"help": "Epochs of each stage, where they differ; in the place of num_train_epochs."}
    )
    stage_steps: list[int] | None = field(
        default=None, metadata={"help": "Optimiser steps of each stage, where they differ; in the place of max_steps."}
    )
    per_device_eval_batch_size: int | None = field(
        default=None,
        metadata={
            "help": "Held-out pictures at a time. Default: per_device_train_batch_size; for a contrastive loss that "
            "of all processes."
        },
    )
    keep_optimizer_state: bool = field(
        default=False,
        metadata={"help": "Carry the optimiser's moments from stage to stage, as dBOT's release does."},
    )
    contrastive_chunk_size: int | None = field(
        default=None,
        metadata={
            "help": "For methods whose loss compares all pictures of a batch (ocl): encode so many at a time, which "
            "divides the per-device batch. Memory is then that of a chunk, loss and gradients are those of the whole "
            "batch, and a step takes about a third longer. (Micro-batches of --gradient_accumulation_steps, on the "
            "other hand, never meet: each has its own negatives.)"
        },
    )
    eval_knn: bool = field(
        default=False,
        metadata={"help": "At each evaluation, log k-NN accuracy for every label (eval_knn_accuracy_LABEL)."},
    )
    online_probe: bool = field(
        default=False,
        metadata={
            "help": "At each evaluation, log linear accuracy for every label (eval_linear_accuracy_LABEL): a logistic "
            "regression fitted anew on the features of that moment, without gradient into the encoder."
        },
    )

    references: bool = field(
        default=True,
        metadata={"help": "At the end, evaluate raw pixels and the untrained network beside what was trained."},
    )

    def __post_init__(self):
        chunk, batch = self.contrastive_chunk_size, self.per_device_train_batch_size
        if chunk is not None and (chunk < 1 or batch % chunk):
            raise ValueError(
                f"contrastive_chunk_size is {chunk}, which does not divide per_device_train_batch_size, {batch}. "
                f"Choose a divisor, for example "
                f"{max(divisor for divisor in range(1, max(1, min(chunk, batch)) + 1) if batch % divisor == 0)}."
            )
        self._check_stages()
        as_in_training = self.per_device_eval_batch_size is None
        if as_in_training:
            self.per_device_eval_batch_size = batch
        super().__post_init__()
        # A contrastive loss depends on how many pictures it compares: in training those of all processes.
        self.contrastive_eval_batch_size = self.per_device_eval_batch_size * (self.world_size if as_in_training else 1)
        # Never asked of a pretraining model; gathering them would fill the memory.
        self.prediction_loss_only = True
        self.label_names = []

    def _check_stages(self) -> None:
        if self.stage_epochs is not None and self.stage_steps is not None:
            raise ValueError("Both stage_epochs and stage_steps are given, which say the same thing. Leave one out.")
        name = "stage_epochs" if self.stage_epochs is not None else "stage_steps"
        lengths = getattr(self, name)
        if lengths is not None:
            if not lengths or min(lengths) <= 0:
                raise ValueError(f"{name} is {lengths}; expected one number above 0 for each stage.")
            if self.num_stages is None:
                self.num_stages = len(lengths)
            if self.num_stages != len(lengths):
                raise ValueError(
                    f"num_stages is {self.num_stages}, and {name} has {len(lengths)} numbers, {lengths}. Give one for "
                    "each stage, or leave num_stages out."
                )
        if self.num_stages is None:
            self.num_stages = 1
        if self.num_stages < 1:
            raise ValueError(f"num_stages is {self.num_stages}; it must be at least 1.")
        if self.keep_optimizer_state and self.num_stages == 1:
            raise ValueError("keep_optimizer_state is for several stages; num_stages is 1. Leave it out.")


def default_cpu_threads() -> int | None:
    """The cores that fall to this process where a launcher set the number of threads to 1; None elsewhere."""
    launched = "ACCELERATE_MIXED_PRECISION" in os.environ or "TORCHELASTIC_RUN_ID" in os.environ
    if not launched or os.environ.get("OMP_NUM_THREADS") != "1":
        return None
    return process_cores()


def supports_bf16(use_cpu: bool) -> bool:
    """Whether the hardware multiplies bfloat16 matrices faster than float32 ones."""
    if not use_cpu:
        return torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
