"""
When adapting pretrained weights is worth it: MAE is pretrained on one half of CIFAR-10's classes, and adapted to the
other half in the ways of docs/adapt.md, beside the weights as they are and a network trained from scratch.

    python benchmarks/adaptation.py --cifar10 /path/to/cifar10 --work runs/adaptation --hours 8
    python benchmarks/adaptation.py --work runs/adaptation --table

A cell is (way, number of unlabelled pictures, seed). All ways see as many pictures, however few there are, with the
preset tiny's schedule of their method. Each cell tells k-NN and linear accuracy on frozen features (the better of
[CLS] and mean; 10,000 labelled pictures of the other half, tested on 4,000 of its test split), and accuracy after
fine-tuning with 250 labels, 1% of them. Its numbers are in `WORK/cells/*.json`: a cell that is there is not run again,
and one that was stopped goes on from its last checkpoint. Cells run seed by seed, until `--hours` are over. `--table`
prints the mean and the standard deviation over the seeds that are there.
"""

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

FIRST, OTHER = range(5), range(5, 10)
LABELS_A_CLASS = 50
BATCH_SIZE = 64
START = "pretrained"
# Flags of `hf_mim pretrain`; None of a way that trains nothing. "{start}" is the folder of the weights.
_FROM = "--model_name_or_path={start}"
WAYS = {
    "scratch": ["--model_type=vit_mae"],
    "frozen": None,
    "MAE, all weights": ["--model_type=vit_mae", _FROM],
    "PiLaMIM, all weights": ["--model_type=pilamim", _FROM],
    "OCL, all weights": ["--model_type=ocl", _FROM],
    "TEC": ["--model_type=tec", _FROM, "--base_model_name_or_path={start}", "--config_overrides=adapters=encoder"],
    "MAE, LoRA of rank 8": ["--model_type=vit_mae", _FROM, "--lora_rank=8"],
    "MAE, last 2 of 4 blocks": ["--model_type=vit_mae", _FROM, "--trainable_blocks=2"],
}
MEASURES = ("k-NN", "linear", "fine-tuned")


@dataclass(frozen=True)
class Cell:
    """A way, how many pictures it sees (None: it sees none), and a seed."""

    way: str
    number: int | None
    seed: int

    @property
    def slug(self) -> str:
        name = "".join(letter if letter.isalnum() else "_" for letter in self.way)
        return f"{name}-{'none' if self.number is None else self.number}-{self.seed}"


def all_cells(args) -> list[Cell]:
    """In the order in which they run; the weights that the others start from are made when they are wanted."""
    return [
        Cell(way, number, seed)
        for seed in args.seeds
        for way in args.ways
        for number in ([None] if WAYS[way] is None else args.numbers)
    ]


def write_data(args) -> None:
    """Parquet files of both halves, once: `first`, `other_N` (N unlabelled pictures), `other` and `labelled`."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder = args.work / "data"
    if (folder / "done").is_file():
        return
    shutil.rmtree(folder, ignore_errors=True)
    tables = {split: pq.read_table(args.cifar10 / f"{split}.parquet") for split in ("train", "test")}
    label = next(name for name in tables["train"].column_names if name in ("label", "labels"))
    order = np.random.Generator(np.random.PCG64(0)).permutation(len(tables["train"]))

    def of(split: str, classes, order=None) -> pa.Table:
        rows = np.arange(len(tables[split])) if order is None else order
        return tables[split].take(rows[np.isin(tables[split][label].to_numpy()[rows], classes)])

    test = of("test", OTHER)
    other = of("train", OTHER, order)
    classes = other[label].to_numpy()
    few = np.concatenate([np.flatnonzero(classes == one)[:LABELS_A_CLASS] for one in OTHER])
    parts = {"first": (of("train", FIRST, order), of("test", FIRST)), "other": (other, test)}
    parts |= {"labelled": (other.take(few), test)}
    parts |= {f"other_{number}": (other.slice(0, number), test) for number in args.numbers}
    for name, pair in parts.items():
        (folder / name).mkdir(parents=True)
        for split, table in zip(("train", "test"), pair, strict=True):
            pq.write_table(table, folder / name / f"{split}.parquet")
    (folder / "done").touch()


def call(command: str, flags: list[str], log: Path) -> None:
    """`hf_mim COMMAND`, whose words go into a file."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "w", encoding="utf-8") as stream:
        words = [sys.executable, "-m", "hf_mim", command, *flags, "--disable_tqdm=true", "--image_size=32"]
        status = subprocess.run(words, stdout=stream, stderr=subprocess.STDOUT, check=False).returncode
    if status:
        raise RuntimeError(f"hf_mim {command} {' '.join(flags)} ended with {status}:\n{log.read_text()[-3000:]}")


def pretrain(way: str, data: str, images: int, seed: int, folder: Path, args) -> None:
    """Trains a way, and leaves the network in `folder`; a run that was stopped goes on."""
    start = args.work / "runs" / f"{START}-{seed}"
    batch = 256 if "--model_type=ocl" in WAYS[way] else BATCH_SIZE
    batch = min(batch, args.numbers[0])
    steps = max(1, images // batch)
    flags = [flag.format(start=start) for flag in WAYS[way]]
    flags += [f"--dataset_name={args.work / 'data' / data}", f"--data_cache_dir={args.work / 'cache'}"]
    flags += [f"--per_device_train_batch_size={batch}", f"--max_steps={steps}", f"--seed={seed}"]
    flags += ["--max_eval_samples=256", "--eval_strategy=no", "--references=false", "--save_strategy=steps"]
    flags += [f"--save_steps={max(1, steps // 10)}", "--save_total_limit=1", f"--output_dir={folder}"]
    call("pretrain", flags, args.work / "logs" / f"{folder.name}.txt")
    for checkpoint in folder.glob("checkpoint-*"):
        shutil.rmtree(checkpoint)


def frozen_accuracies(folder: Path, args) -> dict[str, float]:
    """k-NN and linear accuracy of the encoder in a folder, on the other half."""
    from hf_mim.data.arguments import DataArguments
    from hf_mim.evaluation.features import extract_features, labelled_splits, shared_labels
    from hf_mim.evaluation.report import evaluate_features
    from hf_mim.jobs.loading import load_subject

    data = DataArguments(
        dataset_name=str(args.work / "data" / "other"), data_cache_dir=str(args.work / "cache"), image_size=[32]
    )
    subject = load_subject(str(folder), data)
    splits = labelled_splits(subject.pictures, args.max_labelled, args.max_test)
    features = [
        extract_features({"": subject.encoder}, split, subject.processor, subject.encoder.poolings) for split in splits
    ]
    found = evaluate_features(*features, *shared_labels(*splits))["features"].values()
    return {
        name: max(max(scores[key].values()) for scores in found)
        for name, key in (("k-NN", "knn"), ("linear", "linear"))
    }


def fine_tuned_accuracy(folder: Path, cell: Cell, args) -> float:
    tuned = args.work / "runs" / f"{cell.slug}-tuned"
    flags = [f"--model_name_or_path={folder}", f"--dataset_name={args.work / 'data' / 'labelled'}"]
    flags += [f"--data_cache_dir={args.work / 'cache'}", "--per_device_train_batch_size=32", f"--seed={cell.seed}"]
    flags += [f"--num_train_epochs={args.tuning_epochs}", f"--max_eval_samples={args.max_test}", "--eval_strategy=no"]
    flags += ["--save_strategy=no", f"--output_dir={tuned}"]
    call("finetune", flags, args.work / "logs" / f"{tuned.name}.txt")
    accuracy = json.loads((tuned / "results.json").read_text())["accuracy"]
    shutil.rmtree(tuned)
    return accuracy


def run_cell(cell: Cell, args) -> dict:
    begun = time.perf_counter()
    start = args.work / "runs" / f"{START}-{cell.seed}"
    if cell.way != "scratch" and not (start / "done").is_file():
        pretrain("scratch", "first", args.pretraining_images, cell.seed, start, args)
        (start / "done").touch()
    folder = start
    if cell.number is not None:
        folder = args.work / "runs" / cell.slug
        pretrain(cell.way, f"other_{cell.number}", args.adapting_images, cell.seed, folder, args)
    found = frozen_accuracies(folder, args) | {"fine-tuned": fine_tuned_accuracy(folder, cell, args)}
    if folder != start:
        shutil.rmtree(folder)
    return vars(cell) | found | {"seconds": round(time.perf_counter() - begun)}


def table(args) -> str:
    """A row a way and number of pictures, a column a measure: mean and standard deviation over seeds."""
    found = [json.loads(path.read_text()) for path in sorted((args.work / "cells").glob("*.json"))]
    lines = ["| way | pictures | seeds | " + " | ".join(MEASURES) + " |", "|---" * (3 + len(MEASURES)) + "|"]
    for way in WAYS:
        for number in (None, *sorted({cell["number"] for cell in found if cell["number"]})):
            mine = [cell for cell in found if (cell["way"], cell["number"]) == (way, number)]
            if not mine:
                continue
            cells = []
            for measure in MEASURES:
                values = [cell[measure] for cell in mine]
                deviation = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
                cells.append(f"{statistics.mean(values):.1f}{deviation}")
            of = "-" if number is None else f"{number:,}"
            lines.append(f"| {way} | {of} | {len(mine)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--cifar10", type=Path, help="a folder with train.parquet and test.parquet")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--hours", type=float, default=1e9)
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--numbers", type=int, nargs="+", default=[500, 5_000, 25_000])
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=list(WAYS))
    parser.add_argument("--pretraining_images", type=int, default=500_000)
    parser.add_argument("--adapting_images", type=int, default=200_000)
    parser.add_argument("--tuning_epochs", type=int, default=50)
    parser.add_argument("--max_labelled", type=int, default=10_000)
    parser.add_argument("--max_test", type=int, default=4_000)
    args = parser.parse_args(argv)
    if args.table:
        print(table(args))
        return
    if args.cifar10 is None:
        parser.error("--cifar10 is missing: a folder with train.parquet and test.parquet")
    write_data(args)
    (args.work / "cells").mkdir(parents=True, exist_ok=True)
    begun = time.perf_counter()
    cells = all_cells(args)
    missing = [cell for cell in cells if not (args.work / "cells" / f"{cell.slug}.json").is_file()]
    print(f"{len(cells) - len(missing)} of {len(cells)} cells are there.", flush=True)
    for cell in missing:
        if time.perf_counter() - begun > 3600 * args.hours:
            break
        found = run_cell(cell, args)
        path = args.work / "cells" / f"{cell.slug}.json"
        # Under another name first: what is there is whole.
        path.with_suffix(".tmp").write_text(json.dumps(found) + "\n")
        path.with_suffix(".tmp").rename(path)
        print(json.dumps(found), flush=True)
    print(table(args))


if __name__ == "__main__":
    main()
