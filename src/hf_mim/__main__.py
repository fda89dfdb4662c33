"""The command `hf_mim`: each sub-command is what the script of the same purpose in examples/ does, with its flags."""

import importlib
import sys

from . import __version__
from .missing import say_missing

# Sub-command: the module whose `main` it is, and what it does. The modules are imported when they are asked for.
COMMANDS = {
    "pretrain": ("hf_mim.jobs.pretraining", "pretrain a Vision Transformer on images without labels"),
    "probe": ("hf_mim.jobs.linear_probe", "linear probe of frozen features, by the papers' protocol"),
    "finetune": ("hf_mim.jobs.finetuning", "fine-tune a classifier"),
    "segment": ("hf_mim.jobs.segmentation", "fine-tune a segmenter"),
    "depth": ("hf_mim.jobs.depth", "fine-tune an estimator of depth"),
    "detect": ("hf_mim.jobs.detection", "fine-tune a detector: boxes and masks of objects"),
    "report": ("hf_mim.jobs.representation_report", "k-NN, probes, RankMe and pictures of one or several models"),
    "embed": ("hf_mim.jobs.embed", "features of images as a table, and pages of nearest neighbours"),
    "export": ("hf_mim.jobs.export", "write an encoder or classifier for other software: ViT, timm, ONNX, ..."),
    "convert": ("hf_mim.jobs.convert", "read a checkpoint that a method's authors released"),
    "replay": ("hf_mim.jobs.replay", "do again a step whose loss was not finite, and say where that begins"),
    "check": ("hf_mim.jobs.check", "read a data set once, and say what is wrong with it"),
    "pack": ("hf_mim.jobs.pack", "pack pictures into few large files, smaller where wanted"),
}


def usage() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {what}" for name, (_, what) in COMMANDS.items()]
    return "\n".join(
        [
            "usage: hf_mim COMMAND [RECIPE.yaml] [--FLAG VALUE ...]",
            "       hf_mim --version",
            "",
            *lines,
            "",
            "hf_mim COMMAND --help lists the flags. On several GPUs: accelerate launch -m hf_mim COMMAND ...",
        ]
    )


def main(argv: list[str] | None = None) -> int:
    """Runs a sub-command, and returns its exit status: 2 where there is no such command."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help"):
        print(usage())
        return 0 if argv else 2
    if argv[0] == "--version":
        print(f"hf_mim {__version__}")
        return 0
    name, *rest = argv
    if name not in COMMANDS:
        print(f"Error: there is no command {name!r}.\n\n{usage()}", file=sys.stderr)
        return 2
    # What argparse calls the program in its help.
    sys.argv[0] = f"hf_mim {name}"
    try:
        job = importlib.import_module(COMMANDS[name][0])
    except ImportError as error:
        message = say_missing(error)
        if message is None:
            raise
        print(f"Error: {message}", file=sys.stderr)
        return 1
    return job.main(rest)


if __name__ == "__main__":
    sys.exit(main())
