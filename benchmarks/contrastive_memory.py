"""
Memory and speed of OCL's step at a fixed chunk, from small batches to the paper's 9,600, and without chunks.

    python benchmarks/contrastive_memory.py --output benchmarks/results/contrastive_memory_tiny_cpu.json

A step is forward and backward of the tiny preset in float32. Every case has a process of its own, whose peak of
resident memory is counted above what it held before the step, with the network and the batch in place. The batch of
pictures is data and not the step's, and stated apart (`batch_mib`). So is what the comparison of all features takes
(`comparison_mib`: forward and backward of the loss alone, in a process of its own), beside the size that the matrix of
all similarities would have, were it held (`matrix_mib`). These processes return what they free to the system
(MALLOC_MMAP_THRESHOLD_): else what glibc keeps of freed memory counts, which has more to do with the order of sizes
than with the step; `default_malloc_mib` is the peak with that.

Times are medians over rounds, each of which runs all cases that fit in turn, so that what else the machine does hits
all alike. `time_of_uncached` is a cached step's time over that of the same batch without chunks.
"""

import argparse
import gc
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

from hf_mim.models.presets import PRESETS, preset_config
from hf_mim.registry import method_class

BATCHES = (256, 512, 1024, 2400, 4800, 9600)


def build(preset: str):
    torch.manual_seed(0)
    config = method_class("ocl", "Config")(**preset_config("ocl", preset, None))
    return method_class("ocl", "ForPreTraining")(config).train()


def build_batch(config, size: int) -> dict[str, torch.Tensor]:
    height, width = config.image_size
    return {
        "pixel_values": torch.randn(size, config.num_channels, height, width),
        "noise": torch.rand(size, config.num_patches),
    }


def step(model, batch: dict[str, torch.Tensor], chunk_size: int | None) -> float:
    """Seconds of one step."""
    model.chunk_size = chunk_size
    start = time.perf_counter()
    model(**batch).loss.backward()
    model.zero_grad()
    return time.perf_counter() - start


def loss_alone(model, size: int) -> None:
    features = torch.randn(size, 2, model.config.hidden_size, requires_grad=True)
    model.contrastive_loss(features).backward()


def memory(name: str) -> float:
    """MiB by the kernel's books: VmRSS, resident now, or VmHWM, the most since the process began or was told to."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) / 1024


def print_memory(kind: str, size: int, args) -> None:
    torch.set_num_threads(args.threads)
    model = build(args.preset)
    # What the first step of a process loads and keeps, whatever the batch, is no memory of the step.
    step(model, build_batch(model.config, 4), None)
    batch = build_batch(model.config, 1 if kind == "comparison" else size)
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts from here
    before = memory("VmRSS")
    if kind == "comparison":
        loss_alone(model, size)
    else:
        step(model, batch, args.chunk_size if kind == "cached" else None)
    print(memory("VmHWM") - before)


def peak_memory(kind: str, size: int, args, default_malloc: bool = False) -> float | None:
    """MiB of a step above what was there before it; None where the process was killed for it."""
    command = [sys.executable, __file__, "--memory_of", kind, str(size), "--preset", args.preset]
    command += ["--chunk_size", str(args.chunk_size), "--threads", str(args.threads)]
    environment = os.environ if default_malloc else os.environ | {"MALLOC_MMAP_THRESHOLD_": str(2**20)}
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    if result.returncode < 0:
        return None
    result.check_returncode()
    return float(result.stdout.split()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=PRESETS, default="tiny")
    parser.add_argument("--chunk_size", type=int, default=256)
    parser.add_argument("--batches", type=int, nargs="+", default=BATCHES)
    parser.add_argument("--uncached_up_to", type=int, default=2400, help="largest batch that is tried without chunks")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--output", type=Path, help="a JSON file for the numbers")
    parser.add_argument("--memory_of", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.memory_of:
        print_memory(args.memory_of[0], int(args.memory_of[1]), args)
        return
    if sys.platform != "linux":
        parser.error("peak memory is read from /proc, which only Linux has")
    torch.set_num_threads(args.threads)

    cases = {}
    for size in args.batches:
        cases[size] = {
            "cached_mib": peak_memory("cached", size, args),
            "uncached_mib": peak_memory("uncached", size, args) if size <= args.uncached_up_to else None,
            "comparison_mib": peak_memory("comparison", size, args),
            "matrix_mib": size * size * 4 / 2**20,
            "default_malloc_mib": peak_memory("cached", size, args, default_malloc=True),
        }
    model = build(args.preset)
    height, width = model.config.image_size
    times: dict[tuple[int, bool], list[float]] = {}
    for _ in range(args.rounds):
        for size in args.batches:
            batch = build_batch(model.config, size)
            for cached in (True, False):
                if cached or cases[size]["uncached_mib"] is not None:
                    seconds = step(model, batch, args.chunk_size if cached else None)
                    times.setdefault((size, cached), []).append(seconds)
    for size, case in cases.items():
        seconds = {
            cached: statistics.median(times[size, cached]) for cached in (True, False) if (size, cached) in times
        }
        case["batch_mib"] = size * model.config.num_channels * height * width * 4 / 2**20
        case["cached_images_per_second"] = size / seconds[True]
        case["uncached_images_per_second"] = size / seconds[False] if False in seconds else None
        case["time_of_uncached"] = seconds[True] / seconds[False] if False in seconds else None
    report = {
        "command": " ".join(["python", *sys.argv]),
        "machine": f"{platform.processor() or platform.machine()}, {args.threads} threads, torch {torch.__version__}",
        "preset": args.preset,
        "chunk_size": args.chunk_size,
        "rounds": args.rounds,
        "batches": cases,
    }
    columns = {
        "cached_mib": "chunks MiB",
        "uncached_mib": "whole MiB",
        "default_malloc_mib": "(malloc) MiB",
        "comparison_mib": "loss MiB",
        "matrix_mib": "matrix MiB",
        "batch_mib": "batch MiB",
        "cached_images_per_second": "chunks img/s",
        "uncached_images_per_second": "whole img/s",
        "time_of_uncached": "time ratio",
    }
    print(f"{report['machine']}; {args.preset}, chunks of {args.chunk_size}")
    print(f"{'batch':>6}" + "".join(f"{title:>14}" for title in columns.values()))
    for size, case in cases.items():
        cells = ("-" if case[name] is None else f"{case[name]:.{2 if 'time' in name else 0}f}" for name in columns)
        print(f"{size:6}" + "".join(f"{cell:>14}" for cell in cells))
    if args.output:
        args.output.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
