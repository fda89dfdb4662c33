"""The Trainer of segmenters."""

import torch

from ..evaluation.segmentation import Confusion, sliding_logits
from ..models.vit.segmentation import segmentation_loss, upsample_logits
from ..models.vit.sizes import as_pair
from .finetuning_trainer import FineTuningTrainer


class SegmentationTrainer(FineTuningTrainer):
    """
    [`FineTuningTrainer`] (learning rates that fall with depth, averaged weights, exact resuming) for segmenters. It is
    evaluated on whole pictures by sliding windows, one picture's logits at a time.

    Args:
        As `Trainer`; `args` is a [`SegmentationArguments`], data sets are `SegmentationDataset`s.
    """

    def forward_loss(self, model, inputs, num_items_in_batch):
        outputs = model(**inputs)
        return outputs.loss, outputs

    @torch.no_grad()
    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix: str = "eval") -> dict[str, float]:
        """
        mIoU, mean and pixel accuracy in percent, and the mean cross-entropy, of all pixels that have a class.

        Each process takes every so many-th picture; counts are summed, so that any number of them gives the same.
        """
        data = self.eval_dataset if eval_dataset is None else eval_dataset
        model, accelerator, config = self.model, self.accelerator, self.model.config
        window, ignored = as_pair(config.image_size), config.semantic_loss_ignore_index
        confusion = Confusion(config.num_labels, device=self.args.device)
        loss = torch.zeros(2, dtype=torch.float64, device=self.args.device)
        was_training = model.training
        model.to(self.args.device).eval()
        if accelerator.num_processes > 1:
            # BatchNorm's statistics are those of the first process, as in what is saved.
            for buffer in model.buffers():
                torch.distributed.broadcast(buffer, src=0)
        with self.averaged_weights():
            for index in range(accelerator.process_index, len(data), accelerator.num_processes):
                item = {name: value.to(self.args.device) for name, value in data[0, index].items()}
                truth = item["labels"]
                with accelerator.autocast():
                    logits = sliding_logits(model, item["pixel_values"], window)
                logits = upsample_logits(logits[None], truth.shape)
                number = (truth != ignored).sum()
                loss += torch.stack([segmentation_loss(logits, truth[None], ignored) * number, number]).double()
                confusion.add(truth, logits[0].argmax(dim=0))
        model.train(was_training)
        confusion.counts = accelerator.reduce(confusion.counts, reduction="sum")
        total, number = accelerator.reduce(loss, reduction="sum").tolist()
        scores = confusion.scores() | {"loss": total / max(1.0, number)}
        self.iou = scores.pop("iou")
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in scores.items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics
