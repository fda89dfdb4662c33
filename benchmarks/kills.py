"""
Kills training with SIGKILL at chance moments, a third of them while a checkpoint or a model is written, and starts the
same command again until it ends: are the weights those of a run that nobody killed, to the bit, without a hand's help?

    python benchmarks/kills.py --kills 100

Each run is a fork of one process that has imported everything, so that a kill meets training and not the imports.
"""

import argparse
import contextlib
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

_SIZES = "hidden_size=32,num_hidden_layers=2,num_attention_heads=2"
_DECODER = "decoder_hidden_size=16,decoder_num_hidden_layers=1,decoder_num_attention_heads=2"
_COMMON = ["--image_size=16", "--patch_size=4", "--per_device_train_batch_size=4", "--logging_steps=5", "--use_cpu"]
_COMMON += ["--disable_tqdm=true", "--save_strategy=steps", "--save_steps=3", "--eval_strategy=no", "--bf16=false"]
_PRETRAINING = ["--num_train_epochs=8", "--references=false"]
JOBS = {
    "pilamim": [*_PRETRAINING, f"--config_overrides={_SIZES},{_DECODER}"],
    "ocl": ["--model_type=ocl", *_PRETRAINING, f"--config_overrides={_SIZES}"],
    "dbot": [
        "--model_type=dbot",
        *_PRETRAINING,
        "--stage_steps",
        "15",
        "15",
        f"--config_overrides={_SIZES},{_DECODER}",
    ],
    "fine-tuning": ["--num_train_epochs=8", f"--config_overrides={_SIZES}", "--ema_decay=0.9"],
}


def write_pictures(folder: Path, number: int = 24) -> Path:
    """Noise in two classes, as .npy of 16 x 16 pixels."""
    for index, picture in enumerate(np.random.default_rng(0).random((number, 16, 16, 3), dtype=np.float32)):
        path = folder / "ab"[index % 2] / f"{index:03d}.npy"
        path.parent.mkdir(parents=True, exist_ok=True)
        np.save(path, picture)
    return folder


def start(job: str, pictures: Path, out: Path, log: Path) -> int:
    """Starts the job in a process of its own, whose output goes to `log`; gives its number."""
    number = os.fork()
    if number:
        return number
    try:
        os.setsid()
        with log.open("a") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        from hf_mim.jobs import finetuning, pretraining

        main = finetuning.main if job == "fine-tuning" else pretraining.main
        status = main([*_COMMON, *JOBS[job], f"--train_dir={pictures}", f"--output_dir={out}"])
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    finally:
        os._exit(70)


def wait(number: int) -> int:
    """The exit status; negative, that of the signal that ended the process."""
    return os.waitstatus_to_exitcode(os.waitpid(number, 0)[1])


def kill(number: int, out: Path, seconds: float, *, in_save: bool) -> bool:
    """
    Kills the process after so many seconds, or `in_save` while the next thing is written from then on, if it is met.
    Says whether the process still ran.
    """
    time.sleep(seconds)
    if in_save:
        # What the kill before has left counts only once it is written anew.
        before = _there(out)
        while not _there(out) - before:
            if os.waitpid(number, os.WNOHANG)[0]:
                return False
            time.sleep(0.0005)
        # A save of this size takes about a hundredth of a second.
        time.sleep(random.random() * 0.01)
    if os.waitpid(number, os.WNOHANG)[0]:
        return False
    os.kill(number, signal.SIGKILL)
    os.waitpid(number, 0)
    return True


def _there(out: Path) -> set[tuple]:
    """What is being written, or was left so: folders, told apart by their place on the disk."""
    found = set()
    for path in (out / "_saving", *out.glob("stage-*/_saving")):
        with contextlib.suppress(FileNotFoundError):
            found.add((path, path.stat().st_ino, path.stat().st_mtime_ns))
    return found


def kill_and_compare(job: str, kills: int, folder: Path, seed: int) -> dict[str, int]:
    """
    Kills the job so many times, over as many runs as that takes, and compares each run's weights with an unbroken
    one's.

    Returns:
        `dict`: `kills`, those `in_save` (something half written was left), `runs`, and runs that were `refused` or
        ended with `other_weights`; of the last two there should be none.
    """
    random.seed(f"{job} {seed}")
    pictures = write_pictures(folder / "pictures")
    begun = time.monotonic()
    if wait(start(job, pictures, folder / "unbroken", folder / "unbroken.log")) != 0:
        raise RuntimeError((folder / "unbroken.log").read_text())
    duration = time.monotonic() - begun
    wanted = (folder / "unbroken" / "model.safetensors").read_bytes()
    counts = {"kills": 0, "in_save": 0, "runs": 0, "refused": 0, "other_weights": 0}
    while counts["kills"] < kills:
        out, log = folder / f"broken-{counts['runs']}", folder / f"broken-{counts['runs']}.log"
        counts["runs"] += 1
        # A few kills to a run, then it may end. Of those that are meant for a save, some come too late.
        for _ in range(min(5, kills - counts["kills"])):
            number = start(job, pictures, out, log)
            if not kill(number, out, random.uniform(0, duration), in_save=counts["kills"] % 2 == 1):
                break
            counts["kills"] += 1
            counts["in_save"] += bool(_there(out))
        if wait(start(job, pictures, out, log)) != 0:
            counts["refused"] += 1
            print(log.read_text(), flush=True)
        elif (out / "model.safetensors").read_bytes() != wanted:
            counts["other_weights"] += 1
        else:
            shutil.rmtree(out)
    return counts


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    # Imported once, before any fork.
    import hf_mim.jobs.finetuning
    import hf_mim.jobs.pretraining  # noqa: F401

    bad = 0
    for place, job in enumerate(JOBS):
        kills = args.kills // len(JOBS) + (place < args.kills % len(JOBS))
        with tempfile.TemporaryDirectory() as folder:
            counts = kill_and_compare(job, kills, Path(folder), args.seed)
        bad += counts["refused"] + counts["other_weights"]
        print(f"{job}: {counts}", flush=True)
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())
