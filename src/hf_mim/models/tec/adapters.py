"""TEC's encoder adapter: what the decoder reads, of the outputs of all blocks (section 2.2)."""

import torch
from torch import nn

from ..vit.attention import MaskedViTMLP
from .configuration_tec import TECConfig


class TECEncoderAdapter(nn.Module):
    """Adapts the outputs of all blocks in groups, and adds up (section 2.2, equation 1)."""

    def __init__(self, config: TECConfig):
        super().__init__()
        width, self.group_size = config.hidden_size, config.adapter_group_size
        groups = config.num_hidden_layers // self.group_size
        self.layernorm_before = nn.LayerNorm(config.num_hidden_layers * width, eps=config.layer_norm_eps)
        self.fuse = nn.ModuleList(nn.Linear(self.group_size * width, width) for _ in range(groups))
        self.mlps = nn.ModuleList(
            MaskedViTMLP(width, 4 * config.decoder_hidden_size, config.hidden_act) for _ in range(groups)
        )
        self.layernorm_after = nn.LayerNorm(width, eps=config.layer_norm_eps)

    def group_outputs(self, block_outputs: tuple[torch.Tensor, ...]) -> list[torch.Tensor]:
        """What each group adds, (batch_size, length, hidden_size), the first blocks' first."""
        fused = self.layernorm_before(torch.cat(block_outputs, dim=-1)).chunk(len(self.fuse), dim=-1)
        fused = [fuse(group) for fuse, group in zip(self.fuse, fused, strict=True)]
        dtype = self.layernorm_after.weight.dtype
        return [group.to(dtype) + mlp(group) for mlp, group in zip(self.mlps, fused, strict=True)]

    def forward(self, block_outputs: tuple[torch.Tensor, ...]) -> torch.Tensor:
        """
        Args:
            block_outputs (`tuple` of `torch.Tensor` of shape `(batch_size, length, hidden_size)`): Of every block, the
                last one after the final LayerNorm.
        """
        return self.layernorm_after(sum(self.group_outputs(block_outputs)))


def block_outputs(encoder_outputs) -> tuple[torch.Tensor, ...]:
    """Of every block, the last one after the final LayerNorm, from outputs with `hidden_states`."""
    return (*encoder_outputs.hidden_states[1:-1], encoder_outputs.last_hidden_state)
