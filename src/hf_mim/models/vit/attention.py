"""
Attention and MLP of a block, with the parameter names of transformers' `ViTModel`.

They are ours, on transformers' public table of attention functions, because its own modules are renamed and merged
from one release to the next.
"""

import torch
from torch import nn
from transformers.activations import ACT2FN
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .position import rotate_patches


def eager_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs,
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Attention that also gives its weights.

    Args:
        query, key, value (`torch.Tensor` of shape `(batch_size, heads, length, head_dim)`).
        attention_mask (`torch.Tensor`, *optional*): Added to the logits.

    Returns:
        What is mixed (batch_size, length, heads, head_dim), and the weights (batch_size, heads, length, length).
    """
    logits = query @ key.transpose(2, 3) * scaling
    if attention_mask is not None:
        logits = logits + attention_mask
    weights = logits.softmax(dim=-1, dtype=torch.float32).to(query.dtype)
    weights = nn.functional.dropout(weights, p=dropout, training=module.training)
    return (weights @ value).transpose(1, 2).contiguous(), weights


class MaskedViTAttention(nn.Module):
    """Multi-head self-attention by the implementation that `config._attn_implementation` names."""

    def __init__(self, config):
        super().__init__()
        # A view of it would not see an implementation that is set later.
        self.config = config
        width, heads = config.hidden_size, config.num_attention_heads
        self.num_attention_heads = heads
        self.head_dim = width // heads
        self.attention_dropout = config.attention_probs_dropout_prob
        self.scaling = self.head_dim**-0.5
        # Read by the implementations.
        self.is_causal = False
        self.q_proj = nn.Linear(width, width, bias=config.qkv_bias)
        self.k_proj = nn.Linear(width, width, bias=config.qkv_bias and config.key_bias)
        self.v_proj = nn.Linear(width, width, bias=config.qkv_bias)
        self.o_proj = nn.Linear(width, width)
        # The releases have one map for all three, and initialise it as such.
        for projection in (self.q_proj, self.k_proj, self.v_proj):
            projection.fused_maps = 3

    def forward(
        self,
        hidden_states: torch.Tensor,
        rotary: tuple[torch.Tensor, torch.Tensor] | None = None,
        cls_only: bool = False,
        **kwargs,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """
        Args:
            hidden_states (`torch.Tensor` of shape `(batch_size, length, hidden_size)`).
            rotary (pair of `torch.Tensor`, *optional*): By which the queries and keys of the last tokens, the patches,
                are turned; as `rotary_table` gives it.
            cls_only (`bool`): Whether the first token alone, [CLS], looks at all of them.

        Returns:
            The same shape, or (batch_size, 1, hidden_size), and the weights (batch_size, heads, length or 1, length)
            where the implementation has them.
        """
        query, key, value = (
            projection(tokens).unflatten(2, (self.num_attention_heads, self.head_dim)).transpose(1, 2)
            for projection, tokens in (
                (self.q_proj, hidden_states[:, :1] if cls_only else hidden_states),
                (self.k_proj, hidden_states),
                (self.v_proj, hidden_states),
            )
        )
        if rotary is not None:
            # [CLS] has no place to turn by.
            query = query if cls_only else rotate_patches(query, *rotary)
            key = rotate_patches(key, *rotary)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention)
        dropout = self.attention_dropout if self.training else 0.0
        mixed, weights = attend(self, query, key, value, None, dropout=dropout, scaling=self.scaling, **kwargs)
        return self.o_proj(mixed.flatten(2)), weights


class MaskedViTMLP(nn.Module):
    """
    Two linear maps with an activation between, from `width` to `hidden` and back; with `gated` the activation is of a
    third map, by which the first is multiplied (SwiGLU, where it is SiLU).
    """

    def __init__(self, width: int, hidden: int, activation: str, gated: bool = False):
        super().__init__()
        self.gate = nn.Linear(width, hidden) if gated else None
        self.fc1 = nn.Linear(width, hidden)
        self.activation_fn = ACT2FN[activation]
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        if self.gate is not None:
            return self.fc2(self.activation_fn(self.gate(hidden_states)) * self.fc1(hidden_states))
        return self.fc2(self.activation_fn(self.fc1(hidden_states)))
