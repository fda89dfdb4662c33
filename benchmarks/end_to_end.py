"""
How much of the model's own training rate `examples/run_mim.py` keeps with JPEG files.

    python benchmarks/end_to_end.py --preset tiny --picture_size 128 --batch_size 128 --steps 60
    python benchmarks/end_to_end.py --preset base --picture_size 320 --batch_size 8 --steps 12

Draws scenes as JPEG files, then alternates: the model's step alone on a batch in memory (`throughput.Case`), and the
whole script, whose rate is read off the times of its logs after the first, so that its start does not count.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image

from hf_mim.data.scenes import render_scene
from throughput import Case

SCRIPT = Path(__file__).resolve().parents[1] / "examples" / "run_mim.py"
# Reads the clock at the first and the last log of a training run.
RUNNER = """
import sys, time
from transformers import TrainerCallback
from hf_mim.jobs import pretraining
class Clock(TrainerCallback):
    times = []
    def on_step_end(self, args, state, control, **kwargs):
        self.times.append(time.perf_counter())
class Timed(pretraining.MIMTrainer):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.add_callback(Clock())
pretraining.MIMTrainer = Timed
pretraining.write_results = lambda *args: None
status = pretraining.main(sys.argv[1:])
skipped = 4
print("RATE", (len(Clock.times) - 1 - skipped) / (Clock.times[-1] - Clock.times[skipped]))
sys.exit(status)
"""


def script_rate(args, folder: Path, output: str) -> float:
    """Steps per second of the whole script."""
    command = [sys.executable, "-c", RUNNER, "--train_dir", str(folder), "--preset", args.preset]
    command += ["--output_dir", output, "--resume_from_checkpoint", "false", "--max_steps", str(args.steps)]
    command += ["--per_device_train_batch_size", str(args.batch_size), "--save_strategy", "no", "--bf16", "false"]
    command += ["--dataloader_num_workers", str(args.workers), "--disable_tqdm", "true", "--max_eval_samples", "8"]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError(result.stderr)
    return float(next(line for line in result.stdout.splitlines() if line.startswith("RATE")).split()[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="tiny")
    parser.add_argument("--picture_size", type=int, default=128, help="pixels of the JPEG files")
    parser.add_argument("--num_pictures", type=int, default=500)
    parser.add_argument("--batch_size", type=int, default=128)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, help="a JSON file for the numbers")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "pictures"
        folder.mkdir()
        for i in range(args.num_pictures):
            picture, _ = render_scene(i, image_size=args.picture_size)
            Image.fromarray(picture).save(folder / f"{i:05}.jpg", quality=90)
        model, script = [], []
        case = Case("pilamim/fp32", args.preset, args.batch_size, "cpu")
        case.time(2)
        for _ in range(args.rounds):
            model.append(args.batch_size / case.time(max(2, args.steps // 4)))
            script.append(args.batch_size * script_rate(args, folder, str(Path(name) / "run")))
    report = {
        "command": " ".join(["python", *sys.argv]),
        "model_images_per_second": statistics.median(model),
        "script_images_per_second": statistics.median(script),
        "share": statistics.median(s / m for s, m in zip(script, model, strict=True)),
    }
    print(json.dumps(report, indent=2))
    if args.output:
        args.output.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
