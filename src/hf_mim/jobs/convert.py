"""Reads a checkpoint that a method's authors released, and says what became of each of its weights."""

import os
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import PreTrainedModel
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from ..data.image_processing import build_image_processor
from ..hub.cards import write_conversion_card
from ..hub.origin import is_restricted, restriction
from ..hub.original import ENCODER_RELEASES, convert_checkpoint, name_some
from ..models.vit.sizes import as_pair
from ..registry import MODEL_TYPES, RECORDS, method_name
from ..training.command import name_words, parse_arguments, say
from ..training.config_overrides import parse_overrides
from ..training.errors import run_job


@dataclass
class ConvertArguments:
    """Which checkpoint is read, as what, and where the model goes."""

    checkpoint: str | None = field(default=None, metadata={"help": "The release's .pth, .pt or .safetensors file."})
    output: str | None = field(default=None, metadata={"help": "The folder to write; there is nothing yet."})
    model_type: str | None = field(
        default=None,
        metadata={
            "help": f"Whose release it is: {', '.join([*MODEL_TYPES, *ENCODER_RELEASES])}. Of the last two the "
            "encoder is kept."
        },
    )
    teacher_checkpoint: str | None = field(
        default=None, metadata={"help": "The frozen network's file: TEC's base, dBOT's teacher."}
    )
    config_overrides: str | None = field(
        default=None,
        metadata={"help": "Fields of the config that weights do not tell, e.g. 'num_attention_heads=3'."},
    )

    def __post_init__(self):
        missing = [flag for flag in ("checkpoint", "output", "model_type") if getattr(self, flag) is None]
        if missing:
            raise ValueError(f"--{missing[0]} is missing. hf_mim convert FILE OUT --model_type pilamim")


def main(argv: list[str] | None = None) -> int:
    """`hf_mim convert FILE OUT --model_type pilamim`. Returns the exit status."""
    words = name_words(argv, "checkpoint", "output")
    return run_job(lambda: convert(*parse_arguments((ConvertArguments,), words, presets={})))


def convert(args: ConvertArguments) -> int:
    """
    Writes the model, and an image processor of ImageNet's mean and standard deviation where it sees three channels.

    Raises:
        FileExistsError: If there is something at `output`.
        ValueError: If the checkpoint is not one of the release, or the model is another one once loaded again.
    """
    output = Path(args.output)
    if os.path.lexists(output):
        raise FileExistsError(f"{output} exists, and is not overwritten: name another, or remove it.")
    overrides = parse_overrides(args.config_overrides)
    model, unused = convert_checkpoint(
        args.checkpoint, args.model_type, config=overrides, teacher=args.teacher_checkpoint
    )
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}.") as folder:
        written = Path(folder) / output.name
        model.save_pretrained(written)
        if model.config.num_channels == 3:
            size = as_pair(model.config.image_size)
            build_image_processor(size, 3, IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD).save_pretrained(written)
        released, license = _release(args.model_type)
        write_conversion_card(written, output.name, released, model.config, license)
        _check_reloaded(model, type(model).from_pretrained(written))
        os.rename(written, output)
    number = sum(value.numel() for value in model.state_dict().values())
    say(f"{output}: {type(model).__name__}, {number:,} numbers. It computes the same once loaded again.")
    if unused:
        say(f"{len(unused)} weights of the checkpoint are not used: {name_some(unused)}.")
    else:
        say("All weights of the checkpoint are used.")
    if is_restricted(license):
        say(restriction(f"the authors' {released}", license))
    return 0


def _release(model_type: str) -> tuple[str, str]:
    """What people call the network, and the licence of what its authors released."""
    if model_type in ENCODER_RELEASES:
        return {"dino": "DINO", "ibot": "iBOT"}[model_type], ENCODER_RELEASES[model_type]
    return method_name(model_type), RECORDS[model_type].release_license


@torch.no_grad()
def _check_reloaded(model: PreTrainedModel, reloaded: PreTrainedModel) -> None:
    height, width = as_pair(model.config.image_size)
    generator = torch.Generator().manual_seed(0)
    pixel_values = torch.randn(2, model.config.num_channels, height, width, generator=generator)
    encoders = (getattr(network, "encoder", network) for network in (model, reloaded.eval()))
    expected, found = (encoder(pixel_values).last_hidden_state for encoder in encoders)
    if not expected.isfinite().all():
        raise ValueError("The encoder's outputs are not finite: the checkpoint is damaged, or of another network.")
    difference = (found - expected).abs().max().item()
    if difference > 1e-5:
        raise ValueError(f"Loaded again, the encoder's outputs differ by {difference:.2g}. Nothing is written.")
