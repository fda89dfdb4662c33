"""
Every method, on the same pictures, with the same encoder, beside an untrained network and raw pixels.

    python benchmarks/comparison.py --fashion_mnist /path/to/fashion-mnist
    python benchmarks/comparison.py --fashion_mnist /path/to/fashion-mnist --finetune

A cell is (data, method, seed): `examples/run_mim.py` with each method's tiny preset and the same number of pictures
seen (TEC: as many again after its base, which is MAE's cell of the same seed; dBOT: in two stages). Each cell writes
one JSON under `benchmarks/results/comparison/`; a cell that has its JSON is not run again, so the script goes on where
it was stopped. `--finetune` fine-tunes each cell's encoder, with many labels and with few. At the end, and with
`--table` alone, `table.md` and `comparison.png` are written beside the cells: mean and standard deviation over the
seeds.
"""

import argparse
import json
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

REPOSITORY = Path(__file__).resolve().parents[1]
RESULTS = REPOSITORY / "benchmarks" / "results" / "comparison"
# Flags of run_mim.py; "{runs}" is the folder of the runs with the same data and seed.
METHODS = {
    "MAE": ["--model_type=vit_mae"],
    "PiLaMIM": ["--model_type=pilamim"],
    "PiLaMIM without [CLS] loss": ["--model_type=pilamim", "--config_overrides=use_cls_loss=false"],
    "OCL": ["--model_type=ocl"],
    "dBOT (2 stages)": ["--model_type=dbot", "--num_stages=2"],
    "TEC (base: MAE)": ["--model_type=tec", "--base_model_name_or_path={runs}/MAE"],
    # What TEC has to beat: the base, trained on for as long.
    "MAE, twice as long": ["--model_type=vit_mae", "--model_name_or_path={runs}/MAE"],
    "dBOT (2 stages, first teacher PiLaMIM)": [
        "--model_type=dbot",
        "--num_stages=2",
        "--teacher_model_name_or_path={runs}/PiLaMIM",
    ],
}
# Pictures per step, where not `--batch_size`: contrast lives on the number of negatives.
BATCH_SIZE = {"OCL": 256}
UNTRAINED = "untrained"
# Fine-tuning: many, and 1% of the training pictures.
NUM_LABELS = {"scenes": (2000, 120), "fashion_mnist": (4000, 600)}
# Labels by data set.
LABEL = {"scenes": ["count", "distance", "shape", "color"], "fashion_mnist": ["label"]}


def data_flags(data: str, args) -> list[str]:
    if data == "scenes":
        return []
    return [f"--train_dir={args.fashion_mnist}", "--num_channels=1", "--image_size=28"]


def run(script: str, flags: list[str], args) -> float:
    """Runs an example script on one thread; returns the seconds it took."""
    environment = os.environ | {"OMP_NUM_THREADS": str(args.threads), "HF_HUB_OFFLINE": "1"}
    start = time.perf_counter()
    result = subprocess.run(
        [sys.executable, str(REPOSITORY / "examples" / script), *flags, "--disable_tqdm=true", "--save_strategy=no"],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    if result.returncode:
        raise RuntimeError(f"{script} {' '.join(flags)}\n{result.stdout[-2000:]}\n{result.stderr[-4000:]}")
    return time.perf_counter() - start


def pretrain(data: str, method: str, seed: int, args) -> None:
    """One cell: its JSON holds run_mim.py's `features.json`, the command and the time."""
    path = RESULTS / f"{data}-{slug(method)}-{seed}.json"
    runs = args.runs / data / str(seed)
    if path.is_file():
        return
    if not (runs / "MAE").is_dir() and any("{runs}" in flag for flag in METHODS[method]):
        raise RuntimeError(f"{method} starts from another cell's network, which is not in {runs}: delete its JSON.")
    flags = data_flags(data, args) + ["--crop_scale_min=0.5" if data == "fashion_mnist" else "--crop_scale_min=0.8"]
    flags += [flag.format(runs=runs) for flag in METHODS[method]]
    batch = BATCH_SIZE.get(method, args.batch_size)
    flags += [f"--per_device_train_batch_size={batch}", f"--seed={seed}"]
    # Stages share the pictures among them; --max_steps is the length of one.
    stages = 2 if "--num_stages=2" in flags else 1
    flags += [f"--max_steps={args.pictures // batch // stages}"]
    # Raw pixels are the same in every method's cell; as the untrained network MAE's draw stands for all.
    flags += [] if method == "MAE" else ["--references=false"]
    folder = runs / slug(method)
    shutil.rmtree(folder, ignore_errors=True)
    seconds = run("run_mim.py", [*flags, f"--output_dir={folder}"], args)
    results = json.loads((folder / "features.json").read_text())
    write(path, {"data": data, "method": method, "seed": seed, "flags": flags, "seconds": round(seconds)} | results)


def finetune(data: str, method: str, seed: int, args) -> None:
    """Fine-tunes a cell's encoder, by many labels and 5 epochs, and by 1% of the labels and 20 epochs."""
    folder = args.runs / data / str(seed) / slug(method)
    many, few = NUM_LABELS[data]
    for labels, chosen in (
        (f"{many:,}", [f"--max_train_samples={many}", "--num_train_epochs=5"]),
        ("1%", [f"--max_train_samples={few}", "--num_train_epochs=20", "--per_device_train_batch_size=32"]),
    ):
        path = RESULTS / f"finetuned-{data}-{slug(method)}-{seed}-{slug(labels)}.json"
        # Only where the cell's network is still on this disk.
        if path.is_file() or (method != UNTRAINED and not (folder / "model.safetensors").is_file()):
            continue
        flags = [*data_flags(data, args), f"--seed={seed}", *chosen, "--eval_strategy=no", "--max_eval_samples=4000"]
        flags += ["--model_type=pilamim"] if method == UNTRAINED else [f"--model_name_or_path={folder}"]
        flags += [] if data == "fashion_mnist" else ["--label_column_name=count"]
        output = args.runs / "finetuned" / path.stem
        seconds = run("run_image_classification.py", [*flags, f"--output_dir={output}"], args)
        accuracy = json.loads((output / "results.json").read_text())["accuracy"]
        cell = {"data": data, "method": method, "seed": seed, "labels": labels, "flags": flags}
        write(path, cell | {"seconds": round(seconds), "accuracy": accuracy})


def slug(method: str) -> str:
    """A cell's or folder's name: letters, digits and underscores."""
    return re.sub(r"[^a-zA-Z0-9]+", "_", method).strip("_")


def write(path: Path, cell: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(cell | {"machine": machine()}, indent=2) + "\n")
    print(path.name, cell["seconds"], "s", flush=True)


def machine() -> str:
    return f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}"


def scores() -> dict:
    """{data: {(row, pooling): {score: [one number a seed]}}} of all cells so far; pooling "": of none."""
    table: dict = defaultdict(lambda: defaultdict(lambda: defaultdict(list)))
    for path in sorted(RESULTS.glob("*.json")):
        cell = json.loads(path.read_text())
        rows, method = table[cell["data"]], cell["method"]
        if "features" not in cell:
            rows[method, ""][f"fine-tuned, {cell['labels']} labels"].append(cell["accuracy"])
            continue
        for name, values in cell["features"].items():
            row, _, pooling = name.partition(", ")
            if row.startswith("stage"):
                row = f"{method}, after {row}"
            elif row == "trained":
                row = method
            elif method != "MAE":
                # References: raw pixels, and the encoder that MAE starts from.
                continue
            for label in values["knn"]:
                rows[row, pooling][f"{label}: k-NN"].append(values["knn"][label])
                rows[row, pooling][f"{label}: linear"].append(values["linear"][label])
            if values["rank_me"] is not None:
                rows[row, pooling]["RankMe"].append(values["rank_me"])
    return table


def order_of(row: str) -> int:
    """References first, then the methods as they are listed here, each after its earlier stages."""
    names = ["raw pixels", UNTRAINED]
    for method in METHODS:
        names += [f"{method}, after stage 0", method]
    return names.index(row)


def mean_and_spread(values: list[float]) -> str:
    # Raw pixels have no seed.
    spread = f" ± {statistics.stdev(values):.1f}" if len(set(values)) > 1 else ""
    return f"{statistics.mean(values):.1f}{spread}"


def write_table(table: dict) -> None:
    """`table.md`: a table for each data set and pooling, mean and standard deviation over the seeds."""
    cells = [json.loads(path.read_text()) for path in sorted(RESULTS.glob("*.json"))]
    hours = sum(cell["seconds"] for cell in cells) / 3600
    lines = [f"{len(cells)} cells, {hours:.1f} hours of one thread each; {machine()}. k-NN / linear accuracy in %."]
    for data, labels in LABEL.items():
        rows = table.get(data, {})
        tuned = sorted(
            {name for (_, pooling), scores in rows.items() if pooling == "" for name in scores} - {"RankMe"}
        )
        tuned = [name for name in tuned if name.startswith("fine-tuned")]
        for pooling in ("[CLS]", "mean"):
            names = sorted({row for row, which in rows if which in (pooling, "")}, key=order_of)
            # Fine-tuning is of neither: its head is on the mean of the patches, and trains them.
            extra = tuned if pooling == "[CLS]" else []
            if not names:
                continue
            lines += ["", f"### {data}: {'[CLS]' if pooling == '[CLS]' else 'mean of the patches'}", ""]
            lines += ["| | " + " | ".join([*labels, "RankMe", *extra, "seeds"]) + " |"]
            lines += ["|---" * (len(labels) + len(extra) + 3) + "|"]
            for name in names:
                found = rows.get((name, pooling)) or rows.get((name, ""), {})
                values = [
                    " / ".join(mean_and_spread(found[f"{label}: {score}"]) for score in ("k-NN", "linear"))
                    if f"{label}: k-NN" in found
                    else ""
                    for label in labels
                ]
                values.append(mean_and_spread(found["RankMe"]) if "RankMe" in found else "")
                own = rows.get((name, ""), {})
                values += [mean_and_spread(own[column]) if column in own else "" for column in extra]
                seeds = max(len(numbers) for numbers in found.values())
                lines.append(f"| {name} | " + " | ".join(values) + f" | {seeds} |")
    (RESULTS / "table.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


def draw(table: dict) -> None:
    """k-NN and linear accuracy of [CLS] of every row, a panel a label; a line where raw pixels are."""
    panels = [(data, label) for data, labels in LABEL.items() if data in table for label in labels]
    names = sorted({row for data in table for row, pooling in table[data] if pooling == "[CLS]"}, key=order_of)
    size = (3.6 + 2.3 * len(panels), 1.4 + 0.3 * len(names))
    figure, axes = plt.subplots(1, len(panels), figsize=size, squeeze=False, layout="constrained", sharey=True)
    for (data, label), axis in zip(panels, axes[0], strict=True):
        for offset, (score, color) in enumerate((("k-NN", "#4c72b0"), ("linear", "#dd8452"))):
            values = [table[data].get((name, "[CLS]"), {}).get(f"{label}: {score}", []) for name in names]
            means = [statistics.mean(v) if v else 0.0 for v in values]
            spread = [statistics.stdev(v) if len(v) > 1 else 0.0 for v in values]
            places = [place + 0.4 * offset for place in range(len(names))]
            axis.barh(places, means, 0.38, xerr=spread, color=color, label=score, error_kw={"elinewidth": 0.8})
            pixels = table[data].get(("raw pixels", ""), {}).get(f"{label}: {score}")
            if pixels:
                axis.axvline(statistics.mean(pixels), color=color, linestyle=":", label=f"raw pixels, {score}")
        axis.set_yticks([place + 0.2 for place in range(len(names))], names)
        axis.set_title(f"{data}: {label}", fontsize=9)
        axis.tick_params(labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
        axis.set_xlabel("accuracy of [CLS], %", fontsize=8)
        axis.grid(axis="x", alpha=0.3)
        axis.set_axisbelow(True)
    axes[0][0].invert_yaxis()
    figure.legend(
        *axes[0][0].get_legend_handles_labels(), loc="outside upper right", ncols=4, fontsize=8, frameon=False
    )
    figure.savefig(RESULTS / "comparison.png", dpi=130)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fashion_mnist", type=Path, help="Folder of the idx files; left out: only scenes.")
    parser.add_argument("--data", nargs="+", default=list(LABEL), choices=list(LABEL))
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--pictures", type=int, default=60000, help="Pictures seen by each cell.")
    parser.add_argument("--batch_size", type=int, default=128)
    parser.add_argument("--runs", type=Path, default=Path("runs/comparison"), help="Where the networks are kept.")
    parser.add_argument("--parallel", type=int, default=2, help="Cells at a time.")
    parser.add_argument("--threads", type=int, default=1, help="Threads of a cell.")
    parser.add_argument("--finetune", action="store_true", help="Fine-tune the cells' networks too.")
    parser.add_argument("--table", action="store_true", help="Only write table and plot of the cells there are.")
    args = parser.parse_args()
    args.runs = args.runs.resolve()
    data = [name for name in args.data if name == "scenes" or args.fashion_mnist is not None]
    if not args.table:
        # Seed by seed, so that what is there after an interrupt is whole.
        for seed in args.seeds:
            cells = [(name, method, seed, args) for name in data for method in args.methods]
            with ThreadPoolExecutor(args.parallel) as pool:
                for later in (False, True):
                    # What starts from another cell's network comes after it.
                    now = [cell for cell in cells if any("{runs}" in f for f in METHODS[cell[1]]) == later]
                    list(pool.map(lambda cell: pretrain(*cell), now))
                if args.finetune:
                    untrained = [(name, UNTRAINED, seed, args) for name in data]
                    list(pool.map(lambda cell: finetune(*cell), cells + untrained))
    table = scores()
    if table:
        write_table(table)
        draw(table)


if __name__ == "__main__":
    main()
