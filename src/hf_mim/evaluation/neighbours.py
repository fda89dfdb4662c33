"""A page of images that are near each other by their features: neighbours, and what may be there twice."""

import base64
import html
import io
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from ..data.dataset import ImageDataset
from ..data.images import BrokenImageError
from ..data.loading import spread_indices
from .knn import nearest_neighbours
from .pictures import to_rgb

# The longer side of a thumbnail, in pixels.
_THUMBNAIL = 112

_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
body {{ font: 14px system-ui, sans-serif; margin: 24px; color: #222; background: #fff; }}
.row {{ display: flex; flex-wrap: wrap; gap: 8px; padding: 8px 0; border-bottom: 1px solid #ddd; }}
figure {{ margin: 0; width: {side}px; }}
figure:first-child {{ margin-right: 16px; }}
figure:first-child img {{ outline: 2px solid #222; }}
img {{ display: block; max-width: {side}px; max-height: {side}px; }}
figcaption {{ font-size: 11px; overflow-wrap: anywhere; }}
</style>
</head>
<body>
<h1>{title}</h1>
<p>{about}</p>
<section id="duplicates">
<h2>Near-duplicates</h2>
<p>{duplicates_about}</p>
{duplicates}
</section>
<section id="neighbours">
<h2>Neighbours</h2>
<p>{neighbours_about}</p>
{neighbours}
</section>
</body>
</html>
"""


def read_column(path: Path, name: str) -> np.ndarray:
    """
    A column of numbers (N,), or of lists of one length (N, length).

    Raises:
        ValueError: If there is no such column.
    """
    import pyarrow.parquet as pq

    file = pq.ParquetFile(path)
    if name not in file.schema_arrow.names:
        raise ValueError(f"{path} has no column {name}; it has {', '.join(file.schema_arrow.names)}.")
    length = getattr(file.schema_arrow.field(name).type, "list_size", None)
    columns = (batch.column(0) for batch in file.iter_batches(columns=[name]))
    if length is None:
        return np.concatenate([column.to_numpy() for column in columns])
    return np.concatenate([column.flatten().to_numpy().reshape(-1, length) for column in columns])


def nearest_page(
    table: Path,
    images: ImageDataset,
    *,
    column: str = "mean",
    num_neighbours: int = 8,
    num_shown: int = 100,
    duplicates_above: float = 0.95,
) -> str:
    """
    HTML that needs nothing besides: thumbnails are in it.

    Similarity is the cosine of features less their mean over all images, which would else be near 1 for all pairs.

    Args:
        table: What `write_embeddings` wrote of `images`.
        column (`str`, defaults to `"mean"`): Which features.
        num_neighbours (`int`, defaults to 8): Of each image that is shown; at most as many as there are others.
        num_shown (`int`, defaults to 100): Images whose neighbours are shown, from anywhere; and pairs, at most.
        duplicates_above (`float`, defaults to 0.95): Similarity from which a pair counts as near-duplicates.

    Raises:
        ValueError: If there are fewer than two images.
    """
    rows = read_column(table, "row")
    if len(rows) < 2:
        raise ValueError(f"{table} has {len(rows)} image: neighbours are of two and more.")
    features = torch.from_numpy(read_column(table, column))
    features = features - features.mean(dim=0)
    k = min(num_neighbours, len(rows) - 1)
    similarities, found = nearest_neighbours(features, features, k + 1)
    similarities, found = _without_itself(similarities, found)
    shelf = _Shelf(images, rows)
    pairs = _pairs(similarities[:, 0], found[:, 0], duplicates_above)
    shown = spread_indices(len(rows), num_shown)
    return _PAGE.format(
        title=f"Nearest images of {html.escape(images.source)}",
        side=_THUMBNAIL,
        about=html.escape(
            f"{len(rows)} images. Similarity: the cosine of the features ({column}), less their mean over all images."
        ),
        duplicates_about=f"Pairs of an image and its nearest that are more similar than {duplicates_above:g}: "
        f"{len(pairs)}{f', of which the first {num_shown} are shown' if len(pairs) > num_shown else ''}.",
        duplicates="\n".join(
            shelf.line([(first, None), (second, similarity)]) for similarity, first, second in pairs[:num_shown]
        ),
        neighbours_about=f"{len(shown)} of the images, each followed by the {k} nearest.",
        neighbours="\n".join(
            shelf.line([(place, None), *zip(found[place].tolist(), similarities[place].tolist(), strict=True)])
            for place in shown
        ),
    )


def _without_itself(similarities: torch.Tensor, found: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Each image's neighbours (N, k) of (N, k + 1) that have itself among them, or the last left out."""
    own = found == torch.arange(len(found)).unsqueeze(1)
    own[:, -1] |= ~own.any(dim=1)
    return similarities[~own].unflatten(0, (len(found), -1)), found[~own].unflatten(0, (len(found), -1))


def _pairs(similarity: torch.Tensor, nearest: torch.Tensor, above: float) -> list[tuple[float, int, int]]:
    """(similarity, one, other) of each pair once, the most similar first."""
    chosen = (similarity > above).nonzero().flatten().tolist()
    pairs = {tuple(sorted((place, nearest[place].item()))): similarity[place].item() for place in chosen}
    return sorted(((value, *pair) for pair, value in pairs.items()), key=lambda pair: (-pair[0], pair[1:]))


class _Shelf:
    """Images by their place in the table, as HTML; each is read and shrunk once."""

    def __init__(self, images: ImageDataset, rows: np.ndarray):
        self.images, self.rows = images, rows
        self.known: dict[int, str] = {}

    def line(self, entries: list[tuple[int, float | None]]) -> str:
        """A row of figures, of (place, similarity to the first)."""
        figures = "".join(self.figure(place, similarity) for place, similarity in entries)
        return f'<div class="row">{figures}</div>'

    def figure(self, place: int, similarity: float | None) -> str:
        row = int(self.rows[place])
        name = self.images.name(row)
        if row not in self.known:
            self.known[row] = _thumbnail(self.images, row)
        caption = Path(name).name if similarity is None else f"{similarity:.3f} {Path(name).name}"
        escaped = html.escape(name, quote=True)
        return (
            f'<figure><img src="{self.known[row]}" alt="{escaped}" title="{escaped}" loading="lazy">'
            f"<figcaption>{html.escape(caption)}</figcaption></figure>"
        )


def _thumbnail(images: ImageDataset, row: int) -> str:
    """The image as a data URI; of one that has gone since its features were taken, a grey square."""
    try:
        image = images[row]
        image = image / 255 if image.dtype == torch.uint8 else image.clamp(0, 1)
        thumbnail = Image.fromarray(to_rgb(image[None])[0])
    except BrokenImageError:
        thumbnail = Image.new("RGB", (_THUMBNAIL, _THUMBNAIL), "grey")
    thumbnail.thumbnail((_THUMBNAIL, _THUMBNAIL))
    stream = io.BytesIO()
    thumbnail.save(stream, "JPEG", quality=85)
    return f"data:image/jpeg;base64,{base64.b64encode(stream.getvalue()).decode()}"
