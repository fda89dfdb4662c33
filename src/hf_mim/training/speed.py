"""How fast training goes, what it waits for, and what would make it faster."""

import contextlib
import copy
import time
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import nn
from transformers import PreTrainedModel

from ..models.vit.sizes import as_pair
from .machine import half_precision_peak, peak_memory, process_cores

# Shares of the time from which on they are what limits the speed.
_MUCH_WAITING, _MUCH_BESIDE = 0.1, 0.2
# Waits on a GPU that are timed before they are added up.
_PENDING = 1000
# What `training_operations` has counted, of models that differ in their weights alone.
_COUNTED: dict[tuple, float] = {}


class _Reading(NamedTuple):
    step: int
    seconds: float
    # Of these: spent waiting for data, and beside training (evaluations, checkpoints).
    waited: float
    beside: float

    def since(self, earlier: "_Reading") -> "_Reading":
        return _Reading(*(now - before for now, before in zip(self, earlier, strict=True)))


class SpeedMeter:
    """
    Tells pictures a second, the share of the time that goes into waiting for data, and the rate of arithmetic.

    On a GPU, which works on while the next batch is fetched, waiting is the time for which it had nothing to do; no
    step waits for the host because of it.

    Args:
        device (`torch.device`): Of training.
        operations (`float`, *optional*): Floating-point operations that training takes a picture; see
            [`training_operations`].
    """

    def __init__(self, device: torch.device, operations: float | None):
        self.device, self.operations = device, operations
        self.waited = self.beside = 0.0
        self.pending: list[tuple] = []
        self.begin(0)

    def begin(self, step: int) -> None:
        """Training begins, after `step` steps of an earlier one."""
        self.last, self.after_first = self.reading(step), None

    def step_ended(self, step: int) -> None:
        if self.after_first is None:
            # The first step starts workers and compiles, which says nothing of the others.
            self.after_first = self.reading(step)

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Within, data is waited for."""
        if self.device.type == "cuda":
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            # The device reaches the first when it has done all that it was given, the second when there is data.
            begin.record()
            yield
            end.record()
            self.pending.append((begin, end))
            if len(self.pending) > _PENDING:
                self._add_pending()
        else:
            start = time.monotonic()
            yield
            self.waited += time.monotonic() - start

    @contextlib.contextmanager
    def not_training(self) -> Iterator[None]:
        """Within, something else than training takes the time."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        start = time.monotonic()
        try:
            yield
        finally:
            self.beside += time.monotonic() - start

    def _add_pending(self) -> None:
        for begin, end in self.pending:
            end.synchronize()
            self.waited += begin.elapsed_time(end) / 1000
        self.pending = []

    def reading(self, step: int) -> _Reading:
        self._add_pending()
        return _Reading(step, time.monotonic(), self.waited, self.beside)

    def read(self, args, state) -> dict[str, str]:
        """For people, by unit: of the steps since the last reading, of memory, and the time left."""
        now = self.reading(state.global_step)
        passed, self.last = now.since(self.last), now
        if passed.step <= 0:
            return {}
        said = self._rates(args, passed)
        memory = peak_memory(self.device)
        if memory is not None:
            said["GiB at most"] = f"{memory / 2**30:.1f}"
        left = (state.max_steps - state.global_step) * passed.seconds / passed.step
        return said | {"left": duration(left)}

    def _rates(self, args, passed: _Reading) -> dict[str, str]:
        images = passed.step * args.effective_batch_size / max(passed.seconds - passed.beside, 1e-9)
        said = {"images/s": f"{images:.0f}" if images >= 10 else f"{images:.1f}"}
        said["of the time waiting for data"] = f"{self._waiting_share(passed):.0%}"
        if self.operations is None:
            return said
        # Of one device, which the peak is of.
        rate = images * self.operations / args.world_size
        said["TFLOP/s"] = f"{rate / 1e12:.3g}"
        peak = half_precision_peak(self.device)
        if peak is not None and args.precision != "float32":
            said["of the device's peak"] = f"{rate / peak:.0%}"
        return said

    def _waiting_share(self, passed: _Reading) -> float:
        return min(1.0, passed.waited / max(passed.seconds - passed.beside, 1e-9))

    def bottleneck(self, args, state) -> str | None:
        """What took the time of training after its first step, and the flag that widens it; None of a single step."""
        if self.after_first is None or state.global_step <= self.after_first.step:
            return None
        passed = self.reading(state.global_step).since(self.after_first)
        beside, waiting = passed.beside / max(passed.seconds, 1e-9), self._waiting_share(passed)
        rates = ", ".join(f"{value} {name}" for name, value in self._rates(args, passed).items())
        if beside >= _MUCH_BESIDE:
            what, advice = (
                f"evaluations and checkpoints, {beside:.0%} of the time",
                "larger --eval_steps and --save_steps",
            )
        elif waiting >= _MUCH_WAITING:
            what, advice = f"data, {waiting:.0%} of the time is waiting for it", _for_data(args)
        else:
            what, advice = f"the network's arithmetic on {self.device.type}", _for_arithmetic(args, self.device)
        return f"Speed: {rates}. What limits it: {what}; what helps: {advice}."


def _for_data(args) -> str:
    workers, cores = args.dataloader_num_workers, process_cores()
    if workers < cores - 1:
        return f"--dataloader_num_workers {cores - 1} (was {workers})"
    return f"smaller pictures on the disk, or more cores ({cores} a process, --dataloader_num_workers {workers})"


def _for_arithmetic(args, device: torch.device) -> str:
    if device.type == "cuda":
        if args.precision == "float32" and torch.cuda.is_bf16_supported(including_emulation=False):
            return "--bf16 true"
        if torch.cuda.max_memory_allocated(device) < 0.4 * torch.cuda.mem_get_info(device)[1]:
            return f"a larger --per_device_train_batch_size (was {args.train_batch_size}; there is memory for it)"
    if not args.torch_compile:
        return "--torch_compile true, in a long run, or more devices (accelerate launch)"
    return "more devices (accelerate launch)"


def training_operations(model: nn.Module, batch_size: int) -> float | None:
    """
    Floating-point operations of matrix products, forward and backward, that training takes a picture.

    Counted on shapes alone, by a model without memory. What `gradient checkpointing` or a chunked loss computes again
    is not counted.

    Args:
        model (`nn.Module`): Takes `pixel_values` of its config's size and channels; its output's first entry is
            what the gradient is of.
        batch_size (`int`): Pictures at a time, which a contrastive loss depends on.

    Returns:
        `float`: None of a model that is not transformers', whose config has no `image_size`, or whose work depends on
            what it sees (`work_depends_on_data`).
    """
    if not isinstance(model, PreTrainedModel) or getattr(model.config, "image_size", None) is None:
        return None
    if getattr(model, "work_depends_on_data", False):
        return None
    trained = tuple((name, parameter.requires_grad) for name, parameter in model.named_parameters())
    same = (type(model), model.config.to_json_string(), trained, batch_size)
    if same not in _COUNTED:
        _COUNTED[same] = _count_operations(model, batch_size)
    return _COUNTED[same]


def _count_operations(model: PreTrainedModel, batch_size: int) -> float:
    from torch.utils.flop_counter import FlopCounterMode

    config, device = model.config, torch.device("meta")
    # What is found in the memo is not copied: weights on no device take the place of the weights.
    tensors = {id(p): nn.Parameter(torch.empty_like(p, device=device), p.requires_grad) for p in model.parameters()}
    tensors |= {id(buffer): torch.empty_like(buffer, device=device) for buffer in model.buffers()}
    shapes = copy.deepcopy(model, tensors).eval()
    # Not every implementation works on shapes.
    shapes.set_attn_implementation("eager")
    if getattr(shapes, "chunk_size", None) is not None:
        shapes.chunk_size = None
    channels, size = getattr(config, "num_channels", 3), as_pair(config.image_size)
    with FlopCounterMode(display=False) as counter:
        outputs = shapes(torch.empty(batch_size, channels, *size, device=device))
        outputs[0].sum().backward()
    return counter.get_total_flops() / batch_size


def duration(seconds: float) -> str:
    """Seconds for people: "50 s", "3 min 20 s", "2 h 05 min"."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {seconds:02d} s" if minutes else f"{seconds} s"
