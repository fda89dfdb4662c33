"""CLEVR's two tasks, as VTAB defines them, from the annotations of its scenes: how many objects, and how near."""

import json
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ..arguments import DataArguments
from ..dataset import ImageDataset
from ..scenes import DISTANCE_EDGES, MAX_OBJECTS, MIN_OBJECTS, SCENE_LABELS
from .folder import FileImages, check_folder

CLEVR_TASKS = ("count", "distance")


def clevr_tasks(pixel_coords: Sequence[Sequence[float]]) -> dict[str, int]:
    """
    The classes of one scene.

    Args:
        pixel_coords: `(x, y, distance from the camera)` of each object, 3 to 10 of them.

    Returns:
        `{"count": 0 to 7, "distance": 0 to 5}`: objects less 3, and the bin of the nearest object's distance (above
        0, 8, 8.5, 9, 9.5 and 10).

    Raises:
        ValueError: If there are fewer objects than 3 or more than 10.
    """
    number = len(pixel_coords)
    if not MIN_OBJECTS <= number <= MAX_OBJECTS:
        raise ValueError(f"A CLEVR scene of {number} objects; expected {MIN_OBJECTS} to {MAX_OBJECTS}.")
    nearest = min(coords[2] for coords in pixel_coords)
    # As in VTAB, a distance that is an edge belongs to the bin below it.
    return {"count": number - MIN_OBJECTS, "distance": int(np.searchsorted(DISTANCE_EDGES, nearest, side="left"))}


def with_clevr_tasks(split):
    """A `datasets.Dataset`, and where it has a column `objects` (CLEVR's annotations) the two labels made of it."""
    import datasets

    objects = split.features.get("objects")
    inner = getattr(objects, "feature", objects)
    if not isinstance(inner, dict) or "pixel_coords" not in inner:
        return split
    scenes = split.select_columns(["objects"])[:]["objects"]
    # `datasets` stores a list of objects as such, or as lists of their fields.
    coords = [s["pixel_coords"] if isinstance(s, dict) else [entry["pixel_coords"] for entry in s] for s in scenes]
    tasks = [clevr_tasks(scene) for scene in coords]
    for name in CLEVR_TASKS:
        if name not in split.features:
            feature = datasets.ClassLabel(names=list(SCENE_LABELS[name]))
            split = split.add_column(name, [task[name] for task in tasks], feature=feature)
    return split


def is_clevr(folder: str | os.PathLike) -> bool:
    """Whether a folder is laid out as CLEVR's archive: `images/train`, and `scenes/CLEVR_train_scenes.json`."""
    return _annotations(folder, "train").is_file()


def open_splits(args: DataArguments) -> tuple[ImageDataset, ImageDataset]:
    """Training and validation pictures of the unpacked archive (CLEVR_v1.0), with the labels count and distance.

    Raises:
        ValueError: If the annotations of a split are missing or not CLEVR's.
    """
    return tuple(_split(check_folder(args.train_dir), split, args.num_channels) for split in ("train", "val"))


def _annotations(root, split: str) -> Path:
    return Path(root) / "scenes" / f"CLEVR_{split}_scenes.json"


def _split(root: str, split: str, num_channels: int) -> ImageDataset:
    path = _annotations(root, split)
    try:
        scenes = json.loads(path.read_text())["scenes"]
        names = [os.path.join("images", split, scene["image_filename"]) for scene in scenes]
        tasks = [clevr_tasks([entry["pixel_coords"] for entry in scene["objects"]]) for scene in scenes]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} cannot be read as CLEVR's annotations: {error!r}") from error
    return ImageDataset(
        FileImages(os.fspath(root), names),
        num_channels,
        source=os.path.join(root, "images", split),
        labels={name: [task[name] for task in tasks] for name in CLEVR_TASKS},
        label_names={name: list(SCENE_LABELS[name]) for name in CLEVR_TASKS},
    )
