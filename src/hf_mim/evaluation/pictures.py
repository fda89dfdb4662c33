"""Pictures that show what a model does: reconstructions and loss curves."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from ..files import replacing

_GAP, _TILE, _LABEL = 2, 128, 104


def unnormalise(pixel_values: torch.Tensor, mean, std) -> torch.Tensor:
    """Undoes `(x - mean) / std` per channel and clips to [0, 1]; shape (..., channels, height, width)."""
    mean = torch.as_tensor(mean, dtype=torch.float32).view(-1, 1, 1)
    std = torch.as_tensor(std, dtype=torch.float32).view(-1, 1, 1)
    return (pixel_values.float().cpu() * std + mean).clamp(0.0, 1.0)


def draw_reconstructions(pixel_values, mask, predicted, mean, std) -> Image.Image:
    """
    A sheet with one column a picture; rows: the original; what the encoder saw; the same with the model's predictions
    in the place of the hidden patches.

    Args:
        pixel_values, predicted (`torch.Tensor` of shape `(num_pictures, channels, height, width)`): Normalised.
        mask (`torch.Tensor` of shape `(num_pictures, 1, height, width)`): 1 where hidden.
        mean, std: One number a channel.

    Returns:
        `PIL.Image.Image`, RGB. Of other than 1 or 3 channels the first is shown, in grey.
    """
    original, prediction = unnormalise(pixel_values, mean, std), unnormalise(predicted, mean, std)
    mask = mask.float().cpu()
    masked = original * (1 - mask) + 0.5 * mask
    reconstructed = original * (1 - mask) + prediction * mask
    rows = {"original": original, "masked": masked, "reconstructed": reconstructed}
    return label_rows({name: to_rgb(images) for name, images in rows.items()})


def label_rows(rows: dict[str, np.ndarray]) -> Image.Image:
    """
    A sheet of pictures with the name of each row on its left. Small pictures are enlarged without blurring.

    Args:
        rows: By name, `np.ndarray` of shape `(num_pictures, height, width, 3)`, uint8.
    """
    number, height, width = next(iter(rows.values())).shape[:3]
    scale = max(1, _TILE // min(height, width))
    height, width = height * scale, width * scale
    label = max(_LABEL, 14 + round(max(_font().getlength(name) for name in rows)))
    sheet = Image.new("RGB", (label + number * (width + _GAP), len(rows) * (height + _GAP)), "white")
    draw = ImageDraw.Draw(sheet)
    for i, (name, pictures) in enumerate(rows.items()):
        draw.text((label - 6, i * (height + _GAP) + height // 2), name, "black", _font(), anchor="rm")
        for j, picture in enumerate(pictures):
            enlarged = Image.fromarray(picture).resize((width, height), Image.Resampling.NEAREST)
            sheet.paste(enlarged, (label + j * (width + _GAP), i * (height + _GAP)))
    return sheet


def _font() -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size=13)


def to_rgb(images: torch.Tensor) -> np.ndarray:
    """Pictures (n, channels, height, width) in [0, 1] as uint8 (n, height, width, 3); of other channels the first."""
    if images.shape[1] != 3:
        images = images[:, :1].expand(-1, 3, -1, -1)
    return (images * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()


def depth_colours(truths: list[torch.Tensor]):
    """
    What makes colours, uint8 (..., 3), of depths: the nearer, the brighter, from the nearest to the furthest known one
    of `truths` by their logarithms; grey where a depth is not known (0).
    """
    from matplotlib import colormaps

    known = torch.cat([truth[truth > 0].flatten() for truth in truths])
    low, high = (known.min().log().item(), known.max().log().item()) if len(known) else (0.0, 0.0)

    def colour(depths: torch.Tensor) -> np.ndarray:
        nearness = (high - depths.clamp(min=1e-12).log()) / max(high - low, 1e-6)
        colours = colormaps["magma"](nearness.clamp(0, 1).numpy())[..., :3]
        return np.where((depths > 0).numpy()[..., None], 255 * colours, 128).round().astype(np.uint8)

    return colour


def draw_loss_curves(log_history: list[dict], path: str | Path) -> bool:
    """
    Draws every loss that was logged, training and held out, over the steps.

    Args:
        log_history (`list[dict]`): `trainer.state.log_history`.
        path: Where the PNG goes.

    Returns:
        `bool`: False, and no file, if fewer than two training losses were logged.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import LogLocator, NullLocator

    names = sorted({name for log in log_history for name in log if name == "loss" or name.startswith("loss_")})
    if sum("loss" in log for log in log_history) < 2:
        return False
    number = len(names)
    figure, panels = plt.subplots(1, number, figsize=(4 * number, 3.2), squeeze=False)
    # Fixed margins, in inches: a layout by what is drawn takes as long as drawing it, at each end of a run.
    figure.subplots_adjust(0.55 / (4 * number), 0.5 / 3.2, 1 - 0.1 / (4 * number), 1 - 0.35 / 3.2, wspace=0.2)
    for panel, name in zip(panels[0], names, strict=True):
        for key, label in ((name, "training"), (f"eval_{name}", "held out")):
            points = [(log["step"], log[key]) for log in log_history if key in log]
            if points:
                panel.plot(*zip(*points, strict=True), label=label, marker="o" if key != name else None, markersize=3)
        panel.set(title=name, xlabel="step")
        if all(log[name] > 0 for log in log_history if name in log):
            # The first steps would otherwise hide all that follows.
            panel.set_yscale("log")
            panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            panel.yaxis.set_major_formatter("{x:g}")
            panel.yaxis.set_minor_locator(NullLocator())
        panel.grid(alpha=0.3)
        panel.legend(frameon=False, loc="upper right")
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=110)
    plt.close(figure)
    return True


def draw_shares(shares: list[float], path: str | Path) -> Path:
    """
    Draws how much each group of blocks contributes to what the decoder reads (figure 7 of the TEC paper), as bars.

    Args:
        shares (`list[float]`): Of each group, the first blocks' first; they sum to 1.
        path: Where the PNG goes; returned.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panel = plt.subplots(figsize=(1.5 + 0.8 * len(shares), 3), layout="constrained")
    bars = panel.bar(range(1, 1 + len(shares)), shares)
    panel.bar_label(bars, fmt="{:.2f}")
    panel.set(xlabel="group of blocks, from input to output", ylabel="share", xticks=range(1, 1 + len(shares)))
    panel.set_ylim(0, 1.15 * max(shares))
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=110)
    plt.close(figure)
    return Path(path)
