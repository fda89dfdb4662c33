"""PiLaMIM: one encoder, a pixel decoder, and a latent decoder that predicts an averaged copy of the encoder."""

from dataclasses import dataclass

import torch
from transformers.utils import ModelOutput
from transformers.utils.generic import can_return_tuple

from ..vit.decoder import MaskedViTDecoder
from ..vit.embeddings import patchify
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
from ..vit.sizes import as_pair
from ..vit.teachers import AveragedTeacherMixin
from .configuration_pilamim import PiLaMIMConfig


@dataclass
class PiLaMIMForPreTrainingOutput(ModelOutput):
    """
    Args:
        loss (`torch.FloatTensor` of shape `()`): `loss_pixel + loss_latent + loss_cls`, what is minimised.
        loss_pixel (`torch.FloatTensor` of shape `()`): Mean squared error of the pixels of hidden patches.
        loss_latent (`torch.FloatTensor` of shape `()`): Mean squared error of the latents of hidden patches.
        loss_cls (`torch.FloatTensor` of shape `()`, *optional*): Mean squared error of the latent [CLS].
        predicted_pixels (`torch.FloatTensor` of shape `(batch_size, num_patches, patch_height * patch_width *
            num_channels)`): In the order (row, column, channel), normalised as the input.
        predicted_latents (`torch.FloatTensor` of shape `(batch_size, 1 + num_patches, hidden_size)`): [CLS] first.
        target_latents (`torch.FloatTensor` of shape `(batch_size, 1 + num_patches, hidden_size)`): [CLS] first.
        mask (`torch.FloatTensor` of shape `(batch_size, num_patches)`): 1 where hidden from the encoder.
        ids_restore (`torch.LongTensor` of shape `(batch_size, num_patches)`): Place of patch i in shuffled order.
        hidden_states, attentions: Of the encoder, when asked for.
    """

    loss: torch.FloatTensor | None = None
    loss_pixel: torch.FloatTensor | None = None
    loss_latent: torch.FloatTensor | None = None
    loss_cls: torch.FloatTensor | None = None
    predicted_pixels: torch.FloatTensor | None = None
    predicted_latents: torch.FloatTensor | None = None
    target_latents: torch.FloatTensor | None = None
    mask: torch.FloatTensor | None = None
    ids_restore: torch.LongTensor | None = None
    hidden_states: tuple[torch.FloatTensor, ...] | None = None
    attentions: tuple[torch.FloatTensor, ...] | None = None


class PiLaMIMModel(MaskedViTModel):
    """The encoder that PiLaMIM pretrains."""

    config: PiLaMIMConfig
    # What a checkpoint may hold besides; not worth a warning when only the encoder is loaded.
    _keys_to_ignore_on_load_unexpected = [
        r"^target_encoder\.",
        r"^(pixel|latent)_decoder\.",
        *HEADS,
    ]


class PiLaMIMForPreTraining(AveragedTeacherMixin, MaskedViTForPreTraining):
    """Encoder, averaged target encoder and both decoders (section 2 of the paper)."""

    config: PiLaMIMConfig

    def __init__(self, config: PiLaMIMConfig):
        super().__init__(config)
        patch_height, patch_width = as_pair(config.patch_size)
        self.encoder = PiLaMIMModel(config)
        # Not of 16 bits, whatever the rest is built in.
        self.target_encoder = PiLaMIMModel(config).to(torch.promote_types(self.encoder.dtype, torch.float32))
        self.pixel_decoder = MaskedViTDecoder(config, patch_height * patch_width * config.num_channels)
        self.latent_decoder = MaskedViTDecoder(config, config.hidden_size)
        self.post_init()
        self.freeze()
        # The paper starts both encoders equal; the release starts the target at random.
        self.copy_encoder_to_target()

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor,
        noise: torch.Tensor | None = None,
        return_loss: bool = True,
        **kwargs,
    ) -> PiLaMIMForPreTrainingOutput:
        """
        Args:
            pixel_values (`torch.Tensor` of shape `(batch_size, num_channels, height, width)`): Normalised pictures.
            noise (`torch.Tensor` of shape `(batch_size, num_patches)`, *optional*): Uniform in [0, 1); the patches
                with the smallest are kept. Drawn if None.
            return_loss (`bool`, defaults to True): Whether the output has `loss`. (By this argument the Trainer knows
                that there is a loss without labels.)

        Raises:
            ValueError: If the shapes are not those of the config.
            TypeError: If there is no such argument.
        """
        refuse_unknown(self, kwargs)
        masking = self.masking(pixel_values, noise)
        context = self.encoder(pixel_values, ids_keep=masking.ids_keep, return_dict=True, **kwargs)
        with torch.no_grad():
            target = self.target_encoder(pixel_values, return_dict=True).last_hidden_state.float()
        seen, target = (without_registers(tokens, self.config) for tokens in (context.last_hidden_state, target))
        pixels = self.pixel_decoder(seen, masking.ids_restore)[:, 1:].float()
        latents = self.latent_decoder(seen, masking.ids_restore).float()

        loss_pixel = self.masked_mean_square(pixels - self.pixel_targets(pixel_values), masking.mask)
        loss_latent = self.masked_mean_square(latents[:, 1:] - target[:, 1:], masking.mask)
        loss_cls = (latents[:, 0] - target[:, 0]).square().mean() if self.config.use_cls_loss else None
        loss = loss_pixel + loss_latent if loss_cls is None else loss_pixel + loss_latent + loss_cls
        return PiLaMIMForPreTrainingOutput(
            loss=loss if return_loss else None,
            loss_pixel=loss_pixel,
            loss_latent=loss_latent,
            loss_cls=loss_cls,
            predicted_pixels=pixels,
            predicted_latents=latents,
            target_latents=target,
            mask=masking.mask,
            ids_restore=masking.ids_restore,
            hidden_states=context.hidden_states,
            attentions=context.attentions,
        )

    def pixel_targets(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Float32 pixels (batch_size, num_patches, patch_height * patch_width * num_channels), channels last."""
        patches = patchify(pixel_values.float(), as_pair(self.config.patch_size))
        return patches.permute(0, 1, 2, 4, 5, 3).flatten(3).flatten(1, 2)

    @staticmethod
    def masked_mean_square(difference: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Mean of the squares (batch_size, num_patches, dim) over the hidden patches and all channels."""
        return (difference.square().mean(dim=-1) * mask).sum() / mask.sum()

    @torch.no_grad()
    def reconstruct(
        self, pixel_values: torch.Tensor, noise: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        outputs = self(pixel_values, noise=noise)
        rows, columns = self.config.grid_size
        patch_height, patch_width = as_pair(self.config.patch_size)
        pixels = outputs.predicted_pixels.unflatten(2, (patch_height, patch_width, -1)).unflatten(1, (rows, columns))
        pixels = pixels.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)
        mask = outputs.mask.unflatten(1, (1, rows, columns))
        return mask.repeat_interleave(patch_height, 2).repeat_interleave(patch_width, 3), pixels


PiLaMIMForImageClassification = with_encoder(MaskedViTForImageClassification, PiLaMIMModel)
PiLaMIMForDepthEstimation = with_encoder(MaskedViTForDepthEstimation, PiLaMIMModel)
PiLaMIMForObjectDetection = with_encoder(MaskedViTForObjectDetection, PiLaMIMModel)
PiLaMIMForSemanticSegmentation = with_encoder(MaskedViTForSemanticSegmentation, PiLaMIMModel)
PiLaMIMBackbone = with_encoder(MaskedViTBackbone, PiLaMIMModel)

__all__ = [
    "PiLaMIMBackbone",
    "PiLaMIMForDepthEstimation",
    "PiLaMIMForImageClassification",
    "PiLaMIMForPreTraining",
    "PiLaMIMForObjectDetection",
    "PiLaMIMForSemanticSegmentation",
    "PiLaMIMModel",
]
