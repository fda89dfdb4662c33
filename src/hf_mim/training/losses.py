"""How the trainers keep account of losses: by name, over all processes, each held-out picture once, and finite."""

import torch
from transformers.utils import ModelOutput

from .checkpoints import last_whole_checkpoint

# No step is as late.
NEVER = torch.iinfo(torch.int64).max


class NonFiniteLossError(RuntimeError):
    """A loss, or a weight, became infinite or NaN."""


class LossMeter:
    """Running means of named scalars, kept on the device until they are read."""

    def __init__(self):
        self.reset()

    def reset(self) -> None:
        self.sums: dict[str, torch.Tensor] = {}
        self.weight = 0.0

    def add(self, losses: dict[str, torch.Tensor], weight: float = 1.0) -> None:
        for name, value in losses.items():
            self.sums[name] = self.sums.get(name, 0.0) + weight * value
        self.weight += weight

    def average(self, accelerator) -> dict[str, float]:
        """The weighted means since the last call, over all processes."""
        if not self.sums:
            return {}
        sums = torch.stack(list(self.sums.values()))
        # In one message: a process may have seen fewer pictures than another.
        *sums, weight = accelerator.reduce(torch.cat([sums, sums.new_tensor([self.weight])]), reduction="sum").tolist()
        averages = {name: value / weight for name, value in zip(self.sums, sums, strict=True)}
        self.reset()
        return averages


class LossesMixin:
    """
    Of a `Trainer` with the [`LossMeter`]s `train_losses` and `eval_losses`, and `first_bad_step`, the first step whose
    loss was not finite, or `NEVER`.
    """

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss, outputs = self.forward_loss(model, inputs, num_items_in_batch)
        if model.training:
            losses = {name: value.detach() for name, value in outputs.items() if name.startswith("loss_")}
            # As the loss itself: a step counts as its mean over micro-batches, though an epoch's last has fewer.
            self.train_losses.add(losses, weight=1 / self.current_gradient_accumulation_steps)
            # Stays on the device: reading it at every step would make the host wait for it.
            step = torch.where(torch.isfinite(loss.detach()), NEVER, self.state.global_step + 1)
            self.first_bad_step = torch.minimum(self.first_bad_step, step)
        return (loss, outputs) if return_outputs else loss

    def number_counted(self, batch_size: int) -> int:
        """
        How many of the pictures of a batch, from its first, count in the held-out loss: several processes get the
        first pictures again to fill up the last batch.
        """
        state = self.accelerator.gradient_state
        if not state.end_of_dataloader or state.remainder <= 0:
            return batch_size
        return min(max(state.remainder - self.accelerator.process_index * batch_size, 0), batch_size)

    def forward_loss(self, model, inputs, num_items_in_batch) -> tuple[torch.Tensor, ModelOutput]:
        """The loss that is minimised, and the model's outputs."""
        return super().compute_loss(model, inputs, True, num_items_in_batch)

    @torch.no_grad()
    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        inputs = self._prepare_inputs(inputs)
        counted = self.number_counted(len(inputs[self.model.main_input_name]))
        if counted:
            inputs = {name: value[:counted] for name, value in inputs.items()}
        # Else all are gone through, for nothing: under FSDP the forward pass is a common effort.
        with self.compute_loss_context_manager():
            loss, outputs = self.compute_loss(model, inputs, return_outputs=True)
        losses = {name: value for name, value in outputs.items() if name.startswith("loss_")}
        self.eval_losses.add({"loss": loss} | losses, weight=counted)
        # Only the loss: the predictions of all pictures would fill the memory.
        return loss, None, None

    def evaluation_loop(self, *args, metric_key_prefix="eval", **kwargs):
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        for name, value in self.eval_losses.average(self.accelerator).items():
            output.metrics[f"{metric_key_prefix}_{name}"] = value
        return output

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        # "train_loss" is logged once, at the end.
        if "loss" in logs or "train_loss" in logs:
            self.check_losses()
        if "loss" in logs:
            logs.update(self.train_losses.average(self.accelerator))
        super().log(logs, start_time)

    def check_losses(self) -> None:
        """Raises NonFiniteLossError if a loss of any process was not finite since the start."""
        step = int(self.accelerator.gather(self.first_bad_step.reshape(1)).min())
        if step < NEVER:
            self._stop_for(f"The loss of step {step} is not finite", self.keep_step(step))

    def check_weights(self) -> None:
        """Raises NonFiniteLossError if a weight is not finite, which the loss would show one step later."""
        names, weights = zip(*self.model.named_parameters(), strict=True)
        # Of a sharded weight each process looks at its own part.
        local = [getattr(weight, "_local_tensor", weight).detach() for weight in weights]
        finite = torch.stack([weight.isfinite().all() for weight in local])
        bad = self.accelerator.gather((~finite)[None]).any(dim=0).nonzero().flatten().tolist()
        if bad:
            self._stop_for(f"The weights after step {self.state.global_step} are not finite ({names[bad[0]]})")

    def keep_step(self, step: int) -> str:
        """Keeps what is left of a step whose loss is not finite, and says where."""
        return ""

    def _stop_for(self, reason: str, where: str = "") -> None:
        checkpoint = last_whole_checkpoint(self.args.output_dir)
        kept = f"The last good checkpoint is {checkpoint}." if checkpoint else "No checkpoint had been written yet."
        raise NonFiniteLossError(
            f"{reason}, so nothing was saved since. {kept} Lower the learning rate (it was at most "
            f"{self.args.learning_rate:.2e}), lengthen the warm-up, clip gradients (--max_grad_norm 1), or train in "
            f"float32 (--bf16 false).{where}"
        )
