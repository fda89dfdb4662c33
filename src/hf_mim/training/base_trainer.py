"""What the trainers of pretraining and of fine-tuning share."""

import contextlib
import gc
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerCallback
from transformers.utils import logging

from .loading import LoadingMixin
from .log_lines import LogLines, LogLinesBesideBar
from .losses import NEVER, LossesMixin, LossMeter, NonFiniteLossError
from .saving import SavingMixin
from .speed import SpeedMeter, training_operations

__all__ = ["LossMeter", "NonFiniteLossError", "ViTTrainer"]

logger = logging.get_logger(__name__)

_STEPS_OF_GARBAGE = 50

# The private methods of transformers' Trainer that our trainers override, and why no public one would do. A test tells
# when a new transformers has another one: read it, see whether the reason and what we do still hold.
OVERRIDDEN = {
    "_get_dataloader": "a stream is shared out by file; workers draw no seed from the global generator; held-out "
    "pictures are not dropped, and a contrastive loss compares as many as in training",
    "_get_train_sampler": "the sampler sends the epoch along with the index",
    "_get_eval_sampler": "as the training's; what a contrastive loss would leave over is not read",
    "_run_epoch": "a finished run that is started again trains no further step",
    "_get_grad_norm": "computed only when it is logged",
    "_issue_warnings_after_load": "a checkpoint that lacks weights is refused, not warned of",
    "_save": "the model at the end replaces an older one whole; a checkpoint keeps the modules' names",
    "_save_checkpoint": "a checkpoint gets its name when it is whole, and the older ones go only then",
    "_get_output_dir": "where the checkpoint lies until then",
    "_push_from_checkpoint": "a checkpoint that is pushed goes alone, in one commit",
}
# Those that are called besides.
CALLED = ("_prepare_inputs",)


class ViTTrainer(SavingMixin, LossesMixin, LoadingMixin, Trainer):
    """
    transformers' `Trainer` with runs that can be repeated and resumed exactly: samples are functions of (seed, epoch,
    index), since the sampler sends the epoch along with the index; matrices alone are decayed; every output named
    `loss_*` is logged under its name; a loss that is not finite, a full disk and a damaged checkpoint are noticed.

    Args:
        As `Trainer`; `args` is a [`ViTTrainingArguments`].
        run_settings (`dict`, *optional*): What decides the result besides arguments, model and pictures, as JSON has
            it: where the weights are from, augmentation. Part of the run's record.

    Raises:
        ValueError: If the training data set has fewer pictures than one step needs, or under FSDP version 1.
        NonFiniteLossError: In training, when a loss is not finite; checked when logging, before saving and at the end.
    """

    def __init__(self, *args, run_settings: dict | None = None, **kwargs):
        super().__init__(*args, **kwargs)
        self.run_settings = run_settings or {}
        self._is_saving, self._first_step, self._handler_of_workers = False, 0, None
        self.train_losses, self.eval_losses = LossMeter(), LossMeter()
        self.first_bad_step = torch.tensor(NEVER, device=self.args.device)
        self.speed = SpeedMeter(self.args.device, training_operations(self.model, self.args.train_batch_size))
        self.add_callback(_Hooks(self))
        # transformers prints logs as dictionaries, without the step.
        for printing, better in ((PrinterCallback, LogLines), (ProgressCallback, LogLinesBesideBar)):
            if self.pop_callback(printing) is not None:
                self.add_callback(better(self.speed))
        if self.is_fsdp_enabled:
            self._prepare_fsdp(self.accelerator.state.fsdp_plugin)
        elif self.args.fsdp_plugin_args is not None:
            logger.warning("FSDP is not for CPUs: accelerate leaves --fsdp out, and every process holds all weights.")

    def _prepare_fsdp(self, plugin) -> None:
        if plugin.fsdp_version == 1:
            raise ValueError(
                "FSDP version 1 flattens parameters across sub-modules, so that an averaged target would be averaged "
                "with other weights. Use version 2: --fsdp_config '{\"version\": 2}'."
            )
        if plugin.transformer_cls_names_to_wrap is None:
            # accelerate shards the input embedding by itself, and fails if a module around it is sharded already.
            embedding = self.model.get_input_embeddings()
            around = {type(module).__name__ for module in self.model.modules() if embedding in module.modules()}
            plugin.transformer_cls_names_to_wrap = sorted(set(self.model._no_split_modules) - around)

    @property
    def num_steps_trained(self) -> int:
        """Optimiser steps of the last call of `train`, without those of a checkpoint that it went on from."""
        return self.state.global_step - self._first_step

    def after_optimizer_step(self) -> None:
        """Called after each optimiser step that was not skipped."""

    def _run_epoch(self, *args, **kwargs):
        # The stock loop looks only after a step whether it was the last, so that a finished run would get one more.
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        if hasattr(self, "train_sampler"):
            self.train_sampler.start = self._num_seen_of_epoch(**kwargs)
        super()._run_epoch(*args, **kwargs)

    def _num_seen_of_epoch(
        self, *, epoch, epochs_trained, steps_trained_in_current_epoch, resume_from_checkpoint, **kwargs
    ) -> int:
        """Pictures of the epoch that begins which the run that is resumed has seen: the stock loop skips them."""
        if resume_from_checkpoint is None or epoch != epochs_trained or self.args.ignore_data_skip:
            return 0
        if not self.args.dataloader_drop_last:
            # With the first pictures of an epoch its last batches are filled up.
            return 0
        return steps_trained_in_current_epoch * self.args.train_batch_size * self.args.world_size

    def train(self, *args, **kwargs):
        """As [`SavingMixin.train`], with Python's garbage collected between steps alone."""
        try:
            with _garbage_between_steps():
                return super().train(*args, **kwargs)
        finally:
            if self._handler_of_workers is not None:
                signal.signal(signal.SIGCHLD, self._handler_of_workers)
                self._handler_of_workers = None

    def get_batch_samples(self, *args, **kwargs):
        self._find_dead_workers_between_steps()
        try:
            with self.speed.waiting():
                return super().get_batch_samples(*args, **kwargs)
        except Exception as error:
            self._save_what_is_trained(error)
            if self._handler_of_workers is not None:
                # Raises, and says so, where it comes of a worker that was ended.
                self._handler_of_workers(signal.SIGCHLD, None)
            raise

    def _find_dead_workers_between_steps(self) -> None:
        # torch tells of a worker that has died by an exception in whatever line is run at the moment, of a step too.
        # Without its handler, who waits for a batch finds out within 5 seconds, and what is trained can be saved.
        if not hasattr(signal, "SIGCHLD") or threading.current_thread() is not threading.main_thread():
            return
        handler = signal.getsignal(signal.SIGCHLD)
        if getattr(handler, "__module__", None) == "torch.utils.data._utils.signal_handling":
            self._handler_of_workers = handler
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)

    def _save_what_is_trained(self, error: Exception) -> None:
        """A checkpoint of the steps before data could not be read, where one process can write it by itself."""
        step, folder = self.state.global_step, Path(self.args.output_dir)
        if self.args.world_size > 1 or self.num_steps_trained == 0 or (folder / f"checkpoint-{step}").is_dir():
            return
        self._save_checkpoint(self.model, trial=None)
        logger.error(f"Data cannot be read ({error}). {step} steps are saved; the same command goes on from there.")

    def evaluate(self, *args, **kwargs) -> dict[str, float]:
        with self.speed.not_training():
            return super().evaluate(*args, **kwargs)

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """Matrices: the weights of linear maps and of the patch projection. Not biases, norms, tokens, positions."""
        matrices = (nn.Linear, nn.Conv2d)
        return [f"{name}.weight" for name, module in model.named_modules() if isinstance(module, matrices)]

    def create_scheduler(self, num_training_steps: int, optimizer=None):
        epochs = self.args.warmup_epochs
        if epochs is not None:
            if not hasattr(self.train_dataset, "__len__"):
                raise ValueError("warmup_epochs needs data of known length; with --streaming give --warmup_steps.")
            steps_per_epoch = len(self.train_dataset) / self.get_total_train_batch_size(self.args)
            # At least 1, below which the number would be read as a share of all steps.
            self.args.warmup_steps = max(1, round(epochs * steps_per_epoch)) if epochs > 0 else 0
        return super().create_scheduler(num_training_steps, optimizer)

    def _get_grad_norm(self, model, grad_norm=None):
        # The stock method walks over all gradients at every step; the number is only wanted when it is logged.
        due = (self.state.global_step + 1) % self.state.logging_steps == 0
        return super()._get_grad_norm(model, grad_norm) if due or grad_norm is not None else None


@contextlib.contextmanager
def _garbage_between_steps() -> Iterator[None]:
    """
    Within, Python does not look for garbage by itself, at any moment and in each process at another one, while the
    others wait; see `_Hooks.on_step_end`. What is there at the beginning is not looked through again.
    """
    # What another has set aside is theirs to take back.
    was_enabled, freezes = gc.isenabled(), gc.get_freeze_count() == 0
    gc.collect()
    if freezes:
        gc.freeze()
    gc.disable()
    try:
        yield
    finally:
        if freezes:
            gc.unfreeze()
        if was_enabled:
            gc.enable()


class _Hooks(TrainerCallback):
    """Starts the meters anew, tells of optimiser steps, keeps the sampler's epoch right, and collects garbage."""

    def __init__(self, trainer: ViTTrainer):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        self.trainer.train_losses.reset()
        self.trainer.speed.begin(state.global_step)
        self.trainer._first_step = state.global_step
        self.trainer.first_bad_step.fill_(NEVER)

    def on_epoch_begin(self, args, state, control, **kwargs):
        # accelerate's set_epoch does not reach the sampler through both the shards of several processes and the
        # skipping of a resumed epoch.
        if hasattr(self.trainer, "train_sampler"):
            self.trainer.train_sampler.set_epoch(int(state.epoch or 0))

    def on_step_end(self, args, state, control, **kwargs):
        self.trainer.speed.step_ended(state.global_step)
        if state.global_step % _STEPS_OF_GARBAGE == 0:
            gc.collect()

    def on_evaluate(self, args, state, control, **kwargs):
        gc.collect()

    def on_optimizer_step(self, args, state, control, **kwargs):
        if not self.trainer.accelerator.optimizer_step_was_skipped:
            self.trainer.after_optimizer_step()
