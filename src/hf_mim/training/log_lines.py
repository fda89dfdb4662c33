"""What is printed of training, for people: a line for each log entry."""

import time

from tqdm.auto import tqdm
from transformers import ProgressCallback, TrainerCallback


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
