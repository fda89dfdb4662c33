"""
Every method on the scenes, judged by what each pixel shows: frozen, and fine-tuned.

    python benchmarks/dense.py --seeds 0 1 2 --hours 8
    python benchmarks/dense.py --table

A cell is (method, seed): `run_mim.py` with the preset tiny and the same number of pictures seen (TEC: as many again
after its base, which is MAE's cell of the same seed; dBOT: in two stages), whose last lines are linear mIoU and depth
of frozen patches; and `hf_mim segment` and `hf_mim detect` from its network. Rows go into `results/dense.csv` as they
come; the same command goes on where it stopped. All numbers are in percent.
"""

import argparse
import contextlib
import io
import json
import time
from pathlib import Path

import comparison
import results_table
from hf_mim.__main__ import COMMANDS
from hf_mim.__main__ import main as hf_mim

RESULTS = results_table.REPOSITORY / "benchmarks" / "results" / "dense.csv"
# The networks that are compared, and how many pictures a step has.
METHODS = {"MAE": 16, "PiLaMIM": 16, "TEC (base: MAE)": 16, "OCL": 256, "dBOT (2 stages)": 16}
UNTRAINED = comparison.UNTRAINED
FROZEN = {"linear_miou": "linear mIoU, frozen", "depth_r2": "linear depth R2, frozen"}
# Command of fine-tuning: the score in its results.json, and what it is called here.
FINE_TUNED = {"segment": ("miou", "mIoU, fine-tuned"), "detect": ("box_map", "box mAP, fine-tuned")}


def run(args, *flags: str) -> None:
    """Runs a command of `hf_mim` in this process."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        status = hf_mim([*flags, "--disable_tqdm=true", f"--data_cache_dir={args.runs / 'data'}"])
    if status:
        raise SystemExit(f"hf_mim {' '.join(flags)}\n{printed.getvalue()[-3000:]}")


def pretrain(method: str, seed: int, folder: Path, args) -> dict[tuple[str, int], dict[str, float]]:
    """By method and pictures seen: the frozen scores of a cell's network, and with MAE's of the untrained one."""
    flags = [flag.format(runs=folder.parent) for flag in comparison.METHODS[method]]
    batch, stages = METHODS[method], 2 if "--num_stages=2" in flags else 1
    steps = max(1, args.images // batch // stages)
    flags += ["--preset=tiny", f"--per_device_train_batch_size={batch}", f"--max_steps={steps}", f"--seed={seed}"]
    run(args, "pretrain", *flags, "--save_strategy=steps", "--save_steps=500", f"--output_dir={folder}")
    features = json.loads((folder / "features.json").read_text())["dense"]["features"]
    # Of several stages the last one's.
    name = [name for name in features if not name.startswith(("raw", UNTRAINED))][-1]
    found = {(method, steps * batch * stages): features[name]}
    return found | ({(UNTRAINED, 0): features[UNTRAINED]} if method == "MAE" else {})


def fine_tune(command: str, method: str, seed: int, folder: Path, args) -> dict[tuple[str, int], dict[str, float]]:
    """The score of `hf_mim segment` or `detect` from a cell's network."""
    out = folder.with_name(f"{folder.name}, {command}")
    start = ["--model_type=pilamim"] if method == UNTRAINED else [f"--model_name_or_path={folder}"]
    run(args, command, *start, "--preset=tiny", f"--seed={seed}", *_labels(args), f"--output_dir={out}")
    images = 0 if method == UNTRAINED else args.images
    return {(method, images): json.loads((out / "results.json").read_text())}


def _labels(args) -> list[str]:
    return [f"--max_train_samples={args.labels}", f"--max_eval_samples={args.held_out}"]


def cells(args) -> list[tuple[str, int, str]]:
    """(method, seed, command of `hf_mim`), in the order in which they can be run."""
    tuning = [command for command in FINE_TUNED if command in COMMANDS]
    return [
        (method, seed, command)
        for seed in args.seeds
        for method in (*METHODS, UNTRAINED)
        for command in ([] if method == UNTRAINED else ["pretrain"]) + tuning
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--images", type=int, default=48_000, help="Pictures that each network sees.")
    parser.add_argument("--labels", type=int, default=2000, help="Scenes with labels to fine-tune on.")
    parser.add_argument("--held_out", type=int, default=500, help="Scenes by which fine-tuning is judged.")
    parser.add_argument("--hours", type=float, default=24.0, help="Nothing is started after so many hours.")
    parser.add_argument("--runs", type=Path, default=Path("runs/dense"), help="Where the networks are kept.")
    parser.add_argument("--results", type=Path, default=RESULTS, help="The table.")
    parser.add_argument("--table", action="store_true", help="Print the table of what there is, and run nothing.")
    args = parser.parse_args()
    args.runs = args.runs.resolve()
    end = time.monotonic() + 3600 * args.hours
    for method, seed, command in [] if args.table else cells(args):
        metrics = FROZEN if command == "pretrain" else dict([FINE_TUNED[command]])
        done = {(row["method"], row["seed"], row["metric"]) for row in results_table.read(args.results)}
        if all((method, seed, title) in done for title in metrics.values()):
            continue
        if time.monotonic() >= end:
            print("the time is over; the same command goes on", flush=True)
            break
        print(f"starting: {method}, seed {seed}: {command}", flush=True)
        folder = args.runs / str(seed) / method
        if command == "pretrain":
            found = pretrain(method, seed, folder, args)
        else:
            found = fine_tune(command, method, seed, folder, args)
        origin = {"data": "scenes", "seed": seed, "commit": comparison.commit(), "machine": comparison.machine()}
        rows = [
            origin | {"method": name, "images_seen": images, "metric": title, "value": round(scores[key], 4)}
            for (name, images), scores in found.items()
            for key, title in metrics.items()
        ]
        results_table.append(rows, args.results)
    found = results_table.scores(results_table.read(args.results)).get("scenes", {})
    titles = [*FROZEN.values(), *(title for _, title in FINE_TUNED.values())]
    print("", "method", *titles, "", sep=" | ")
    for method in (UNTRAINED, *METHODS):
        seeds = (found.get(method, {}).get(title) for title in titles)
        print(
            "", method, *(results_table.mean_and_spread(values) if values else "" for values in seeds), "", sep=" | "
        )


if __name__ == "__main__":
    main()
