"""
What a loss that is not finite leaves behind: the batch, its indices, and the state that the step began with.

A loss is read at every step only where that costs nothing, on a CPU: elsewhere the host would wait for the device.
There a run that is started again, and so comes to the same step by the same way, reads the losses from that step on.
"""

import copy
import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers.utils import logging

from ..files import replacing, write_json
from .checkpoints import last_whole_checkpoint

logger = logging.get_logger(__name__)

FOLDER = "nonfinite"
STEP, BATCH, RANDOM, MODEL = "step.json", "batch.safetensors", "random.pt", "model"
# Kinds of devices on which reading a loss costs nothing.
READS_AT_ONCE = ("cpu",)


def random_state(device: torch.device) -> dict[str, torch.Tensor]:
    """Of torch's generators, which stochastic depth draws from: of the CPU, and of the device where it has another."""
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


class NonFiniteKeeper:
    """
    Keeps the first step of a training whose loss is not finite, in `output_dir/nonfinite` (of several processes each
    keeps its own in `process-N` there).

    Args:
        trainer ([`MIMTrainer`]).
    """

    def __init__(self, trainer):
        self.trainer = trainer
        self._from_step, self._kept = 1, False
        self._step, self._micro_batch = 0, 0

    @property
    def folder(self) -> Path:
        args = self.trainer.args
        folder = Path(args.output_dir) / FOLDER
        return folder / f"process-{args.process_index}" if args.world_size > 1 else folder

    @property
    def keeps_weights(self) -> bool:
        """False where no process has them all (FSDP), and of low-rank updates, which are no part of the config."""
        names = (name for name, _ in self.trainer.model.named_parameters())
        return not self.trainer.is_fsdp_enabled and not any("lora_" in name for name in names)

    def begin(self) -> None:
        """Before a training: what an earlier one left is forgotten, if this one starts from zero."""
        self._kept, self._step = False, 0
        self._from_step = 1 if self.trainer.args.device.type in READS_AT_ONCE else None
        if self.trainer.state.global_step == 0 and not self._known():
            shutil.rmtree(self.folder, ignore_errors=True)
        elif self._from_step is None and (known := self._known()):
            self._from_step = known
            logger.warning(f"The loss was not finite at step {known}: losses are read from there on.")

    def _known(self) -> int | None:
        """A step that is known not to be finite, and of which no state is kept."""
        try:
            step = json.loads((self.folder / STEP).read_text())
        except (OSError, ValueError):
            return None
        return None if step["has_state"] else step["step"]

    def before(self) -> dict | None:
        """Before a forward pass: the random state that it begins with; None where losses are not read."""
        step = self.trainer.state.global_step + 1
        self._micro_batch = self._micro_batch + 1 if step == self._step else 0
        self._step = step
        if self._kept or self._from_step is None or step < self._from_step:
            return None
        return random_state(self.trainer.args.device)

    def after(self, inputs: dict, outputs, loss: torch.Tensor, states: dict | None) -> None:
        """After it: keeps all of it where the loss is not finite."""
        if states is None or bool(loss.isfinite()):
            return
        self._kept = True
        trainer = self.trainer
        folder = self.folder
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        batch = {name: value.detach().contiguous().cpu() for name, value in inputs.items() if torch.is_tensor(value)}
        save_file(batch, folder / BATCH)
        torch.save(states, folder / RANDOM)
        if self.keeps_weights:
            model = trainer.accelerator.unwrap_model(trainer.model, keep_torch_compile=False)
            # Under the names of the modules, which all methods find again.
            model.save_pretrained(folder / MODEL, save_original_format=False)
            with replacing(folder / "optimizer.pt") as temporary:
                torch.save(trainer.optimizer.state_dict(), temporary)
        losses = {name: value for name, value in outputs.items() if name.startswith("loss_")}
        # Last: what is named there is there.
        self._write(trainer.state.global_step + 1, {"loss": loss} | losses, has_state=self.keeps_weights)

    def keep(self, step: int) -> str:
        """Says where what is kept of a step lies; where its losses were not read, notes that there is such a step."""
        if not self._kept:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._write(step, {}, has_state=False)
        run = Path(self.trainer.args.output_dir)
        if not self.keeps_weights:
            return f" Which pictures it saw is in {self.folder / STEP}."
        if self._kept:
            return f" What the step began with is in {self.folder}: `hf_mim replay {run}` does it again."
        return f" The same command again goes the same way, and keeps in {run / FOLDER} what that step begins with."

    def _write(self, step: int, losses: dict[str, torch.Tensor], *, has_state: bool) -> None:
        trainer, has_losses = self.trainer, bool(losses)
        checkpoint = last_whole_checkpoint(trainer.args.output_dir)
        micro_batch = self._micro_batch if has_losses else None
        epoch, indices = self.indices(step, micro_batch)
        write_json(
            self.folder / STEP,
            {
                "step": step,
                "micro_batch": micro_batch,
                # As text: JSON has no NaN.
                "losses": {name: str(value.item()) for name, value in losses.items()},
                "epoch": epoch,
                "indices": indices,
                "has_state": has_state,
                "checkpoint": None if checkpoint is None else str(checkpoint),
                "chunk_size": trainer.args.contrastive_chunk_size,
                "precision": trainer.args.precision,
                "device": trainer.args.device.type,
            },
        )

    def indices(self, step: int, micro_batch: int | None) -> tuple[int | None, list[int] | None]:
        """
        The epoch and this process's pictures of a micro-batch, or of all of the step; None of a stream, which has no
        indices.
        """
        trainer, args = self.trainer, self.trainer.args
        loader = trainer.callback_handler.train_dataloader
        if not hasattr(trainer, "train_sampler") or loader is None:
            return None, None
        accumulated = args.gradient_accumulation_steps
        steps_per_epoch = max(1, -(-len(loader) // accumulated))
        epoch, step_of_epoch = divmod(step - 1, steps_per_epoch)
        # As it would be at the epoch's beginning; of a resumed run it starts further on.
        sampler = copy.copy(trainer.train_sampler)
        sampler.start = 0
        sampler.set_epoch(epoch)
        order, size = [index for _, index in sampler], args.per_device_train_batch_size
        found = []
        for number in range(accumulated) if micro_batch is None else [micro_batch]:
            batch = (step_of_epoch * accumulated + number) * args.world_size + args.process_index
            found += order[batch * size : (batch + 1) * size]
        return epoch, found
