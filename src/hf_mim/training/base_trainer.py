"""What the trainers of pretraining and of fine-tuning share."""

import functools
import shutil
from pathlib import Path

import torch
from accelerate.data_loader import prepare_data_loader
from safetensors import SafetensorError
from torch import nn
from torch.utils.data import DataLoader
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerCallback
from transformers.utils import ModelOutput, logging

from ..data.pretraining import EpochSampler, StreamingPretrainingDataset
from ..files import replacing
from .callbacks import LogLines, LogLinesBesideBar
from .checkpoints import (
    check_same_run,
    finish_checkpoint,
    finish_model,
    last_whole_checkpoint,
    rotate_checkpoints,
    set_later_checkpoints_aside,
    unfinished,
    write_record,
)
from .run_record import run_record

logger = logging.get_logger(__name__)

# What transformers calls the state of a training.
_STATE = "trainer_state.json"
_NEVER = torch.iinfo(torch.int64).max


class NonFiniteLossError(RuntimeError):
    """A loss, or a weight, became infinite or NaN."""


class ViTTrainer(Trainer):
    """
    transformers' `Trainer` with runs that can be repeated and resumed exactly: samples are functions of (seed, epoch,
    index), since the sampler sends the epoch along with the index; matrices alone are decayed; every output named
    `loss_*` is logged under its name; a loss that is not finite, a full disk and a damaged checkpoint are noticed.

    Args:
        As `Trainer`; `args` is a [`ViTTrainingArguments`].
        run_settings (`dict`, *optional*): What decides the result besides arguments, model and pictures, as JSON has
            it: where the weights are from, augmentation. Part of the run's record.

    Raises:
        ValueError: If the training data set has fewer pictures than one step needs, or under FSDP version 1.
        NonFiniteLossError: In training, when a loss is not finite; checked when logging, before saving and at the end.
    """

    def __init__(self, *args, run_settings: dict | None = None, **kwargs):
        super().__init__(*args, **kwargs)
        self.run_settings = run_settings or {}
        self._is_saving, self._first_step = False, 0
        self.train_losses, self.eval_losses = LossMeter(), LossMeter()
        self.first_bad_step = torch.tensor(_NEVER, device=self.args.device)
        self.add_callback(_Hooks(self))
        # transformers prints logs as dictionaries, without the step.
        for printing, better in ((PrinterCallback, LogLines), (ProgressCallback, LogLinesBesideBar)):
            if self.pop_callback(printing) is not None:
                self.add_callback(better())
        if self.is_fsdp_enabled:
            self._prepare_fsdp(self.accelerator.state.fsdp_plugin)
        elif self.args.fsdp_plugin_args is not None:
            logger.warning("FSDP is not for CPUs: accelerate leaves --fsdp out, and every process holds all weights.")

    def _prepare_fsdp(self, plugin) -> None:
        if plugin.fsdp_version == 1:
            raise ValueError(
                "FSDP version 1 flattens parameters across sub-modules, so that an averaged target would be averaged "
                "with other weights. Use version 2: --fsdp_config '{\"version\": 2}'."
            )
        if plugin.transformer_cls_names_to_wrap is None:
            # accelerate shards the input embedding by itself, and fails if a module around it is sharded already.
            embedding = self.model.get_input_embeddings()
            around = {type(module).__name__ for module in self.model.modules() if embedding in module.modules()}
            plugin.transformer_cls_names_to_wrap = sorted(set(self.model._no_split_modules) - around)

    # Data

    def _get_dataloader(self, dataset, description, batch_size, *args, is_training=False, **kwargs) -> DataLoader:
        if is_training and isinstance(dataset, StreamingPretrainingDataset) and self.args.world_size > 1:
            # Each process reads its own share; accelerate would read the first one's alone and deal it out.
            loader = DataLoader(
                dataset,
                batch_size=batch_size,
                collate_fn=self.data_collator,
                num_workers=self.args.dataloader_num_workers,
                pin_memory=self.args.dataloader_pin_memory,
                persistent_workers=self.args.dataloader_persistent_workers,
                prefetch_factor=self.args.dataloader_prefetch_factor,
            )
            loader = prepare_data_loader(
                loader,
                self.accelerator.device,
                num_processes=1,
                process_index=0,
                put_on_device=True,
                dispatch_batches=False,
            )
        else:
            drop_last = self.args.dataloader_drop_last
            self.args.dataloader_drop_last = drop_last and is_training
            try:
                loader = super()._get_dataloader(
                    dataset, description, batch_size, *args, is_training=is_training, **kwargs
                )
            finally:
                self.args.dataloader_drop_last = drop_last
        # An iterator draws the seed of its workers, which none of them uses. Drawn from the global generator it would
        # move stochastic depth's, and not in the same way after resuming.
        getattr(loader, "base_dataloader", loader).generator = torch.Generator()
        return loader

    def _get_train_sampler(self, train_dataset=None) -> EpochSampler:
        dataset = self.train_dataset if train_dataset is None else train_dataset
        needed = self.get_total_train_batch_size(self.args)
        if self.args.dataloader_drop_last and len(dataset) < needed:
            raise ValueError(
                f"The training data has {len(dataset)} pictures, fewer than the {needed} of one step (per-device "
                "batch x processes x accumulation). Choose a smaller --per_device_train_batch_size, or add pictures."
            )
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        self.train_sampler = EpochSampler(len(dataset), seed=seed)
        return self.train_sampler

    def _get_eval_sampler(self, eval_dataset) -> EpochSampler:
        return EpochSampler(len(eval_dataset), shuffle=False)

    # Optimisation

    def train(self, resume_from_checkpoint=None, *args, **kwargs):
        """
        As `Trainer.train`; True goes on from the last whole checkpoint.

        Raises:
            ValueError: If the checkpoint is of a run that was decided otherwise; see [`run_record`].
        """
        if resume_from_checkpoint is True:
            resume_from_checkpoint = last_whole_checkpoint(self.args.output_dir)
            if resume_from_checkpoint is None:
                raise ValueError(f"There is no whole checkpoint in {self.args.output_dir} to resume from.")
        checkpoint = str(resume_from_checkpoint) if resume_from_checkpoint else None
        if checkpoint is not None:
            check_same_run(checkpoint, self.run_record, "is a checkpoint of another run")
        # All have looked before one renames.
        self.accelerator.wait_for_everyone()
        if self.is_world_process_zero():
            set_later_checkpoints_aside(self.args.output_dir, checkpoint)
        self.accelerator.wait_for_everyone()
        return super().train(checkpoint, *args, **kwargs)

    @property
    def num_steps_trained(self) -> int:
        """Optimiser steps of the last call of `train`, without those of a checkpoint that it went on from."""
        return self.state.global_step - self._first_step

    @functools.cached_property
    def run_record(self) -> dict:
        """What decides the result of training, and what else is worth knowing of it; see [`run_record`]."""
        return run_record(self.model, self.args, self.train_dataset, self.run_settings)

    def _run_epoch(self, *args, **kwargs):
        # The stock loop looks only after a step whether it was the last, so that a finished run would get one more.
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)

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

    def _issue_warnings_after_load(self, load_result) -> None:
        # The stock method warns, and trains on with what the network was initialised with.
        parts = (("lacks", load_result.missing_keys), ("has besides", load_result.unexpected_keys))
        wrong = [f"{what} {', '.join(names[:3])} ({len(names)} tensors)" for what, names in parts if names]
        if wrong:
            raise ValueError(f"The checkpoint's weights are not this network's: it {', and '.join(wrong)}.")

    # Losses

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss, outputs = self.forward_loss(model, inputs, num_items_in_batch)
        if model.training:
            losses = {name: value.detach() for name, value in outputs.items() if name.startswith("loss_")}
            # As the loss itself: a step counts as its mean over micro-batches, though an epoch's last has fewer.
            self.train_losses.add(losses, weight=1 / self.current_gradient_accumulation_steps)
            # Stays on the device: reading it at every step would make the host wait for it.
            step = torch.where(torch.isfinite(loss.detach()), _NEVER, self.state.global_step + 1)
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

    def after_optimizer_step(self) -> None:
        """Called after each optimiser step that was not skipped."""

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
        if step < _NEVER:
            self._stop_for(f"The loss of step {step} is not finite")

    def check_weights(self) -> None:
        """Raises NonFiniteLossError if a weight is not finite, which the loss would show one step later."""
        names, weights = zip(*self.model.named_parameters(), strict=True)
        # Of a sharded weight each process looks at its own part.
        local = [getattr(weight, "_local_tensor", weight).detach() for weight in weights]
        finite = torch.stack([weight.isfinite().all() for weight in local])
        bad = self.accelerator.gather((~finite)[None]).any(dim=0).nonzero().flatten().tolist()
        if bad:
            self._stop_for(f"The weights after step {self.state.global_step} are not finite ({names[bad[0]]})")

    def _stop_for(self, reason: str) -> None:
        checkpoint = last_whole_checkpoint(self.args.output_dir)
        kept = f"The last good checkpoint is {checkpoint}." if checkpoint else "No checkpoint had been written yet."
        raise NonFiniteLossError(
            f"{reason}, so nothing was saved since. {kept} Lower the learning rate (it was at most "
            f"{self.args.learning_rate:.2e}), lengthen the warm-up, clip gradients (--max_grad_norm 1), or train in "
            "float32 (--bf16 false)."
        )

    # Saving

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        self.check_losses()
        self.check_weights()
        super().save_model(output_dir, _internal_call)
        plugin = self.accelerator.state.fsdp_plugin if self.is_fsdp_enabled else None
        if plugin is not None and "FULL_STATE_DICT" not in str(plugin.state_dict_type):
            # The stock method leaves all to the shards, which only training can read.
            if output_dir in (None, self.args.output_dir):
                self._save(output_dir, state_dict=self.accelerator.get_state_dict(self.model))
            elif self.args.should_save:
                self.model.config.save_pretrained(output_dir)
        if self.args.should_save:
            write_record(output_dir or self.args.output_dir, self.run_record)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        if output_dir in (None, self.args.output_dir):
            # Written beside first: a run that is killed here leaves the files that were there, whole.
            super()._save(str(unfinished(self.args.output_dir) / "model"), state_dict)
            if self.args.should_save:
                finish_model(self.args.output_dir, "model")
            return
        # transformers writes the weights of ViT and ViTMAE under the names of its older versions, which its Trainer
        # does not find again. A checkpoint keeps the names of the modules; the model at the end gets the others.
        self.model.save_pretrained = functools.partial(self.model.save_pretrained, save_original_format=False)
        try:
            super()._save(output_dir, state_dict)
        finally:
            self.model.__dict__.pop("save_pretrained", None)

    def save_state(self) -> None:
        if self.is_world_process_zero():
            with replacing(Path(self.args.output_dir) / _STATE) as temporary:
                self.state.save_to_json(str(temporary))

    def create_model_card(self, *args, **kwargs) -> None:
        """Keeps the card that the job wrote, which the stock one would replace when pushing."""
        if not (Path(self.args.output_dir) / "README.md").is_file():
            super().create_model_card(*args, **kwargs)

    def _get_output_dir(self, trial) -> str:
        folder = super()._get_output_dir(trial)
        # Only `_save_checkpoint` asks while it saves.
        return str(unfinished(folder)) if self._is_saving else folder

    def _save_checkpoint(self, model, trial):
        folder, name = Path(self._get_output_dir(trial)), f"checkpoint-{self.state.global_step}"
        push_to_hub, self.args.push_to_hub = self.args.push_to_hub, False
        self._is_saving = True
        try:
            super()._save_checkpoint(model, trial)
            # Each process writes its own part.
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                self._correct_best_checkpoint(folder)
                finish_checkpoint(folder, name)
        except NonFiniteLossError:
            raise
        except BaseException as error:
            if self.args.should_save:
                shutil.rmtree(unfinished(folder), ignore_errors=True)
            # torch's writer says RuntimeError when it cannot write, and that comes from this file.
            torch_cannot = isinstance(error, RuntimeError) and "inline_container" in str(error)
            if not isinstance(error, OSError | SafetensorError) and not torch_cannot:
                raise
            checkpoint = last_whole_checkpoint(self.args.output_dir)
            kept = f"Training resumes from {checkpoint}" if checkpoint else "No earlier checkpoint is there"
            raise OSError(
                f"Writing the checkpoint {folder / name} failed ({error}); what was written of it is deleted. {kept}. "
                "Is the disk full? Free some space and start the same command again."
            ) from error
        finally:
            self._is_saving = False
            self.args.push_to_hub = push_to_hub
        if push_to_hub:
            self._push_from_checkpoint(str(folder / name))
        if self.args.should_save:
            # Only now that the new one is whole.
            rotate_checkpoints(folder, self.args.save_total_limit, self.state.best_model_checkpoint)
        self.accelerator.wait_for_everyone()

    def _correct_best_checkpoint(self, folder: Path) -> None:
        # The stock method looks for the best checkpoint where this one lies until it is whole.
        if not self.state.best_global_step:
            return
        name = f"checkpoint-{self.state.best_global_step}"
        if name == f"checkpoint-{self.state.global_step}" or (folder / name).is_dir():
            self.state.best_model_checkpoint = str(folder / name)
        written = unfinished(folder) / f"checkpoint-{self.state.global_step}"
        self.state.save_to_json(str(written / _STATE))


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


class _Hooks(TrainerCallback):
    """Starts the meters anew, tells of optimiser steps, and keeps the sampler's epoch right."""

    def __init__(self, trainer: ViTTrainer):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        self.trainer.train_losses.reset()
        self.trainer._first_step = state.global_step
        self.trainer.first_bad_step.fill_(_NEVER)

    def on_epoch_begin(self, args, state, control, **kwargs):
        # accelerate's set_epoch does not reach the sampler through both the shards of several processes and the
        # skipping of a resumed epoch.
        if hasattr(self.trainer, "train_sampler"):
            self.trainer.train_sampler.set_epoch(int(state.epoch or 0))

    def on_optimizer_step(self, args, state, control, **kwargs):
        if not self.trainer.accelerator.optimizer_step_was_skipped:
            self.trainer.after_optimizer_step()
