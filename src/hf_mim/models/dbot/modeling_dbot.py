"""dBOT: a masked student predicts the features that a frozen teacher has of the whole picture."""

from dataclasses import dataclass

import torch
from torch import nn
from transformers.utils import ModelOutput
from transformers.utils.generic import can_return_tuple

from ..vit.decoder import MaskedViTDecoder
from ..vit.frozen import build_frozen
from ..vit.frozen_sources import read_source
from ..vit.modeling_vit import (
    HEADS,
    MaskedViTBackbone,
    MaskedViTForDepthEstimation,
    MaskedViTForImageClassification,
    MaskedViTForObjectDetection,
    MaskedViTForSemanticSegmentation,
    MaskedViTModel,
    refuse_unknown,
    with_encoder,
    without_registers,
)
from ..vit.pretraining import MaskedViTForPreTraining
from ..vit.teachers import FrozenTeacherMixin
from .configuration_dbot import DBOTConfig

_TARGET_EPS = 1e-6


@dataclass
class DBOTForPreTrainingOutput(ModelOutput):
    """
    Args:
        loss (`torch.FloatTensor` of shape `()`): What is minimised: `loss_distillation`.
        loss_distillation (`torch.FloatTensor` of shape `()`): Smooth L1 of the hidden patches and [CLS].
        predictions (`torch.FloatTensor` of shape `(batch_size, 1 + num_patches, teacher's width)`): [CLS] first.
        targets (`torch.FloatTensor` of shape `(batch_size, 1 + num_patches, teacher's width)`): The teacher's
            features, each token normalised; [CLS] first.
        mask (`torch.FloatTensor` of shape `(batch_size, num_patches)`): 1 where hidden from the encoder.
        ids_restore (`torch.LongTensor` of shape `(batch_size, num_patches)`): Place of patch i in shuffled order.
        hidden_states, attentions: Of the encoder, when asked for.
    """

    loss: torch.FloatTensor | None = None
    loss_distillation: torch.FloatTensor | None = None
    predictions: torch.FloatTensor | None = None
    targets: torch.FloatTensor | None = None
    mask: torch.FloatTensor | None = None
    ids_restore: torch.LongTensor | None = None
    hidden_states: tuple[torch.FloatTensor, ...] | None = None
    attentions: tuple[torch.FloatTensor, ...] | None = None


class DBOTModel(MaskedViTModel):
    """The encoder that dBOT pretrains: the student."""

    config: DBOTConfig
    # What a checkpoint may hold besides; not worth a warning when only the encoder is loaded.
    _keys_to_ignore_on_load_unexpected = [r"^teacher\.", r"^decoder\.", *HEADS]


class DBOTForPreTraining(FrozenTeacherMixin, MaskedViTForPreTraining):
    """Student, decoder and frozen teacher (section 3 of the paper)."""

    config: DBOTConfig
    teacher_name = "teacher"

    def __init__(self, config: DBOTConfig):
        super().__init__(config)
        self.encoder = DBOTModel(config)
        self.teacher = build_frozen(config, "teacher")
        self.decoder = MaskedViTDecoder(config, self.teacher.hidden_size, config.drop_path_rate)
        self.post_init()
        self.freeze()

    @torch.no_grad()
    def next_stage(self) -> "DBOTForPreTraining":
        """
        An untrained student whose teacher is this one, for the next stage of training in several. It depends on the
        random state, and on nothing of this model but its config and its encoder.
        """
        attention = self.config._attn_implementation
        model = type(self)._from_config(self.config.for_next_stage(), attn_implementation=attention)
        model.take_source(read_source(self.encoder))
        return model

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor,
        noise: torch.Tensor | None = None,
        return_loss: bool = True,
        targets: dict[str, torch.Tensor] | None = None,
        **kwargs,
    ) -> DBOTForPreTrainingOutput:
        """
        Args:
            pixel_values (`torch.Tensor` of shape `(batch_size, num_channels, height, width)`): Normalised pictures.
            noise (`torch.Tensor` of shape `(batch_size, num_patches)`, *optional*): Uniform in [0, 1); the patches
                with the smallest are kept. Drawn if None.
            return_loss (`bool`, defaults to True): Whether the output has `loss`. (By this argument the Trainer knows
                that there is a loss without labels.)
            targets (`dict[str, torch.Tensor]`, *optional*): What [`~DBOTForPreTraining.frozen_targets`] gives of these
                pictures; computed if None.

        Raises:
            ValueError: If the shapes are not those of the config.
            TypeError: If there is no such argument.
        """
        refuse_unknown(self, kwargs)
        masking = self.masking(pixel_values, noise)
        student = self.encoder(pixel_values, ids_keep=masking.ids_keep, return_dict=True, **kwargs)
        seen = without_registers(student.last_hidden_state, self.config)
        predictions = self.decoder(seen, masking.ids_restore).float()
        targets = (self.frozen_targets(pixel_values) if targets is None else targets)["features"].float()
        loss = self.masked_smooth_l1(predictions, targets, masking.mask)
        return DBOTForPreTrainingOutput(
            loss=loss if return_loss else None,
            loss_distillation=loss,
            predictions=predictions,
            targets=targets,
            mask=masking.mask,
            ids_restore=masking.ids_restore,
            hidden_states=student.hidden_states,
            attentions=student.attentions,
        )

    def frozen_targets(self, pixel_values: torch.Tensor) -> dict[str, torch.Tensor]:
        """What the teacher has of pictures, whatever is hidden from the student: [`teacher_targets`] as `features`."""
        return {"features": self.teacher_targets(pixel_values)}

    @torch.no_grad()
    def teacher_targets(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """The teacher's last block's output before its final norm, each token with mean 0 and unbiased variance 1."""
        (features,) = self.teacher(pixel_values).last_hidden_states
        variance, mean = torch.var_mean(features.float(), dim=-1, keepdim=True)
        return (features - mean) / (variance + _TARGET_EPS).sqrt()

    def masked_smooth_l1(self, predictions: torch.Tensor, targets: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Mean over the channels, then over the hidden patches and [CLS], which counts as one of them."""
        loss = nn.functional.smooth_l1_loss(predictions, targets, reduction="none", beta=self.config.smooth_l1_beta)
        loss = loss.mean(dim=-1)
        return (loss[:, 0].sum() + (loss[:, 1:] * mask).sum()) / (len(mask) + mask.sum())


DBOTForImageClassification = with_encoder(MaskedViTForImageClassification, DBOTModel)
DBOTForDepthEstimation = with_encoder(MaskedViTForDepthEstimation, DBOTModel)
DBOTForObjectDetection = with_encoder(MaskedViTForObjectDetection, DBOTModel)
DBOTForSemanticSegmentation = with_encoder(MaskedViTForSemanticSegmentation, DBOTModel)
DBOTBackbone = with_encoder(MaskedViTBackbone, DBOTModel)

__all__ = [
    "DBOTBackbone",
    "DBOTForDepthEstimation",
    "DBOTForImageClassification",
    "DBOTForPreTraining",
    "DBOTForObjectDetection",
    "DBOTForSemanticSegmentation",
    "DBOTModel",
]
