"""
What is computed in float32, or the type of the weights, under autocast.

| what                                                          | where                                    |
|---------------------------------------------------------------|------------------------------------------|
| the residual stream, with positions, [CLS] and mask tokens    | `MaskedViTEmbeddings`, `MaskedViTLayer`, |
|                                                               | `restore_order`                          |
| every LayerNorm                                               | torch                                    |
| the softmax of attention                                      | `eager_attention`, torch                 |
| the sum of TEC's adapters, attention logits that are targets  | `attention_products`                     |
| the normalisation of targets, and all losses                  | the methods' `*_loss`                    |
| OCL's temperature and similarities                            | `OCLForPreTraining.contrastive_loss`     |
| averaged targets                                              | `averaging`                              |

All other products, and what attention mixes, are of autocast's type.
"""

import contextlib

import torch


def without_autocast(tensor: torch.Tensor) -> contextlib.AbstractContextManager:
    """Within, what is computed of tensors on the device of `tensor` keeps their types."""
    # Tensors that are shapes alone have no autocast.
    return contextlib.nullcontext() if tensor.is_meta else torch.autocast(tensor.device.type, enabled=False)
