"""Does again a step of pretraining whose loss was not finite, and says where that begins."""

import json
import math
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import AutoConfig

from ..registry import method_class
from ..training.command import name_words, parse_arguments, say
from ..training.errors import run_job
from ..training.nonfinite import BATCH, FOLDER, MODEL, RANDOM, STEP

_PRECISIONS = {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass
class ReplayArguments:
    """Which step is done again."""

    run: str | None = field(
        default=None, metadata={"help": "The run's folder (its --output_dir), or that of one of its stages."}
    )
    precision: str | None = field(
        default=None,
        metadata={"help": f"{', '.join(_PRECISIONS)}. Default: the run's. In float32 shows whether it is at fault."},
    )

    def __post_init__(self):
        if self.run is None:
            raise ValueError("hf_mim replay RUN: give the folder of the run.")
        if self.precision not in (None, *_PRECISIONS):
            raise ValueError(f"--precision is {self.precision!r}; expected one of {', '.join(_PRECISIONS)}.")


@dataclass
class Replay:
    """
    Args:
        losses (`dict[str, float]`): `loss` and all `loss_*`.
        inputs (`list[str]`): Of the batch, what has values that are not finite.
        weights (`list[str]`): Parameters that are not finite before the step.
        module (`str`, *optional*): The first whose output is not finite, in the order in which they finish.
        gradient (`str`, *optional*): The first parameter whose gradient is not finite.
    """

    losses: dict[str, float]
    inputs: list[str]
    weights: list[str]
    module: str | None
    gradient: str | None


def main(argv: list[str] | None = None) -> int:
    """`hf_mim replay RUN`. Returns 0 where the losses are those of the run, else 1."""
    words = name_words(argv, "run")
    return run_job(lambda: report(*parse_arguments((ReplayArguments,), words, presets={})))


def report(args: ReplayArguments) -> int:
    """
    Does the step of every process again, and says what came of it.

    Raises:
        ValueError: If no step was kept, or not its state.
    """
    folders = find_steps(args.run)
    same = True
    for folder in folders:
        kept = json.loads((folder / STEP).read_text())
        found = replay_step(folder, args.precision)
        for line in describe(folder, kept, found):
            say(line)
        same &= all(is_same(found.losses[name], float(value)) for name, value in kept["losses"].items())
    say("The losses are those of the run." if same else "The losses are not those of the run.")
    return 0 if same else 1


def is_same(value: float, other: float) -> bool:
    """NaN equals NaN; a compiled network rounds otherwise than one that is not."""
    return (math.isnan(value) and math.isnan(other)) or math.isclose(value, other, rel_tol=1e-4)


def find_steps(run: str | Path) -> list[Path]:
    """The folders of kept steps in a run's; raises ValueError where there are none, or none with its state."""
    found = sorted(Path(run).glob(f"**/{FOLDER}/**/{STEP}"))
    if not found:
        raise ValueError(f"{run} has no {FOLDER}/{STEP}: no step of that run had a loss that is not finite.")
    whole = [path.parent for path in found if (path.parent / MODEL).is_dir()]
    if not whole:
        kept = json.loads(found[0].read_text())
        raise ValueError(
            f"{found[0].parent} names step {kept['step']}, and not the state that it began with: on {kept['device']} "
            "losses are read only when they are logged. Start the training's command again: it goes the same way from "
            f"{kept['checkpoint'] or 'the start'}, and keeps the state. (Not under FSDP, nor "
            "of low-rank updates.)"
        )
    return whole


def replay_step(folder: Path, precision: str | None = None) -> Replay:
    """
    The forward and backward pass of a kept step, with its weights, batch, masks and random state, on the kind of
    device that it was on.

    Args:
        folder (`Path`): From [`find_steps`].
        precision (`str`, *optional*): "float32", "bfloat16" or "float16" instead of the run's.
    """
    kept = json.loads((folder / STEP).read_text())
    model_type = AutoConfig.from_pretrained(folder / MODEL).model_type
    device = torch.device(kept["device"] if kept["device"] != "cuda" or torch.cuda.is_available() else "cpu")
    model = method_class(model_type, "ForPreTraining").from_pretrained(folder / MODEL).to(device).train()
    if kept["chunk_size"] is not None:
        model.chunk_size = kept["chunk_size"]
    batch = {name: value.to(device) for name, value in load_file(folder / BATCH).items()}
    first: list[str] = []
    handles = [
        module.register_forward_hook(lambda module, inputs, output, name=name: _note(first, name, output))
        for name, module in model.named_modules()
        if name
    ]
    states = torch.load(folder / RANDOM, weights_only=True)
    torch.set_rng_state(states["cpu"])
    if "cuda" in states and device.type == "cuda":
        torch.cuda.set_rng_state(states["cuda"], device)
    dtype = _PRECISIONS[precision or kept["precision"]]
    with nullcontext() if dtype is None else torch.autocast(device.type, dtype):
        outputs = model(**batch)
    for handle in handles:
        handle.remove()
    outputs.loss.backward()
    names = dict(model.named_parameters())
    return Replay(
        losses={name: outputs[name].item() for name in outputs if name == "loss" or name.startswith("loss_")},
        inputs=[name for name, value in batch.items() if not _is_finite(value)],
        weights=[name for name, weight in names.items() if not _is_finite(weight)],
        module=next(iter(first), None),
        gradient=next((name for name, w in names.items() if w.grad is not None and not _is_finite(w.grad)), None),
    )


def _note(first: list[str], name: str, output) -> None:
    if not first and not _is_finite(output):
        first.append(name)


def _is_finite(output) -> bool:
    if torch.is_tensor(output):
        return not output.is_floating_point() or bool(output.isfinite().all())
    if isinstance(output, dict):
        output = tuple(output.values())
    return not isinstance(output, tuple | list) or all(map(_is_finite, output))


def describe(folder: Path, kept: dict, found: Replay) -> list[str]:
    """What came of it, line by line."""
    lines = [f"\n{folder}: step {kept['step']}, {kept['precision']} on {kept['device']}."]
    if kept["indices"] is not None:
        batch = load_file(folder / BATCH)
        bad = [
            str(index)
            for row, index in enumerate(kept["indices"])
            if not all(_is_finite(value[row]) for value in batch.values())
        ]
        lines.append(f"  pictures (epoch {kept['epoch']}): {', '.join(map(str, kept['indices']))}")
        if bad:
            lines.append(f"  not finite as they were given to the network: {', '.join(bad)}")
    for name, value in found.losses.items():
        lines.append(f"  {name}: {value} (in the run {kept['losses'].get(name)})")
    if found.weights:
        lines.append(f"  weights that were not finite before the step: {', '.join(found.weights[:5])}")
    lines.append(f"  first output that is not finite: {found.module or 'none'}")
    lines.append(f"  first gradient that is not finite: {found.gradient or 'none'}")
    return lines
