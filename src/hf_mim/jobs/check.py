"""Reads a data set once, before it costs a night, and says what is wrong with it."""

import os
from dataclasses import dataclass, field, replace

import numpy as np

from ..data.arguments import DataArguments
from ..data.inspection import Inspection, find_copies, inspect_images
from ..data.loading import load_images
from ..training.command import parse_arguments, say
from ..training.errors import run_job
from .loading import name_data

_TITLES = {
    "missing": "missing (no picture in the row)",
    "broken": "broken",
    "oversized": "above the limit of pixels (--max_image_pixels)",
    "unfit": "of other channels or types than the model takes (--num_channels)",
}


@dataclass
class CheckArguments:
    """How a data set is checked."""

    num_workers: int = field(
        default=min(os.cpu_count() or 1, 8), metadata={"help": "Processes that read. Default: one a core, 8 at most."}
    )
    max_listed: int = field(
        default=20, metadata={"help": "Pictures that are named of each kind; the rest is counted."}
    )

    def __post_init__(self):
        for flag in ("num_workers", "max_listed"):
            if getattr(self, flag) < 0:
                raise ValueError(f"--{flag} must not be negative, got {getattr(self, flag)}.")


def main(argv: list[str] | None = None) -> int:
    """`hf_mim check DATA`: DATA is a folder, a data set of the Hub, or left out where flags name it.

    Returns:
        `int`: 0, or 1 where a picture is missing, broken, too large or of other channels.
    """
    return run_job(lambda: check(*parse_arguments((DataArguments, CheckArguments), _name_data(argv), presets={})))


def _name_data(argv: list[str] | None) -> list[str] | None:
    """The command line, its first word as the flag that it stands for."""
    if not argv or argv[0].startswith("-") or argv[0].endswith((".json", ".yaml", ".yml")):
        return argv
    return [f"--{name_data(argv[0])}={argv[0]}", *argv[1:]]


def check(data_args: DataArguments, args: CheckArguments) -> int:
    """
    Says what the pictures are and which are at fault.

    Raises:
        ValueError: If there is no such data, or it is a stream.
    """
    if data_args.streaming:
        raise ValueError("What is checked is gone through in no order: leave out --streaming.")
    images = load_images(replace(data_args, max_train_samples=None, max_eval_samples=None))
    found = {
        name: inspect_images(split, num_workers=args.num_workers, max_named=args.max_listed)
        for name, split in (("Training", images.train), ("Held out", images.validation))
    }
    for name, inspection in found.items():
        for line in describe(name, inspection, args.max_listed):
            say(line)
    copies = find_copies(list(found.values()))
    say(f"\nCopies: {len(copies)} pictures hold the same bytes as another.")
    for line in _listed([f"{copy} = {original}" for copy, original in copies], args.max_listed):
        say(line)
    faulty = sum(inspection.num_faulty for inspection in found.values())
    num = sum(len(inspection.pictures) for inspection in found.values())
    if faulty:
        leave_out = " --skip_broken_images leaves out all but those of other channels." if faulty else ""
        say(f"\n{faulty} of {num} pictures cannot be trained on as they are.{leave_out}")
        return 1
    say(f"\nAll {num} pictures can be read.")
    return 0


def describe(name: str, found: Inspection, max_listed: int) -> list[str]:
    """What is said of one split, line by line."""
    images = found.pictures
    lines = [f"\n{name}: {len(images)} pictures of {images.source}"]
    readable = found.heights > 0
    for side, values in (("height", found.heights[readable]), ("width", found.widths[readable])):
        if len(values):
            lines.append(f"  {side}: {values.min()} to {values.max()}, median {np.median(values):g}")
    lines += [f"  stored as {form}: {number}" for form, number in found.forms.most_common()]
    for label, column in images.labels.items():
        lines += _describe_label(label, column, images.label_names[label], max_listed)
    for kind, messages in found.faults.items():
        if messages:
            lines += [f"  {_TITLES[kind]}: {len(messages)}", *_listed(messages, max_listed)]
    for form, names in found.odd.items():
        lines += [f"  odd, {form}: {found.forms[form]}", *_listed(names, max_listed, found.forms[form])]
    return lines


def _describe_label(label: str, column: np.ndarray, names: list[str], max_listed: int) -> list[str]:
    if column.ndim == 2:
        counts, unlabelled = (column == 1).sum(axis=0), int((column < 0).any(axis=1).sum())
    else:
        counts, unlabelled = np.bincount(column[column >= 0], minlength=len(names)), int((column < 0).sum())
    without = f"; {unlabelled} pictures have none" if unlabelled else ""
    kind = " (multi-label)" if column.ndim == 2 else ""
    return [f"  label {label}{kind}: {len(names)} classes{without}"] + _listed(
        [f"{name}: {count}" for name, count in zip(names, counts.tolist(), strict=True)], max_listed
    )


def _listed(entries: list[str], most: int, number: int | None = None) -> list[str]:
    more = (len(entries) if number is None else number) - min(len(entries), most)
    return [f"    {entry}" for entry in entries[:most]] + [f"    ... and {more} more"] * (more > 0)
