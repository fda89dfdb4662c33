"""The embedded data set: pictures in the manner of CLEVR, drawn by numpy, with labels known exactly.

A scene is a ground plane seen in perspective by a jittered camera under a jittered lamp, with 3 to 10 solids on it:
spheres, cubes and cylinders in CLEVR's eight colours, two sizes and two materials (matte rubber, shiny metal). Scene
`index` of a split is a pure function of `(seed, split, index)`: nothing else, not the image size, the order or the
process, changes it or its labels, nor does the machine: what is drawn is the same to the bit on any that computes
by IEEE 754, since the functions whose last bits differ between processors are not used (see `_dot` and below).

Four labels, each an integer class (`SCENE_LABELS` has the names):

* `count` (8 classes): the number of solids, 3 to 10.
* `distance` (6 classes): the depth of the nearest solid's centre along the camera's axis (the "third pixel coordinate"
  of CLEVR), in VTAB's bins, whose edges are 0, 8, 8.5, 9, 9.5, 10 and 100.
* `shape` (3 classes) and `color` (8 classes) of that nearest solid, which is nearer than any other by `DEPTH_GAP` or
  more, so that the labels never hang on a hair.

How a picture is drawn, and why it is fast: the ground and its soft shadows are analytic and smooth, so one ray a pixel
is enough; a solid is ray-cast only inside its projected bounding box, at eight points a pixel for smooth edges, and
shaded once a pixel; and the boxes of all the solids of a scene are laid end to end in one flat array, so that many
solids take no more calls of numpy than few. Importing this module costs numpy alone.
"""

import io
import math
from dataclasses import dataclass

import numpy as np

# Raise it whenever a drawn pixel or a label changes: it is part of the name of the cached data set.
SCENES_VERSION = 2

SPLITS = ("train", "validation", "test")
SHAPES = ("sphere", "cube", "cylinder")
SPHERE, CUBE, CYLINDER = range(3)
# CLEVR's colours, as sRGB bytes.
COLORS = {
    "gray": (87, 87, 87),
    "red": (173, 35, 35),
    "blue": (42, 75, 215),
    "green": (29, 105, 20),
    "brown": (129, 74, 25),
    "purple": (129, 38, 192),
    "cyan": (41, 208, 208),
    "yellow": (255, 238, 51),
}
SIZES = (0.4, 0.72)
MIN_OBJECTS, MAX_OBJECTS = 3, 10
DISTANCE_EDGES = (8.0, 8.5, 9.0, 9.5, 10.0)
SCENE_LABELS = {
    "count": tuple(str(n) for n in range(MIN_OBJECTS, MAX_OBJECTS + 1)),
    "distance": ("below 8", "8 to 8.5", "8.5 to 9", "9 to 9.5", "9.5 to 10", "above 10"),
    "shape": SHAPES,
    "color": tuple(COLORS),
}

MIN_IMAGE_SIZE = 16
# How many processes can share the drawing of a data set.
_MAX_PARTS = 64
# Focal length over the shorter side of the picture: a field of view of 41 degrees.
FOCAL = 1.33
# Half-extents of the part of the ground that solids stand on: to the sides, and towards and away from the camera.
FIELD = (3.1, 3.7)
# CLEVR's margin between solids on the ground, in scene units.
MARGIN = 0.25
DEPTH_GAP = 0.1
# The disc around a solid's projected centre that its silhouette just fits in, in units of the solid's radius.
SILHOUETTE = (1.0, 1.17, 1.4)


@dataclass(frozen=True)
class Scene:
    """The geometry of one scene: what is drawn, and what the labels are read from.

    World axes: x to the right, y away from the camera, z up; the ground is z = 0. Angles are in radians.

    Attributes:
        camera: camera position, float64 of shape (3,).
        axes: rows right, down and forward (unit vectors of the world), float64 of shape (3, 3).
        light: unit vector towards the key lamp, float64 of shape (3,).
        warmth: colour of the lamp, from -1 (cool) to 1 (warm).
        backdrop: brightness of the ground, around 1.
        shape: indices into `SHAPES`, int64 of shape (n,), in ascending order (drawing relies on it).
        color: indices into the keys of `COLORS`, int64 of shape (n,).
        metal: True for metal, False for rubber, bool of shape (n,).
        radius: half the height of a sphere or cylinder, `SIZES`; a cube's half edge is this over sqrt(2). (n,).
        center: centres of the solids, float64 of shape (n, 3).
        angle: rotation about the vertical, float64 of shape (n,).
    """

    camera: np.ndarray
    axes: np.ndarray
    light: np.ndarray
    warmth: float
    backdrop: float
    shape: np.ndarray
    color: np.ndarray
    metal: np.ndarray
    radius: np.ndarray
    center: np.ndarray
    angle: np.ndarray

    @property
    def half_size(self) -> np.ndarray:
        """Half the height of each solid, which is what its unit shape is scaled by; float64 of shape (n,)."""
        # As in CLEVR, a cube is shrunk so that its base fits the circle that a cylinder of its size stands on.
        return np.where(self.shape == CUBE, self.radius / math.sqrt(2.0), self.radius)

    @property
    def depth(self) -> np.ndarray:
        """Distance of each centre from the camera along the camera's axis; float64 of shape (n,)."""
        return _dot((self.center - self.camera).T, self.axes[2])

    def project(self, points: np.ndarray, image_size: int | tuple[int, int]) -> np.ndarray:
        """Pixel coordinates (x to the right, y down; pixel [0, 0] covers 0 to 1) of world points (n, 3), as (n, 2)."""
        height, width = _check_image_size(image_size)
        right, down, forward = _apply(self.axes, points - self.camera).T
        scale = FOCAL * min(height, width) / forward
        return np.stack([width / 2 + right * scale, height / 2 + down * scale], axis=1)

    def labels(self) -> dict[str, int]:
        """The four labels, as class indices into the names in `SCENE_LABELS`."""
        depth = self.depth
        nearest = int(depth.argmin())
        return {
            "count": len(self.shape) - MIN_OBJECTS,
            "distance": int(np.searchsorted(DISTANCE_EDGES, depth[nearest], side="right")),
            "shape": int(self.shape[nearest]),
            "color": int(self.color[nearest]),
        }


def sample_scene(index: int, *, split: str = "train", seed: int = 0) -> Scene:
    """Draw the geometry of scene `index` of a split: a pure function of `(seed, split, index)`.

    The number of solids is uniform from 3 to 10. As in CLEVR, solids keep a margin on the ground, all are in the frame
    of a square picture, and no solid hides the centre of another.

    Args:
        index: 0 to 2**63 - 1.
        split: "train", "validation" or "test": three unrelated series.
        seed: 0 to 2**63 - 1; another seed, another data set.

    Returns:
        The `Scene`.

    Raises:
        ValueError: for an unknown split, or an index or seed out of its range.
    """
    _check_series(split, seed)
    if not 0 <= index < 2**63:
        raise ValueError(
            f"index is {index}, but scenes are numbered from 0 to 2**63 - 1: pass a number in that range."
        )
    # Philox is a counter-based generator: (seed, split) is the key, and the index sits in the counter's top word, so
    # that each scene owns a stream of its own and none has to be skipped through to reach it.
    rng = np.random.Generator(np.random.Philox(key=[seed, SPLITS.index(split)], counter=[0, 0, 0, index]))
    num_objects = int(rng.integers(MIN_OBJECTS, MAX_OBJECTS + 1))

    jitter = (2 * rng.random(8) - 1).tolist()
    distance, elevation, azimuth = 11.5 + 0.8 * jitter[0], math.radians(33 + 3 * jitter[1]), 0.12 * jitter[2]
    # The lamp stands to the left of the camera and above, so that shadows fall to the right and away, as in CLEVR.
    lamp_azimuth, lamp_height = math.radians(215 + 25 * jitter[5]), math.radians(52 + 7 * jitter[6])
    cos, sin = _cos_sin(np.array([elevation, azimuth, lamp_azimuth, lamp_height]))
    level = distance * cos[0]
    camera = np.array([level * sin[1], -level * cos[1], distance * sin[0]])
    target = np.array([0.12 * jitter[3], 0.15 + 0.15 * jitter[4], 0.1])
    forward = (target - camera) / _length(target - camera)
    right = np.array([forward[1], -forward[0], 0.0]) / _length(forward[:2])
    down = np.array([-forward[2] * right[1], forward[2] * right[0], forward[0] * right[1] - forward[1] * right[0]])
    axes = np.stack([right, down, forward])
    light = np.array([cos[3] * cos[2], cos[3] * sin[2], sin[3]])
    warmth = jitter[7]
    backdrop = 0.9 + 0.2 * rng.random()

    # A crowded draw may leave no room: it is thrown away whole, but for the number of solids, which stays uniform.
    while True:
        shape = np.sort(rng.integers(len(SHAPES), size=num_objects))
        radius = np.array(SIZES)[rng.integers(len(SIZES), size=num_objects)]
        half_size = np.where(shape == CUBE, radius / math.sqrt(2.0), radius)
        center = _place(rng, camera, axes, shape, radius, half_size)
        if center is None:
            continue
        first, second = np.partition(_dot((center - camera).T, forward), 1)[:2]
        if second - first >= DEPTH_GAP:
            break
    return Scene(
        camera=camera,
        axes=axes,
        light=light,
        warmth=warmth,
        backdrop=backdrop,
        shape=shape,
        color=rng.integers(len(COLORS), size=num_objects),
        metal=rng.random(num_objects) < 0.5,
        radius=radius,
        center=center,
        angle=np.where(shape == CUBE, math.pi / 2 * rng.random(num_objects), 0.0),
    )


def _place(rng, camera, axes, shape, radius, half_size, tries=96):
    """Centres (n, 3) of solids that neither touch, hide each other's centres, nor leave the frame; None if no room."""
    num_objects = len(shape)
    spots = (2 * rng.random((tries, 2)) - 1) * FIELD
    # A spot's place in the camera's frame at ground level; a solid's centre is the same, half its height further up.
    seen = (_apply(axes[:, :2], spots) - _apply(axes, camera)).tolist()
    up = axes[:, 2].tolist()
    reach = (radius * np.array(SILHOUETTE)[shape]).tolist()
    half_size, radius = half_size.tolist(), radius.tolist()
    placed, k = [], 0
    for (x, y), (right, down, forward) in zip(spots.tolist(), seen, strict=True):
        rise = half_size[k]
        depth = forward + rise * up[2]
        u, v, extent = (right + rise * up[0]) / depth, (down + rise * up[1]) / depth, reach[k] / depth
        if max(abs(u), abs(v)) + extent > 0.47 / FOCAL:
            continue
        for other_x, other_y, other_radius, other_u, other_v, other_extent, other_depth in placed:
            if (
                math.sqrt((x - other_x) * (x - other_x) + (y - other_y) * (y - other_y))
                < radius[k] + other_radius + MARGIN
            ):
                break
            # What matters is the silhouette of the nearer of the two: the further one's centre stays clear of it.
            clear = 1.05 * (extent if depth < other_depth else other_extent)
            if math.sqrt((u - other_u) * (u - other_u) + (v - other_v) * (v - other_v)) < clear:
                break
        else:
            placed.append((x, y, radius[k], u, v, extent, depth))
            k += 1
            if k == num_objects:
                return np.array([(x, y, rise) for (x, y, *_), rise in zip(placed, half_size, strict=True)])
    return None


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
    height, width = _check_image_size(image_size)
    scene = sample_scene(index, split=split, seed=seed)
    return _draw(scene, height, width), scene.labels()


def scenes(
    split: str = "train",
    num_images: int = 12000,
    *,
    image_size: int | tuple[int, int] = 64,
    seed: int = 0,
    num_proc: int | None = None,
    cache_dir: str | None = None,
):
    """The first `num_images` scenes of a split as a `datasets.Dataset`, drawn on the first call and cached on disk.

    Later calls with the same split, number, size and seed load what was drawn, whatever `num_proc` was. A drawing that
    was stopped leaves nothing behind that a later call would take for whole. Of two processes that ask for the same
    scenes at once, one draws them and the other waits.

    Args:
        split: "train", "validation" or "test": three unrelated series.
        num_images: 1 or more.
        image_size: side of square pictures, or (height, width); each at least 16 pixels.
        seed: 0 to 2**63 - 1; another seed, another data set.
        num_proc: how many processes draw; None draws in this one.
        cache_dir: where `datasets` keeps what was drawn; None for its usual place.

    Returns:
        A `datasets.Dataset` with the columns `image` (`datasets.Image`, kept as PNG) and `count`, `distance`, `shape`
        and `color` (`datasets.ClassLabel`, with the names in `SCENE_LABELS`). Row i is what `render_scene(i)` draws.

    Raises:
        ValueError: for an unknown split, a seed out of its range, less than one picture, or pictures of less than 16
            pixels.
    """
    _check_series(split, seed)
    height, width = _check_image_size(image_size)
    if num_images < 1:
        raise ValueError(f"num_images is {num_images}, but a data set needs at least one: pass 1 or more.")
    from datasets import ClassLabel, Dataset, Features, Image, NamedSplit

    # Processes share out whole parts. The parts do not depend on their number, nor does the name in the cache.
    num_parts = min(num_images, _MAX_PARTS)
    labels = {name: ClassLabel(names=list(names)) for name, names in SCENE_LABELS.items()}
    ends = [num_images * i // num_parts for i in range(num_parts + 1)]
    return Dataset.from_generator(
        _generate,
        features=Features(image=Image(), **labels),
        gen_kwargs={
            "parts": list(zip(ends[:-1], ends[1:], strict=True)),
            "split": split,
            "seed": seed,
            "image_size": (height, width),
        },
        split=NamedSplit(split),
        num_proc=None if num_proc is None else min(num_proc, num_parts),
        cache_dir=cache_dir,
        fingerprint=f"scenes-v{SCENES_VERSION}-{split}-{num_images}-{height}x{width}-{seed}",
    )


def _generate(parts, split, seed, image_size):
    from PIL import Image

    for start, stop in parts:
        for index in range(start, stop):
            picture, labels = render_scene(index, split=split, seed=seed, image_size=image_size)
            file = io.BytesIO()
            # Light compression: three times as fast as the default, and about a tenth larger.
            Image.fromarray(picture).save(file, format="PNG", compress_level=1)
            yield {"image": {"path": None, "bytes": file.getvalue()}, **labels}


# Where in a pixel its eight rays go, from its centre, in sixteenths. No two share a row or a column, so that an edge
# that moves across a pixel meets them one by one.
_RAYS = np.array([(1, -3), (-1, 3), (5, 1), (-3, -5), (-5, 5), (-7, -1), (3, 7), (7, -7)], dtype=np.float32) / 16
_FAR = np.float32(1e9)
# Radius of the ball that stands in for a solid of each shape, in units of its half height.
_BULK = (1.0, 1.2, 1.1)
_CORNERS = np.array([(x, y, z) for x in (-1, 1) for y in (-1, 1) for z in (-1, 1)], dtype=np.float64)
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


def _to_linear(srgb: np.ndarray) -> np.ndarray:
    srgb = np.asarray(srgb) / 255
    return np.where(srgb < 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4)


_ALBEDO = _to_linear(list(COLORS.values())).astype(np.float32).T


def _draw(scene: Scene, height: int, width: int) -> np.ndarray:
    """The picture of a scene, uint8 of shape (height, width, 3)."""
    focal, pixels = FOCAL * min(height, width), height * width
    lamp_color = np.float32([[1.0 + 0.05 * scene.warmth], [1.0], [1.0 - 0.08 * scene.warmth]])
    sky_color = np.float32([[1.0 - 0.04 * scene.warmth], [1.0], [1.0 + 0.05 * scene.warmth]])
    lamp, sky = _light_ground(scene, height, width, focal)
    pixel, cover, solid, normal, point = _find_surfaces(scene, height, width, focal)
    # Where no solid is met, the ground is seen; it is smooth enough to be the same all over a pixel.
    bare = 1 - np.bincount(pixel, weights=cover, minlength=pixels).astype(np.float32)
    light = (lamp.ravel() * bare) * lamp_color + (sky.ravel() * bare) * sky_color
    for channel, color in zip(light, _shade(scene, solid, normal, point, lamp_color, sky_color), strict=True):
        channel += np.bincount(pixel, weights=cover * color, minlength=pixels)
    light *= np.float32((_TONES - 1) / _WHITE)
    picture = np.empty((pixels, 3), dtype=np.uint8)
    picture.T[:] = _TONE_TABLE.take(light.astype(np.intp), mode="clip")
    return picture.reshape(height, width, 3)


def _light_ground(scene, height, width, focal):
    """Light that each pixel gets from the ground, by lamp and by sky: two arrays (height, width), float32."""
    camera, axes = scene.camera.astype(np.float32), scene.axes.astype(np.float32)
    u = (np.arange(width, dtype=np.float32) + np.float32(0.5 - width / 2)) / np.float32(focal)
    v = ((np.arange(height, dtype=np.float32) + np.float32(0.5 - height / 2)) / np.float32(focal))[:, None]
    # The camera is level from left to right, so that how far a ray goes to the ground depends on its row alone. Rays
    # that rise are let meet it very far away, where it has long faded into the backdrop: no horizon is seen.
    depth = camera[2] / np.maximum(-(axes[2, 2] + v * axes[1, 2]), np.float32(1e-3))
    x = (camera[0] + depth * (axes[2, 0] + v * axes[1, 0])) + (depth * axes[0, 0]) * u
    y = (camera[1] + depth * (axes[2, 1] + v * axes[1, 1])) + (depth * axes[0, 1]) * u
    # A pool of light around the middle, a little towards the lamp.
    aside, beyond = x - np.float32(scene.light[0]), y - np.float32(scene.light[1])
    pool = 1 / (1 + (aside * aside + beyond * beyond) / 90)
    lamp = np.float32(0.4 * scene.backdrop) * pool
    sky = np.float32(0.085 * scene.backdrop) * pool + np.float32(0.065 * scene.backdrop)
    _cast_shadows(scene, x, y, lamp, sky)
    return lamp, sky


def _cast_shadows(scene, x, y, lamp, sky):
    """Darken `lamp` by the solids' shadows and `sky` by their closeness, in place.

    All four arrays are (height, width); `x` and `y` say where on the ground each pixel looks. A prism's shadow is its
    base swept along the ground, away from the lamp; a sphere's is an ellipse. A shadow's edge is sharp where the solid
    touches the ground, and softer the higher the part of the solid that casts it.
    """
    height, width = lamp.shape
    size, radius = scene.half_size, scene.radius
    slope = -scene.light[:2] / scene.light[2]
    ahead = slope / _length(slope)
    length = 2 * size * _length(slope)
    reach = np.where(scene.shape == SPHERE, 2.4, 1.9) * radius
    # A shadow with its soft edge is inside the box of two squares, one around the solid's foot, one around the tip.
    points = np.zeros((len(size), 8, 3))
    points[:, :, :2] = scene.center[:, None, :2] + reach[:, None, None] * _CORNERS[:, :2]
    points[:, ::2, :2] += (length[:, None] * ahead)[:, None]
    spots = scene.project(points.reshape(-1, 3), (height, width)).reshape(-1, 8, 2)
    boxes = _boxes(spots.min(axis=1), spots.max(axis=1), height, width)
    solid, row, column = _lay_out(boxes)

    cos, sin = _cos_sin(scene.angle)
    table = np.array([scene.center[:, 0], scene.center[:, 1], size, radius, length, reach, cos, sin], dtype=np.float32)
    cx, cy, size, radius, length, reach, cos, sin = table.take(solid, axis=1)
    pixel = row * width + column
    qx, qy = x.take(pixel) - cx, y.take(pixel) - cy
    ahead_x, ahead_y = ahead.astype(np.float32)
    along, across = qx * ahead_x + qy * ahead_y, qy * ahead_x - qx * ahead_y
    # Of each place on the ground: the distance from the shadow's outline (negative inside), and from the solid's foot.
    edge, near = np.empty_like(qx), np.sqrt(qx * qx + qy * qy)
    cube, cylinder = np.searchsorted(solid, np.searchsorted(scene.shape, [CUBE, CYLINDER]))

    part = slice(0, cube)
    squeezed = (along[part] - length[part] / 2) * np.float32(scene.light[2])
    edge[part] = np.sqrt(squeezed**2 + across[part] ** 2) - radius[part]

    part = slice(cube, cylinder)
    a, cos, sin, sweep = size[part], cos[part], sin[part], length[part]
    px, py = cos * qx[part] + sin * qy[part], cos * qy[part] - sin * qx[part]
    ax, ay = cos * ahead_x + sin * ahead_y, cos * ahead_y - sin * ahead_x
    # A swept square is a hexagon, with two sides across its own x, two across its own y and two along the sweep.
    half_x, half_y = sweep * ax / 2, sweep * ay / 2
    sides = _outside(np.abs(px - half_x) - (a + np.abs(half_x)), np.abs(py - half_y) - (a + np.abs(half_y)))
    edge[part] = np.maximum(sides, np.abs(across[part]) - a * (np.abs(ax) + np.abs(ay)))
    near[part] = np.maximum(_outside(np.abs(px) - a, np.abs(py) - a), 0)

    part = slice(cylinder, None)
    beyond = along[part] - np.minimum(np.maximum(along[part], 0), length[part])
    edge[part] = np.sqrt(beyond**2 + across[part] ** 2) - radius[part]
    near[part] = np.maximum(near[part] - radius[part], 0)

    caster = 2 * size * np.minimum(np.maximum(along / length, 0), 1)
    lit = _soft_edge(edge, caster)
    closed = np.maximum(1 - near / reach, 0)
    open_sky = 1 - 0.75 * closed * closed * closed
    first = 0
    for x0, y0, x1, y1 in boxes.tolist():
        last = first + (y1 - y0) * (x1 - x0)
        lamp[y0:y1, x0:x1] *= lit[first:last].reshape(y1 - y0, x1 - x0)
        sky[y0:y1, x0:x1] *= open_sky[first:last].reshape(y1 - y0, x1 - x0)
        first = last


def _find_surfaces(scene, height, width, focal):
    """What the solids show of themselves: one entry for each solid in each pixel that it is seen in, m in all.

    Returns:
        pixel: (m,) row * width + column.
        cover: (m,) share of the pixel that the solid fills, from 1/8 to 1.
        solid: (m,) which of the scene's solids, in ascending order.
        normal: (3, m) mean outward normal over that share; shorter than 1 where the pixel straddles an edge.
        point: (3, m) mean place in the world over that share.
    """
    size, rays = scene.half_size, len(_RAYS)
    (cos, sin), zero = _cos_sin(scene.angle), np.zeros_like(scene.angle)
    turn = np.array([[cos, sin, zero], [-sin, cos, zero], [zero, zero, zero + 1]]).transpose(2, 0, 1)
    # In a solid's own frame it is the unit solid of its shape: the camera and its axes are moved there instead.
    origin = _apply(turn, scene.camera - scene.center).T / size
    frame = _apply(turn[:, None], scene.axes).transpose(1, 2, 0) / size
    origin, frame = origin.astype(np.float32), frame.astype(np.float32)

    boxes = _boxes(*_bounds(scene, turn, height, width, focal), height, width)
    solid, row, column = _lay_out(boxes)
    right, down, forward = frame.take(solid, axis=2)
    u = (column + (0.5 - width / 2)).astype(np.float32) / np.float32(focal)
    v = (row + (0.5 - height / 2)).astype(np.float32) / np.float32(focal)
    # Steps of one along the camera's axis, so that a ray's parameter is the depth: (3, t, rays), as a pixel's own step
    # and a ray's place in the pixel.
    ray = (frame[0, :, :, None] * _RAYS[:, 0] + frame[1, :, :, None] * _RAYS[:, 1]) / np.float32(focal)
    step = ray.take(solid, axis=1)
    step += (right * u + down * v + forward)[:, :, None]
    start = origin.take(solid, axis=1)[:, :, None]
    depth = np.empty(step.shape[1:], dtype=np.float32)
    cube, cylinder = np.searchsorted(solid, np.searchsorted(scene.shape, [CUBE, CYLINDER]))
    for part, meet in (
        (slice(0, cube), _meet_sphere),
        (slice(cube, cylinder), _meet_cube),
        (slice(cylinder, None), _meet_cylinder),
    ):
        depth[part] = meet(start[:, part], step[:, part])

    # Of the solids that a ray meets, the nearest is seen: each box is laid over a picture of the least depth so far.
    nearest = np.full((height, width, rays), _FAR, dtype=np.float32)
    windows, first = [], 0
    for x0, y0, x1, y1 in boxes.tolist():
        last = first + (y1 - y0) * (x1 - x0)
        windows.append((nearest[y0:y1, x0:x1], depth[first:last].reshape(y1 - y0, x1 - x0, rays)))
        first = last
    for window, own in windows:
        np.minimum(window, own, out=window)
    for window, own in windows:
        own[own > window] = _FAR
    seen = np.flatnonzero(depth < _FAR)
    entry = seen // rays
    point = step.reshape(3, -1).take(seen, axis=1)
    point *= depth.take(seen)
    point += start[:, :, 0].take(entry, axis=1)
    cube, cylinder = np.searchsorted(entry, [cube, cylinder])
    normal = _normals(point, cube, cylinder)

    # Shading costs more than finding what to shade, so it is done once for all the rays of a pixel that see one solid,
    # at their mean point, with their mean normal: across a cube's edge that is as if the edge were rounded.
    first = np.flatnonzero(np.concatenate([[True], entry[1:] != entry[:-1]]))
    many = np.concatenate([first[1:], [len(entry)]]) - first
    entry, many = entry[first], many.astype(np.float32)
    solid = solid[entry]
    normal, point = np.add.reduceat(normal, first, axis=1) / many, np.add.reduceat(point, first, axis=1) / many
    cx, cy, cz, size, cos, sin = np.array([*scene.center.T, size, cos, sin], dtype=np.float32).take(solid, axis=1)
    for a in (normal, point):
        a[0], a[1] = cos * a[0] - sin * a[1], sin * a[0] + cos * a[1]
    point *= size
    point += (cx, cy, cz)
    return (row * width + column)[entry], many * np.float32(1 / rays), solid, normal, point


def _shade(scene, solid, normal, point, lamp_color, sky_color):
    """Light that points of the solids send to the camera: (3, m) for red, green and blue, float32, from 0 up.

    Takes what `_find_surfaces` gives, and the colours (3, 1) of the lamp and of the sky.
    """
    light, camera = scene.light.astype(np.float32), scene.camera.astype(np.float32)
    gaze = point - camera[:, None]
    gaze /= np.sqrt(_dot(gaze, gaze))
    plain = np.sqrt(_dot(normal, normal))
    normal = normal / plain
    facing = _dot(normal, gaze)
    mirror = gaze - 2 * facing * normal
    grazing = np.square(np.square(1 + np.minimum(facing, 0)))
    metal = scene.metal[solid]
    size = scene.half_size.astype(np.float32)
    # To one another, solids are balls of about their own bulk.
    bulk = size * np.float32(_BULK)[scene.shape]
    center = scene.center.T.astype(np.float32)
    other = np.arange(len(size)) != solid[:, None]
    apart = center[:, None] - point[:, :, None]
    square = _dot(apart, apart)

    # How much of the lamp the other solids leave to see: their shadows on this one.
    ahead = _dot(apart, light)
    ball = np.sqrt(np.maximum(square - ahead * ahead, 0)) - bulk
    free = np.where(other & (ahead > 0), _soft_edge(ball, np.maximum(ahead, 0)), 1).min(axis=1)
    lit = np.maximum(_dot(normal, light) + 0.12, 0) / 1.12 * free
    upward = 0.5 + 0.5 * normal[2]
    rise = np.maximum(point[2], 0) / size[solid]
    ambient = 0.2 + 0.22 * upward
    ambient *= 1 - 0.65 * (1 - upward) * _exp_minus(rise)

    # What a mirror would show: the bright ground, brightest towards the lamp and dark close to the solid, under a dim
    # studio with two wide soft lamps.
    down = np.maximum(-mirror[2], 0.05)
    across = np.sqrt(mirror[0] * mirror[0] + mirror[1] * mirror[1]) + 1e-3
    lampward = np.maximum((mirror[0] * light[0] + mirror[1] * light[1]) / across, 0)
    floor = (1 - _exp_minus(0.9 * rise / down)) * (0.5 + 1.6 * np.square(np.square(lampward))) + 0.08
    room = 0.14 + 0.38 * np.maximum(mirror[2], 0)
    shown = floor + _smooth(mirror[2] * 4 + 0.5) * (room - floor)
    toward = np.maximum(_dot(mirror, light), 0)
    window = _smooth(toward * 10 - 8.6) * free
    broad = np.square(np.square(np.square(toward)))
    tight = np.square(np.square(np.square(broad)))
    fill = np.float32([-0.75 * light[0], 0.45 * light[1], 0.62])
    shown += 0.55 * _smooth(_dot(mirror, fill / _length(fill)) * 6 - 4.8)
    # An edge between two faces shows a blur of everything.
    clear = _smooth(plain * 30 - 29)
    shown = 0.4 + clear * (shown - 0.4)
    window *= clear

    # And of the other solids, the nearest.
    ahead = _dot(apart, mirror[:, :, None])
    inside = np.maximum(1 - (square - ahead * ahead) / (bulk * bulk), 0)
    inside *= other & (ahead > 0)
    met = np.where(inside > 0, ahead - bulk * np.sqrt(inside), _FAR).argmin(axis=1)
    veil = _smooth(2 * inside[np.arange(len(met)), met]) * 0.8 * clear * metal
    shown *= 1 - veil
    window *= 1 - veil
    met_color = 0.15 + _ALBEDO.take(scene.color[met], axis=1)

    share = np.where(metal, np.float32(0.2), np.float32(1))
    own = 0.95 * share * lit + np.where(metal, 1.3 * window, 0)
    dim = share * ambient + np.where(metal, 1.25 * shown, 0)
    gloss = np.where(
        metal,
        0.5 * tight * free * clear + 0.1 * window + 0.35 * grazing * shown,
        0.1 * broad * free + 0.04 * grazing,
    )
    color = own * lamp_color + dim * sky_color + veil * met_color
    return color * _ALBEDO.take(scene.color[solid], axis=1) + gloss * lamp_color


def _meet_sphere(start, step):
    """Depths (t, rays) at which rays meet the unit sphere, _FAR for those that miss.

    A ray starts at `start` (3, t, 1) and is at `start + depth * step`, with `step` (3, t, rays).
    """
    a, b, c = _dot(step, step), _dot(start, step), _dot(start, start) - 1
    inside = b * b - a * c
    return np.where(inside > 0, (-b - np.sqrt(np.maximum(inside, 0))) / a, _FAR)


def _meet_cube(start, step):
    """As `_meet_sphere`, for the cube from -1 to 1."""
    enter, leave = _meet_slab(start, step)
    enter, leave = enter.max(axis=0), leave.min(axis=0)
    return np.where(enter < leave, enter, _FAR)


def _meet_cylinder(start, step):
    """As `_meet_sphere`, for the upright cylinder of radius 1 from z = -1 to 1."""
    a, b, c = _dot(step[:2], step[:2]), _dot(start[:2], step[:2]), _dot(start[:2], start[:2]) - 1
    inside = b * b - a * c
    root = np.sqrt(np.maximum(inside, 0))
    enter, leave = _meet_slab(start[2], step[2])
    enter, leave = np.maximum(enter, (-b - root) / a), np.minimum(leave, (root - b) / a)
    return np.where((inside > 0) & (enter < leave), enter, _FAR)


def _meet_slab(start, step):
    """Depths at which rays enter and leave the space from -1 to 1 along an axis."""
    # A ray along the slab would divide by nothing: half a millionth of slant changes no pixel.
    inverse = 1 / np.where(np.abs(step) < 1e-6, np.float32(1e-6), step)
    middle, half = -start * inverse, np.abs(inverse)
    return middle - half, middle + half


def _normals(point, cube, cylinder):
    """Unit normals (3, r) at points (3, r) of spheres, from `cube` on of cubes and from `cylinder` on of cylinders."""
    normal = point.copy()
    # High powers bend the normal round close to an edge, as if the edge were rounded off: the glint along it is what
    # makes a drawn box look like a thing.
    normal[:, cube:cylinder] *= _power_16(point[:, cube:cylinder])
    part = point[:, cylinder:]
    normal[:2, cylinder:] *= _power_16(np.sqrt(_dot(part[:2], part[:2])))
    normal[2, cylinder:] *= _power_16(part[2])
    normal[:, cube:] /= np.sqrt(_dot(normal[:, cube:], normal[:, cube:]))
    return normal


def _power_16(a):
    # By hand: numpy's power is many times slower.
    a = a * a
    a = a * a
    a = a * a
    return a * a


# What follows stands for functions of numpy and of the C library, whose last bits differ between processors and
# versions: sums of products in one order, and functions out of additions, multiplications and square roots alone,
# which IEEE 754 rounds in one way.


def _dot(a, b):
    """Sum of products over the first axis, of length 2 or 3."""
    total = a[0] * b[0]
    for i in range(1, len(a)):
        total += a[i] * b[i]
    return total


def _apply(matrix, points):
    """Matrices (..., m, n) times points (..., n), as (..., m); n is 2 or 3."""
    total = matrix[..., 0] * points[..., None, 0]
    for i in range(1, points.shape[-1]):
        total += matrix[..., i] * points[..., None, i]
    return total


def _length(vector):
    return np.sqrt(_dot(vector, vector))


def _cos_sin(angle):
    """Cosine and sine of angles within a few turns, in radians, float64."""
    # The series need few terms within an eighth of a turn: the rest is quarters, which only swap and mirror them.
    quarters = np.rint(angle * (2 / math.pi))
    rest = angle - quarters * (math.pi / 2)
    square = rest * rest
    cos, sin = np.zeros_like(rest), np.zeros_like(rest)
    for n in range(18, 0, -2):
        cos = (cos + 1) * square / -(n * (n - 1))
        sin = (sin + 1) * square / -(n * (n + 1))
    cos, sin = cos + 1, (sin + 1) * rest
    quarters = quarters.astype(np.int64) & 3
    return np.choose(quarters, [cos, -sin, -cos, sin]), np.choose(quarters, [sin, cos, -sin, -cos])


def _exp_minus(a):
    """exp(-a) of numbers from 0 up, float32."""
    # 2**-(whole + share) is put together from the exponent's bits, and a series of share.
    a = np.minimum(a * np.float32(1 / math.log(2)), 100)
    whole = np.floor(a)
    share = (a - whole) * np.float32(-math.log(2))
    total = np.ones_like(share)
    for n in range(8, 0, -1):
        total = total * share * np.float32(1 / n) + 1
    return total * ((127 - whole.astype(np.int32)) << 23).view(np.float32)


def _smooth(a):
    """0 below 0, 1 above 1, and a smooth step between."""
    a = np.minimum(np.maximum(a, 0), 1)
    return a * a * (3 - 2 * a)


def _soft_edge(distance, caster):
    """Light, from 0 to 1, at a distance from a shadow's outline (negative inside), cast by what is `caster` away."""
    return _smooth(distance / (0.1 + 0.56 * caster) + 0.5)


def _outside(a, b):
    """Distance from a rectangle, given the signed distances to its two pairs of sides; negative inside."""
    return np.sqrt(np.maximum(a, 0) ** 2 + np.maximum(b, 0) ** 2) + np.minimum(np.maximum(a, b), 0)


def _bounds(scene, turn, height, width, focal):
    """Lowest and highest pixel coordinates (x, y) of each solid: two arrays (n, 2)."""
    size = scene.half_size
    corners = _apply(turn.transpose(0, 2, 1)[:, None], _CORNERS) * size[:, None, None] + scene.center[:, None]
    spots = scene.project(corners.reshape(-1, 3), (height, width)).reshape(-1, 8, 2)
    # A sphere's outline is known exactly: the planes through the camera that touch it.
    seen = _apply(scene.axes, scene.center - scene.camera)
    aside, depth, size = seen[:, :2], seen[:, 2:], size[:, None]
    spread = size * np.sqrt(aside**2 + depth**2 - size**2)
    middle, scale = np.array([width / 2, height / 2]), focal / (depth**2 - size**2)
    sphere = (scene.shape == SPHERE)[:, None]
    low = np.where(sphere, middle + scale * (aside * depth - spread), spots.min(axis=1))
    high = np.where(sphere, middle + scale * (aside * depth + spread), spots.max(axis=1))
    return low, high


def _boxes(low, high, height, width):
    """Boxes of whole pixels around spots of the picture, cut at its border: (n, 4), as x0, y0, x1, y1."""
    corners = np.concatenate([np.floor(low), np.ceil(high)], axis=1)
    return np.minimum(np.maximum(corners, 0), [width, height, width, height]).astype(np.int64)


def _lay_out(boxes):
    """The pixels of all the boxes, box after box and row after row: which box, which row, which column; (t,) each."""
    x0, y0, x1, y1 = boxes.T
    many = (x1 - x0) * (y1 - y0)
    solid = np.repeat(np.arange(len(boxes)), many)
    wide, x0, y0, before = np.array([x1 - x0, x0, y0, np.cumsum(many) - many]).take(solid, axis=1)
    row, column = np.divmod(np.arange(len(solid)) - before, wide)
    return solid, row + y0, column + x0


def _check_image_size(image_size: int | tuple[int, int]) -> tuple[int, int]:
    sides = (image_size, image_size) if np.ndim(image_size) == 0 else tuple(image_size)
    if len(sides) != 2 or min(sides) < MIN_IMAGE_SIZE:
        raise ValueError(
            f"image_size is {image_size}, but a scene needs {MIN_IMAGE_SIZE} pixels or more to a side: "
            f"pass {MIN_IMAGE_SIZE} or more, or a (height, width) of such."
        )
    return int(sides[0]), int(sides[1])


def _check_series(split: str, seed: int) -> None:
    if split not in SPLITS:
        raise ValueError(
            f"split is {split!r}, but the splits of the scenes are {', '.join(SPLITS)}: pass one of these."
        )
    if not 0 <= seed < 2**63:
        raise ValueError(f"seed is {seed}, but seeds go from 0 to 2**63 - 1: pass a number in that range.")
