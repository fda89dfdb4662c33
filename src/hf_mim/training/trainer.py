"""A Trainer for every ForPreTraining model of hf_mim."""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn
from transformers import TrainerCallback

from ..data.pretraining import pretraining_collator
from .base_trainer import ViTTrainer
from .collapse import MAX_PICTURES, CollapseWatch


class MIMTrainer(ViTTrainer):
    """
    The trainer of masked image modelling. It knows a method only through what its outputs and its model
    offer: every output named `loss_*` is logged under its name, `model.after_optimizer_step` is called after each
    optimiser step (averaged targets), and `model.watched_features` are watched for collapse when logging.

    Data sets yield `pixel_values` and `noise`, which are functions of (seed, epoch, sample index): the sampler sends
    the epoch along with the index, so that neither workers, processes nor resuming change what a sample looks like.

    Args:
        As `Trainer`; `args` is a [`MIMTrainingArguments`], `train_dataset` a `PretrainingDataset` or a
        `StreamingPretrainingDataset`.
        stage (`int`, *optional*): Of a run of several; logged as `stage`.
        optimizer_state (path, *optional*): A saved optimiser whose state, but not whose learning rate, training
            starts with.

    Raises:
        ValueError: If the training data set has fewer pictures than one step needs; under FSDP version 1, or under
            FSDP with `keep_optimizer_state`; or if `contrastive_chunk_size` is given for a model whose loss compares
            no pictures.
        NonFiniteLossError: In training, when a loss is not finite; checked when logging, before saving and at the end.
    """

    def __init__(self, *args, stage: int | None = None, optimizer_state: str | Path | None = None, **kwargs):
        kwargs.setdefault("data_collator", pretraining_collator)
        super().__init__(*args, **kwargs)
        self.stage, self.optimizer_state = stage, optimizer_state
        # Called with the encoder at each evaluation; gives metrics by name.
        self.feature_evaluation: Callable[[nn.Module], dict[str, float]] | None = None
        self.collapse_watch = CollapseWatch()
        self.add_callback(_BeginWatch(self.collapse_watch))
        if self.args.contrastive_chunk_size is not None:
            if not self.model.pairwise_loss:
                raise ValueError(
                    f"contrastive_chunk_size is {self.args.contrastive_chunk_size}, and the loss of "
                    f"{type(self.model).__name__} compares no pictures with each other: leave it out. For less memory "
                    "take smaller batches with --gradient_accumulation_steps, which give the same step."
                )
            self.model.chunk_size = self.args.contrastive_chunk_size
        if self.is_fsdp_enabled and self.args.keep_optimizer_state:
            raise ValueError("--keep_optimizer_state does not work with FSDP, which shards the optimiser's state.")

    def _get_dataloader(self, dataset, description, batch_size, *args, is_training=False, **kwargs):
        if not is_training and self.model.pairwise_loss:
            batch_size = self.args.contrastive_eval_batch_size
        return super()._get_dataloader(dataset, description, batch_size, *args, is_training=is_training, **kwargs)

    def number_counted(self, batch_size: int) -> int:
        counted = super().number_counted(batch_size)
        # A smaller batch has fewer pictures to tell one from, which makes another loss of it; so it only counts alone.
        whole = self.args.contrastive_eval_batch_size
        is_left_over = self.model.pairwise_loss and counted < whole <= len(
            self.callback_handler.eval_dataloader.dataset
        )
        return 0 if is_left_over else counted

    def create_optimizer(self, *args, **kwargs) -> torch.optim.Optimizer:
        created = self.optimizer is None
        optimizer = super().create_optimizer(*args, **kwargs)
        if created and self.optimizer_state is not None:
            state = torch.load(self.optimizer_state, map_location="cpu", weights_only=True)["state"]
            optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
        return optimizer

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        if model.training:
            self._watch_features(outputs)
        return (loss, outputs) if return_outputs else loss

    def _watch_features(self, outputs) -> None:
        step, watch = self.state.global_step + 1, self.collapse_watch
        due = step % self.state.logging_steps == 0 or watch.start is None
        features = self.model.watched_features(outputs) if due and self.accelerator.sync_gradients else None
        if features is not None:
            # On all processes, which then agree on when the next time is.
            features = self.accelerator.gather(features.detach()[:MAX_PICTURES].contiguous())
            watch.measure(features, step, say=self.is_world_process_zero())

    def after_optimizer_step(self) -> None:
        model = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        model.after_optimizer_step(self.state.global_step, self.state.max_steps)

    def evaluation_loop(self, *args, metric_key_prefix="eval", **kwargs):
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        if self.feature_evaluation is not None:
            model = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
            for name, value in self.feature_evaluation(model.encoder).items():
                output.metrics[f"{metric_key_prefix}_{name}"] = value
        return output

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            logs.update(self.collapse_watch.last)
        if self.stage is not None:
            logs["stage"] = self.stage
        super().log(logs, start_time)


class _BeginWatch(TrainerCallback):
    """Starts the watch anew with each training."""

    def __init__(self, watch: CollapseWatch):
        self.watch = watch

    def on_train_begin(self, args, state, control, **kwargs):
        self.watch.begin(state.log_history)
