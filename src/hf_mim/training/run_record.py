"""What decided the result of a run: written beside its weights, compared before going on, and told by its card."""

import hashlib
import platform

import accelerate
import numpy as np
import torch
import transformers

from .. import __version__
from .arguments import ViTTrainingArguments


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
    decides = {"model_type": model.config.model_type}
    decides |= describe_pictures(train_dataset) | settings | args.deciding()
    if getattr(model, "pairwise_loss", False):
        # Micro-batches never meet.
        decides["pictures_compared"] = args.effective_batch_size // args.gradient_accumulation_steps
    return {
        "decides": decides,
        "also": {
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
        },
    }


def describe_pictures(train_dataset) -> dict:
    """Where the training pictures are from (`data`), how many there are (None of a stream), and their fingerprint."""
    pictures = getattr(train_dataset, "pictures", None)
    fingerprint = pictures.content_fingerprint() if hasattr(pictures, "content_fingerprint") else None
    labels = getattr(train_dataset, "labels", None)
    if fingerprint is not None and labels is not None:
        fingerprint = hashlib.sha256(fingerprint.encode() + np.asarray(labels).tobytes()).hexdigest()
    return {
        "data": str(getattr(pictures, "source", None) or type(train_dataset).__name__),
        "num_pictures": len(train_dataset) if hasattr(train_dataset, "__len__") else None,
        "fingerprint": fingerprint,
    }
