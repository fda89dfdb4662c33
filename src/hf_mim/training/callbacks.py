"""What happens beside the optimisation: stopping without loss, and reconstructions among the logs."""

import os
import signal
import threading
import time
from pathlib import Path

import numpy as np
import torch
from accelerate.utils import extract_model_from_parallel
from transformers import TrainerCallback
from transformers.utils import logging

from ..evaluation.pictures import draw_reconstructions
from ..files import save_picture

logger = logging.get_logger(__name__)

# From a terminal, from a scheduler that ends a job, and from one that warns before it does.
_REQUESTS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name)]
# A launcher sends a signal on to processes that had it from the terminal already.
_SAME_REQUEST_SECONDS = 2.0
_SECONDS_UNTIL_AGREED = 2.0


class SaveOnInterrupt(TrainerCallback):
    """
    Ctrl-C, SIGTERM or SIGUSR1 ends training after the current step, with a checkpoint; a second one ends it at once.

    With several processes they agree every few seconds, at a step that all of them know, so that none waits for
    another for ever.
    """

    def __init__(self, trainer):
        self.trainer = trainer
        self.requested = False
        self.stopped = False
        self._process = os.getpid()
        self._first_request = 0.0
        self._previous = {}
        # With several processes: the step at which they agree next, and when they did last.
        self._next_step, self._last_step, self._last_time = 0, 0, 0.0

    def on_train_begin(self, args, state, control, **kwargs):
        self._next_step, self._last_step, self._last_time = state.global_step + 1, state.global_step, time.monotonic()
        # Python delivers signals to the main thread only, and only there may handlers be set.
        if threading.current_thread() is threading.main_thread():
            for number in _REQUESTS:
                self._previous[number] = signal.signal(number, self._request)

    def on_train_end(self, args, state, control, **kwargs):
        self.restore()

    def restore(self) -> None:
        """Puts the previous signal handlers back."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}

    def _request(self, number, frame):
        # A data loader's workers inherit the handler; they end with the main process.
        if os.getpid() != self._process:
            return
        if self.requested:
            if time.monotonic() - self._first_request > _SAME_REQUEST_SECONDS:
                raise KeyboardInterrupt
            return
        self.requested = True
        self._first_request = time.monotonic()
        note = " (What the launcher says of it, with a traceback, is harmless.)" if _is_launched() else ""
        print(f"\nInterrupted: finishing the step and saving. Once more to stop at once.{note}", flush=True)

    def on_step_end(self, args, state, control, **kwargs):
        requested = self.requested
        if args.world_size > 1:
            if state.global_step < self._next_step:
                return
            requested = self._agree(args, state.global_step)
        if requested:
            self.stopped = True
            control.should_save = True
            control.should_training_stop = True

    def _agree(self, args, step: int) -> bool:
        """Whether any process was asked to stop. All then know the step at which they ask again."""
        now = time.monotonic()
        told = torch.tensor([float(self.requested), now - self._last_time], device=args.device)
        requests, seconds = self.trainer.accelerator.reduce(told).tolist()
        seconds_per_step = max(seconds / args.world_size / (step - self._last_step), 1e-6)
        self._next_step = step + max(1, int(_SECONDS_UNTIL_AGREED / seconds_per_step))
        self._last_step, self._last_time = step, now
        return requests > 0


def _is_launched() -> bool:
    return "ACCELERATE_MIXED_PRECISION" in os.environ or "TORCHELASTIC_RUN_ID" in os.environ


class MIMCallback(TrainerCallback):
    """
    Does after each optimiser step what a method needs then: moves PiLaMIM's averaged target, keeps OCL's temperature
    within its limit. `MIMTrainer` has it; give it to transformers' own `Trainer`:
    `Trainer(model, args, train_dataset=..., callbacks=[hf_mim.MIMCallback()])`.
    """

    def on_optimizer_step(self, args, state, control, model=None, optimizer=None, **kwargs):
        # With float16 a step whose gradients overflowed is left out.
        if not getattr(optimizer, "step_was_skipped", False):
            extract_model_from_parallel(model, keep_torch_compile=False).after_optimizer_step(
                state.global_step, state.max_steps
            )


class LogReconstructions(TrainerCallback):
    """
    After each evaluation and at the end, draws what the model makes of a few held-out pictures, into
    `output_dir/reconstructions` and into tensorboard and trackio where they are in `report_to`.

    Args:
        trainer: The trainer, whose callbacks hold the writers.
        batch (`dict`): `pixel_values` and `noise` of the pictures shown.
        mean, std: Of the normalisation, one number a channel.
    """

    def __init__(self, trainer, batch: dict[str, torch.Tensor], mean, std):
        self.trainer, self.batch, self.mean, self.std = trainer, batch, mean, std
        self.last_path: Path | None = None
        self._last_step: int | None = None

    def on_evaluate(self, args, state, control, **kwargs):
        self.draw(args, state)

    def on_log(self, args, state, control, logs=None, **kwargs):
        # The last log. At on_train_end the writers are closed already.
        if "train_loss" in logs:
            self.draw(args, state)

    def draw(self, args, state) -> None:
        if state.global_step == self._last_step:
            return
        self._last_step = state.global_step
        model = self.trainer.accelerator.unwrap_model(self.trainer.model, keep_torch_compile=False)
        # On all processes: under FSDP the forward pass is a common effort.
        was_training = model.training
        model.eval()
        with torch.no_grad(), self.trainer.accelerator.autocast():
            pixel_values, noise = (self.batch[name].to(args.device) for name in ("pixel_values", "noise"))
            reconstruction = model.reconstruct(pixel_values, noise)
        model.train(was_training)
        if reconstruction is None or not state.is_world_process_zero:
            return
        sheet = draw_reconstructions(self.batch["pixel_values"], *reconstruction, self.mean, self.std)
        path = Path(args.output_dir) / "reconstructions" / f"step-{state.global_step}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        save_picture(path, sheet)
        self.last_path = path
        self._report(np.asarray(sheet), state.global_step)

    def _report(self, sheet: np.ndarray, step: int) -> None:
        for callback in self.trainer.callback_handler.callbacks:
            writer = getattr(callback, "tb_writer", None)
            if writer is not None:
                writer.add_image("reconstructions", sheet, step, dataformats="HWC")
        if "trackio" in self.trainer.args.report_to:
            import trackio

            trackio.log({"reconstructions": trackio.Image(sheet)}, step=step)
