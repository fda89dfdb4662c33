"""What is printed of training, for people: a line for each log entry."""

from tqdm.auto import tqdm
from transformers import ProgressCallback, TrainerCallback

from .speed import SpeedMeter, duration


class LogLines(TrainerCallback):
    """
    Prints what is logged as a line: step, epoch, losses, learning rate, what `speed` reads, time left. At the end a
    line says what limited the speed.

    Args:
        speed ([`SpeedMeter`]): Of the training.
    """

    def __init__(self, speed: SpeedMeter):
        self.speed = speed

    def on_log(self, args, state, control, logs=None, **kwargs):
        if state.is_world_process_zero:
            for line in log_lines(logs, args, state, self.speed):
                print(line, flush=True)


class LogLinesBesideBar(ProgressCallback):
    """transformers' progress bar, with the lines of [`LogLines`] above it."""

    def __init__(self, speed: SpeedMeter):
        super().__init__()
        self.speed = speed

    def on_log(self, args, state, control, logs=None, **kwargs):
        if state.is_world_process_zero:
            for line in log_lines(logs, args, state, self.speed):
                tqdm.write(line)


def log_lines(logs: dict, args, state, speed: SpeedMeter) -> list[str]:
    """A log entry as a line, and after the last of a training what limited its speed."""
    lines = [log_line(logs, state, speed.read(args, state) if "loss" in logs else {})]
    limit = speed.bottleneck(args, state) if "train_loss" in logs else None
    return lines if limit is None else [*lines, limit]


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
