"""The Trainer that fine-tunes classifiers, ours and transformers' own."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import EvalPrediction

from ..evaluation.multi_label import f1_score, mean_average_precision
from .base_trainer import ViTTrainer
from .layer_decay import layer_decay_groups

_AVERAGE = "average.safetensors"


class FineTuningTrainer(ViTTrainer):
    """
    [`ViTTrainer`] (exact resuming, losses that are not finite, matrices decayed) for classifiers: cross-entropy with
    soft labels for whatever model has logits, learning rates that fall with depth, accuracy, and averaged weights.
    With `config.problem_type` "multi_label_classification": binary cross-entropy, mean average precision and F1.

    Args:
        As `Trainer`; `args` is a [`FineTuningArguments`], data sets are `LabelledDataset`s.
    """

    def __init__(self, model: nn.Module, *args, **kwargs):
        self.is_multi_label = getattr(model.config, "problem_type", None) == "multi_label_classification"
        super().__init__(
            model,
            *args,
            compute_metrics=_precision_and_f1 if self.is_multi_label else _accuracy,
            preprocess_logits_for_metrics=None if self.is_multi_label else _likeliest,
            **kwargs,
        )
        # The loss is a mean over the batch, whatever arguments the model's forward takes; without this the Trainer
        # would not divide it by the accumulation.
        self.model_accepts_loss_kwargs = False
        # The collator smooths, with the mixing.
        self.label_smoother = None
        self.classes: torch.Tensor | None = None
        self.average: dict[str, torch.Tensor] = {}

    def forward_loss(self, model, inputs, num_items_in_batch):
        # Not the model's own loss: transformers' takes soft labels for those of a multi-label problem, with a loss for
        # that, and writes it into the config.
        outputs = model(pixel_values=inputs["pixel_values"])
        loss = nn.functional.binary_cross_entropy_with_logits if self.is_multi_label else nn.functional.cross_entropy
        return loss(outputs.logits.float(), inputs["labels"]), outputs

    def create_optimizer(self, model=None):
        if self.optimizer is None:
            model = self.model if model is None else model
            optimizer_class, kwargs = self.get_optimizer_cls_and_kwargs(self.args, model)
            groups = layer_decay_groups(
                model,
                num_layers=model.config.num_hidden_layers,
                learning_rate=self.args.learning_rate,
                layer_decay=self.args.layer_decay,
                weight_decay=self.args.weight_decay,
                decayed=set(self.get_decay_parameter_names(model)),
            )
            self.optimizer = optimizer_class(groups, **kwargs)
        return self.optimizer

    # Accuracy

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            logits = model(pixel_values=inputs["pixel_values"]).logits.float()
        labels = inputs["labels"]
        counted = self.number_counted(len(labels))
        loss = nn.functional.cross_entropy(logits[: max(counted, 1)], labels[: max(counted, 1)])
        self.eval_losses.add({"loss": loss}, weight=counted)
        if self.classes is not None:
            others = torch.ones(logits.shape[1], dtype=torch.bool, device=logits.device)
            others[self.classes] = False
            logits = logits.masked_fill(others, -torch.inf)
        return loss, logits, labels

    def evaluate(self, eval_dataset=None, *args, classes: list[int] | None = None, **kwargs) -> dict[str, float]:
        """
        As `Trainer.evaluate`, with the averaged weights where there are any.

        Args:
            classes (`list[int]`, *optional*): The only ones among which a picture's class is looked for; all if None.
        """
        self.classes = None if classes is None else torch.tensor(classes, device=self.args.device)
        try:
            with self.averaged_weights():
                return super().evaluate(eval_dataset, *args, **kwargs)
        finally:
            self.classes = None

    # Averaged weights

    def train(self, resume_from_checkpoint=None, *args, **kwargs):
        if self.args.ema_decay is not None:
            self.average = {n: p.detach().clone() for n, p in self.model.named_parameters() if p.requires_grad}
            if resume_from_checkpoint:
                self.average = load_file(Path(resume_from_checkpoint) / _AVERAGE)
            self.average = {name: value.to(self.args.device) for name, value in self.average.items()}
        return super().train(resume_from_checkpoint, *args, **kwargs)

    @torch.no_grad()
    def after_optimizer_step(self) -> None:
        if self.average:
            weights = dict(self.model.named_parameters())
            trained = [weights[name] for name in self.average]
            torch._foreach_lerp_(list(self.average.values()), trained, 1.0 - self.args.ema_decay)

    @contextlib.contextmanager
    def averaged_weights(self) -> Iterator[None]:
        """Within, the model has the averaged weights; nothing happens where none are kept."""
        weights = dict(self.model.named_parameters())
        kept = {name: weights[name].detach().clone() for name in self.average}
        self._set_weights(self.average)
        try:
            yield
        finally:
            self._set_weights(kept)

    @torch.no_grad()
    def _set_weights(self, values: dict[str, torch.Tensor]) -> None:
        weights = dict(self.model.named_parameters())
        for name, value in values.items():
            weights[name].copy_(value)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        # A checkpoint has the weights that training goes on from, and the average beside them.
        if output_dir in (None, self.args.output_dir):
            with self.averaged_weights():
                super().save_model(output_dir, _internal_call)
            return
        super().save_model(output_dir, _internal_call)
        if self.average and self.args.should_save:
            save_file({name: value.contiguous() for name, value in self.average.items()}, Path(output_dir) / _AVERAGE)


def _likeliest(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """What is kept of the predictions: a few classes a picture."""
    return logits.topk(min(5, logits.shape[1])).indices


def _precision_and_f1(prediction: EvalPrediction) -> dict[str, float]:
    """Mean average precision over the labels, and F1 of those that are rather true than not, in percent."""
    logits, targets = torch.as_tensor(prediction.predictions), torch.as_tensor(prediction.label_ids)
    return {
        "mean_average_precision": mean_average_precision(logits, targets),
        "f1": f1_score(logits > 0, targets),
    }


def _accuracy(prediction: EvalPrediction) -> dict[str, float]:
    """Percent of pictures whose class is the likeliest, and among the five likeliest."""
    ranked, labels = np.asarray(prediction.predictions), np.asarray(prediction.label_ids)
    right = ranked == labels[:, None]
    accuracies = {"accuracy": 100.0 * right[:, 0].mean().item()}
    if right.shape[1] == 5:
        accuracies["top5_accuracy"] = 100.0 * right.any(axis=1).mean().item()
    return accuracies
