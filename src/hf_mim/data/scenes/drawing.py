"""From a scene to its picture.

Why it is fast: the ground and its soft shadows are analytic and smooth, so one ray a pixel is enough; a solid is
ray-cast only inside its projected bounding box, at eight points a pixel for smooth edges, and shaded once a pixel; and
the boxes of all the solids of a scene are laid end to end in one flat array, so that many solids take no more calls of
numpy than few.
"""

import numpy as np

from .geometry import FOCAL, Scene, check_image_size, sample_scene
from .shading import light_ground, shade
from .surfaces import find_surfaces

# Light is added up in linear numbers from 0 to _WHITE. A table turns it into sRGB bytes, and rolls it off softly above
# _KNEE rather than clipping it, so that highlights keep their shape.
_WHITE, _KNEE, _TONES = 1.8, 0.6, 4096


def _tone_table() -> np.ndarray:
    light = np.linspace(0.0, _WHITE, _TONES)
    room = 1.0 - _KNEE
    light = np.where(light < _KNEE, light, _KNEE + room * np.tanh((light - _KNEE) / room))
    srgb = np.where(light < 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055)
    return np.round(255 * srgb).astype(np.uint8)


_TONE_TABLE = _tone_table()


def render_scene(
    index: int, *, split: str = "train", seed: int = 0, image_size: int | tuple[int, int] = 64
) -> tuple[np.ndarray, dict[str, int]]:
    """Draw scene `index` of a split: a pure function of `(seed, split, index, image_size)`.

    The scene and its labels do not depend on the size. A rectangular picture shows what the square one of its shorter
    side shows, and more of the surroundings along its longer side.

    Args:
        index: 0 to 2**63 - 1.
        split: "train", "validation" or "test": three unrelated series.
        seed: 0 to 2**63 - 1; another seed, another data set.
        image_size: side of a square picture, or (height, width); each at least 16 pixels.

    Returns:
        The picture, uint8 of shape (height, width, 3), sRGB from 0 to 255, and its labels: `count` (0 to 7),
        `distance` (0 to 5), `shape` (0 to 2) and `color` (0 to 7), indices into the names in `SCENE_LABELS`.

    Raises:
        ValueError: for an unknown split, an index or seed out of its range, or a picture of less than 16 pixels.
    """
    height, width = check_image_size(image_size)
    scene = sample_scene(index, split=split, seed=seed)
    return _draw(scene, height, width), scene.labels()


def _draw(scene: Scene, height: int, width: int) -> np.ndarray:
    """The picture of a scene, uint8 of shape (height, width, 3)."""
    focal, pixels = FOCAL * min(height, width), height * width
    lamp_color = np.float32([[1.0 + 0.05 * scene.warmth], [1.0], [1.0 - 0.08 * scene.warmth]])
    sky_color = np.float32([[1.0 - 0.04 * scene.warmth], [1.0], [1.0 + 0.05 * scene.warmth]])
    lamp, sky = light_ground(scene, height, width, focal)
    pixel, cover, solid, normal, point = find_surfaces(scene, height, width, focal)
    # Where no solid is met, the ground is seen; it is smooth enough to be the same all over a pixel.
    bare = 1 - np.bincount(pixel, weights=cover, minlength=pixels).astype(np.float32)
    light = (lamp.ravel() * bare) * lamp_color + (sky.ravel() * bare) * sky_color
    for channel, color in zip(light, shade(scene, solid, normal, point, lamp_color, sky_color), strict=True):
        channel += np.bincount(pixel, weights=cover * color, minlength=pixels)
    light *= np.float32((_TONES - 1) / _WHITE)
    image = np.empty((pixels, 3), dtype=np.uint8)
    image.T[:] = _TONE_TABLE.take(light.astype(np.intp), mode="clip")
    return image.reshape(height, width, 3)
