"""
What an encoder's blocks do, as dBOT's authors look at it: how far each head's attention reaches, and how much of the
tokens' features a few directions hold.
"""

import inspect
from collections.abc import Iterable
from pathlib import Path

import torch
from transformers import PreTrainedModel

from ..files import replacing
from ..models.vit.sizes import as_pair


def mean_attention_distance(
    attention: torch.Tensor, grid: tuple[int, int], patch_size: tuple[int, int]
) -> torch.Tensor:
    """
    The distance in pixels from a patch to the patches that it attends to, weighted by its attention and averaged over
    the patches. Attention to [CLS] and registers is left out, and the rest made to sum to 1.

    Args:
        attention (`torch.Tensor` of shape `(..., prefix + L, prefix + L)`): After softmax; [CLS] and registers first.
        grid (`tuple[int, int]`): (rows, columns) of the L patches, row-major.
        patch_size (`tuple[int, int]`): (height, width) in pixels.

    Returns:
        float32 `torch.Tensor` of shape `(...)`.
    """
    rows, columns = grid
    num_patches = rows * columns
    y = torch.arange(rows, device=attention.device).repeat_interleave(columns) * patch_size[0]
    x = torch.arange(columns, device=attention.device).repeat(rows) * patch_size[1]
    places = torch.stack((y, x), dim=1).float()
    distances = torch.cdist(places, places, compute_mode="donot_use_mm_for_euclid_dist")
    shares = attention[..., -num_patches:, -num_patches:].float()
    # Where a patch attends to no patch at all, it reaches nowhere.
    totals = shares.sum(dim=-1).clamp_min(torch.finfo(torch.float32).tiny)
    return ((shares * distances).sum(dim=-1) / totals).mean(dim=-1)


def top_singular_share(features: torch.Tensor, top: int = 5) -> torch.Tensor:
    """
    Share of the `top` largest singular values in the sum of all: near 1 where a few directions hold everything.

    Args:
        features (`torch.Tensor` of shape `(..., num_tokens, dim)`).
        top (`int`, defaults to 5): At least 1.

    Returns:
        float32 `torch.Tensor` of shape `(...)`, from 0 (only for all-zero features) to 1.

    Raises:
        ValueError: If `top` is below 1.
    """
    if top < 1:
        raise ValueError(f"top is {top}; expected at least 1 singular value.")
    values = torch.linalg.svdvals(features.float())
    return values[..., :top].sum(dim=-1) / values.sum(dim=-1).clamp_min(torch.finfo(torch.float32).tiny)


@torch.no_grad()
def encoder_properties(
    encoder: PreTrainedModel, batches: Iterable[torch.Tensor], top: int = 5
) -> dict[str, torch.Tensor]:
    """
    Attention distances and singular values of an encoder, averaged over pictures.

    Args:
        encoder: What `AutoModel.from_pretrained` gives for any plain ViT with `patch_size` in its config; of hf_mim or
            of transformers. It sees whole pictures.
        batches: `pixel_values` (batch_size, channels, height, width).
        top (`int`, defaults to 5): As of `top_singular_share`, of the patches' features within a picture.

    Returns:
        `attention_distance` (num_layers, num_heads), in pixels; `top_singular_share` (num_layers,): of the outputs of
        the blocks, before the final norm. On the CPU.

    Raises:
        ValueError: If there are no pictures, or the encoder gives no attentions of a plain ViT's shape.
    """
    implementation, training = encoder.config._attn_implementation, encoder.training
    # Only eager attention gives its weights.
    encoder.set_attn_implementation("eager")
    encoder.eval()
    distances = shares = 0.0
    number = 0
    try:
        for batch in batches:
            sums = _sums_over_pictures(encoder, batch.to(encoder.device), top)
            distances, shares = distances + sums[0].cpu(), shares + sums[1].cpu()
            number += len(batch)
    finally:
        encoder.set_attn_implementation(implementation)
        encoder.train(training)
    if number == 0:
        raise ValueError("There are no pictures to look at.")
    return {"attention_distance": distances / number, "top_singular_share": shares / number}


def _sums_over_pictures(encoder, pixel_values: torch.Tensor, top: int) -> tuple[torch.Tensor, torch.Tensor]:
    patch_size = as_pair(encoder.config.patch_size)
    grid = tuple(side // patch for side, patch in zip(pixel_values.shape[2:], patch_size, strict=True))
    num_patches = grid[0] * grid[1]
    kwargs = {"output_attentions": True, "output_hidden_states": True}
    if "interpolate_pos_encoding" in inspect.signature(encoder.forward).parameters:
        kwargs["interpolate_pos_encoding"] = tuple(pixel_values.shape[2:]) != as_pair(encoder.config.image_size)
    outputs = encoder(pixel_values, **kwargs)
    attentions, hidden_states = outputs.attentions, outputs.hidden_states[1:]
    if not attentions or len({tuple(a.shape[2:]) for a in attentions}) > 1 or attentions[0].shape[-1] < num_patches:
        raise ValueError(
            f"{type(encoder).__name__} gives no attentions among {grid[0]} x {grid[1]} patches in every "
            "block. Take the encoder of a plain ViT that sees whole pictures."
        )
    distances = torch.stack([mean_attention_distance(layer, grid, patch_size).sum(dim=0) for layer in attentions])
    shares = torch.stack([top_singular_share(layer[:, -num_patches:], top).sum(dim=0) for layer in hidden_states])
    return distances, shares


def draw_attention_distances(distances: dict[str, torch.Tensor], path: str | Path) -> Path:
    """Draws `attention_distance` (num_layers, num_heads) by encoder: a panel each, a point a head; returns `path`."""
    figure, panels = _panels(len(distances))
    for panel, (name, values) in zip(panels, distances.items(), strict=True):
        layers = torch.arange(1, len(values) + 1)
        panel.scatter(layers.repeat_interleave(values.shape[1]), values.flatten(), s=12, alpha=0.7)
        panel.plot(layers, values.mean(dim=1), color="black", linewidth=1)
        panel.set(title=name, xlabel="block", ylabel="attention distance in pixels")
        panel.set_ylim(0, 1.08 * max(v.max().item() for v in distances.values()))
        panel.set_xticks(layers[:: 1 + len(layers) // 13])
        panel.grid(alpha=0.3)
    return _save(figure, path)


def draw_singular_shares(shares: dict[str, torch.Tensor], path: str | Path, top: int = 5) -> Path:
    """Draws `top_singular_share` (num_layers,) by encoder in one panel; returns `path`."""
    figure, (panel,) = _panels(1)
    for name, values in shares.items():
        layers = torch.arange(1, len(values) + 1)
        panel.plot(layers, 100 * values, label=name, marker="o", markersize=3)
    depth = max(len(values) for values in shares.values())
    panel.set(xlabel="block", ylabel=f"share of the top {top} singular values, %")
    panel.set_xticks(range(1, depth + 1, 1 + depth // 13))
    panel.grid(alpha=0.3)
    panel.legend(frameon=False)
    return _save(figure, path)


def _panels(number: int):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(
        1, number, figsize=(4 * number, 3.4), squeeze=False, sharey=True, layout="constrained"
    )
    return figure, panels[0]


def _save(figure, path: str | Path) -> Path:
    import matplotlib.pyplot as plt

    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=110)
    plt.close(figure)
    return Path(path)
