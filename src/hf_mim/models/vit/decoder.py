"""The decoder that predicts something for every patch from what the encoder makes of the kept ones."""

import torch
from torch import nn

from .embeddings import add_position_table
from .layers import build_layers
from .masking import restore_order
from .position import select_positions


class DecoderSizes:
    """
    A method's config seen with its decoder's sizes, for the blocks of the decoder.

    A view and not a copy: the attention implementation that is set on the config later reaches the decoder too.
    """

    def __init__(self, config):
        self.config = config
        self.hidden_size = config.decoder_hidden_size
        self.num_hidden_layers = config.decoder_num_hidden_layers
        self.num_attention_heads = config.decoder_num_attention_heads
        self.intermediate_size = config.decoder_intermediate_size
        self.hidden_act = config.hidden_act
        self.layer_norm_eps = config.layer_norm_eps
        self.qkv_bias, self.key_bias = config.qkv_bias, config.key_bias
        self.use_gated_mlp = False
        self.attention_probs_dropout_prob = config.attention_probs_dropout_prob

    @property
    def _attn_implementation(self) -> str | None:
        return self.config._attn_implementation


class MaskedViTDecoder(nn.Module):
    """
    Predicts something for every token, hidden ones included, from the encoder's output.

    Input map, mask tokens for what is to be predicted, positions, blocks, LayerNorm (if `config.decoder_final_norm`),
    output map.
    """

    def __init__(self, config, output_size: int, drop_path_rate: float = 0.0):
        super().__init__()
        sizes = DecoderSizes(config)
        self.num_cls = int(config.use_cls_token)
        self.embed = nn.Linear(config.hidden_size, sizes.hidden_size)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, sizes.hidden_size))
        add_position_table(self, config, sizes.hidden_size)
        self.layers = build_layers(sizes, drop_path_rate)
        final_norm = config.decoder_final_norm
        self.layernorm = nn.LayerNorm(sizes.hidden_size, eps=config.layer_norm_eps) if final_norm else nn.Identity()
        self.head = nn.Linear(sizes.hidden_size, output_size)

    def forward(
        self, hidden_states: torch.Tensor, ids_restore: torch.Tensor, ids_patch: torch.Tensor | None = None
    ) -> torch.Tensor:
        """
        Args:
            hidden_states (`torch.Tensor` of shape `(batch_size, num_cls + num_keep, hidden_size)`): The encoder's
                output, without registers.
            ids_restore (`torch.LongTensor` of shape `(batch_size, length)`): Which of the kept patches and, after
                them, mask tokens stands at each place of the sequence; `Masking.ids_restore` for the whole grid.
            ids_patch (`torch.LongTensor` of shape `(batch_size, length)`, *optional*): The patch, kept or to be
                predicted, whose position that place has; the whole grid in row-major order if None.

        Returns:
            `torch.Tensor` of shape `(batch_size, num_cls + length, output_size)`, [CLS] first where there is one.
        """
        hidden_states = restore_order(self.embed(hidden_states), self.mask_token, ids_restore, self.num_cls)
        positions = select_positions(self.position_embeddings, ids_patch, self.num_cls)
        hidden_states = hidden_states + positions.to(hidden_states.dtype)
        for layer in self.layers:
            hidden_states = layer(hidden_states)
        return self.head(self.layernorm(hidden_states))
