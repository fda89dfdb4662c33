"""A network, pictures and a trainer so small that a step takes a few milliseconds."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import torch

from hf_mim import PiLaMIMConfig, PiLaMIMForPreTraining
from hf_mim.data.dataset import ImageDataset
from hf_mim.data.pretraining import PretrainingDataset
from hf_mim.data.transforms import PretrainingTransform
from hf_mim.training.arguments import MIMTrainingArguments
from hf_mim.training.trainer import MIMTrainer

REPOSITORY = Path(__file__).parents[1]
RUN_MIM = str(REPOSITORY / "examples" / "run_mim.py")

SIZES = {
    "image_size": 16,
    "patch_size": 4,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "decoder_hidden_size": 16,
    "decoder_num_hidden_layers": 1,
    "decoder_num_attention_heads": 2,
}
_SIZE_FLAGS = {name: value for name, value in SIZES.items() if name not in ("image_size", "patch_size")}
# HF_MIM_TEST_BF16=1 or 0 has all of them train with or without bfloat16; where it is not set, the scripts choose by
# the processor. Tests that compare more closely than bfloat16 allows ask for float32 themselves.
FORCED_BF16 = {None: None, "0": False, "1": True}[os.environ.get("HF_MIM_TEST_BF16") or None]
# Of examples/run_mim.py: the same network, and nothing that takes time.
FLAGS = [
    "--image_size=16",
    "--patch_size=4",
    "--config_overrides=" + ",".join(f"{name}={value}" for name, value in _SIZE_FLAGS.items()),
    "--per_device_train_batch_size=4",
    "--base_learning_rate=0.05",
    "--logging_steps=1",
    "--disable_tqdm=true",
    "--use_cpu",
    *([] if FORCED_BF16 is None else [f"--bf16={FORCED_BF16}"]),
]


def tiny_config(**changes) -> PiLaMIMConfig:
    return PiLaMIMConfig(**(SIZES | changes))


def pictures(number: int = 20, seed: int = 0) -> np.ndarray:
    """Noise, uint8 (number, 16, 16, 3)."""
    return np.random.default_rng(seed).integers(0, 256, (number, 16, 16, 3), dtype=np.uint8)


def tiny_data(number: int = 20, seed: int = 0) -> PretrainingDataset:
    source = ImageDataset(pictures(number, seed), 3, source="noise")
    return PretrainingDataset(source, PretrainingTransform((16, 16), 16, [0.5] * 3, [0.25] * 3, seed=0))


def tiny_arguments(output_dir, **changes) -> MIMTrainingArguments:
    defaults = {
        "per_device_train_batch_size": 4,
        "base_learning_rate": 0.05,
        "logging_steps": 1,
        "save_strategy": "no",
        "disable_tqdm": True,
        "use_cpu": True,
        "bf16": bool(FORCED_BF16),
        "dataloader_pin_memory": False,
        # Of several loaders in one process torch takes 5 seconds to end each worker that was kept.
        "dataloader_persistent_workers": False,
    }
    return MIMTrainingArguments(output_dir=str(output_dir), **(defaults | changes))


def tiny_trainer(
    output_dir, *, config=None, model_class=PiLaMIMForPreTraining, data=None, eval_data=None, callbacks=None, **changes
) -> MIMTrainer:
    """A trainer of a network that is the same at every call."""
    torch.manual_seed(0)
    model = model_class(config or tiny_config())
    return MIMTrainer(
        model=model,
        args=tiny_arguments(output_dir, **changes),
        train_dataset=data or tiny_data(),
        eval_dataset=eval_data,
        callbacks=callbacks,
    )


def write_pictures(folder: Path, number: int = 20, seed: int = 0) -> Path:
    """`number` float arrays (.npy, values 0 to 1) in a folder, which is returned."""
    folder.mkdir(parents=True, exist_ok=True)
    for index, picture in enumerate(pictures(number, seed)):
        np.save(folder / f"{index:03d}.npy", picture.astype(np.float32) / 255)
    return folder


def losses(output_dir, *names: str) -> list[tuple]:
    """(step, *values) of every log entry that has a loss, from the last `trainer_state.json`."""
    history = json.loads((Path(output_dir) / "trainer_state.json").read_text())["log_history"]
    return [(log["step"], *(log[name] for name in names or ("loss",))) for log in history if "loss" in log]


def environment(**changes: str) -> dict[str, str]:
    # One thread each, so that sums have one order; the tests' own launchers must not pass settings on.
    dropped = ("ACCELERATE_", "TORCHELASTIC_", "RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(dropped)}
    return kept | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"} | changes


@contextmanager
def started(command: list[str], **changes: str) -> Iterator[subprocess.Popen]:
    """
    `python ...command` while it runs, in a process group of its own, of which nothing outlives the block. `changes`
    are of its environment.
    """
    process = subprocess.Popen(
        [sys.executable, *command],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(**changes),
        cwd=REPOSITORY,
        start_new_session=True,
    )
    with process:
        try:
            yield process
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


def run(command: list[str], timeout: float = 240, **changes: str) -> subprocess.CompletedProcess:
    """What `python ...command` says and ends with. `changes` are of its environment."""
    with started(command, **changes) as process:
        out, err = process.communicate(timeout=timeout)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)
