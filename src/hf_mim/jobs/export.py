"""Writes an encoder or classifier for other software, and says how far its outputs are from the model's."""

from dataclasses import dataclass, field

from ..hub.export import export
from ..hub.formats import FORMATS
from ..training.command import name_words, parse_arguments, say
from ..training.errors import run_job


@dataclass
class ExportArguments:
    """What is exported, where to and as what."""

    model_name_or_path: str | None = field(
        default=None, metadata={"help": "A run, an encoder or a classifier of hf_mim, or any plain ViT of the Hub."}
    )
    output: str | None = field(default=None, metadata={"help": "The file or folder to write; there is nothing yet."})
    format: str = field(
        default="vit",
        metadata={
            "help": f"{', '.join(FORMATS)}. vit and dinov2 are folders that plain transformers loads, the others "
            "files that end in .safetensors, .onnx or .pt2."
        },
    )
    dtype: str = field(default="float32", metadata={"help": "Of the weights: float32 or float16."})

    def __post_init__(self):
        for flag, what in (("model_name_or_path", "the run"), ("output", "where the export goes")):
            if getattr(self, flag) is None:
                raise ValueError(f"--{flag} is missing: {what}. hf_mim export RUN OUT.onnx --format onnx")


def main(argv: list[str] | None = None) -> int:
    """`hf_mim export RUN OUT --format onnx`. Returns the exit status."""
    words = name_words(argv, "model_name_or_path", "output")
    return run_job(lambda: write_export(*parse_arguments((ExportArguments,), words, presets={})))


def write_export(args: ExportArguments) -> int:
    """Exports, and says the largest difference from the model."""
    difference = export(args.model_name_or_path, args.output, args.format, dtype=args.dtype)
    say(f"{args.output}: {args.format}, {args.dtype}. Largest difference from the model: {difference:.1e}.")
    return 0
