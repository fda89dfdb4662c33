"""Features of images as a table, by any Vision Transformer, and a page of the nearest ones."""

import itertools
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path

from accelerate import PartialState

from ..data.arguments import DataArguments
from ..evaluation.embedding import parts_of, write_embeddings
from ..evaluation.neighbours import nearest_page
from ..files import write_text
from ..training.command import name_words, parse_arguments, say
from ..training.errors import run_job
from ..training.run_lock import only_run_in
from .loading import load_subject, name_data

# Broken images that are named on the screen.
_MAX_LISTED = 20


@dataclass
class EmbedArguments:
    """Which network looks at which images, and what is kept."""

    model_name_or_path: str | None = field(
        default=None, metadata={"help": "A run of hf_mim, or any plain ViT: ViT, ViTMAE, DINOv2, DINOv3, CLIP, ..."}
    )
    images: str | None = field(
        default=None, metadata={"help": "A folder, or a data set as --dataset_name takes it. All images of a split."}
    )
    output: str | None = field(default=None, metadata={"help": "The table to write, a .parquet file."})
    patches: bool = field(default=False, metadata={"help": "Keep the features of all patches too, in float16."})
    nearest: int | None = field(
        default=None,
        metadata={"help": "Write a page beside the table too, .html, of so many nearest images and near-duplicates."},
    )
    nearest_by: str = field(default="mean", metadata={"help": "Features of the page: mean (of the patches) or cls."})
    num_shown: int = field(default=100, metadata={"help": "Images, and pairs of near-duplicates, on the page."})
    duplicates_above: float = field(
        default=0.95, metadata={"help": "Similarity above which two images count as near-duplicates, from -1 to 1."}
    )
    batch_size: int = field(default=64, metadata={"help": "Images at a time, of each process."})
    num_workers: int = field(default=0, metadata={"help": "Processes that read images, of each process."})
    bf16: bool = field(default=False, metadata={"help": "Compute in bfloat16 autocast."})

    def __post_init__(self):
        usage = "hf_mim embed RUN IMAGES OUT.parquet"
        for flag, what in (("model_name_or_path", "the network"), ("output", "the table to write")):
            if getattr(self, flag) is None:
                raise ValueError(f"--{flag} is missing: {what}. {usage}")
        if not self.output.endswith(".parquet"):
            raise ValueError(f"--output is a file that ends in .parquet, got {self.output}. {usage}")
        for flag, least in (("nearest", 1), ("num_shown", 1), ("batch_size", 1), ("num_workers", 0)):
            if getattr(self, flag) is not None and getattr(self, flag) < least:
                raise ValueError(f"--{flag} must be at least {least}, got {getattr(self, flag)}.")
        if not -1 <= self.duplicates_above <= 1:
            raise ValueError(f"--duplicates_above is a similarity from -1 to 1, got {self.duplicates_above}.")
        if self.nearest_by not in ("mean", "cls"):
            raise ValueError(f"--nearest_by is {self.nearest_by!r}; expected mean or cls.")


def main(argv: list[str] | None = None) -> int:
    """`hf_mim embed RUN IMAGES OUT.parquet`, or `RUN OUT.parquet` and a flag of `DataArguments`. The exit status."""
    return run_job(lambda: embed(*parse_arguments((EmbedArguments, DataArguments), _words(argv), presets={})))


def _words(argv: list[str] | None) -> list[str]:
    argv = sys.argv[1:] if argv is None else argv
    named = len(list(itertools.takewhile(lambda word: not word.startswith("-"), argv)))
    return name_words(argv, "model_name_or_path", *(["images"] if named > 2 else []), "output")


def embed(args: EmbedArguments, data_args: DataArguments) -> int:
    """
    Writes the table, the list of broken images where there are any, and the page if it is asked for.

    Raises:
        ValueError: If model and images do not fit, there are none, the table has no such column, or another process
            is writing it.
        FileExistsError: If a file of these is there.
    """
    if args.images is not None:
        data_args = replace(data_args, **{name_data(args.images): args.images})
    elif data_args.train_dir is None and data_args.dataset_name is None:
        raise ValueError("IMAGES is missing: a folder or data set. hf_mim embed RUN IMAGES OUT.parquet")
    output = Path(args.output)
    broken_list, page = output.with_suffix(".broken.txt"), output.with_suffix(".html")
    for path in [output, broken_list, *([page] if args.nearest else [])]:
        if path.exists():
            raise FileExistsError(f"{path} exists, and is not overwritten: name another, or remove it.")
    with only_run_in(parts_of(output), flag="--output"):
        return _embed(args, data_args, output, broken_list, page)


def _embed(args: EmbedArguments, data_args: DataArguments, output: Path, broken_list: Path, page: Path) -> int:
    state = PartialState()
    subject = load_subject(args.model_name_or_path, data_args, device=state.device, hold_out=False)
    settings = {
        "model": subject.name,
        "images": subject.pictures.source,
        "image_size": list(subject.image_size),
        "image_mean": subject.mean,
        "image_std": subject.std,
        "bf16": args.bf16,
    }
    broken = write_embeddings(
        subject.encoder,
        subject.pictures,
        subject.processor,
        output,
        patches=args.patches,
        batch_size=args.batch_size,
        num_workers=args.num_workers,
        bf16=args.bf16,
        settings=settings,
    )
    say(f"{output}: {len(subject.pictures) - len(broken)} images.")
    if broken:
        say(f"{len(broken)} images cannot be read, and have no row ({broken_list}):")
        for line in broken[:_MAX_LISTED]:
            say(f"  {line}")
        if state.is_main_process:
            write_text(broken_list, "\n".join(broken) + "\n")
    if args.nearest and state.is_main_process:
        text = nearest_page(
            output,
            subject.pictures,
            column=args.nearest_by,
            num_neighbours=args.nearest,
            num_shown=args.num_shown,
            duplicates_above=args.duplicates_above,
        )
        write_text(page, text)
        say(f"{page}: the nearest images.")
    state.wait_for_everyone()
    return 0
