"""What happens beside the optimisation: stopping without loss, and reconstructions among the logs."""

import os
import signal
import threading
import time
from pathlib import Path

import numpy as np
import torch
from accelerate.utils import extract_model_from_parallel
from tqdm.auto import tqdm
from transformers import ProgressCallback, TrainerCallback
from transformers.utils import logging

from ..evaluation.pictures import draw_reconstructions
from ..files import save_picture

logger = logging.get_logger(__name__)

# A launcher sends a signal on to processes that had it from the terminal already.
_SAME_REQUEST_SECONDS = 2.0
_SECONDS_UNTIL_AGREED = 2.0


class SaveOnInterrupt(TrainerCallback):
    """
    Ctrl-C or SIGTERM ends training after the current step, with a checkpoint; a second one ends it at once.

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
            for number in (signal.SIGINT, signal.SIGTERM):
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


class LogLines(TrainerCallback):
    """Prints what is logged as a line: step, epoch, losses, learning rate, pictures a second, time left."""

    def __init__(self):
        self.pace = Pace()

    def on_train_begin(self, args, state, control, **kwargs):
        self.pace.begin(state.global_step)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if state.is_world_process_zero:
            print(log_line(logs, state, self.pace.read(args, state) if "loss" in logs else {}), flush=True)


class LogLinesBesideBar(ProgressCallback):
    """transformers' progress bar, with the lines of [`LogLines`] above it."""

    def __init__(self):
        super().__init__()
        self.pace = Pace()

    def on_train_begin(self, args, state, control, **kwargs):
        super().on_train_begin(args, state, control, **kwargs)
        self.pace.begin(state.global_step)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if state.is_world_process_zero:
            tqdm.write(log_line(logs, state, self.pace.read(args, state) if "loss" in logs else {}))


class Pace:
    """How fast training goes, since it was read last: with the evaluations and checkpoints in between."""

    def begin(self, step: int) -> None:
        self.last_step, self.last_time = step, time.monotonic()

    def read(self, args, state) -> dict[str, str]:
        """`images/s` and the time `left`."""
        steps, seconds = state.global_step - self.last_step, time.monotonic() - self.last_time
        self.begin(state.global_step)
        if steps <= 0:
            return {}
        left = (state.max_steps - state.global_step) * seconds / steps
        return {"images/s": f"{steps * args.effective_batch_size / seconds:.0f}", "left": duration(left)}


def log_line(logs: dict, state, pace: dict[str, str]) -> str:
    """A log entry for people; `trainer_state.json` has it for programs."""
    where = f"step {state.global_step}/{state.max_steps}"
    where += f", epoch {logs['epoch']:.2f}" if "epoch" in logs else ""
    if "train_runtime" in logs:
        return f"{where}: trained in {duration(logs['train_runtime'])}, mean loss {logs['train_loss']:.4g}"
    numbers = {name: value for name, value in logs.items() if isinstance(value, int | float) and name != "epoch"}
    is_held_out = any(name.startswith("eval_") for name in numbers)
    said = [
        f"{'lr' if name == 'learning_rate' else name.removeprefix('eval_')} {value:.4g}"
        for name, value in numbers.items()
        if not name.endswith(_NOT_SAID)
    ]
    said += [f"{value} {name}" for name, value in pace.items()]
    return f"{where}: {'held out: ' if is_held_out else ''}{', '.join(said)}"


# The times of evaluations, and what counts operations.
_NOT_SAID = ("_runtime", "_per_second", "_preparation_time", "total_flos", "_tokens_seen")


def duration(seconds: float) -> str:
    """Seconds for people: "50 s", "3 min 20 s", "2 h 05 min"."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {seconds:02d} s" if minutes else f"{seconds} s"
