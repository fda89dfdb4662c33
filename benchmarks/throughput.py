"""
Training speed and memory of hf_mim's methods beside transformers' ViTMAE of the same sizes, interleaved in one run.

    python benchmarks/throughput.py --preset base --batch_size 8 --rounds 5
    python benchmarks/throughput.py --preset tiny --batch_size 128 --rounds 10

A step is forward, backward, AdamW, and the averaged target. Each round runs every case for a few steps in turn, beside
a square matrix product, so that what else the machine does hits all alike; medians over rounds are reported. Peak
memory is that of a process of its own per case, less what it held before the model was built. `matmul` is the share of
the machine's own matrix product rate (float32 or bfloat16, as the case) that the step's arithmetic reaches. `frozen`
is the share of the step that the forward pass of a frozen network takes: PiLaMIM's target encoder, TEC's base (of the
student's own sizes here).
"""

import argparse
import json
import platform
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

from hf_mim.models.presets import PRESETS, preset_config
from hf_mim.models.vit.sizes import as_pair
from hf_mim.registry import MODEL_TYPES, method_class

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class Case:
    """One network and precision, and its training step."""

    def __init__(self, name: str, preset: str, batch_size: int, device: str):
        self.name = name
        self.method, self.precision = name.split("/")
        self.batch_size, self.device = batch_size, device
        torch.manual_seed(0)
        self.model = build_model(self.method, preset).to(device).train()
        config = self.model.config
        (height, width), (patch_height, patch_width) = as_pair(config.image_size), as_pair(config.patch_size)
        self.pixel_values = torch.randn(batch_size, config.num_channels, height, width, device=device)
        self.noise = torch.rand(batch_size, (height // patch_height) * (width // patch_width), device=device)
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=1e-4, betas=(0.9, 0.95), weight_decay=0.05)

    def loss(self):
        with torch.autocast(self.device, dtype=torch.bfloat16, enabled=self.precision == "bf16"):
            return self.model(self.pixel_values, noise=self.noise).loss

    def step(self) -> None:
        self.loss().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        if hasattr(self.model, "after_optimizer_step"):
            self.model.after_optimizer_step(0, 100)

    def time(self, steps: int) -> float:
        """Seconds a step."""
        start = time.perf_counter()
        for _ in range(steps):
            self.step()
        synchronize(self.device)
        return (time.perf_counter() - start) / steps

    def time_frozen(self, steps: int) -> float:
        """Seconds a step of what the frozen networks compute; 0 where there are none."""
        start = time.perf_counter()
        for _ in range(steps):
            with torch.no_grad(), torch.autocast(self.device, torch.bfloat16, enabled=self.precision == "bf16"):
                for name in getattr(self.model, "frozen_modules", ()):
                    self.model.get_submodule(name)(self.pixel_values)
        synchronize(self.device)
        return (time.perf_counter() - start) / steps if getattr(self.model, "frozen_modules", ()) else 0.0

    def flops(self) -> int:
        with FlopCounterMode(display=False) as counter:
            self.loss().backward()
        self.optimizer.zero_grad()
        return counter.get_total_flops()


def build_model(method: str, preset: str):
    config = method_class(method, "Config")(**preset_config(method, preset, None))
    return method_class(method, "ForPreTraining")(config)


def synchronize(device: str) -> None:
    if device != "cpu":
        torch.accelerator.synchronize()


def matmul_rate(dtype: torch.dtype, device: str, size: int = 2048, repeats: int = 3) -> float:
    """Floating-point operations per second of a square matrix product."""
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    a @ b
    synchronize(device)
    start = time.perf_counter()
    for _ in range(repeats):
        a @ b
    synchronize(device)
    return 2 * size**3 * repeats / (time.perf_counter() - start)


def peak_memory(name: str, args) -> float:
    """MiB that training takes at its peak, measured in a process of its own."""
    command = [sys.executable, __file__, "--memory_of", name, "--preset", args.preset]
    command += ["--batch_size", str(args.batch_size), "--device", args.device]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def print_memory(name: str, args) -> None:
    if args.device == "cpu":
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    case = Case(name, args.preset, args.batch_size, args.device)
    for _ in range(3):
        case.step()
    if args.device == "cpu":
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024 - before)
    else:
        print(torch.cuda.max_memory_allocated() / 2**20)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=PRESETS, default="base")
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=1, help="steps of each case in a round")
    parser.add_argument(
        "--methods", nargs="+", choices=MODEL_TYPES, default=list(MODEL_TYPES), help="vit_mae is needed"
    )
    parser.add_argument("--precisions", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, help="a JSON file for the numbers")
    parser.add_argument("--memory_of", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.memory_of:
        print_memory(args.memory_of, args)
        return

    names = [f"{method}/{precision}" for precision in args.precisions for method in args.methods]
    memory = {name: peak_memory(name, args) for name in names}
    cases = [Case(name, args.preset, args.batch_size, args.device) for name in names]
    flops = {case.name: case.flops() for case in cases}
    for case in cases:
        case.time(1)
    times, frozen = ({name: [] for name in names} for _ in range(2))
    rates = {precision: [] for precision in args.precisions}
    for _ in range(args.rounds):
        for precision in args.precisions:
            rates[precision].append(matmul_rate(DTYPES[precision], args.device))
        for case in cases:
            times[case.name].append(case.time(args.steps))
            frozen[case.name].append(case.time_frozen(args.steps))
    report = {
        "command": " ".join(["python", *sys.argv]),
        "machine": f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, {args.device}, "
        f"torch {torch.__version__}",
        "preset": args.preset,
        "batch_size": args.batch_size,
        "matmul_gflops": {p: statistics.median(rates[p]) / 1e9 for p in rates},
        "cases": {},
    }
    for case in cases:
        seconds = statistics.median(times[case.name])
        reference = statistics.median(times[f"vit_mae/{case.precision}"])
        report["cases"][case.name] = {
            "step_ms": 1000 * seconds,
            "images_per_second": args.batch_size / seconds,
            "share_of_vit_mae": reference / seconds,
            "frozen_share": statistics.median(frozen[case.name]) / seconds,
            "peak_memory_mib": memory[case.name],
            "gflop_per_image": flops[case.name] / args.batch_size / 1e9,
            "matmul_share": flops[case.name] / seconds / statistics.median(rates[case.precision]),
        }
    print(json.dumps({key: value for key, value in report.items() if key != "cases"}, indent=2))
    print(
        f"{'':16}{'step ms':>10}{'images/s':>10}{'of ViTMAE':>11}{'frozen':>8}{'peak MiB':>10}"
        f"{'GFLOP/img':>11}{'matmul':>8}"
    )
    for name, case in report["cases"].items():
        print(
            f"{name:16}{case['step_ms']:10.1f}{case['images_per_second']:10.2f}{case['share_of_vit_mae']:11.2f}"
            f"{case['frozen_share']:8.2f}{case['peak_memory_mib']:10.0f}{case['gflop_per_image']:11.2f}"
            f"{case['matmul_share']:8.2f}"
        )
    if args.output:
        args.output.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
