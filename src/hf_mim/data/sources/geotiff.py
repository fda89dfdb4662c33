"""
GeoTIFF scenes, cut into tiles of `--tile_size` on the fly.

A scene is covered by tiles from its upper left corner; the last of a row and of a column end at the scene's edge, over
their neighbours where its size is no multiple. Tiles in which nothing is measured (`nodata`, a mask band, alpha) are
left out; of others, what is not measured gets the mean of the tile's other pixels, band by band.
"""

import numpy as np

from ..arguments import DataArguments
from ..dataset import ImageDataset
from ..images import BrokenImageError
from . import folder
from .parts import PartImages

ENDINGS = (".tif", ".tiff")


def open_splits(args: DataArguments) -> tuple[ImageDataset, ImageDataset | None]:
    """The tiles of `--train_dir`, and of `--validation_dir` or the split beside them.

    Raises:
        ValueError: there are none, or a scene has not the bands that are wanted, or others than its neighbours.
        ImportError: rasterio is not installed.
    """
    return folder.open_splits(
        args, ENDINGS, lambda root, paths: SceneTiles(root, paths, args.tile_size, args.bands, args.value_range)
    )


class SceneTiles(PartImages):
    """
    Tiles of scenes: a part is (row, column, height, width) in pixels of the scene. A scene whose header names a value
    or a mask for what is not measured is gone through once, when it is made, tile by tile.

    Args:
        tile_size (`int`): height and width; a scene that is smaller is one tile.
        bands (`list[int]`, *optional*): which bands, in this order, from 1; all if None.
    """

    part_size = 4

    def __init__(self, root: str, paths: list[str], tile_size: int, bands: list[int] | None = None, value_range=None):
        import rasterio  # noqa: F401

        self.tile_size, self.bands = tile_size, bands
        self._first: tuple[int, str] | None = None
        super().__init__(root, paths, value_range, (tile_size, bands))

    def list_parts(self, path: str) -> np.ndarray:
        with _open(path) as scene:
            self._check_bands(path, scene.count)
            tiles = [
                (row, column, min(self.tile_size, scene.height), min(self.tile_size, scene.width))
                for row in _starts(scene.height, self.tile_size)
                for column in _starts(scene.width, self.tile_size)
            ]
            if all("all_valid" in (flag.name for flag in flags) for flags in scene.mask_flag_enums):
                return np.array(tiles)
            return np.array([tile for tile in tiles if _has_data(scene, tile)])

    def _check_bands(self, path: str, number: int) -> None:
        if self.bands is not None:
            if max(self.bands) > number:
                raise ValueError(f"--bands {' '.join(map(str, self.bands))}: {path} has {number} bands.")
            return
        self._first = self._first or (number, path)
        if number != self._first[0]:
            raise ValueError(
                f"{path} has {number} bands, and {self._first[1]} has {self._first[0]}: say by --bands which are read."
            )

    def read(self, path: str, part: np.ndarray) -> np.ndarray:
        with _open(path) as scene:
            tile = scene.read(self.bands, window=_window(part), masked=True)
        values, hidden = tile.data, np.ma.getmaskarray(tile)
        if hidden.any():
            values = values.copy()
            for band, missing in zip(values, hidden, strict=True):
                known = band[~missing]
                band[missing] = known.mean(dtype=np.float64) if known.size else 0
        return values.transpose(1, 2, 0)

    def describe(self, part: np.ndarray) -> str:
        return f"tile at row {part[0]}, column {part[1]}"


def _open(path: str):
    import rasterio

    try:
        return rasterio.open(path)
    except rasterio.errors.RasterioError as error:
        raise BrokenImageError(f"{path}: cannot be read as GeoTIFF: {error}") from error


def _window(part):
    from rasterio.windows import Window

    row, column, height, width = (int(number) for number in part)
    return Window(column, row, width, height)


def _starts(length: int, tile: int) -> list[int]:
    last = max(length - tile, 0)
    return [*range(0, last, tile), last]


def _has_data(scene, part) -> bool:
    import rasterio

    try:
        return bool(scene.dataset_mask(window=_window(part)).any())
    except rasterio.errors.RasterioError:
        # Kept: it says so when it is read.
        return True
