"""A Trainer for every ForPreTraining model of hf_mim."""

import copy
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn
from transformers import TrainerCallback

from ..data.pretraining import EpochSampler, RawCollator, pretraining_collator
from ..data.transforms import PretrainingTransform
from .arguments import MIMTrainingArguments
from .base_trainer import ViTTrainer
from .callbacks import MIMCallback
from .collapse import MAX_PICTURES, CollapseWatch
from .datasets import prepare_evaluation, prepare_images
from .nonfinite import NonFiniteKeeper


class MIMTrainer(ViTTrainer):
    """
    The trainer of masked image modelling. It knows a method only through what its outputs and its model
    offer: every output named `loss_*` is logged under its name, `model.after_optimizer_step` is called after each
    optimiser step (`MIMCallback`), and `model.watched_features` are watched for collapse when logging.

    Crops, flips and masks are functions of (seed, epoch, sample index): the sampler sends the epoch along with the
    index, so that neither workers, processes nor resuming change what a sample looks like.

    Args:
        As `Trainer`; `args` is a [`MIMTrainingArguments`].
        train_dataset: A folder, a list of paths, PIL images, arrays or tensors, an array (N, height, width, channels),
            a `datasets.Dataset` or `IterableDataset` (which needs `max_steps`), or any map-style data set of images,
            (image, label) pairs or dicts that hold an image: cropped, flipped and normalised as the papers do. Items
            with `pixel_values` are left as they are. A `PretrainingDataset` has a transform of its own.
        eval_dataset: The same, or a dict of several, as the image processor gives the images.
        processing_class: The image processor, which is saved with the model. None: one that fits the model and the
            images (mean and standard deviation are ImageNet's for 3 channels, computed for any other number).
        image_column (`str`, *optional*): Where an item has its image, if that cannot be told.
        stage (`int`, *optional*): Of a run of several; logged as `stage`.
        optimizer_state (path, *optional*): A saved optimiser whose state, but not whose learning rate, training
            starts with.

    Raises:
        ValueError: If the training data set has fewer pictures than one step needs; under FSDP version 1, or under
            FSDP with `keep_optimizer_state`; or if `contrastive_chunk_size` is given for a model whose loss compares
            no pictures.
        NonFiniteLossError: In training, when a loss is not finite; checked when logging, before saving and at the end.
    """

    def __init__(
        self,
        model: nn.Module,
        args: MIMTrainingArguments,
        data_collator=None,
        train_dataset=None,
        eval_dataset=None,
        processing_class=None,
        *,
        image_column: str | None = None,
        stage: int | None = None,
        optimizer_state: str | Path | None = None,
        callbacks: list | None = None,
        **kwargs,
    ):
        train_dataset, processing_class = prepare_images(
            train_dataset, model.config, args, processing_class, train=True, image_column=image_column
        )
        eval_dataset, processing_class = prepare_evaluation(
            eval_dataset, model.config, args, processing_class, image_column
        )
        if processing_class is not None and hasattr(model, "set_image_normalization"):
            model.set_image_normalization(processing_class.image_mean, processing_class.image_std)
        # Of its own: a target is not to be moved twice.
        callbacks = [callback for callback in callbacks or () if not _is_ours(callback)]
        super().__init__(
            model,
            args,
            data_collator=pretraining_collator if data_collator is None else data_collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            callbacks=[MIMCallback(), *callbacks],
            **kwargs,
        )
        self.stage, self.optimizer_state = stage, optimizer_state
        # A GPU normalises while the host has other things to do, and is sent a quarter; on a CPU it would be slower.
        self.normalises_on_device = self.args.device.type != "cpu" and data_collator is None
        self.device_transform: PretrainingTransform | None = None
        # Called with the encoder at each evaluation; gives metrics by name.
        self.feature_evaluation: Callable[[nn.Module], dict[str, float]] | None = None
        # Called after it with the model, the step and the number of steps; see `Appraisal`.
        self.appraisal: Callable[[nn.Module, int, int], dict[str, float]] | None = None
        self.collapse_watch = CollapseWatch(warns=self.is_world_process_zero())
        self.nonfinite = NonFiniteKeeper(self)
        self.add_callback(_BeginWatch(self.collapse_watch, self.nonfinite))
        self.is_pairwise = getattr(model, "pairwise_loss", False)
        if self.args.contrastive_chunk_size is not None:
            if not self.is_pairwise:
                raise ValueError(
                    f"contrastive_chunk_size is {self.args.contrastive_chunk_size}, and the loss of "
                    f"{type(self.model).__name__} compares no pictures with each other: leave it out. For less memory "
                    "take smaller batches with --gradient_accumulation_steps, which give the same step."
                )
            self.model.chunk_size = self.args.contrastive_chunk_size
        if self.is_fsdp_enabled and self.args.keep_optimizer_state:
            raise ValueError("--keep_optimizer_state does not work with FSDP, which shards the optimiser's state.")

    def _get_dataloader(self, dataset, description, batch_size, *args, is_training=False, **kwargs):
        if not is_training and self.is_pairwise:
            batch_size = self.args.contrastive_eval_batch_size
        transform, collator = getattr(dataset, "transform", None), self.data_collator
        if is_training and self.normalises_on_device and isinstance(transform, PretrainingTransform):
            dataset = copy.copy(dataset)
            dataset.transform, self.data_collator = transform.raw(), RawCollator(transform)
            # Its numbers will be on the device, and workers want them where they are.
            self.device_transform = transform.raw()
        try:
            return super()._get_dataloader(dataset, description, batch_size, *args, is_training=is_training, **kwargs)
        finally:
            self.data_collator = collator

    def _get_eval_sampler(self, eval_dataset) -> EpochSampler:
        return EpochSampler(self._num_compared(eval_dataset), shuffle=False)

    def number_counted(self, batch_size: int) -> int:
        if not self.is_pairwise or not self.accelerator.gradient_state.end_of_dataloader:
            return super().number_counted(batch_size)
        whole = self.args.contrastive_eval_batch_size
        of_last_round = self._num_compared(self.callback_handler.eval_dataloader.dataset) % (
            whole * self.args.world_size
        )
        if of_last_round == 0:
            return batch_size
        return min(max(of_last_round - self.accelerator.process_index * whole, 0), batch_size)

    def _num_compared(self, eval_dataset) -> int:
        # A smaller batch has fewer pictures to tell one from, which makes another loss of it; so it only counts alone.
        number, whole = len(eval_dataset), self.args.contrastive_eval_batch_size
        return number // whole * whole if self.is_pairwise and number >= whole else number

    def evaluate(self, eval_dataset=None, *args, **kwargs) -> dict[str, float]:
        """As `Trainer.evaluate`; `eval_dataset` may be all that the constructor takes."""
        if eval_dataset is not None and not isinstance(eval_dataset, str):
            eval_dataset, _ = prepare_evaluation(eval_dataset, self.model.config, self.args, self.processing_class)
        return super().evaluate(eval_dataset, *args, **kwargs)

    def train(self, resume_from_checkpoint=None, *args, **kwargs):
        """
        As [`ViTTrainer.train`].

        Raises:
            ValueError: If the arguments ask for what a trainer alone does not do: several stages, or evaluations of
                features without `feature_evaluation`.
        """
        if self.args.num_stages > 1 and self.stage is None:
            raise ValueError(
                f"num_stages is {self.args.num_stages}, and a trainer trains one stage. Let "
                "hf_mim.jobs.pretraining.pretrain (examples/run_mim.py) train them all, or give each stage a trainer "
                "of its own, with the model.next_stage() of the one before."
            )
        if (self.args.eval_knn or self.args.online_probe) and self.feature_evaluation is None:
            raise ValueError(
                "eval_knn and online_probe need whole pictures with labels, where the trainer's data sets have crops. "
                "Set trainer.feature_evaluation = hf_mim.evaluation.online.OnlineEvaluation(pictures, processor, "
                "knn=True, linear=True), or leave them out."
            )
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def create_optimizer(self, *args, **kwargs) -> torch.optim.Optimizer:
        created = self.optimizer is None
        optimizer = super().create_optimizer(*args, **kwargs)
        if created and self.optimizer_state is not None:
            state = torch.load(self.optimizer_state, map_location="cpu", weights_only=True)["state"]
            optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
        return optimizer

    def forward_loss(self, model, inputs, num_items_in_batch):
        states = self.nonfinite.before() if model.training else None
        loss, outputs = super().forward_loss(model, inputs, num_items_in_batch)
        self.nonfinite.after(inputs, outputs, loss, states)
        return loss, outputs

    def keep_step(self, step: int) -> str:
        return self.nonfinite.keep(step)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if inputs["pixel_values"].dtype == torch.uint8 and self.device_transform is not None:
            inputs = inputs | {"pixel_values": self.device_transform.normalise(inputs["pixel_values"])}
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        if model.training:
            self._watch_features(outputs)
        return (loss, outputs) if return_outputs else loss

    def _watch_features(self, outputs) -> None:
        step, watch = self.state.global_step + 1, self.collapse_watch
        due = step % self.state.logging_steps == 0 or watch.start is None
        if due and self.accelerator.sync_gradients and hasattr(self.model, "watched_features"):
            # On all processes, which then agree on when the next time is.
            features = self.model.watched_features(outputs).detach()[:MAX_PICTURES]
            features = self.accelerator.gather(features.contiguous())
            watch.measure(features, step)

    def evaluation_loop(self, *args, metric_key_prefix="eval", **kwargs):
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        if self.feature_evaluation is not None:
            model = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
            for name, value in self.feature_evaluation(model.encoder).items():
                output.metrics[f"{metric_key_prefix}_{name}"] = value
        if self.appraisal is not None:
            model = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
            numbers = self.appraisal(model, self.state.global_step, self.state.max_steps)
            output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in numbers.items()})
        return output

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            logs.update(self.collapse_watch.last)
        if self.stage is not None:
            logs["stage"] = self.stage
        super().log(logs, start_time)


def _is_ours(callback) -> bool:
    return callback is MIMCallback or isinstance(callback, MIMCallback)


class _BeginWatch(TrainerCallback):
    """Starts what watches a training anew with each."""

    def __init__(self, watch: CollapseWatch, nonfinite: NonFiniteKeeper):
        self.watch, self.nonfinite = watch, nonfinite

    def on_train_begin(self, args, state, control, **kwargs):
        self.watch.begin(state.log_history)
        self.nonfinite.begin()
