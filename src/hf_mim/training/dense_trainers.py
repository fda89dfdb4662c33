"""The Trainers of models that tell something of each pixel."""

import torch

from ..evaluation.depth import DepthErrors
from ..evaluation.segmentation import Confusion
from ..evaluation.windows import sliding_maps
from ..models.vit.depth import known_depths, scale_invariant_log_loss
from ..models.vit.segmentation import segmentation_loss
from ..models.vit.sizes import as_pair
from ..models.vit.upsampling import upsample
from .finetuning_trainer import FineTuningTrainer


class DenseTrainer(FineTuningTrainer):
    """
    [`FineTuningTrainer`] (learning rates that fall with depth, averaged weights, exact resuming) for models of pixels.
    They are evaluated on whole pictures by sliding windows, one picture's maps at a time.

    Args:
        As `Trainer`; `args` is a [`DenseArguments`], data sets are `DenseDataset`s.

    Attributes:
        scores: All that the last evaluation has found.
    """

    def forward_loss(self, model, inputs, num_items_in_batch):
        outputs = model(**inputs)
        return outputs.loss, outputs

    def new_counts(self):
        """What counts how right a model is: with `counts`, which add up over processes, `add` and `scores`."""
        raise NotImplementedError

    def maps(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """What the model tells of pictures, (batch_size, channels, rows, columns)."""
        raise NotImplementedError

    def told(self, maps: torch.Tensor) -> torch.Tensor:
        """The answer (height, width) that maps (channels, height, width) stand for."""
        raise NotImplementedError

    def picture_loss(self, maps: torch.Tensor, truth: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The loss of one picture's maps at its own size, and how much it counts in the mean."""
        raise NotImplementedError

    def predict_picture(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Maps (channels, height, width) of a picture (num_channels, height, width), by sliding windows."""
        with self.accelerator.autocast():
            return sliding_maps(self.maps, pixel_values.to(self.args.device), as_pair(self.model.config.image_size))

    @torch.no_grad()
    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix: str = "eval") -> dict[str, float]:
        """
        The scores, and the mean loss, of all pixels of which something is known.

        Each process takes every so many-th picture; counts are summed, so that any number of them gives the same.
        """
        data = self.eval_dataset if eval_dataset is None else eval_dataset
        model, accelerator = self.model, self.accelerator
        counts = self.new_counts()
        loss = torch.zeros(2, dtype=torch.float64, device=self.args.device)
        was_training = model.training
        model.to(self.args.device).eval()
        if accelerator.num_processes > 1:
            # BatchNorm's statistics are those of the first process, as in what is saved.
            for buffer in model.buffers():
                torch.distributed.broadcast(buffer, src=0)
        with self.averaged_weights():
            for index in range(accelerator.process_index, len(data), accelerator.num_processes):
                loss += self._judge(data[0, index], counts)
        model.train(was_training)
        counts.counts = accelerator.reduce(counts.counts, reduction="sum")
        total, weight = accelerator.reduce(loss, reduction="sum").tolist()
        self.scores = counts.scores() | {"loss": total / max(1.0, weight)}
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in self.scores.items() if name != "iou"}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _judge(self, item: dict[str, torch.Tensor], counts) -> torch.Tensor:
        """Counts one picture, whose maps are gone afterwards; its loss times its weight, and its weight."""
        truth = item["labels"].to(self.args.device)
        maps = upsample(self.predict_picture(item["pixel_values"])[None], truth.shape)[0]
        counts.add(truth, self.told(maps))
        value, weight = self.picture_loss(maps, truth)
        return torch.stack([value * weight, weight]).double()


class SegmentationTrainer(DenseTrainer):
    """[`DenseTrainer`] of segmenters: mIoU, mean and pixel accuracy in percent."""

    def new_counts(self) -> Confusion:
        return Confusion(self.model.config.num_labels, device=self.args.device)

    def maps(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return self.model(pixel_values).logits

    def told(self, maps: torch.Tensor) -> torch.Tensor:
        return maps.argmax(dim=0)

    def picture_loss(self, maps: torch.Tensor, truth: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        ignored = self.model.config.semantic_loss_ignore_index
        return segmentation_loss(maps[None], truth[None], ignored), (truth != ignored).sum()


class DepthTrainer(DenseTrainer):
    """[`DenseTrainer`] of estimators of depth: RMSE in the unit of the depths, relative error and delta_1."""

    def new_counts(self) -> DepthErrors:
        return DepthErrors(device=self.args.device)

    def maps(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return self.model(pixel_values).predicted_depth.unsqueeze(1)

    def told(self, maps: torch.Tensor) -> torch.Tensor:
        return maps[0]

    def picture_loss(self, maps: torch.Tensor, truth: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        invariance = self.model.config.scale_invariance
        return scale_invariant_log_loss(maps, truth[None], invariance), known_depths(truth).any()
