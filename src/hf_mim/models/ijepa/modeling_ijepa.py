"""
I-JEPA: an encoder sees one block of a picture, a predictor tells what an averaged copy of the encoder makes of others.

A baseline: the encoder's weights have the names and shapes of transformers' `IJepaModel`, which reads what is saved.
"""

from dataclasses import dataclass

import torch
from torch import nn
from transformers import initialization as init
from transformers.utils import ModelOutput
from transformers.utils.generic import can_return_tuple

from ..vit.decoder import MaskedViTDecoder
from ..vit.embeddings import MaskedViTEmbeddings
from ..vit.modeling_vit import MaskedViTModel, MaskedViTPreTrainedModel, refuse_unknown
from ..vit.pretraining import MaskedViTForPreTraining
from ..vit.teachers import AveragedTeacherMixin
from .blocks import draw_blocks
from .configuration_ijepa import IJepaConfig


@dataclass
class IJepaForPreTrainingOutput(ModelOutput):
    """
    Args:
        loss (`torch.FloatTensor` of shape `()`): `loss_latent`, what is minimised.
        loss_latent (`torch.FloatTensor` of shape `()`): Smooth L1 of the latents of target blocks.
        predicted_latents (`torch.FloatTensor` of shape `(batch_size, num_target_blocks, num_context_blocks,
            target_length, hidden_size)`): Of each target block, from each context block.
        target_latents (`torch.FloatTensor` of shape `(batch_size, num_target_blocks, target_length, hidden_size)`):
            Normalised.
        mask (`torch.FloatTensor` of shape `(batch_size, num_patches)`): 1 where hidden from the encoder.
        ids_context (`torch.LongTensor` of shape `(batch_size, num_context_blocks, context_length)`): Row-major.
        ids_target (`torch.LongTensor` of shape `(batch_size, num_target_blocks, target_length)`): Row-major.
        hidden_states, attentions: Of the encoder, when asked for; the context blocks of a picture follow each other.
    """

    loss: torch.FloatTensor | None = None
    loss_latent: torch.FloatTensor | None = None
    predicted_latents: torch.FloatTensor | None = None
    target_latents: torch.FloatTensor | None = None
    mask: torch.FloatTensor | None = None
    ids_context: torch.LongTensor | None = None
    ids_target: torch.LongTensor | None = None
    hidden_states: tuple[torch.FloatTensor, ...] | None = None
    attentions: tuple[torch.FloatTensor, ...] | None = None


class IJepaEmbeddings(MaskedViTEmbeddings):
    """Patch tokens with the fixed positions, which are saved: transformers' `IJepaModel` has them as weights."""

    def __init__(self, config: IJepaConfig):
        super().__init__(config)
        self.register_buffer("position_embeddings", self.position_embeddings, persistent=True)


class IJepaPreTrainedModel(MaskedViTPreTrainedModel):
    """I-JEPA's initialisation."""

    config: IJepaConfig
    base_model_prefix = "ijepa"
    _no_split_modules = ["IJepaEmbeddings", "MaskedViTLayer"]

    @classmethod
    def is_custom_code(cls) -> bool:
        """False, so that weights are renamed on the way to and from disk as the stock classes' are."""
        return False

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        std = self.config.initializer_range
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            # The release divides output maps by sqrt(2 * layer), and then initialises all of them anew.
            init.trunc_normal_(module.weight, std=std)
            if module.bias is not None:
                init.zeros_(module.bias)
        else:
            super()._init_weights(module)
        if isinstance(module, MaskedViTDecoder):
            init.trunc_normal_(module.mask_token, std=std)


class IJepaModel(IJepaPreTrainedModel, MaskedViTModel):
    """The encoder that I-JEPA pretrains: no [CLS], fixed positions."""

    embeddings_class = IJepaEmbeddings
    # What a checkpoint may hold besides; not worth a warning when only the encoder is loaded.
    _keys_to_ignore_on_load_unexpected = [r"^target_encoder\.", r"^predictor\.", r"^classifier\.", r"^pooler\."]


class IJepaForPreTraining(AveragedTeacherMixin, IJepaPreTrainedModel, MaskedViTForPreTraining):
    """Encoder, averaged target encoder and predictor (section 3 of the paper)."""

    # Saved, as stock weights are, and still the fixed table, which is float32 in every method.
    _keep_in_fp32_modules_strict = [*AveragedTeacherMixin._keep_in_fp32_modules_strict, "position_embeddings"]

    def __init__(self, config: IJepaConfig):
        config.check_pretraining()
        super().__init__(config)
        self.ijepa = IJepaModel(config)
        # Not of 16 bits, whatever the rest is built in.
        self.target_encoder = IJepaModel(config).to(torch.promote_types(self.encoder.dtype, torch.float32))
        self.predictor = MaskedViTDecoder(config, config.hidden_size)
        self.target_length = config.target_blocks.smallest
        self.post_init()
        self.freeze()
        self.copy_encoder_to_target()

    @property
    def encoder(self) -> IJepaModel:
        """The encoder, by the name that it has in every method."""
        return self.ijepa

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor,
        noise: torch.Tensor | None = None,
        ids_context: torch.Tensor | None = None,
        ids_target: torch.Tensor | None = None,
        return_loss: bool = True,
        **kwargs,
    ) -> IJepaForPreTrainingOutput:
        """
        Args:
            pixel_values (`torch.Tensor` of shape `(batch_size, num_channels, height, width)`): Normalised pictures.
            noise (`torch.Tensor` of shape `(batch_size, num_patches)`, *optional*): Uniform in [0, 1); decides the
                blocks that are not given. Drawn if None.
            ids_context (`torch.LongTensor` of shape `(batch_size, num_context_blocks, context_length)`, *optional*):
                The patches of each block that the encoder sees, row-major indices.
            ids_target (`torch.LongTensor` of shape `(batch_size, num_target_blocks, target_length)`, *optional*): The
                patches of each block that is predicted, row-major indices.
            return_loss (`bool`, defaults to True): Whether the output has `loss`. (By this argument the Trainer knows
                that there is a loss without labels.)

        Raises:
            ValueError: If the shapes are not those of the config.
            TypeError: If there is no such argument.
        """
        refuse_unknown(self, kwargs)
        noise = self.masking_noise(pixel_values, noise)
        ids_context, ids_target = self._blocks(noise, ids_context, ids_target)
        context = self.encoder(pixel_values, ids_keep=ids_context.flatten(0, 1), return_dict=True, **kwargs)
        with torch.no_grad():
            target = self.target_encoder(pixel_values, return_dict=True).last_hidden_state.float()
            target = nn.functional.layer_norm(target, target.shape[-1:])
            target = _rows(target.unsqueeze(1).expand(-1, ids_target.shape[1], -1, -1), ids_target)

        predicted = self._predict(context.last_hidden_state, ids_context, ids_target).float()
        loss = nn.functional.smooth_l1_loss(predicted, target.unsqueeze(2).expand_as(predicted))
        mask = torch.ones_like(noise, dtype=torch.float32).scatter(1, ids_context.flatten(1), 0.0)
        return IJepaForPreTrainingOutput(
            loss=loss if return_loss else None,
            loss_latent=loss,
            predicted_latents=predicted,
            target_latents=target,
            mask=mask,
            ids_context=ids_context,
            ids_target=ids_target,
            hidden_states=context.hidden_states,
            attentions=context.attentions,
        )

    def _blocks(self, noise, ids_context, ids_target) -> tuple[torch.Tensor, torch.Tensor]:
        """What is given, if it fits, and blocks by `noise` in the place of what is None."""
        given = {"ids_context": ids_context, "ids_target": ids_target}
        drawn = (None, None)
        if ids_context is None or ids_target is None:
            drawn = draw_blocks(noise, self.config, self.target_length)
        blocks = []
        for (name, ids), other in zip(given.items(), drawn, strict=True):
            if ids is None:
                ids = other
            elif ids.ndim != 3 or len(ids) != len(noise):
                raise ValueError(
                    f"{name} has the shape {tuple(ids.shape)}; expected (batch_size, blocks, patches) with a "
                    f"batch_size of {len(noise)}."
                )
            blocks.append(ids)
        return blocks[0], blocks[1]

    def _predict(self, context: torch.Tensor, ids_context: torch.Tensor, ids_target: torch.Tensor) -> torch.Tensor:
        """Latents of every target block, by itself, from every context block (batch_size * num_context_blocks, ..)."""
        (batch_size, num_contexts, seen), (_, num_targets, length) = ids_context.shape, ids_target.shape
        shape = (batch_size, num_targets, num_contexts)
        ids_patch = torch.cat(
            (ids_context.unsqueeze(1).expand(*shape, seen), ids_target.unsqueeze(2).expand(*shape, length)), dim=-1
        ).flatten(0, 2)
        context = context.unflatten(0, (batch_size, 1, num_contexts)).expand(*shape, -1, -1).flatten(0, 2)
        # The context's tokens, then a mask token for each patch of the target.
        ids_restore = torch.arange(seen + length, device=context.device).expand_as(ids_patch)
        return self.predictor(context, ids_restore, ids_patch)[:, seen:].unflatten(0, shape)


def _rows(tokens: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Of tokens (batch_size, blocks, num_patches, dim) those of the patches `ids` (batch_size, blocks, length)."""
    return tokens.gather(2, ids.unsqueeze(-1).expand(*ids.shape, tokens.shape[-1]))


__all__ = ["IJepaForPreTraining", "IJepaModel"]
