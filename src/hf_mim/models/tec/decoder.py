"""TEC's multi-target decoder (section 2.3)."""

import torch
from torch import nn

from ..vit.decoder import DecoderSizes
from ..vit.embeddings import add_position_table
from ..vit.frozen import attention_products
from ..vit.layers import build_layers
from ..vit.masking import restore_order
from .configuration_tec import TECConfig


class TECTargetDecoder(nn.Module):
    """What one target has of its own: input map, mask token, final norm and output map."""

    def __init__(self, config: TECConfig, output_size: int):
        super().__init__()
        width = config.decoder_hidden_size
        self.embed = nn.Linear(config.hidden_size, width)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        self.layernorm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.head = nn.Linear(width, output_size)

    def forward(self, hidden_states: torch.Tensor, ids_restore: torch.Tensor) -> torch.Tensor:
        """What the blocks read, (batch_size, 1 + num_patches, decoder_hidden_size), without positions."""
        return restore_order(self.embed(hidden_states), self.mask_token, ids_restore)

    def read_out(self, tokens: torch.Tensor) -> torch.Tensor:
        """Predictions (batch_size, length, output_size) from the blocks' output."""
        return self.head(self.layernorm(tokens))


class TECDecoder(nn.Module):
    """
    The multi-target decoder (section 2.3): the same blocks for a sequence of each target.

    Args:
        config: The student's.
        base_width, base_heads (`int`): Of the network that is predicted.
    """

    def __init__(self, config: TECConfig, base_width: int, base_heads: int):
        super().__init__()
        self.base_heads = base_heads
        self.scale = base_width**-0.5 if config.attention_logit_scale is None else config.attention_logit_scale
        add_position_table(self, config, config.decoder_hidden_size)
        self.layers = build_layers(DecoderSizes(config), 0.0)
        self.feature = TECTargetDecoder(config, base_width)
        if config.attention_target != "none":
            # All queries, then all keys.
            self.attention = TECTargetDecoder(config, 2 * base_width)

    def forward(
        self, hidden_states: torch.Tensor, ids_restore: torch.Tensor, rows: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """
        Args:
            hidden_states (`torch.Tensor` of shape `(batch_size, 1 + num_keep, hidden_size)`): [CLS], kept patches.
            ids_restore (`torch.LongTensor` of shape `(batch_size, num_patches)`): Place of patch i among the shuffled.
            rows (`torch.LongTensor` of shape `(batch_size, R)`): Rows of attention to predict; None for no attention.

        Returns:
            Features (batch_size, num_patches, base_width), and logits (batch_size, base_heads, R, num_patches).
        """
        targets = [self.feature] if rows is None else [self.feature, self.attention]
        # One batch of both sequences: the blocks are the same.
        tokens = torch.cat([target(hidden_states, ids_restore) for target in targets])
        tokens = tokens + self.position_embeddings.to(tokens.dtype)
        for layer in self.layers:
            tokens = layer(tokens)
        features, *attention = tokens.chunk(len(targets))
        features = self.feature.read_out(features[:, 1:])
        return features, self.attention_logits(attention[0], rows) if attention else None

    def attention_logits(self, tokens: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """Products of the rows' queries and the patches' keys, scaled."""
        samples = torch.arange(rows.shape[0], device=rows.device).unsqueeze(1)
        queries, keys = self.attention.read_out(tokens).chunk(2, dim=-1)
        queries, keys = (
            vectors.unflatten(2, (self.base_heads, -1)).transpose(1, 2)
            for vectors in (queries[samples, rows], keys[:, 1:])
        )
        return attention_products(queries, keys) * self.scale
