"""Pictures that show what a representation holds: t-SNE, attention, patch features as colours, scores."""

from itertools import product
from pathlib import Path

import numpy as np
import torch
from torch import nn

from ..files import replacing
from .pictures import to_rgb


def require_sklearn() -> None:
    """Raises ValueError, which says what to install, where scikit-learn is missing."""
    try:
        import sklearn.manifold  # noqa: F401
    except ImportError as error:
        raise ValueError(
            "The representation report needs scikit-learn, for t-SNE: pip install scikit-learn."
        ) from error


def attention_pictures(images: torch.Tensor, attention: torch.Tensor) -> np.ndarray:
    """
    Where [CLS] looks: its attention, the mean of all heads, as heat over the picture in grey.

    Args:
        images (`torch.Tensor` of shape `(n, channels, height, width)`): In [0, 1].
        attention (`torch.Tensor` of shape `(n, heads, rows, columns)`): From `FeatureEncoder.cls_attention`.

    Returns:
        `np.ndarray` of shape `(n, height, width, 3)`, uint8. Dark is a picture's lowest attention, bright its highest.
    """
    from matplotlib import colormaps

    heat = attention.mean(dim=1, keepdim=True).float().cpu()
    low, high = heat.amin(dim=(1, 2, 3), keepdim=True), heat.amax(dim=(1, 2, 3), keepdim=True)
    heat = (heat - low) / (high - low).clamp(min=1e-12)
    heat = nn.functional.interpolate(heat, size=images.shape[2:], mode="bilinear", align_corners=False)
    colours = colormaps["inferno"](heat[:, 0].numpy())[..., :3]
    grey = to_rgb(images).astype(np.float64).mean(axis=3, keepdims=True) / 255
    return (255 * (0.35 * grey + 0.65 * colours)).round().clip(0, 255).astype(np.uint8)


def patch_colours(patches: torch.Tensor, num_shown: int, size: tuple[int, int]) -> np.ndarray:
    """
    The first three principal components of patch features as red, green and blue.

    Args:
        patches (`torch.Tensor` of shape `(n, rows, columns, dim)`): From `FeatureEncoder.patches`. The components are
            those of all n pictures together, so that a colour means the same in each.
        num_shown (`int`): How many pictures to return.
        size (`tuple[int, int]`): (height, width) of the result.

    Returns:
        `np.ndarray` of shape `(num_shown, height, width, 3)`, uint8: a patch is a tile of one colour.
    """
    flat = patches.float().cpu().flatten(0, 2)
    flat = flat - flat.mean(dim=0)
    directions = torch.linalg.svd(flat, full_matrices=False).Vh[:3]
    # The sign of a component is arbitrary: its larger side is made positive, so that a picture can be made again.
    directions = directions * torch.where(directions.sum(dim=1, keepdim=True) < 0, -1.0, 1.0)
    values = flat @ directions.T
    low, high = (torch.quantile(values[:: max(1, len(values) // 100000)], q, dim=0) for q in (0.02, 0.98))
    values = ((values - low) / (high - low).clamp(min=1e-12)).clamp(0, 1)
    values = nn.functional.pad(values, (0, 3 - values.shape[1]))
    colours = values.unflatten(0, patches.shape[:3])[:num_shown].permute(0, 3, 1, 2)
    return to_rgb(nn.functional.interpolate(colours, size=size, mode="nearest"))


def enlarge(images: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Pictures (n, channels, height, width) in [0, 1] at another size; by whole multiples without blurring."""
    if all(new % old == 0 for new, old in zip(size, images.shape[2:], strict=True)):
        return nn.functional.interpolate(images, size=size, mode="nearest")
    return nn.functional.interpolate(images, size=size, mode="bilinear", antialias=True, align_corners=False)


def embed_tsne(features: torch.Tensor, seed: int = 0) -> np.ndarray:
    """t-SNE of features (n, dim) by cosine distance: float32 (n, 2)."""
    from sklearn.manifold import TSNE

    perplexity = min(30.0, (len(features) - 1) / 3)
    features = nn.functional.normalize(features.float(), dim=1).numpy()
    return TSNE(perplexity=perplexity, init="pca", random_state=seed).fit_transform(features)


def draw_tsne(
    points: dict[str, np.ndarray], classes: np.ndarray, names: list[str], label: str, path: str | Path
) -> None:
    """
    One panel for each model: its pictures as points, coloured by class.

    Args:
        points: By model, (n, 2).
        classes (`np.ndarray` of shape `(n,)`): Index into `names`.
        names (`list[str]`): Of the classes, at most 20.
        label (`str`): What the classes are of, as the legend's title.
    """
    plt = _pyplot()
    columns = min(3, len(points))
    rows = -(-len(points) // columns)
    figure, panels = plt.subplots(
        rows, columns, figsize=(4.2 * columns + 1.6, 4.2 * rows + 0.2), squeeze=False, layout="constrained"
    )
    colours = plt.get_cmap("tab10" if len(names) <= 10 else "tab20").colors
    for panel in panels.flat[len(points) :]:
        panel.set_visible(False)
    for panel, (model, places) in zip(panels.flat, points.items(), strict=False):
        for number in range(len(names)):
            mine = classes == number
            panel.scatter(*places[mine].T, s=9, color=colours[number], label=names[number], linewidths=0, alpha=0.85)
        panel.set(title=model, xticks=[], yticks=[])
        panel.set_box_aspect(1)
        for spine in panel.spines.values():
            spine.set_color("0.8")
    handles, texts = panels[0, 0].get_legend_handles_labels()
    figure.legend(handles, texts, title=label, loc="outside right upper", frameon=False, markerscale=2.2)
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=120)
    plt.close(figure)


def draw_scores(results: dict, models: list[str], path: str | Path) -> None:
    """
    Bars of k-NN and linear accuracy for every label, from what `evaluate_features` gives.

    Args:
        models: Names of the models; each has a colour of its own, and all that is no model (references) is grey.
    """
    plt = _pyplot()
    labels = list(next(iter(results["features"].values()))["knn"])
    names = list(results["features"])
    kinds = {"knn": "k-NN", "linear": "linear probe"}
    columns = len(labels) if len(labels) > 1 else 2
    figure, panels = plt.subplots(
        2 * len(labels) // columns,
        columns,
        figsize=(1.2 + 2.6 * columns, (0.7 + 0.25 * len(names)) * (2 * len(labels) // columns)),
        squeeze=False,
        sharey=True,
        layout="constrained",
    )
    hues = plt.get_cmap("tab10").colors
    # In tables features are called "MODEL, POOLING".
    owner = [next((i for i, model in enumerate(models) if name.startswith(f"{model}, ")), None) for name in names]
    colours = ["0.75" if number is None else hues[number % 10] for number in owner]
    for panel, (kind, label) in zip(panels.flat, product(kinds, labels), strict=True):
        bars = panel.barh(names, [results["features"][name][kind][label] for name in names], color=colours)
        panel.bar_label(bars, fmt="%.1f", padding=2, fontsize=8)
        # One scale for both kinds of a label.
        highest = max(scores[other][label] for scores in results["features"].values() for other in kinds)
        panel.set_xlim(0, 1.22 * max(1.0, highest))
        panel.set_title(f"{label}, {kinds[kind]}", fontsize=10)
        panel.tick_params(labelsize=8)
        panel.spines[["top", "right"]].set_visible(False)
    for panel in panels[-1]:
        panel.set_xlabel("accuracy in %", fontsize=9)
    panels[0, 0].invert_yaxis()
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=120)
    plt.close(figure)


def _pyplot():
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt
