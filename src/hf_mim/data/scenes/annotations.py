"""What the renderer knows of every pixel of a scene: which solid it shows, of which shape, and how far away."""

from dataclasses import dataclass

import numpy as np

from .arithmetic import dot
from .geometry import FOCAL, SHAPES, Scene, check_image_size, sample_scene
from .surfaces import find_surfaces, ground_depth

MASK_CLASSES = ("background", *SHAPES)
# Rays that rise count as meeting the ground further away than this, which none that falls does.
_HORIZON = 1000.0


@dataclass(frozen=True)
class SceneAnnotations:
    """What is seen where in a scene's picture of height x width pixels.

    A pixel belongs to what fills most of it: of equal shares to a solid rather than the ground, and to the nearer of
    two solids. A solid that wins no pixel (in very small pictures) is not annotated.

    Attributes:
        mask: class of each pixel, indices into `MASK_CLASSES`, uint8 of shape (height, width).
        instances: 0 on the ground, k + 1 where solid k of those annotated is seen, uint8 of shape (height, width).
        depth: distance of what is seen along the camera's axis, in scene units (as the label `distance`), float32 of
            shape (height, width); 0 where there is nothing, above the horizon of very tall pictures.
        boxes: of each solid's visible pixels, x0, y0, x1, y1 in pixels (pixel [0, 0] covers 0 to 1), as tight as can
            be, float32 of shape (n, 4).
        classes: of each solid, indices into `MASK_CLASSES` (1 or more), int64 of shape (n,).
    """

    mask: np.ndarray
    instances: np.ndarray
    depth: np.ndarray
    boxes: np.ndarray
    classes: np.ndarray


def annotate_scene(
    index: int, *, split: str = "train", seed: int = 0, image_size: int | tuple[int, int] = 64
) -> SceneAnnotations:
    """What is seen in each pixel of `render_scene`'s picture of the same arguments: as pure a function of them.

    Args:
        index: 0 to 2**63 - 1.
        split: "train", "validation" or "test": three unrelated series.
        seed: 0 to 2**63 - 1; another seed, another data set.
        image_size: side of a square picture, or (height, width); each at least 16 pixels.

    Raises:
        ValueError: for an unknown split, an index or seed out of its range, or a picture of less than 16 pixels.
    """
    height, width = check_image_size(image_size)
    return annotate(sample_scene(index, split=split, seed=seed), height, width)


def annotate(scene: Scene, height: int, width: int) -> SceneAnnotations:
    focal = FOCAL * min(height, width)
    pixel, cover, solid, _, point = find_surfaces(scene, height, width, focal)
    away = dot(point - scene.camera.astype(np.float32)[:, None], scene.axes[2].astype(np.float32))
    # What was found so far to fill most of each pixel: at first the ground, with what no solid covers.
    share = 1 - np.bincount(pixel, weights=cover, minlength=height * width)
    owner = np.zeros(height * width, dtype=np.int64)
    ground = ground_depth(scene, height, focal)
    depth = np.repeat(np.where(ground < _HORIZON, ground, np.float32(0)), width)
    number = len(scene.shape)
    ends = np.searchsorted(solid, np.arange(number + 1))
    for k in range(number):
        own = slice(ends[k], ends[k + 1])
        where, filled, near = pixel[own], cover[own], away[own]
        before = share.take(where)
        # Shares are counts of a pixel's eight rays, so that equal ones are equal to the bit.
        wins = (filled > before) | ((filled == before) & ((owner.take(where) == 0) | (near < depth.take(where))))
        where = where[wins]
        share[where], owner[where], depth[where] = filled[wins], k + 1, near[wins]
    seen = np.flatnonzero(np.bincount(owner, minlength=number + 1)[1:])
    names = np.zeros(number + 1, dtype=np.uint8)
    names[seen + 1] = np.arange(1, len(seen) + 1)
    classes = scene.shape[seen] + 1
    instances = names[owner].reshape(height, width)
    return SceneAnnotations(
        mask=np.concatenate([[0], classes]).astype(np.uint8)[instances],
        instances=instances,
        depth=depth.reshape(height, width),
        boxes=_boxes(instances, len(seen)),
        classes=classes,
    )


def _boxes(instances: np.ndarray, number: int) -> np.ndarray:
    boxes = np.empty((number, 4), dtype=np.float32)
    for k in range(number):
        here = instances == k + 1
        rows, columns = np.flatnonzero(here.any(axis=1)), np.flatnonzero(here.any(axis=0))
        boxes[k] = columns[0], rows[0], columns[-1] + 1, rows[-1] + 1
    return boxes
