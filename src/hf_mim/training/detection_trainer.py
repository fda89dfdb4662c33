"""The Trainer of detectors."""

import torch

from ..evaluation.detection import DetectionScores
from .finetuning_trainer import FineTuningTrainer


class DetectionTrainer(FineTuningTrainer):
    """
    [`FineTuningTrainer`] (learning rates that fall with depth, averaged weights, exact resuming) for detectors. It is
    evaluated on whole pictures, one at a time, at their own size.

    Args:
        As `Trainer`; `args` is a [`DetectionArguments`], data sets are `DetectionDataset`s, and `processing_class` the
        image processor.
    """

    def forward_loss(self, model, inputs, num_items_in_batch):
        outputs = model(**inputs)
        return outputs.loss, outputs

    @torch.no_grad()
    def find_objects(self, item: dict, threshold: float = 0.0) -> dict[str, torch.Tensor]:
        """What is found in an item of the evaluation data, as the image processor says it, in the picture's pixels."""
        features = {name: value.to(self.args.device) for name, value in item["features"].items()}
        with self.accelerator.autocast():
            outputs = self.model(**features)
        with_masks = self.model.config.detection_masks
        name = "post_process_object_masks" if with_masks else "post_process_object_detection"
        (found,) = getattr(self.processing_class, name)(outputs, threshold, [item["size"]])
        return found

    @torch.no_grad()
    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix: str = "eval") -> dict[str, float]:
        """
        COCO's mean average precision of boxes, and of masks where there are any, in percent; `scores` then has them
        by class too.

        Each process takes every so many-th picture; what they find is put together, so that any number of them gives
        the same.
        """
        data = self.eval_dataset if eval_dataset is None else eval_dataset
        model, accelerator, config = self.model, self.accelerator, self.model.config
        scores = DetectionScores(config.detection_masks)
        was_training = model.training
        model.to(self.args.device).eval()
        with self.speed.not_training(), self.averaged_weights():
            for index in range(accelerator.process_index, len(data), accelerator.num_processes):
                item = data[0, index]
                scores.add(index, self.find_objects(item), item["objects"])
        model.train(was_training)
        self.scores = scores.compute([config.id2label[number] for number in range(config.num_labels)])
        metrics = {
            f"{metric_key_prefix}_{name}": value for name, value in self.scores.items() if isinstance(value, float)
        }
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics
