"""Random masking whose randomness is an argument, so that any step can be repeated."""

import torch


def random_masking(noise: torch.Tensor, num_keep: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """
    Chooses the patches that the encoder sees: those with the smallest noise, in the order of their noise.

    Args:
        noise (`torch.Tensor` of shape `(batch_size, num_patches)`): Uniform in [0, 1), one number a patch.
        num_keep (`int`): Number of patches to keep.

    Returns:
        `ids_keep` (`torch.LongTensor` of shape `(batch_size, num_keep)`): kept patches, in shuffled order;
        `mask` (float `torch.Tensor` of shape `(batch_size, num_patches)`): 1 where a patch is hidden, 0 where kept;
        `ids_restore` (`torch.LongTensor` of shape `(batch_size, num_patches)`): where patch i stands in the
        shuffled order.
    """
    ids_shuffle = torch.argsort(noise, dim=1)
    ids_restore = torch.argsort(ids_shuffle, dim=1)
    mask = (ids_restore >= num_keep).to(torch.float32)
    return ids_shuffle[:, :num_keep], mask, ids_restore


def restore_order(tokens: torch.Tensor, mask_token: torch.Tensor, ids_restore: torch.Tensor) -> torch.Tensor:
    """
    Puts the kept patches back in their places and mask tokens in the others.

    Args:
        tokens (`torch.Tensor` of shape `(batch_size, 1 + num_keep, dim)`): [CLS], then the kept patches as shuffled.
        mask_token (`torch.Tensor` of shape `(1, 1, dim)`): Stands for every hidden patch.
        ids_restore (`torch.LongTensor` of shape `(batch_size, num_patches)`): From [`random_masking`].

    Returns:
        `torch.Tensor` of shape `(batch_size, 1 + num_patches, dim)`: [CLS], then all patches in row-major order, of
        the mask token's type: the residual stream starts here.
    """
    batch_size, length, dim = tokens.shape
    tokens = tokens.to(mask_token.dtype)
    hidden = mask_token.expand(batch_size, ids_restore.shape[1] + 1 - length, dim)
    shuffled = torch.cat((tokens[:, 1:], hidden), dim=1)
    ordered = torch.gather(shuffled, 1, ids_restore.unsqueeze(-1).expand(-1, -1, dim))
    return torch.cat((tokens[:, :1], ordered), dim=1)
