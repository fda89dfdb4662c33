"""What decided the result of a run: written beside its weights, compared before going on, and told by its card."""

import contextlib
import hashlib
import json
import platform
from collections.abc import Mapping
from pathlib import Path

import accelerate
import numpy as np
import torch
import transformers

from .. import __version__
from ..files import write_json
from .arguments import ViTTrainingArguments
from .checkpoints import last_whole_checkpoint, unused_path

# Beside the weights.
RUN_RECORD = "run.json"
# What tells the images: they are the same if all but the first are, which says where they lie.
_OF_IMAGES = ("data", "num_pictures", "fingerprint")
# The job of a record that names none: the first records did not.
_TRAINING = "training"


def run_record(model, args: ViTTrainingArguments, train_dataset, settings: dict) -> dict:
    """
    The record of a run, as JSON has it.

    Args:
        model: A network with a `config`.
        args ([`ViTTrainingArguments`]): Of the run.
        train_dataset: With `pictures` where they are ours; of any other its length counts.
        settings (`dict`): What decides the result besides; see [`ViTTrainer`].

    Returns:
        `dict`: `decides`: by name, what a run must share with a checkpoint to go on from it. `also`: how the batch was
        shared out, and versions, which may differ.
    """
    decides = {"job": _TRAINING, "model_type": model.config.model_type}
    decides |= describe_images(train_dataset) | settings | args.deciding()
    if getattr(model, "pairwise_loss", False):
        # Micro-batches never meet.
        decides["pictures_compared"] = args.effective_batch_size // args.gradient_accumulation_steps
    return {"decides": decides, "also": circumstances(args)}


def circumstances(args: ViTTrainingArguments) -> dict:
    """How the batch was shared out, and versions: what may differ between two parts of a run."""
    return {
        "per_device_train_batch_size": args.per_device_train_batch_size,
        "gradient_accumulation_steps": args.gradient_accumulation_steps,
        "num_processes": args.world_size,
        "device": args.device.type,
        "versions": {
            "python": platform.python_version(),
            "hf_mim": __version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "accelerate": accelerate.__version__,
        },
    }


def describe_images(dataset) -> dict:
    """
    Where images are from (`data`), how many there are (None of a stream), and a fingerprint of them and of what is to
    be told of them: `dataset.labels`, an array or arrays by name, or what `dataset.labels_fingerprint()` says.
    """
    images = getattr(dataset, "pictures", None)
    fingerprint = images.content_fingerprint() if hasattr(images, "content_fingerprint") else None
    labels = getattr(dataset, "labels", None)
    if fingerprint is not None and labels is not None:
        columns = sorted(labels.items()) if isinstance(labels, Mapping) else [("", labels)]
        told = b"".join(name.encode() + np.asarray(column).tobytes() for name, column in columns)
        fingerprint = hashlib.sha256(fingerprint.encode() + told).hexdigest()
    if fingerprint is not None and hasattr(dataset, "labels_fingerprint"):
        fingerprint = hashlib.sha256((fingerprint + dataset.labels_fingerprint()).encode()).hexdigest()
    return {
        "data": str(getattr(images, "source", None) or type(dataset).__name__),
        "num_pictures": len(dataset) if hasattr(dataset, "__len__") else None,
        "fingerprint": fingerprint,
    }


def write_record(folder: str | Path, record: dict) -> None:
    """Writes what decided a run's result (`decides`), and what else is worth knowing of it, beside its weights."""
    write_json(Path(folder) / RUN_RECORD, record)


def set_record_aside(folder: str | Path, record: dict, *results: str) -> None:
    """
    Renames the record of another run that was in `folder`, which from now on is this one's, to `_old-run.json`, and
    the files `results` that came of it likewise.
    """
    try:
        check_same_run(folder, record)
    except ValueError:
        for name in (RUN_RECORD, *results):
            old = Path(folder) / name
            if old.exists():
                old.rename(unused_path(old.with_name(f"_old-{name}")))


def precision_of_run(output_dir: str | Path) -> str | None:
    """As `ViTTrainingArguments.precision`, of the run that `output_dir` holds; None if it holds none that tells."""
    # Of a run in stages the first is as good as any.
    for folder in (Path(output_dir), Path(output_dir) / "stage-0"):
        for recorded in (last_whole_checkpoint(folder), folder):
            # What else may be wrong with a record is said where it is compared.
            with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
                return json.loads((recorded / RUN_RECORD).read_text())["decides"]["precision"]
    return None


def check_same_run(folder: str | Path, record: dict, what: str = "holds another run") -> None:
    """
    Raises ValueError if what is in `folder` came from a run that decided its result otherwise than `record` does: by
    other pictures, another seed, batch, schedule, learning rate, augmentation or precision. A folder without a record
    is of a version that wrote none.
    """
    try:
        saved = {"job": _TRAINING} | json.loads((Path(folder) / RUN_RECORD).read_text())["decides"]
    except FileNotFoundError:
        return
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{Path(folder) / RUN_RECORD} cannot be read ({error!r}): delete it to go on.") from error
    wanted = json.loads(json.dumps(record["decides"]))
    names = [name for name in wanted if name in saved and saved[name] != wanted[name] and name not in _OF_IMAGES]
    differences = [f"{name}: {saved[name]!r} there, {wanted[name]!r} here" for name in names]
    if any(saved.get(name) != wanted.get(name) for name in _OF_IMAGES[1:]):
        there, here = (f"{of['data']} ({of['num_pictures']} pictures)" for of in (saved, wanted))
        differences.insert(0, f"data: {there} there, {here} here{', with other contents' if there == here else ''}")
    if differences:
        raise ValueError(
            f"{folder} {what} ({'; '.join(differences)}). Choose another --output_dir, or the same settings as that "
            "run, or pass --resume_from_checkpoint false to start from zero."
        )
