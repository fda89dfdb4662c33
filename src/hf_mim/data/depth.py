"""Pictures with maps of how far away each pixel is: where they are, and reading and checking them."""

from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np

from .arguments import DataArguments
from .dataset import ImageDataset
from .dense import MapArguments, load_maps, open_map, read_maps
from .loading import spread_indices

# Scenes of which the usual depth is computed.
_SAMPLED = 256


@dataclass
class DepthMapArguments(MapArguments):
    """Where the depth maps are. With neither: those of the embedded scenes."""

    kind: ClassVar[str] = "depth"
    usual_columns: ClassVar[list[str]] = ["depth", "depth_map", "label"]
    unknown: ClassVar[float] = 0.0

    train_depth_dir: str | None = field(
        default=None,
        metadata={
            "help": "Folder of depth maps beside --train_dir: one of the same stem for each picture, a grey PNG of 16 "
            "bits, or .npy; 0 (and NaN) where it is not known."
        },
    )
    validation_depth_dir: str | None = field(
        default=None, metadata={"help": "The same for --validation_dir. Default: a share of training is held out."}
    )
    depth_column_name: str | None = field(
        default=None, metadata={"help": "Column of the depths in --dataset_name. Default: depth, depth_map or label."}
    )
    depth_scale: float = field(
        default=1.0, metadata={"help": "Depth that a stored number of 1 stands for: 0.001 of millimetres, in metres."}
    )

    def __post_init__(self):
        if not 0 < self.depth_scale < float("inf"):
            raise ValueError(f"--depth_scale is {self.depth_scale}; expected a number above 0.")
        super().__post_init__()

    def read(self, value, name: str) -> np.ndarray:
        """
        The depths of a picture's pixels times `depth_scale`, float32 of shape (height, width), 0 where they are not
        known.

        Raises:
            ValueError: If it cannot be read, or its numbers are no depths: colours, 8 bits, or below 0.
        """
        opened = open_map(value, name, "depth map")
        if not isinstance(opened, np.ndarray):
            if opened.mode[0] not in "IF":
                what = "8 bits a pixel" if opened.mode in ("L", "P", "1") else f"colours ({opened.mode})"
                raise ValueError(
                    f"{name}: a depth map of {what}; expected a grey PNG of 16 bits, a TIFF of floats, or .npy. What "
                    "only shows depths to the eye has lost them."
                )
            opened = np.array(opened)
        if opened.ndim == 3 and 1 in (opened.shape[0], opened.shape[2]):
            opened = opened.squeeze(0 if opened.shape[0] == 1 else 2)
        if opened.ndim != 2 or opened.size == 0:
            raise ValueError(f"{name}: a depth map of the shape {opened.shape}; expected (height, width).")
        if opened.dtype.kind not in "uif":
            raise ValueError(f"{name}: a depth map of {opened.dtype}; expected numbers.")
        depths = opened.astype(np.float32) * np.float32(self.depth_scale)
        depths[~np.isfinite(depths)] = 0
        if depths.min() < 0:
            raise ValueError(
                f"{name}: a depth of {depths.min():g}; expected numbers above 0, and 0 or NaN where it is not known."
            )
        return depths


def load_depths(
    data_args: DataArguments, depth_args: DepthMapArguments, seed: int
) -> tuple[ImageDataset, ImageDataset, float]:
    """
    Training and held-out pictures with depth maps that were all read once, and the mean of the natural logarithm of
    the training pictures' depths.

    Raises:
        ValueError: If there are no depth maps, or one of them is not as it should be.
    """
    train, validation = load_maps(data_args, depth_args, seed)
    if not data_args.train_dir and not data_args.dataset_name:
        if depth_args.depth_scale != 1:
            raise ValueError("--depth_scale is of depth maps of your own; the scenes' have their unit.")
        # Drawn by the renderer, which cannot be wrong about them.
        sample = train.select(spread_indices(len(train), _SAMPLED))
        maps = (sample.annotated(index, ["depth"])["depth"].numpy() for index in range(len(sample)))
        return train, validation, _mean_log(maps, train)
    mean = _mean_log((depths for _, depths in read_maps(train, "depth")), train)
    _mean_log((depths for _, depths in read_maps(validation, "depth")), validation)
    return train, validation, mean


def _mean_log(maps, images: ImageDataset) -> float:
    """Raises ValueError if no pixel has a depth."""
    total, number = 0.0, 0
    for depths in maps:
        known = depths[depths > 0]
        total, number = total + float(np.log(known, dtype=np.float64).sum()), number + known.size
    if number == 0:
        raise ValueError(f"No pixel of the depth maps of {images.source} has a depth: all are 0 or NaN.")
    return total / number
