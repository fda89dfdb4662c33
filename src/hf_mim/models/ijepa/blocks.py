"""I-JEPA's masks: what the encoder sees and what is predicted, as functions of a picture's noise."""

from typing import NamedTuple

import torch

# Size, row and column.
DRAWS_PER_BLOCK = 3
# Of a picture's noise, float32 of 24 bits, the lower 12 bits place its blocks; the upper ones rank its patches.
_LEVELS = 4096


class Blocks(NamedTuple):
    """
    Rectangles of patches.

    Args:
        grid (`tuple[int, int]`): (rows, columns) of the picture.
        scale (`tuple[float, float]`): Lowest and highest area, as a share of the grid.
        aspect_ratio (`tuple[float, float]`): Lowest and highest number of rows over columns.
    """

    grid: tuple[int, int]
    scale: tuple[float, float]
    aspect_ratio: tuple[float, float]

    def sizes(self, draws: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Rows and columns, of the shape of `draws` in [0, 1): one draw gives both area and aspect ratio, as in the
        release. A block is never as high or as wide as the grid.
        """
        area = (self.scale[0] + draws * (self.scale[1] - self.scale[0])) * (self.grid[0] * self.grid[1])
        ratio = self.aspect_ratio[0] + draws * (self.aspect_ratio[1] - self.aspect_ratio[0])
        rows, columns = (area * ratio).sqrt().round(), (area / ratio).sqrt().round()
        return rows.clamp(1, self.grid[0] - 1), columns.clamp(1, self.grid[1] - 1)

    @property
    def smallest(self) -> int:
        """Patches of the smallest block that can be drawn."""
        rows, columns = self.sizes(torch.arange(_LEVELS, device="cpu") / _LEVELS)
        return int((rows * columns).min())

    def masks(self, draws: torch.Tensor) -> torch.Tensor:
        """
        Args:
            draws (`torch.Tensor` of shape `(batch_size, num_blocks, 3)`): Uniform in [0, 1): size, row, column.

        Returns:
            `torch.BoolTensor` of shape `(batch_size, num_blocks, num_patches)`, True in the block.
        """
        rows, columns = self.sizes(draws[..., 0])
        inside = []
        for size, length, draw in zip((rows, columns), self.grid, draws[..., 1:].unbind(-1), strict=True):
            first = (draw * (length - size + 1)).floor().unsqueeze(-1)
            place = torch.arange(length, device=draws.device)
            inside.append((place >= first) & (place < first + size.unsqueeze(-1)))
        return (inside[0].unsqueeze(-1) & inside[1].unsqueeze(-2)).flatten(-2)


def draw_blocks(noise: torch.Tensor, config, target_length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """
    The patches of each picture's context and target blocks, by its own noise alone: whatever the batch, the step or
    the number of processes.

    Pictures of a batch need blocks of equal length. Sizes are each picture's own, and of each block a random part is
    taken: of a target as many patches as the smallest has, of a context `config.num_keep` of those that no target
    has. Where too few are left, the last target's patches may be seen too, then those of the one before it, and so on.

    Args:
        noise (`torch.Tensor` of shape `(batch_size, num_patches)`): Uniform in [0, 1).
        config (`IJepaConfig`).
        target_length (`int`): `config.target_blocks.smallest`, which takes a while to find.

    Returns:
        `ids_context` (batch_size, num_context_blocks, num_keep) and `ids_target` (batch_size, num_target_blocks,
        target_length), `torch.LongTensor` of row-major indices, ascending.
    """
    num_targets, num_contexts = config.num_target_blocks, config.num_context_blocks
    draws = noise[:, : DRAWS_PER_BLOCK * (num_targets + num_contexts)].float() * _LEVELS
    draws = (draws - draws.floor()).unflatten(1, (-1, DRAWS_PER_BLOCK))
    targets = config.target_blocks.masks(draws[:, :num_targets])
    contexts = config.context_blocks.masks(draws[:, num_targets:])

    rank = noise.unsqueeze(1)
    ids_target = _lowest(rank + (~targets), target_length)
    # How many targets, from the last on, must be left standing aside before a patch is free.
    order = torch.arange(num_targets, 0, -1, device=noise.device).view(1, -1, 1)
    taken = (targets * order).amax(dim=1, keepdim=True)
    if config.allow_overlap:
        taken = torch.zeros_like(taken)
    ids_context = _lowest(rank + torch.where(contexts, taken, num_targets + 1), config.num_keep)
    return ids_context, ids_target


def _lowest(rank: torch.Tensor, length: int) -> torch.Tensor:
    """The `length` places of the lowest rank, in ascending order of places."""
    return rank.argsort(dim=-1)[..., :length].sort(dim=-1).values
