"""
What two choices in a training step are worth on a CPU, each as a ratio of times interleaved in one process.

    python benchmarks/step_ratios.py --presets tiny small --output benchmarks/results/step_ratios_cpu.json

`bfloat16`: by method and preset, the time of a step in float32 over that in bfloat16 autocast, which is the default
where the processor multiplies in it. `cls_alone`: for OCL, the time of a step whose last block computes all tokens
over that of one whose last block computes [CLS] alone. Processor time of one thread, medians over rounds.
"""

import argparse
import json
import platform
import statistics
import sys
import time
from pathlib import Path

import torch

from hf_mim.models.ocl.modeling_ocl import OCLForPreTraining
from hf_mim.registry import MODEL_TYPES
from throughput import Case

BATCH = {"tiny": 64, "small": 8, "base": 4}


def ratio(slow, fast, rounds: int) -> float:
    """How many times as long `slow` takes as `fast`: calls that do a step."""
    seconds = [], []
    for round_ in range(rounds + 1):
        for call, times in zip((slow, fast), seconds, strict=True):
            start = time.process_time()
            call()
            if round_:
                times.append(time.process_time() - start)
    return statistics.median(a / b for a, b in zip(*seconds, strict=True))


def cls_alone(preset: str, rounds: int) -> float:
    case = Case("ocl/fp32", preset, BATCH[preset], "cpu")
    alone = OCLForPreTraining._is_recording

    def all_tokens():
        OCLForPreTraining._is_recording = lambda model, keywords: True
        try:
            case.step()
        finally:
            OCLForPreTraining._is_recording = alone

    return ratio(all_tokens, case.step, rounds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--presets", nargs="+", choices=BATCH, default=["tiny", "small"])
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--output", type=Path, help="a JSON file for the numbers")
    args = parser.parse_args()
    torch.set_num_threads(1)
    report = {
        "command": " ".join(["python", *sys.argv]),
        "machine": f"{platform.processor() or platform.machine()}, 1 thread, torch {torch.__version__}, avx512_bf16 "
        f"{torch.cpu._is_avx512_bf16_supported()}, amx {torch.cpu._is_amx_tile_supported()}",
        "bfloat16": {},
        "cls_alone": {},
    }
    for preset in args.presets:
        report["cls_alone"][preset] = cls_alone(preset, args.rounds)
        for method in MODEL_TYPES:
            float32, bfloat16 = (Case(f"{method}/{name}", preset, BATCH[preset], "cpu") for name in ("fp32", "bf16"))
            report["bfloat16"][f"{method}, {preset}"] = ratio(float32.step, bfloat16.step, args.rounds)
        print(json.dumps(report, indent=2), flush=True)
    if args.output:
        args.output.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
