"""
Every method, on the same images, with the same encoder, beside an untrained network, raw pixels and a supervised one.

    python benchmarks/comparison.py --next --cifar10 /path/to/cifar10 --fashion_mnist /path/to/fashion-mnist
    python benchmarks/comparison.py --table

A cell is (data, method, seed): `examples/run_mim.py` with each method's tiny preset and the same number of images seen
(TEC: as many again after its base, which is MAE's cell of the same seed; dBOT: in two stages). Its numbers go into
`results/comparison.csv` (see `results_table.py`); a cell that is there is not run again, and one that was stopped goes
on from its last checkpoint. `--next` says what is done and what is not, and runs the cells that are not, one after the
other, for `--hours`; with `--hours 0` it only says it. `--table` writes tables and pictures of what there is.

On CIFAR-10 every cell is looked at after 1/16, 1/8, 1/4, 1/2 and all of its images: the learning curves. Choices are
made on `cifar10_held_out`: 5,000 of the training split are held out, and the test split is not read.
"""

import argparse
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import HfArgumentParser

import results_table
from hf_mim.data.arguments import DataArguments
from hf_mim.evaluation.attentive_probe import evaluate_attentively
from hf_mim.evaluation.features import extract_features, labelled_splits, shared_labels
from hf_mim.evaluation.report import evaluate_features
from hf_mim.jobs.loading import load_subject
from hf_mim.training.arguments import supports_bf16
from hf_mim.training.presets import preset_training
from results_table import REPOSITORY

MILLION = 1_000_000
# Flags of run_mim.py; "{runs}" is the folder of the runs with the same data and seed.
METHODS = {
    "MAE": ["--model_type=vit_mae"],
    "PiLaMIM": ["--model_type=pilamim"],
    "PiLaMIM without [CLS] loss": ["--model_type=pilamim", "--config_overrides=use_cls_loss=false"],
    "OCL": ["--model_type=ocl"],
    # The paper's ablation over the number of negatives.
    "OCL, 64 a step": ["--model_type=ocl"],
    "dBOT (2 stages)": ["--model_type=dbot", "--num_stages=2"],
    "TEC (base: MAE)": ["--model_type=tec", "--base_model_name_or_path={runs}/MAE"],
    # What TEC has to beat: the base, trained on for as long.
    "MAE, twice as long": ["--model_type=vit_mae", "--model_name_or_path={runs}/MAE"],
    "I-JEPA": ["--model_type=ijepa"],
    "dBOT (2 stages, first teacher PiLaMIM)": [
        "--model_type=dbot",
        "--num_stages=2",
        "--teacher_model_name_or_path={runs}/PiLaMIM",
    ],
    "dBOT (2 stages, first teacher MAE)": [
        "--model_type=dbot",
        "--num_stages=2",
        "--teacher_model_name_or_path={runs}/MAE",
    ],
    "MAE, 2,000,000 images": ["--model_type=vit_mae"],
    "PiLaMIM, 2,000,000 images": ["--model_type=pilamim"],
    "OCL, 2,000,000 images": ["--model_type=ocl"],
    "MAE, mini": ["--model_type=vit_mae", "--preset=mini"],
    "PiLaMIM, mini": ["--model_type=pilamim", "--preset=mini"],
}
# An untrained network of the same size, trained with labels; flags of run_image_classification.py.
SUPERVISED = {"supervised": [], "supervised, mini": ["--preset=mini"]}
UNTRAINED = "untrained"
# Images per step, whatever the data.
BATCH_SIZES = {"OCL": 256, "OCL, 64 a step": 64, "OCL, 2,000,000 images": 256}
_SHORT = ["dBOT (2 stages, first teacher PiLaMIM)"]
_CURVES = ["dBOT (2 stages, first teacher MAE)", "OCL, 64 a step"]
_LONG = [name for name in METHODS if name.endswith("images")]
_MINI = [name for name in (*METHODS, *SUPERVISED) if name.endswith("mini")]
# Dear: one seed of each, after all others, and not fine-tuned.
_LAST = (*_LONG, *_MINI)


@dataclass(frozen=True)
class Data:
    """A data set of the comparison: how many images each method sees, and by how many labels it is fine-tuned."""

    images: int
    crop_scale_min: float
    methods: tuple[str, ...]
    # Name of the number of labels, and flags of run_image_classification.py.
    labels: dict[str, list[str]]
    label: str = "label"
    # Looked at on the way: learning curves.
    points: tuple[float, ...] = (1.0,)
    # Images per step, but for contrast, which lives on the number of negatives.
    batch: int = 128


def _few(number: int, epochs: int) -> list[str]:
    return [f"--max_train_samples={number}", f"--num_train_epochs={epochs}"]


_BASE = [name for name in METHODS if name not in (*_SHORT, *_CURVES, *_LAST)]
_HALVES = (1 / 16, 1 / 8, 1 / 4, 1 / 2, 1.0)
DATA = {
    "cifar10": Data(
        500_000,
        0.2,
        (*_BASE, *_CURVES, "supervised", *_LAST),
        {
            "1%": [*_few(500, 50), "--per_device_train_batch_size=32"],
            "10%": _few(5000, 20),
            "all": ["--num_train_epochs=5"],
        },
        points=_HALVES,
        # Of the same images, steps of 64 make more than steps of 128 (LOG.md).
        batch=64,
    ),
    "cifar10_held_out": Data(500_000, 0.2, tuple(_BASE), {}, batch=64),
    "scenes": Data(
        60_000,
        0.8,
        (*_BASE, *_SHORT),
        {"2000": _few(2000, 5), "1%": [*_few(120, 20), "--per_device_train_batch_size=32"]},
        label="count",
    ),
    "fashion_mnist": Data(
        60_000,
        0.5,
        (*_BASE, *_SHORT),
        {"4000": _few(4000, 5), "1%": [*_few(600, 20), "--per_device_train_batch_size=32"]},
    ),
}


@dataclass(frozen=True)
class Cell:
    """(data, method, seed), and for fine-tuning of its network the number of labels."""

    data: str
    method: str
    seed: int
    labels: str | None = None

    @property
    def name(self) -> str:
        return f"{self.data}, {self.method}, seed {self.seed}{f', fine-tuned/{self.labels}' if self.labels else ''}"

    @property
    def metric(self) -> str:
        """What is in the table once the cell is done."""
        return f"fine-tuned/{self.labels}" if self.labels else "seconds"

    def images(self, args) -> int:
        if args.images is not None:
            return args.images
        return 2 * MILLION if self.method in _LONG else DATA[self.data].images

    def needs(self) -> "Cell | None":
        """The cell whose network this one starts from."""
        if self.labels is not None:
            return None if self.method == UNTRAINED else Cell(self.data, self.method, self.seed)
        found = [re.search(r"{runs}/(\w+)", flag) for flag in METHODS.get(self.method, ())]
        return next((Cell(self.data, match[1], self.seed) for match in found if match), None)

    def folder(self, args) -> Path:
        name = slug(self.method) if self.labels is None else f"{slug(self.method)}-{slug(self.labels)}"
        return args.runs / self.data / str(self.seed) / name


def slug(method: str) -> str:
    """A folder's name: letters, digits and underscores."""
    return re.sub(r"[^a-zA-Z0-9]+", "_", method).strip("_")


def all_cells(args) -> list[Cell]:
    """In the order in which they are run: seed by seed, so that what is there after an interrupt is whole."""
    cells = []
    for seed in args.seeds:
        for data in args.data:
            methods = [m for m in DATA[data].methods if m in args.methods and (m not in _LAST or seed == 0)]
            cells += [Cell(data, method, seed) for method in methods]
            if args.finetune:
                tuned = [UNTRAINED, *(m for m in methods if m not in (*SUPERVISED, *_LAST))]
                cells += [Cell(data, method, seed, labels) for method in tuned for labels in DATA[data].labels]
    return sorted(cells, key=lambda cell: cell.method in _LAST)


def data_flags(data: str, args) -> list[str]:
    if data == "scenes":
        return []
    if data == "cifar10":
        return [f"--dataset_name={args.cifar10}", "--image_size=32", *_cache(args)]
    if data == "cifar10_held_out":
        # Of this file alone, a tenth is held out: the same 5,000 each time.
        file = args.cifar10 / "train.parquet"
        return [f"--dataset_name={file}", "--validation_fraction=0.1", "--image_size=32", *_cache(args)]
    return [f"--train_dir={args.fashion_mnist}", "--num_channels=1", "--image_size=28"]


def _cache(args) -> list[str]:
    return [f"--data_cache_dir={args.runs / 'data'}"]


def run(script: str, flags: list[str], args) -> float:
    """Runs an example script; returns the seconds it took."""
    environment = os.environ | {"OMP_NUM_THREADS": str(args.threads), "HF_HUB_OFFLINE": "1"}
    start = time.perf_counter()
    result = subprocess.run(
        [sys.executable, str(REPOSITORY / "examples" / script), *flags, "--disable_tqdm=true", *args.flags],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    if result.returncode:
        raise RuntimeError(f"{script} {' '.join(flags)}\n{result.stdout[-2000:]}\n{result.stderr[-4000:]}")
    return time.perf_counter() - start


def pretrain(cell: Cell, args) -> list[dict]:
    """A cell's rows: of its network at each of its points, and of the references where it is MAE's."""
    data = DATA[cell.data]
    flags = [*data_flags(cell.data, args), f"--crop_scale_min={data.crop_scale_min}"]
    flags += [flag.format(runs=cell.folder(args).parent) for flag in METHODS[cell.method]]
    batch = BATCH_SIZES.get(cell.method, data.batch)
    flags += [f"--per_device_train_batch_size={batch}", f"--seed={cell.seed}"]
    if cell.data == "scenes" and cell.method.startswith(("MAE", "PiLaMIM")):
        # As on the other data: the scenes' own schedule goes with small batches.
        flags += [
            f"--base_learning_rate={preset_training('tiny', 'pilamim')['base_learning_rate']}",
            "--mask_ratio=0.75",
        ]
    # Stages share the images among them; --max_steps is the length of one.
    stages = 2 if "--num_stages=2" in flags else 1
    steps = max(1, cell.images(args) // batch // stages)
    flags += [f"--max_steps={steps}"]
    # Raw pixels are the same in every method's cell; as the untrained network MAE's draw stands for all.
    flags += [] if cell.method == "MAE" else ["--references=false"]
    every, points = curve(data.points, steps * stages)
    # All are looked at in the end; each interruption leaves one more.
    flags += ["--save_strategy=steps", f"--save_steps={every}", "--save_total_limit=100"]
    folder = cell.folder(args)
    run("run_mim.py", [*flags, f"--output_dir={folder}"], args)
    pace = images_per_second(folder)
    results = json.loads((folder / "features.json").read_text())
    rows: list[dict] = []

    def add(method: str, images: int, metric: str, value: float | None) -> None:
        if value is not None:
            rows.append(row(cell, metric, value) | {"method": method, "images_seen": images})

    for name, images, metric, value in numbers(results):
        if images == 0:
            add(name, 0, metric, value)
        elif name is None:
            add(cell.method, steps * batch * stages, metric, value)
        else:
            add(f"{cell.method}, after {name}", steps * batch * (int(name.split()[1]) + 1), metric, value)
    places = sorted(folder.glob("stage*")) or [folder]
    for stage, place in enumerate(places):
        for checkpoint in sorted(place.glob("checkpoint-*")):
            seen = stage * steps + int(checkpoint.name.split("-")[1])
            if seen in points:
                for _, _, metric, value in numbers(evaluate_checkpoint(checkpoint, cell, args)):
                    add(cell.method, seen * batch, metric, value)
                add(cell.method, seen * batch, "seconds", pace and round(seen * batch / pace, 1))
    add(cell.method, steps * batch * stages, "seconds", pace and round(steps * batch * stages / pace, 1))
    for checkpoint in folder.rglob("checkpoint-*"):
        shutil.rmtree(checkpoint)
    return rows


def curve(points: tuple[float, ...], steps: int) -> tuple[int, set[int]]:
    """Every how many steps there is a checkpoint, and those of the checkpoints that are looked at."""
    every = max(1, round(min(points) * steps))
    return every, {every * round(point / min(points)) for point in points if point < 1}


def images_per_second(folder: Path) -> float | None:
    """Of the longest part of a run that was trained at a stretch; None where no part came to its end."""
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    parts = [log for log in history if log.get("train_samples_per_second")]
    return max(parts, key=lambda log: log["train_runtime"])["train_samples_per_second"] if parts else None


def numbers(results: dict):
    """(name of the network, 0 for references, metric, value) of `features.json`; the name is None for the last one."""

    def of(name: str) -> tuple[str | None, int | None]:
        return None if name == "trained" else name, 0 if name in results_table.REFERENCES else None

    for name, values in results["features"].items():
        network, _, features = name.partition(", ")
        for score, short in (("knn", "k-NN"), ("linear", "linear")):
            for label, value in values[score].items():
                yield *of(network), "/".join(part for part in (short, features, label) if part), value
        yield *of(network), f"RankMe/{features}", values["rank_me"]
    for network, accuracies in results["attentive"]["accuracy"].items():
        for label, value in accuracies.items():
            yield *of(network), f"attentive/{label}", value


def evaluate_checkpoint(checkpoint: Path, cell: Cell, args) -> dict:
    """What the encoder of a checkpoint is worth, as the end of a run says it."""
    (data_args,) = HfArgumentParser(DataArguments).parse_args_into_dataclasses(data_flags(cell.data, args))
    subject = load_subject(str(checkpoint), data_args)
    splits = labelled_splits(subject.pictures)
    labels = shared_labels(*splits)
    encoders, how = {"trained": subject.encoder}, {"bf16": supports_bf16(use_cpu=not torch.cuda.is_available())}
    poolings = subject.encoder.poolings
    features = [extract_features(encoders, split, subject.processor, poolings, **how) for split in splits]
    attentive = evaluate_attentively(encoders, *splits, *labels, subject.processor, **how)
    return evaluate_features(*features, *labels) | {"attentive": attentive}


def supervise(cell: Cell, args) -> list[dict]:
    """An untrained network trained with all labels: its accuracy after as many images."""
    batch = DATA[cell.data].batch
    steps = max(1, cell.images(args) // batch)
    every = max(1, round(min(DATA[cell.data].points) * steps))
    flags = [*data_flags(cell.data, args), "--model_type=pilamim", f"--seed={cell.seed}", f"--max_steps={steps}"]
    flags += [f"--per_device_train_batch_size={batch}", "--max_eval_samples=4000", *_label_flags(cell)]
    flags += ["--eval_strategy=steps", f"--eval_steps={every}", "--save_strategy=steps", f"--save_steps={every}"]
    flags += SUPERVISED[cell.method]
    run("run_image_classification.py", [*flags, f"--output_dir={cell.folder(args)}"], args)
    history = json.loads((cell.folder(args) / "trainer_state.json").read_text())["log_history"]
    pace = images_per_second(cell.folder(args))
    rows = []
    for log in history:
        if "eval_accuracy" in log:
            images = log["step"] * batch
            accuracy = f"accuracy/{DATA[cell.data].label}"
            for metric, value in ((accuracy, log["eval_accuracy"]), ("seconds", images / pace)):
                rows.append(row(cell, metric, value) | {"images_seen": images})
    for checkpoint in cell.folder(args).glob("checkpoint-*"):
        shutil.rmtree(checkpoint)
    return rows


def finetune(cell: Cell, args) -> list[dict]:
    """Accuracy of a cell's encoder fine-tuned with some of the labels; of an untrained one: from scratch."""
    flags = [*data_flags(cell.data, args), f"--seed={cell.seed}", *DATA[cell.data].labels[cell.labels]]
    flags += ["--eval_strategy=no", "--max_eval_samples=4000", "--save_strategy=no", *_label_flags(cell)]
    needed = cell.needs()
    flags += ["--model_type=pilamim"] if needed is None else [f"--model_name_or_path={needed.folder(args)}"]
    output = cell.folder(args)
    shutil.rmtree(output, ignore_errors=True)
    seconds = run("run_image_classification.py", [*flags, f"--output_dir={output}"], args)
    accuracy = json.loads((output / "results.json").read_text())["accuracy"]
    shutil.rmtree(output)
    return [row(cell, cell.metric, accuracy), row(cell, f"seconds/{cell.metric}", round(seconds))]


def _label_flags(cell: Cell) -> list[str]:
    return [] if cell.data == "fashion_mnist" else [f"--label_column_name={DATA[cell.data].label}"]


def row(cell: Cell, metric: str, value: float) -> dict:
    here = {"data": cell.data, "method": cell.method, "seed": cell.seed, "images_seen": None}
    return here | {"metric": metric, "value": round(value, 4), "commit": commit(), "machine": machine()}


def commit() -> str:
    git = ["git", "-C", str(REPOSITORY)]
    found = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True)
    changed = subprocess.run([*git, "diff", "--quiet", "HEAD", "--", "src"], check=False).returncode
    return found.stdout.strip() + ("+" if changed else "")


def machine() -> str:
    return f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}"


def is_done(cell: Cell, rows: list[dict]) -> bool:
    """Whether the cell's last number is in the table."""
    places = {(row["data"], row["method"], row["seed"]) for row in rows if row["metric"] == cell.metric}
    return (cell.data, cell.method, cell.seed) in places


def can_start(cell: Cell, args) -> bool:
    """Whether the network that the cell starts from is on this disk."""
    needed = cell.needs()
    return needed is None or (needed.folder(args) / "model.safetensors").is_file()


def run_cells(cells: list[Cell], args) -> None:
    """Runs what is not done, one cell after the other, until the time is over; says what cannot start, and why."""
    end = time.monotonic() + 3600 * args.hours
    for cell in cells:
        if is_done(cell, results_table.read(args.results)):
            continue
        if not can_start(cell, args):
            print(f"left out: {cell.name}: the network of {cell.needs().name} is not in {args.runs}", flush=True)
            continue
        if time.monotonic() >= end:
            print("the time is over; the same command goes on", flush=True)
            return
        start = time.monotonic()
        print(f"starting: {cell.name}", flush=True)
        work = finetune if cell.labels else supervise if cell.method in SUPERVISED else pretrain
        results_table.append(work(cell, args), args.results)
        print(f"done: {cell.name}, {time.monotonic() - start:.0f} s", flush=True)


def write_all(args) -> None:
    """Tables, here and in README, docs and cards, and pictures."""
    rows = results_table.read(args.results)
    found = results_table.scores(rows)
    results_table.write_tables(found, list(METHODS))
    short = {data: methods for data, methods in found.items() if DATA[data].points == (1.0,)}
    if short:
        results_table.draw_scores(short, list(METHODS), args.results.with_suffix(".png"))
    for data in found:
        if len(DATA[data].points) > 1:
            path = args.results.with_name(f"comparison_{data}.png")
            results_table.draw_curves(rows, data, DATA[data].label, path, [*METHODS, *SUPERVISED])


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--next", action="store_true", help="Say what is done, and run what is not.")
    parser.add_argument("--table", action="store_true", help="Write tables and pictures of the cells that there are.")
    parser.add_argument("--fashion_mnist", type=Path, help="Folder of the idx files; left out: not compared on.")
    parser.add_argument("--cifar10", type=Path, help="Folder of train.parquet and test.parquet; left out: likewise.")
    parser.add_argument("--data", nargs="+", default=["cifar10", "scenes", "fashion_mnist"], choices=list(DATA))
    parser.add_argument("--methods", nargs="+", default=[*METHODS, *SUPERVISED], choices=[*METHODS, *SUPERVISED])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--images", type=int, help="Seen by each cell. Default: 500,000 (CIFAR-10), 60,000 (others).")
    parser.add_argument("--hours", type=float, default=24.0, help="No cell is started after so many hours.")
    parser.add_argument("--finetune", action="store_true", help="Fine-tune the cells' networks too.")
    parser.add_argument("--runs", type=Path, default=Path("runs/comparison"), help="Where the networks are kept.")
    parser.add_argument("--results", type=Path, default=results_table.RESULTS, help="The table.")
    parser.add_argument("--threads", type=int, default=1, help="Threads of a cell.")
    parser.add_argument("--flags", nargs="*", default=[], help="More flags of the scripts, e.g. --flags=--bf16=false.")
    args = parser.parse_args(argv)
    if not args.next and not args.table:
        parser.error("give --next, --table, or both")
    args.runs = args.runs.resolve()
    where = {"fashion_mnist": args.fashion_mnist, "cifar10": args.cifar10, "cifar10_held_out": args.cifar10}
    args.data = [name for name in args.data if name == "scenes" or where[name] is not None]
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    torch.set_num_threads(args.threads)
    if args.next:
        cells, rows = all_cells(args), results_table.read(args.results)
        done = [cell for cell in cells if is_done(cell, rows)]
        print(f"{len(done)} of {len(cells)} cells are done")
        for cell in cells:
            print(f"{'done' if cell in done else 'open'}: {cell.name}")
        run_cells(cells, args)
    if args.table:
        write_all(args)


if __name__ == "__main__":
    main()
