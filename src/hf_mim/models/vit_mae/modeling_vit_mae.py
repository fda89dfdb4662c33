"""
The baseline: transformers' own ViTMAE, pretrained as the methods are, and stock again once it is saved.

Three things are put right. The position tables hold MAE's values, where transformers 5.23 leaves zeros in both; linear
maps start as MAE's do; and the encoder masks only where it is given noise, so that features are those of the whole
picture. Names and shapes of weights are the stock ones.
"""

from dataclasses import dataclass

import torch
from torch import nn
from transformers import initialization as init
from transformers.models.vit_mae import modeling_vit_mae as stock
from transformers.utils.generic import can_return_tuple

from ..vit.alignment import AlignedLoading
from ..vit.modeling_vit import MaskedViTModel, init_linear, refuse_unknown
from ..vit.position import sincos_position_table
from ..vit.pretraining import PreTrainingMixin
from .configuration_vit_mae import ViTMAEConfig


@dataclass
class ViTMAEForPreTrainingOutput(stock.ViTMAEForPreTrainingOutput):
    """
    transformers' output, and

    Args:
        loss_pixel (`torch.FloatTensor` of shape `()`): Mean squared error of the pixels of hidden patches; the loss.
    """

    loss_pixel: torch.FloatTensor | None = None


class ViTMAEEmbeddings(stock.ViTMAEEmbeddings):
    """Patch tokens, masked by noise where there is noise, and all of them in order where there is none."""

    def random_masking(self, sequence, noise=None):
        if noise is not None:
            return super().random_masking(sequence, noise)
        batch_size, num_patches, _ = sequence.shape
        mask = torch.zeros(batch_size, num_patches, device=sequence.device)
        return sequence, mask, torch.arange(num_patches, device=sequence.device).expand(batch_size, -1)


class ViTMAEPreTrainedModel(AlignedLoading, stock.ViTMAEPreTrainedModel):
    """MAE's initialisation, and position tables that stay fixed through loading."""

    config: ViTMAEConfig

    @classmethod
    def is_custom_code(cls) -> bool:
        """False, so that weights are renamed on the way to and from disk as the stock classes' are."""
        return False

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            init_linear(module)
        elif isinstance(module, stock.ViTMAEAttention):
            # One map of all three in MAE's release.
            for projection in (module.q_proj, module.k_proj, module.v_proj):
                init_linear(projection, fused_maps=3)
        elif isinstance(module, nn.LayerNorm):
            super()._init_weights(module)
        elif isinstance(module, stock.ViTMAEEmbeddings):
            init.normal_(module.cls_token, std=self.config.initializer_range)
            self._init_positions(module.position_embeddings)
        elif isinstance(module, stock.ViTMAEDecoder):
            init.normal_(module.mask_token, std=self.config.initializer_range)
            self._init_positions(module.decoder_pos_embed)

    def _init_positions(self, positions: nn.Parameter) -> None:
        init.copy_(positions, sincos_position_table(*self.config.grid_size, positions.shape[-1]))


class ViTMAEModel(stock.ViTMAEModel, ViTMAEPreTrainedModel):
    """The encoder. Without `noise` it sees the whole picture, `last_hidden_state` being [CLS], then all patches."""

    config: ViTMAEConfig
    _keys_to_ignore_on_load_unexpected = [r"^decoder\."]

    def __init__(self, config: ViTMAEConfig):
        super().__init__(config)
        self.embeddings = ViTMAEEmbeddings(config)
        self.post_init()


class ViTMAEForPreTraining(PreTrainingMixin, stock.ViTMAEForPreTraining, ViTMAEPreTrainedModel):
    """Encoder and decoder, with the hooks that the trainer calls."""

    config: ViTMAEConfig

    def __init__(self, config: ViTMAEConfig):
        # Not the stock constructor, which would build and initialise an encoder that is then replaced.
        super(stock.ViTMAEForPreTraining, self).__init__(config)
        self.vit = ViTMAEModel(config)
        self.decoder = stock.ViTMAEDecoder(config, num_patches=config.num_patches)
        self.post_init()
        self.freeze()

    @property
    def encoder(self) -> ViTMAEModel:
        """The encoder, by the name that it has in every method."""
        return self.vit

    def freeze(self) -> None:
        """Stops gradients of the position tables."""
        self.vit.embeddings.position_embeddings.requires_grad_(False)
        self.decoder.decoder_pos_embed.requires_grad_(False)

    @torch.no_grad()
    def load_encoder(self, encoder: MaskedViTModel) -> None:
        self.vit.load_state_dict(self._weights_of(encoder))

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor,
        noise: torch.Tensor | None = None,
        return_loss: bool = True,
        **kwargs,
    ) -> ViTMAEForPreTrainingOutput:
        """
        Args:
            pixel_values (`torch.Tensor` of shape `(batch_size, num_channels, image_size, image_size)`): Normalised.
            noise (`torch.Tensor` of shape `(batch_size, num_patches)`, *optional*): Uniform in [0, 1); the patches
                with the smallest are kept. Drawn if None.
            return_loss (`bool`, defaults to True): Whether the output has `loss`. (By this argument the Trainer knows
                that there is a loss without labels.)

        Raises:
            ValueError: If the shapes are not those of the config.
        """
        refuse_unknown(self, kwargs)
        noise = self.masking_noise(pixel_values, noise)
        outputs = super().forward(pixel_values, noise=noise, return_dict=True, **kwargs)
        outputs = ViTMAEForPreTrainingOutput(**outputs, loss_pixel=outputs.loss)
        if not return_loss:
            outputs.loss = None
        return outputs

    @torch.no_grad()
    def reconstruct(
        self, pixel_values: torch.Tensor, noise: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        outputs = self(pixel_values, noise=noise)
        pixels = outputs.logits.float()
        if self.config.norm_pix_loss:
            # What is predicted are a patch's normalised pixels: it is shown with the patch's own mean and variance.
            target = self.patchify(pixel_values)
            pixels = pixels * (target.var(dim=-1, keepdim=True) + 1e-6).sqrt() + target.mean(dim=-1, keepdim=True)
        mask = outputs.mask.unflatten(1, (1, *self.config.grid_size))
        patch_size = self.config.patch_size
        return mask.repeat_interleave(patch_size, 2).repeat_interleave(patch_size, 3), self.unpatchify(pixels)


__all__ = ["ViTMAEForPreTraining", "ViTMAEModel"]
