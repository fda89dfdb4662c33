"""Masking whose randomness is an argument, so that any step can be repeated."""

from typing import NamedTuple

import torch


class Masking(NamedTuple):
    """
    Which patches of each picture the encoder sees, and which are predicted from them: all the others.

    Args:
        ids_keep (`torch.LongTensor` of shape `(batch_size, num_keep)`): The kept patches, in shuffled order.
        mask (float `torch.Tensor` of shape `(batch_size, num_patches)`): 1 where a patch is hidden, 0 where kept.
        ids_restore (`torch.LongTensor` of shape `(batch_size, num_patches)`): Where patch i stands in the shuffled
            order, that of the kept patches, then the hidden ones.
    """

    ids_keep: torch.Tensor
    mask: torch.Tensor
    ids_restore: torch.Tensor

    @property
    def ids_predict(self) -> torch.Tensor:
        """The hidden patches (batch_size, num_patches - num_keep), in shuffled order."""
        return self.ids_restore.argsort(dim=1)[:, self.ids_keep.shape[1] :]


def random_masking(noise: torch.Tensor, num_keep: int) -> Masking:
    """
    The encoder sees the patches with the smallest noise, in the order of their noise.

    Args:
        noise (`torch.Tensor` of shape `(batch_size, num_patches)`): Uniform in [0, 1), one number a patch; in training
            a function of (seed, epoch, sample).
        num_keep (`int`): Number of patches to keep.
    """
    ids_shuffle = torch.argsort(noise, dim=1)
    ids_restore = torch.argsort(ids_shuffle, dim=1)
    mask = (ids_restore >= num_keep).to(torch.float32)
    return Masking(ids_shuffle[:, :num_keep], mask, ids_restore)


def restore_order(
    tokens: torch.Tensor, mask_token: torch.Tensor, ids_restore: torch.Tensor, num_prefix: int = 1
) -> torch.Tensor:
    """
    Puts the kept patches back in their places and mask tokens in the others.

    Args:
        tokens (`torch.Tensor` of shape `(batch_size, num_prefix + num_keep, dim)`): [CLS], then the kept patches.
        mask_token (`torch.Tensor` of shape `(1, 1, dim)`): Stands for every patch that is not among them.
        ids_restore (`torch.LongTensor` of shape `(batch_size, length)`): Which of the kept patches and, after them,
            mask tokens stands at each place; from [`random_masking`] for all patches in row-major order.
        num_prefix (`int`, defaults to 1): Tokens before the patches, which stay there.

    Returns:
        `torch.Tensor` of shape `(batch_size, num_prefix + length, dim)`, of the mask token's type: the residual stream
        starts here.
    """
    batch_size, num_tokens, dim = tokens.shape
    tokens = tokens.to(mask_token.dtype)
    hidden = mask_token.expand(batch_size, ids_restore.shape[1] + num_prefix - num_tokens, dim)
    shuffled = torch.cat((tokens[:, num_prefix:], hidden), dim=1)
    ordered = torch.gather(shuffled, 1, ids_restore.unsqueeze(-1).expand(-1, -1, dim))
    return torch.cat((tokens[:, :num_prefix], ordered), dim=1)
