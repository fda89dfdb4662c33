"""The blocks of encoders and decoders."""

import torch
from torch import nn
from torchvision.ops import StochasticDepth
from transformers.modeling_layers import GradientCheckpointingLayer

from .attention import MaskedViTAttention, MaskedViTMLP


class MaskedViTLayer(GradientCheckpointingLayer):
    """A pre-norm Transformer block with stochastic depth."""

    def __init__(self, config, drop_path_rate: float = 0.0):
        super().__init__()
        self.layernorm_before = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.attention = MaskedViTAttention(config)
        self.layernorm_after = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = MaskedViTMLP(config.hidden_size, config.intermediate_size, config.hidden_act, config.use_gated_mlp)
        self.drop_path = StochasticDepth(drop_path_rate, mode="row") if drop_path_rate > 0.0 else nn.Identity()

    def forward(
        self,
        hidden_states: torch.Tensor,
        weights: list[torch.Tensor] | None = None,
        rotary: tuple[torch.Tensor, torch.Tensor] | None = None,
        cls_only: bool = False,
        **kwargs,
    ) -> torch.Tensor:
        """
        `weights`, where it is given, gets the attention weights, if the implementation has them; `rotary` turns the
        patches' queries and keys; with `cls_only` the output is [CLS] alone, (batch_size, 1, hidden_size).
        """
        attention, attended = self.attention(self.layernorm_before(hidden_states), rotary, cls_only, **kwargs)
        if cls_only:
            hidden_states = hidden_states[:, :1]
        if weights is not None and attended is not None:
            weights.append(attended)
        hidden_states = hidden_states + self.drop_path(attention)
        return hidden_states + self.drop_path(self.mlp(self.layernorm_after(hidden_states)))


def build_layers(config, drop_path_rate: float) -> nn.ModuleList:
    """The blocks of an encoder or decoder; stochastic depth rises linearly from 0 to `drop_path_rate`."""
    last = max(config.num_hidden_layers - 1, 1)
    return nn.ModuleList(MaskedViTLayer(config, drop_path_rate * i / last) for i in range(config.num_hidden_layers))
