"""
Images a second of fine-tuning a segmenter, beside those of fine-tuning a classifier with the same encoder.

    python benchmarks/segmentation_rate.py --steps 60 --rounds 3

Both are the scripts' jobs with the preset tiny on scenes of 64 x 64 pixels, taking turns in one process, loading and
augmentation included, evaluation not. All see as many pictures as `--steps` of 64 have, in the five epochs of the
presets: what the renderer knows of a scene is computed when it is first asked for.
"""

import argparse
import contextlib
import io
import json
import statistics
import tempfile
from pathlib import Path

from hf_mim.jobs import finetuning, segmentation

JOBS = {
    "classifier": (finetuning.main, ["--label_column_name=shape"]),
    "segmenter, linear": (segmentation.main, ["--segmentation_head=linear"]),
    "segmenter, upernet": (segmentation.main, ["--segmentation_head=upernet"]),
}


def rate(main, flags: list[str], steps: int, cache: str) -> float:
    """Images a second of a run of `steps` steps of 64."""
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        settings = {"max_train_samples": steps * 64 // 5, "max_eval_samples": 8, "data_cache_dir": cache}
        quiet = ["--disable_tqdm=true", "--eval_strategy=no", "--save_strategy=no", f"--output_dir={folder}"]
        status = main([*(f"--{name}={value}" for name, value in settings.items()), *quiet, *flags])
        if status:
            raise SystemExit(f"A run failed with the status {status}.")
        history = json.loads((Path(folder) / "trainer_state.json").read_text())["log_history"]
    return next(log["train_samples_per_second"] for log in history if "train_samples_per_second" in log)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    rates = {name: [] for name in JOBS}
    with tempfile.TemporaryDirectory() as cache:
        for _ in range(args.rounds):
            for name, (job, flags) in JOBS.items():
                rates[name].append(rate(job, flags, args.steps, cache))
                print(f"{name}: {rates[name][-1]:.0f} images/s", flush=True)
    reference = statistics.median(rates["classifier"])
    for name, values in rates.items():
        middle = statistics.median(values)
        print(f"{name}: {middle:.0f} images/s, {100 * middle / reference:.0f} % of the classifier's ({values})")


if __name__ == "__main__":
    main()
