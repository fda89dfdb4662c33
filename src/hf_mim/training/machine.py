"""What the machine has: cores for each process, the peak rate of its device, memory."""

import os
import shutil
import sys
from pathlib import Path

import torch

# TFLOP/s of dense matrix products in bfloat16 or float16, by a part of the device's name; the first that fits.
# From the makers' data sheets, without sparsity.
_HALF_PRECISION_PEAKS = {
    "B200": 2250,
    "H200": 989,
    "H100 PCIe": 756,
    "H100 NVL": 835,
    "H100": 989,
    "A100": 312,
    "L40S": 362,
    "L4": 121,
    "A10G": 70,
    "V100": 125,
    "T4": 65,
    "RTX 4090": 165,
    "RTX 3090": 71,
    "MI300X": 1307,
}

_LEAST_SHARED_MEMORY = 2**30


def process_cores() -> int:
    """The cores that fall to this process, of those that it and the others on this machine may use."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


def default_workers(on_cpu: bool) -> int:
    """
    How many processes load data where none are asked for: beside a GPU the cores but one, at most 16. On a CPU, where
    training takes every core that loading leaves, one for each four cores, at most 4. None where a container has less
    than a GiB of shared memory, through which they hand over what they read.
    """
    shared = Path("/dev/shm")
    if shared.is_dir() and shutil.disk_usage(shared).free < _LEAST_SHARED_MEMORY:
        return 0
    cores = process_cores()
    return min(cores // 4, 4) if on_cpu else min(cores - 1, 16)


def half_precision_peak(device: torch.device) -> float | None:
    """Operations per second that the device's data sheet names for bfloat16 and float16; None where it is unknown."""
    if device.type != "cuda":
        return None
    # Whole words: "L4" is no part of "L40S".
    name = f" {torch.cuda.get_device_name(device).replace('-', ' ')} "
    return next((peak * 1e12 for part, peak in _HALF_PRECISION_PEAKS.items() if f" {part} " in name), None)


def peak_memory(device: torch.device) -> int | None:
    """Bytes that this process held at most, of a GPU's memory or else of the machine's; None where it is not told."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "win32":
        return None
    import resource

    held = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return held if sys.platform == "darwin" else held * 1024
