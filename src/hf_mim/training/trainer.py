"""A Trainer for every ForPreTraining model of hf_mim."""

import shutil
from pathlib import Path

import torch
from torch import nn
from transformers import Trainer, TrainerCallback
from transformers.trainer_utils import get_last_checkpoint

from ..data.pretraining import EpochSampler, pretraining_collator


class NonFiniteLossError(RuntimeError):
    """A loss became infinite or NaN."""


class MIMTrainer(Trainer):
    """
    transformers' `Trainer` for masked image modelling. It knows a method only through what its outputs and its model
    offer: every output named `loss_*` is logged under its name, and `model.after_optimizer_step` is called after each
    optimiser step (averaged targets).

    Data sets yield `pixel_values` and `noise`, which are functions of (seed, epoch, sample index): the sampler sends
    the epoch along with the index, so that neither workers, processes nor resuming change what a sample looks like.

    Args:
        As `Trainer`; `args` is a [`MIMTrainingArguments`], `train_dataset` a `PretrainingDataset` or a
        `StreamingPretrainingDataset`.

    Raises:
        ValueError: If the training data set has fewer pictures than one step needs, or under FSDP version 1.
        NonFiniteLossError: In training, when a loss is not finite; checked when logging and before saving.
    """

    def __init__(self, *args, **kwargs):
        kwargs.setdefault("data_collator", pretraining_collator)
        super().__init__(*args, **kwargs)
        # The models return a loss without labels; the Trainer only looks for an argument `return_loss`.
        self.can_return_loss = True
        self.train_losses, self.eval_losses = LossMeter(), LossMeter()
        self.first_bad_step = torch.tensor(-1, device=self.args.device)
        self.add_callback(_ModelHooks(self))
        if self.is_fsdp_enabled and self.accelerator.state.fsdp_plugin.fsdp_version == 1:
            raise ValueError(
                "FSDP version 1 flattens parameters across sub-modules, so that an averaged target would be averaged "
                'with other weights. Use version 2: --fsdp_config \'{"version": 2}\'.'
            )

    # Data

    def _get_train_sampler(self, train_dataset=None) -> EpochSampler:
        dataset = self.train_dataset if train_dataset is None else train_dataset
        needed = self.get_total_train_batch_size(self.args)
        if self.args.dataloader_drop_last and len(dataset) < needed:
            raise ValueError(
                f"The training data has {len(dataset)} pictures, fewer than the {needed} of one step (per-device batch x "
                "processes x accumulation). Choose a smaller --per_device_train_batch_size, or add pictures."
            )
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        self.train_sampler = EpochSampler(len(dataset), seed=seed)
        return self.train_sampler

    def _get_eval_sampler(self, eval_dataset) -> EpochSampler:
        return EpochSampler(len(eval_dataset), shuffle=False)

    # Optimisation

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """Matrices: the weights of linear maps and of the patch projection. Not biases, norms, tokens, positions."""
        matrices = (nn.Linear, nn.Conv2d)
        return [f"{name}.weight" for name, module in model.named_modules() if isinstance(module, matrices)]

    def create_scheduler(self, num_training_steps: int, optimizer=None):
        epochs = self.args.warmup_epochs
        if epochs is not None:
            if not hasattr(self.train_dataset, "__len__"):
                raise ValueError("warmup_epochs needs data of known length; with --streaming give --warmup_steps.")
            steps_per_epoch = len(self.train_dataset) / self.get_total_train_batch_size(self.args)
            # At least 1, below which the number would be read as a share of all steps.
            self.args.warmup_steps = max(1, round(epochs * steps_per_epoch)) if epochs > 0 else 0
        return super().create_scheduler(num_training_steps, optimizer)

    def _get_grad_norm(self, model, grad_norm=None):
        # The stock method walks over all gradients at every step; the number is only wanted when it is logged.
        due = (self.state.global_step + 1) % self.state.logging_steps == 0
        return super()._get_grad_norm(model, grad_norm) if due or grad_norm is not None else None

    # Losses

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        meter = self.train_losses if model.training else self.eval_losses
        meter.add({name: value.detach() for name, value in outputs.items() if name.startswith("loss_")})
        if model.training:
            # Stays on the device: reading it at every step would make the host wait for it.
            first_time = ~torch.isfinite(loss.detach()) & (self.first_bad_step < 0)
            self.first_bad_step = torch.where(first_time, self.state.global_step + 1, self.first_bad_step)
        return (loss, outputs) if return_outputs else loss

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        # Only the loss: the predictions of all pictures would fill the memory.
        loss, _, _ = super().prediction_step(model, inputs, True, ignore_keys)
        return loss, None, None

    def evaluation_loop(self, *args, metric_key_prefix="eval", **kwargs):
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        for name, value in self.eval_losses.average(self.accelerator).items():
            output.metrics[f"{metric_key_prefix}_{name}"] = value
        return output

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            self.check_losses()
            logs.update(self.train_losses.average(self.accelerator))
        super().log(logs, start_time)

    def check_losses(self) -> None:
        """Raises NonFiniteLossError if a loss of any process was not finite since the start."""
        step = int(self.accelerator.gather(self.first_bad_step.reshape(1)).max())
        if step < 0:
            return
        checkpoint = get_last_checkpoint(self.args.output_dir)
        kept = f"The last good checkpoint is {checkpoint}." if checkpoint else "No checkpoint had been written yet."
        raise NonFiniteLossError(
            f"The loss of step {step} is not finite, so nothing was saved since. {kept} Lower the learning rate "
            f"(it was at most {self.args.learning_rate:.2e}), lengthen the warm-up, clip gradients (--max_grad_norm 1), "
            "or train in float32 (--bf16 false)."
        )

    # Saving

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        self.check_losses()
        super().save_model(output_dir, _internal_call)

    def _save_checkpoint(self, model, trial):
        try:
            super()._save_checkpoint(model, trial)
        except NonFiniteLossError:
            raise
        except Exception as error:
            # Half a checkpoint would be taken for the last one when resuming.
            folder = Path(self._get_output_dir(trial)) / f"checkpoint-{self.state.global_step}"
            if self.args.should_save:
                shutil.rmtree(folder, ignore_errors=True)
            checkpoint = get_last_checkpoint(self.args.output_dir)
            kept = f"Training resumes from {checkpoint}" if checkpoint else "No earlier checkpoint is there"
            raise OSError(
                f"Writing the checkpoint {folder} failed ({error}); what was written of it is deleted. {kept}. Is the "
                "disk full? Free some space and start the same command again."
            ) from error


class LossMeter:
    """Running means of named scalars, kept on the device until they are read."""

    def __init__(self):
        self.sums: dict[str, torch.Tensor] = {}
        self.count = 0

    def add(self, losses: dict[str, torch.Tensor]) -> None:
        for name, value in losses.items():
            self.sums[name] = self.sums[name] + value if name in self.sums else value
        self.count += 1

    def average(self, accelerator) -> dict[str, float]:
        """The means since the last call, over all processes."""
        if not self.sums:
            return {}
        means = accelerator.reduce(torch.stack(list(self.sums.values())) / self.count, reduction="mean").tolist()
        averages = dict(zip(self.sums, means, strict=True))
        self.sums, self.count = {}, 0
        return averages


class _ModelHooks(TrainerCallback):
    """Calls what the model wants to be called, and keeps the sampler's epoch right."""

    def __init__(self, trainer: MIMTrainer):
        self.trainer = trainer

    def on_epoch_begin(self, args, state, control, **kwargs):
        # accelerate's set_epoch does not reach the sampler through both the shards of several processes and the
        # skipping of a resumed epoch.
        if hasattr(self.trainer, "train_sampler"):
            self.trainer.train_sampler.set_epoch(int(state.epoch or 0))

    def on_optimizer_step(self, args, state, control, **kwargs):
        if not self.trainer.accelerator.optimizer_step_was_skipped:
            model = self.trainer.accelerator.unwrap_model(self.trainer.model, keep_torch_compile=False)
            model.after_optimizer_step(state.global_step, state.max_steps)
