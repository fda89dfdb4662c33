"""Which errors are the user's to mend, and are said in a line; all others keep their stack."""

import gc
import os
import re
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

from accelerate import PartialState
from huggingface_hub.utils import are_progress_bars_disabled, enable_progress_bars
from safetensors import SafetensorError
from transformers import Trainer
from transformers.utils import logging

from ..data.images import BrokenImageError
from ..missing import say_missing
from .losses import NonFiniteLossError

_PACKAGE = str(Path(__file__).parents[1]) + os.sep


def run_job(job: Callable[[], int]) -> int:
    """Runs a script's job, says in a line what the user can mend, and returns the exit status: 130 after Ctrl-C."""
    if not are_progress_bars_disabled():
        # A bar for each file of weights would fall between the training's own; downloads keep theirs.
        logging.disable_progress_bar()
        enable_progress_bars()
    try:
        status = job()
        # Left to the interpreter's end, the wrapped model's gloo threads now and then abort the process (torch 2.15).
        gc.collect()
        PartialState().destroy_process_group()
        return status
    except KeyboardInterrupt:
        # Ctrl-C, in training the second one. What was written is whole, and stays.
        if logging.get_verbosity() <= logging.INFO:
            raise
        print("\nInterrupted. The same command goes on from what is finished.", file=sys.stderr)
        return 130
    except Exception as error:
        # What the user can mend is said without a page of stack; everything else keeps its stack.
        message = plain_message(error)
        if message is None or logging.get_verbosity() <= logging.INFO:
            raise
        rank = int(os.environ.get("RANK", 0))
        print(f"\nError{f' (process {rank})' if rank else ''}: {message}", file=sys.stderr)
        return 1


def plain_message(error: Exception) -> str | None:
    """
    What to say instead of a stack, or None where the stack is wanted.

    Said plainly are losses that are not finite, broken pictures, damaged weights, a package of an extra that is not
    installed, what the system says of a file, and a ValueError or OSError that comes before training (flags, sizes,
    data sets, checkpoints) or from a check of ours. What else torch or transformers raise in training is a bug until
    shown otherwise.
    """
    text = str(error)
    frames = [frame.f_code for frame, _ in traceback.walk_tb(error.__traceback__)]
    raised_in = frames[-1].co_filename if frames else ""
    if text.startswith("Caught ") and "DataLoader worker" in text:
        # The error of a data loader's worker, as text, with its stack: the last file, and the message at the end.
        raised_in = ([""] + re.findall(r'^  File "(.*?)", line', text, flags=re.MULTILINE))[-1]
        text = re.split(r"^[\w.]*Error: ", text, flags=re.MULTILINE)[-1].strip()
    if isinstance(error, RuntimeError) and re.match(
        r"DataLoader worker .*(killed by signal|exited unexpectedly)", text
    ):
        return (
            "The system ended a process that loads data, most likely for want of memory "
            f"({text.splitlines()[0].rstrip('. ')}). Give fewer --dataloader_num_workers (of `hf_mim check`, `embed` "
            "and `pack` --num_workers); the same command goes on from what is finished."
        )
    before_training = Trainer.train.__code__ not in frames
    if isinstance(error, BrokenImageError):
        return (
            f"{text} Remove it, or pass --skip_broken_images to leave such pictures out. `hf_mim check` with the same "
            "flags lists all of them."
        )
    if isinstance(error, SafetensorError):
        return f"A file of weights that is to be read is damaged or cut off ({text}). Copy or save it again."
    if isinstance(error, NonFiniteLossError) or getattr(error, "filename", None) is not None:
        return text
    if isinstance(error, ImportError) and say_missing(error) is not None:
        return say_missing(error)
    if isinstance(error, ImportError) and raised_in.startswith(_PACKAGE) and "pip install" in text:
        return text
    if isinstance(error, ValueError | OSError) and (before_training or raised_in.startswith(_PACKAGE)):
        return text
    return None
