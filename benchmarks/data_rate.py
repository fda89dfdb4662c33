"""
How fast training data is read: JPEG files to batches of crops, by one process, without a network.

    python benchmarks/data_rate.py --picture_size 500 --image_size 224

Compares pixels that workers normalise (float32) with pixels that travel as bytes and are normalised where they arrive
(counted as `bytes, normalised`; on a GPU it is not the host's work), interleaved in one run. Time is that of the
processor, of this process and its worker, so that what else the machine does counts for little.
"""

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader

from hf_mim.data.dataset import ImageDataset
from hf_mim.data.pretraining import EpochSampler, PretrainingDataset, RawCollator, pretraining_collator
from hf_mim.data.transforms import PretrainingTransform


def write_jpegs(folder: Path, number: int, size: int) -> list[str]:
    """Smooth colours with some noise, `size` pixels wide and three quarters as high."""
    random, paths = np.random.default_rng(0), []
    for i in range(number):
        smooth = Image.fromarray(random.integers(0, 256, (24, 32, 3), dtype=np.uint8)).resize((size, size * 3 // 4))
        pixels = np.array(smooth, dtype=np.int16) + random.integers(-12, 13, (size * 3 // 4, size, 3), dtype=np.int16)
        paths.append(str(folder / f"{i:04}.jpg"))
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(paths[-1], quality=90)
    return paths


def seconds_of(dataset, collator, workers: int, normalise=None) -> float:
    """Processor time of an epoch, of this process and its workers; `normalise` is called with each batch's pixels."""
    loader = DataLoader(
        dataset, batch_size=32, sampler=EpochSampler(len(dataset)), collate_fn=collator, num_workers=workers
    )
    before = sum(os.times()[:4])
    for batch in loader:
        if normalise is not None:
            normalise(batch["pixel_values"])
    del loader
    return sum(os.times()[:4]) - before


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--picture_size", type=int, default=500, help="width of the JPEG files in pixels")
    parser.add_argument("--image_size", type=int, default=224, help="of the crops that training sees")
    parser.add_argument("--num_pictures", type=int, default=256)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path, help="a JSON file for the numbers")
    args = parser.parse_args()
    torch.set_num_threads(1)
    size = (args.image_size, args.image_size)
    transform = PretrainingTransform(size, 196, [0.5] * 3, [0.25] * 3)
    with tempfile.TemporaryDirectory() as folder:
        paths = write_jpegs(Path(folder), args.num_pictures, args.picture_size)
        pictures = ImageDataset(paths, 3, source=folder)
        cases = {
            "float32": (PretrainingDataset(pictures, transform), pretraining_collator),
            "bytes": (PretrainingDataset(pictures, transform.raw()), RawCollator(transform)),
        }
        cases = {name: (*case, args.workers) for name, case in cases.items()}
        cases["bytes, normalised"] = (*cases["bytes"], transform.normalise)
        seconds = {name: [] for name in cases}
        for round_ in range(args.rounds + 1):
            for name, case in cases.items():
                measured = seconds_of(*case)
                if round_:
                    seconds[name].append(measured)
    report = {
        "command": " ".join(["python", *sys.argv]),
        "machine": f"{platform.processor() or platform.machine()}, 1 thread, {args.workers} workers, "
        f"torch {torch.__version__}",
        "images_per_processor_second": {
            name: args.num_pictures / statistics.median(times) for name, times in seconds.items()
        },
        "times_float32": {
            name: statistics.median(slow / fast for slow, fast in zip(seconds["float32"], times, strict=True))
            for name, times in seconds.items()
        },
    }
    print(json.dumps(report, indent=2))
    if args.output:
        args.output.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
