"""The embedded data set: pictures in the manner of CLEVR, drawn by numpy, with labels known exactly.

A scene is a ground plane seen in perspective under a jittered camera and lamp, with 3 to 10 solids on it: spheres,
cubes and cylinders in CLEVR's eight colours, two sizes and two materials (matte rubber, shiny metal). Scene `index` of a
split is a pure function of `(seed, split, index)`: nothing else, not the image size, the order or the process, changes
it or its labels.

Four labels, each an integer class (`SCENE_LABELS` has the names):

* `count` (8 classes): the number of solids, 3 to 10.
* `distance` (6 classes): the depth of the nearest solid's centre along the camera's axis (the "third pixel coordinate"
  of CLEVR), in VTAB's bins, whose edges are 0, 8, 8.5, 9, 9.5, 10 and 100.
* `shape` (3 classes) and `color` (8 classes) of that nearest solid, which is nearer than any other by `DEPTH_GAP` or
  more, so that the labels never hang on a hair.

How a picture is drawn, and why it is fast: the ground and its soft shadows are analytic and smooth, so one ray a pixel
is enough; a solid is ray-cast only inside its projected bounding box, at eight points a pixel for smooth edges; and the
boxes of all the solids of a scene are laid end to end in one flat array, so that numpy is called some two hundred times
a picture whatever the number of solids. Importing this module costs numpy alone.
"""

import io
import math
from dataclasses import dataclass

import numpy as np


# Raise it whenever a drawn pixel or a label changes: it is part of the name of the cached data set.
SCENES_VERSION = 1

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
# Focal length over the shorter side of the picture: a field of view of 42 degrees.
FOCAL = 1.3
# Half-extents of the part of the ground that solids stand on: to the sides, and towards and away from the camera.
FIELD = (3.1, 3.7)
# CLEVR's margin between solids on the ground, in scene units.
MARGIN = 0.25
DEPTH_GAP = 0.1
# The disc around a solid's projected centre that its silhouette stays in, as seen by the camera of any scene, in units
# of the solid's radius.
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
        return (self.center - self.camera) @ self.axes[2]

    def project(self, points: np.ndarray, image_size: int | tuple[int, int]) -> np.ndarray:
        """Pixel coordinates (x to the right, y down; pixel [0, 0] covers 0 to 1) of world points (n, 3), as (n, 2)."""
        height, width = _check_image_size(image_size)
        right, down, forward = ((points - self.camera) @ self.axes.T).T
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
        index: 0 or more; there is no end.
        split: "train", "validation" or "test": three unrelated series.
        seed: 0 to 2**63 - 1; another seed, another data set.

    Returns:
        The `Scene`.

    Raises:
        ValueError: for an unknown split, or an index or seed out of its range.
    """
    _check_split(split)
    if not 0 <= index < 2**63:
        raise ValueError(f"index is {index}, and scenes are numbered from 0: pass an index of 0 or more.")
    if not 0 <= seed < 2**63:
        raise ValueError(f"seed is {seed}, but must be from 0 to 2**63 - 1: pass a seed in that range.")
    # Philox is a counter-based generator: (seed, split) is the key, and the index sits in the counter's top word, so
    # that each scene owns a stream of its own and none has to be skipped through to reach it.
    rng = np.random.Generator(np.random.Philox(key=[seed, SPLITS.index(split)], counter=[0, 0, 0, index]))
    num_objects = int(rng.integers(MIN_OBJECTS, MAX_OBJECTS + 1))

    jitter = rng.uniform(-1.0, 1.0, 8).tolist()
    distance, elevation, azimuth = 11.2 + 0.7 * jitter[0], math.radians(33 + 3 * jitter[1]), 0.12 * jitter[2]
    level = distance * math.cos(elevation)
    camera = np.array([level * math.sin(azimuth), -level * math.cos(azimuth), distance * math.sin(elevation)])
    target = np.array([0.12 * jitter[3], 0.15 + 0.15 * jitter[4], 0.1])
    forward = (target - camera) / np.linalg.norm(target - camera)
    right = np.array([forward[1], -forward[0], 0.0]) / math.hypot(forward[0], forward[1])
    axes = np.stack([right, np.cross(forward, right), forward])
    # The lamp stands to the left of the camera and above, so that shadows fall to the right and away, as in CLEVR.
    lamp_azimuth, lamp_height = math.radians(215 + 25 * jitter[5]), math.radians(52 + 7 * jitter[6])
    light = np.array(
        [
            math.cos(lamp_height) * math.cos(lamp_azimuth),
            math.cos(lamp_height) * math.sin(lamp_azimuth),
            math.sin(lamp_height),
        ]
    )
    warmth = jitter[7]
    backdrop = float(rng.uniform(0.9, 1.1))

    # A crowded draw may leave no room: it is thrown away whole, but for the number of solids, which stays uniform.
    while True:
        shape = np.sort(rng.integers(len(SHAPES), size=num_objects))
        radius = np.array(SIZES)[rng.integers(len(SIZES), size=num_objects)]
        half_size = np.where(shape == CUBE, radius / math.sqrt(2.0), radius)
        center = _place(rng, camera, axes, shape, radius, half_size)
        if center is None:
            continue
        first, second = np.partition((center - camera) @ forward, 1)[:2]
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
        angle=np.where(shape == CUBE, rng.uniform(0.0, math.pi / 2, num_objects), 0.0),
    )


def _place(rng, camera, axes, shape, radius, half_size, tries=96):
    """Centres (n, 3) of solids that neither touch, hide each other's centres, nor leave the frame; None if no room."""
    num_objects = len(shape)
    spots = rng.uniform(-1.0, 1.0, (tries, 2)) * FIELD
    # A spot's place in the camera's frame at ground level; a solid's centre is the same, half its height further up.
    seen = ((np.c_[spots, np.zeros(tries)] - camera) @ axes.T).tolist()
    up = axes[:, 2].tolist()
    reach = (radius * np.array(SILHOUETTE)[shape]).tolist()
    half_size, radius = half_size.tolist(), radius.tolist()
    placed, k = [], 0
    for (x, y), (right, down, forward) in zip(spots.tolist(), seen, strict=True):
        rise = half_size[k]
        depth = forward + rise * up[2]
        u, v, extent = (right + rise * up[0]) / depth, (down + rise * up[1]) / depth, reach[k] / depth
        if max(abs(u), abs(v)) + extent > 0.49 / FOCAL:
            continue
        for other_x, other_y, other_radius, other_u, other_v, other_extent, other_depth in placed:
            if math.hypot(x - other_x, y - other_y) < radius[k] + other_radius + MARGIN:
                break
            # What matters is the silhouette of the nearer of the two: the further one's centre stays clear of it.
            if math.hypot(u - other_u, v - other_v) < 1.05 * (extent if depth < other_depth else other_extent):
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
        index: 0 or more; there is no end.
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


# Where in a pixel its eight rays go, from its centre, in sixteenths: no two share a row or a column, so that an edge of
# any slope crosses them one by one.
_RAYS = np.array([(1, -3), (-1, 3), (5, 1), (-3, -5), (-5, 5), (-7, -1), (3, 7), (7, -7)], dtype=np.float32) / 16
_FAR = np.float32(1e9)
# Radius of the ball that stands in for a solid of each shape, in units of its half height.
_BULK = (1.0, 1.2, 1.1)
_CORNERS = np.array([(x, y, z) for x in (-1, 1) for y in (-1, 1) for z in (-1, 1)], dtype=np.float64)
# Light is added up in linear numbers from 0 to _WHITE, and this table turns it into sRGB bytes, rolling off softly above
# _KNEE rather than clipping: highlights keep their shape.
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


_ALBEDO = _to_linear(list(COLORS.values())).astype(np.float32)


def _draw(scene: Scene, height: int, width: int) -> np.ndarray:
    """The picture of a scene, uint8 of shape (height, width, 3)."""
    focal = FOCAL * min(height, width)
    lamp_color = np.float32([1.0 + 0.05 * scene.warmth, 1.0, 1.0 - 0.08 * scene.warmth])
    sky_color = np.float32([1.0 - 0.04 * scene.warmth, 1.0, 1.0 + 0.05 * scene.warmth])
    lamp, sky = (light.ravel() for light in _draw_ground(scene, height, width, focal))
    pixel, cover, solid, normal, point = _find_surfaces(scene, height, width, focal)
    colors = _shade(scene, solid, normal, point, lamp_color, sky_color)

    # Where no solid is met, the ground is seen; it is smooth enough to be the same all over a pixel.
    bare = 1 - np.bincount(pixel, weights=cover, minlength=height * width).astype(np.float32)
    picture = np.empty((height * width, 3), dtype=np.uint8)
    for c in range(3):
        light = np.bincount(pixel, weights=cover * colors[c], minlength=height * width)
        light += bare * (lamp * lamp_color[c] + sky * sky_color[c])
        light *= (_TONES - 1) / _WHITE
        picture[:, c] = _TONE_TABLE[np.minimum(light, _TONES - 1).astype(np.int16)]
    return picture.reshape(height, width, 3)


def _draw_ground(scene, height, width, focal):
    """Light that each pixel gets from the ground, by lamp and by sky: two arrays (height, width), float32."""
    camera, axes = scene.camera.astype(np.float32), scene.axes.astype(np.float32)
    u = ((np.arange(width, dtype=np.float32) + 0.5) - width / 2) / np.float32(focal)
    v = (((np.arange(height, dtype=np.float32) + 0.5) - height / 2) / np.float32(focal))[:, None]
    # The camera is level from left to right, so how far a ray goes before it meets the ground depends on its row alone.
    # Rays that rise meet it very far away instead, where it has long faded into the backdrop: no horizon is seen.
    depth = camera[2] / np.maximum(-(axes[2, 2] + v * axes[1, 2]), np.float32(1e-3))
    x = camera[0] + depth * (axes[2, 0] + v * axes[1, 0] + u * axes[0, 0])
    y = camera[1] + depth * (axes[2, 1] + v * axes[1, 1] + u * axes[0, 1])
    # A pool of light around the middle, a little towards the lamp.
    pool = 1 / (1 + ((x - scene.light[0]) ** 2 + (y - scene.light[1]) ** 2) * np.float32(1 / 90))
    lamp = np.float32(0.36 * scene.backdrop) * pool
    sky = np.float32(0.14 * scene.backdrop) * (np.float32(0.45) + np.float32(0.55) * pool)
    _cast_shadows(scene, x, y, focal, lamp, sky)
    return lamp, sky


def _cast_shadows(scene, x, y, focal, lamp, sky):
    """Darken `lamp` by the solids' shadows and `sky` by their closeness, in place; all (height, width).

    `x`, `y`: where on the ground each pixel looks. A prism's shadow is its base swept along the ground, away from the
    lamp, by `sweep`; a sphere's is an ellipse. Its edge is sharp where the caster touches the ground and softer the
    higher the part of the solid that casts it.
    """
    height, width = lamp.shape
    count, size, radius = len(scene.shape), scene.half_size, scene.radius
    slope = -scene.light[:2] / scene.light[2]
    length = 2 * size * math.hypot(*slope)
    ahead = slope / math.hypot(*slope)
    reach = np.where(scene.shape == SPHERE, 2.4, 1.9) * radius
    ends = scene.center[:, None, :2] + np.outer(length, ahead)[:, None] * [[0.0], [1.0]]
    # The swept base, with room for its penumbra, is inside the box of two squares around its ends.
    around = np.concatenate([ends[:, :, None] + reach[:, None, None, None] * _CORNERS[::2, :2]], axis=2)
    points = np.concatenate([around.reshape(-1, 2), np.zeros((count * 8, 1))], axis=1)
    spots = scene.project(points, (height, width)).reshape(count, 8, 2)
    boxes = _boxes(spots.min(axis=1), spots.max(axis=1), height, width)
    solid, row, column = _lay_out(boxes)

    single = [a.astype(np.float32) for a in (scene.center[:, 0], scene.center[:, 1], size, radius, length, reach)]
    cx, cy, size, radius, length, reach = (a[solid] for a in single)
    qx, qy = x[row, column] - cx, y[row, column] - cy
    ahead_x, ahead_y = ahead.astype(np.float32)
    along, across = qx * ahead_x + qy * ahead_y, qy * ahead_x - qx * ahead_y
    edge, near = np.empty_like(qx), np.empty_like(qx)
    first, second = np.searchsorted(solid, np.searchsorted(scene.shape, [CUBE, CYLINDER]))

    part = slice(0, first)
    squeezed = (along[part] - length[part] / 2) * np.float32(scene.light[2])
    edge[part] = np.sqrt(squeezed**2 + across[part] ** 2) - radius[part]
    near[part] = np.sqrt(qx[part] ** 2 + qy[part] ** 2)

    part = slice(first, second)
    cos, sin = np.cos(scene.angle), np.sin(scene.angle)
    sweep = np.outer(2 * scene.half_size, slope)
    sweep_x = (cos * sweep[:, 0] + sin * sweep[:, 1]).astype(np.float32)[solid[part]]
    sweep_y = (cos * sweep[:, 1] - sin * sweep[:, 0]).astype(np.float32)[solid[part]]
    cos, sin = cos.astype(np.float32)[solid[part]], sin.astype(np.float32)[solid[part]]
    a, px, py = size[part], cos * qx[part] + sin * qy[part], cos * qy[part] - sin * qx[part]
    # A swept square is a hexagon: two sides each across its own x, its own y and the sweep.
    side_x = np.abs(px - sweep_x / 2) - (a + np.abs(sweep_x) / 2)
    side_y = np.abs(py - sweep_y / 2) - (a + np.abs(sweep_y) / 2)
    beside = np.abs(across[part]) - a * (np.abs(sweep_x) + np.abs(sweep_y)) / length[part]
    edge[part] = _outside(side_x, side_y)
    np.maximum(edge[part], beside, out=edge[part])
    near[part] = np.maximum(_outside(np.abs(px) - a, np.abs(py) - a), 0)

    part = slice(second, None)
    beyond = along[part] - np.clip(along[part], 0, length[part])
    edge[part] = np.sqrt(beyond**2 + across[part] ** 2) - radius[part]
    near[part] = np.maximum(np.sqrt(qx[part] ** 2 + qy[part] ** 2) - radius[part], 0)

    caster = 2 * size * np.clip(along / length, 0, 1)
    blur = np.float32(0.05) + np.float32(0.28) * caster
    lit = _smooth(edge / blur * np.float32(0.5) + np.float32(0.5))
    open_sky = 1 - np.float32(0.75) * np.clip(1 - near / reach, 0, 1) ** 3
    start = 0
    for x0, y0, x1, y1 in boxes.tolist():
        stop = start + (y1 - y0) * (x1 - x0)
        lamp[y0:y1, x0:x1] *= lit[start:stop].reshape(y1 - y0, x1 - x0)
        sky[y0:y1, x0:x1] *= open_sky[start:stop].reshape(y1 - y0, x1 - x0)
        start = stop


def _find_surfaces(scene, height, width, focal):
    """What the solids show of themselves: one entry for each solid in each pixel that it is seen in, m in all.

    Returns:
        pixel: (m,) row * width + column.
        cover: (m,) share of the pixel that the solid fills, from 1/8 to 1.
        solid: (m,) which of the scene's solids, in ascending order.
        normal, point: lists of three (m,): mean outward unit normal, and mean place in the world, over that share.
    """
    size, rays = scene.half_size, len(_RAYS)
    cos, sin, zero = np.cos(scene.angle), np.sin(scene.angle), np.zeros_like(scene.angle)
    turn = np.stack([cos, sin, zero, -sin, cos, zero, zero, zero, zero + 1], axis=1).reshape(-1, 3, 3)
    # In a solid's own frame it is the unit solid of its shape: the camera and its axes are moved there instead.
    origin = (np.einsum("nij,nj->ni", turn, scene.camera - scene.center) / size[:, None]).astype(np.float32)
    frame = (np.einsum("nij,kj->nki", turn, scene.axes) / size[:, None, None]).astype(np.float32)

    boxes = _boxes(*_bounds(scene, turn, height, width, focal), height, width)
    solid, row, column = _lay_out(boxes)
    u = (column.astype(np.float32)[:, None] + (_RAYS[:, 0] + np.float32(0.5 - width / 2))) / np.float32(focal)
    v = (row.astype(np.float32)[:, None] + (_RAYS[:, 1] + np.float32(0.5 - height / 2))) / np.float32(focal)
    # Steps of one along the camera's axis, so that a ray's parameter is the depth.
    frame = frame[solid]
    step = [frame[:, 2, i, None] + u * frame[:, 0, i, None] + v * frame[:, 1, i, None] for i in range(3)]
    start = [origin[solid, i, None] for i in range(3)]
    depth = np.empty_like(u)
    cube, cylinder = np.searchsorted(solid, np.searchsorted(scene.shape, [CUBE, CYLINDER]))
    for part, meet in (
        (slice(0, cube), _meet_sphere),
        (slice(cube, cylinder), _meet_cube),
        (slice(cylinder, None), _meet_cylinder),
    ):
        depth[part] = meet([a[part] for a in start], [a[part] for a in step])

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

    depth, ray_solid = depth.ravel()[seen], solid[entry]
    point = [origin[ray_solid, i] + depth * step[i].ravel()[seen] for i in range(3)]
    normal = _normals(scene, ray_solid, point)
    # Shading costs more than finding what to shade, so it is done once for all the rays of a pixel that see one solid,
    # with their mean normal: across a cube's edge that is the normal of a rounded edge, and so looks right too.
    first = np.flatnonzero(np.diff(entry, prepend=-1))
    many = np.diff(first, append=len(entry)).astype(np.float32)
    entry = entry[first]
    solid = solid[entry]
    normal = [np.add.reduceat(n, first) for n in normal]
    scale = 1 / np.sqrt(_dot(normal, normal))
    point = [np.add.reduceat(p, first) / many for p in point]
    size, center = size.astype(np.float32)[solid], scene.center.astype(np.float32)[solid]
    cos, sin = cos.astype(np.float32)[solid], sin.astype(np.float32)[solid]
    normal = [(cos * normal[0] - sin * normal[1]) * scale, (sin * normal[0] + cos * normal[1]) * scale, normal[2] * scale]
    point = [cos * point[0] - sin * point[1], sin * point[0] + cos * point[1], point[2]]
    point = [center[:, i] + size * point[i] for i in range(3)]
    return (row * width + column)[entry], many * np.float32(1 / rays), solid, normal, point


def _shade(scene, solid, normal, point, lamp_color, sky_color):
    """Red, green and blue light that points of the solids send to the camera: a list of three (m,), float32."""
    light, camera = scene.light.astype(np.float32), scene.camera.astype(np.float32)
    gaze = [point[i] - camera[i] for i in range(3)]
    away = 1 / np.sqrt(_dot(gaze, gaze))
    gaze = [g * away for g in gaze]
    facing = _dot(normal, gaze)
    mirror = [gaze[i] - 2 * facing * normal[i] for i in range(3)]
    grazing = np.clip(1 + facing, 0, 1) ** 4
    metal = scene.metal[solid]
    # The other solids stand in the lamp's way, and are seen in metal ones, as balls of about their own bulk.
    bulk = (scene.half_size * np.array(_BULK)[scene.shape]).astype(np.float32)
    center = scene.center.astype(np.float32)
    other = np.arange(len(bulk)) != solid[:, None]
    apart = [point[i][:, None] - center[:, i] for i in range(3)]
    square = _dot(apart, apart)

    ahead = -_dot(apart, light)
    gap = np.sqrt(np.maximum(square - ahead * ahead, 0)) - bulk
    blur = np.float32(0.05) + np.float32(0.28) * np.maximum(ahead, 0)
    free = np.where(other & (ahead > 0), _smooth(gap / blur * np.float32(0.5) + np.float32(0.5)), 1).min(axis=1)
    lit = np.maximum(_dot(normal, light) + np.float32(0.12), 0) * np.float32(1 / 1.12) * free
    upward = np.float32(0.5) + np.float32(0.5) * normal[2]
    size = scene.half_size.astype(np.float32)[solid]
    rise = np.maximum(point[2], 0) / size
    ambient = np.float32(0.2) + np.float32(0.22) * upward
    ambient *= 1 - np.float32(0.65) * (1 - upward) * np.exp(-rise)

    # What a mirror would show: the bright ground, dark close to the solid, and a dim studio with two wide soft lamps.
    down = np.maximum(-mirror[2], np.float32(0.05))
    floor = np.float32(0.7) - np.float32(0.6) * np.exp(-np.float32(0.9) * rise / down)
    room = np.float32(0.12) + np.float32(0.38) * np.maximum(mirror[2], 0)
    shown = floor + _smooth(mirror[2] * 4 + np.float32(0.5)) * (room - floor)
    lamp = np.maximum(_dot(mirror, light), 0)
    window = _smooth((lamp - np.float32(0.86)) * np.float32(1 / 0.1)) * free
    fill = np.float32([-0.75 * light[0], 0.45 * light[1], 0.62])
    shown += np.float32(0.55) * _smooth(_dot(mirror, fill / np.linalg.norm(fill)) * np.float32(6) - np.float32(4.8))

    ahead = -_dot([a[metal] for a in apart], [r[metal, None] for r in mirror])
    inside = bulk * bulk - (square[metal] - ahead * ahead)
    hit = np.where(other[metal] & (ahead > 0) & (inside > 0), ahead - np.sqrt(np.maximum(inside, 0)), _FAR)
    near = hit.argmin(axis=1)
    pick = np.arange(len(near)), near
    veil = np.zeros_like(shown)
    veil[metal] = np.where(hit[pick] < _FAR, _smooth(inside[pick] / (bulk * bulk)[near] * 4), 0)
    height = np.zeros_like(shown)
    height[metal] = np.where(hit[pick] < _FAR, (point[2][metal] + hit[pick] * mirror[2][metal] - center[near, 2]) / bulk[near], 0)
    seen_color = np.zeros(len(solid), dtype=np.int64)
    seen_color[metal] = scene.color[near]
    shown *= 1 - veil
    window = window * (1 - veil)

    own = scene.color[solid]
    keep = np.where(metal, np.float32(0.2), np.float32(1))
    key = np.float32(0.95) * keep * lit + np.where(metal, np.float32(1.3) * window, 0)
    dim = keep * ambient + np.where(metal, np.float32(1.25) * shown, 0)
    gloss = np.where(
        metal,
        np.float32(0.5) * lamp**64 * free + np.float32(0.1) * window + np.float32(0.35) * grazing * shown,
        np.float32(0.1) * lamp**10 * free + np.float32(0.04) * grazing,
    )
    met = veil * (np.float32(0.55) + np.float32(0.4) * height)
    colors = []
    for c in range(3):
        albedo = _ALBEDO[own, c]
        tint = albedo * (key * lamp_color[c] + dim * sky_color[c] + met * _ALBEDO[seen_color, c])
        colors.append(tint + gloss * lamp_color[c])
    return colors


def _meet_sphere(start, step):
    """Depth at which rays meet the unit sphere, _FAR where they miss; `start` (t, 1) and `step` (t, s), three each."""
    a, b, c = _dot(step, step), _dot(start, step), _dot(start, start) - 1
    inside = b * b - a * c
    return np.where(inside > 0, (-b - np.sqrt(np.maximum(inside, 0))) / a, _FAR)


def _meet_cube(start, step):
    """As `_meet_sphere`, for the cube from -1 to 1."""
    enter, leave = _meet_slab(start[0], step[0])
    for i in (1, 2):
        enter_i, leave_i = _meet_slab(start[i], step[i])
        enter, leave = np.maximum(enter, enter_i), np.minimum(leave, leave_i)
    return np.where(enter < leave, enter, _FAR)


def _meet_cylinder(start, step):
    """As `_meet_sphere`, for the upright cylinder of radius 1 from z = -1 to 1."""
    a, b, c = _dot(step[:2], step[:2]), _dot(start[:2], step[:2]), _dot(start[:2], start[:2]) - 1
    inside = b * b - a * c
    root = np.sqrt(np.maximum(inside, 0))
    enter, leave = _meet_slab(start[2], step[2])
    enter, leave = np.maximum(enter, (-b - root) / a), np.minimum(leave, (-b + root) / a)
    return np.where((inside > 0) & (enter < leave), enter, _FAR)


def _meet_slab(start, step):
    """Depths at which rays enter and leave the space from -1 to 1 along one axis."""
    inverse = 1 / np.where(np.abs(step) < 1e-6, np.float32(1e-6), step)
    middle, half = -start * inverse, np.abs(inverse)
    return middle - half, middle + half


def _normals(scene, solid, point):
    """Unit normals at points of the unit solids, in the solids' own frames; lists of three arrays (m,)."""
    normal = [p.copy() for p in point]
    cube, cylinder = np.searchsorted(solid, np.searchsorted(scene.shape, [CUBE, CYLINDER]))
    # High powers bend the normal round within a few hundredths of an edge, as if the edge were rounded off: the glint
    # along it is what makes a drawn box look like a thing.
    part = slice(cube, cylinder)
    for i in range(3):
        normal[i][part] *= _power_24(point[i][part])
    part = slice(cylinder, None)
    side = _power_24(np.sqrt(point[0][part] ** 2 + point[1][part] ** 2))
    normal[0][part] *= side
    normal[1][part] *= side
    normal[2][part] *= _power_24(point[2][part])
    part = slice(cube, None)
    scale = 1 / np.sqrt(_dot([n[part] for n in normal], [n[part] for n in normal]))
    for n in normal:
        n[part] *= scale
    return normal


def _power_24(a):
    a = a * a
    a = a * a
    a = a * a
    return a * a * a


def _dot(a, b):
    total = a[0] * b[0]
    for i in range(1, len(a)):
        total = total + a[i] * b[i]
    return total


def _smooth(a):
    """0 below 0, 1 above 1, and a smooth step between."""
    a = np.clip(a, 0, 1)
    return a * a * (3 - 2 * a)


def _outside(a, b):
    """Distance from a rectangle, given the signed distances to its two pairs of sides; negative inside."""
    return np.sqrt(np.maximum(a, 0) ** 2 + np.maximum(b, 0) ** 2) + np.minimum(np.maximum(a, b), 0)


def _bounds(scene, turn, height, width, focal):
    """Lowest and highest pixel coordinates of each solid: two arrays (n, 2)."""
    size = scene.half_size
    corners = np.einsum("nij,ki->nkj", turn, _CORNERS) * size[:, None, None] + scene.center[:, None]
    spots = scene.project(corners.reshape(-1, 3), (height, width)).reshape(-1, 8, 2)
    low, high = spots.min(axis=1), spots.max(axis=1)
    # A sphere's outline is known exactly: the planes through the camera that touch it.
    seen = (scene.center - scene.camera) @ scene.axes.T
    aside, depth, radius = seen[:, :2], seen[:, 2:], size[:, None]
    spread = radius * np.sqrt(aside**2 + depth**2 - radius**2)
    middle, square = np.array([width / 2, height / 2]), depth**2 - radius**2
    sphere = (scene.shape == SPHERE)[:, None]
    low = np.where(sphere, middle + focal * (aside * depth - spread) / square, low)
    high = np.where(sphere, middle + focal * (aside * depth + spread) / square, high)
    return low, high


def _boxes(low, high, height, width):
    """Boxes of whole pixels around spots of the picture, cut at its border: (n, 4), as x0, y0, x1, y1."""
    most = np.array([width, height])
    low, high = np.clip(np.floor(low), 0, most), np.clip(np.ceil(high), 0, most)
    return np.concatenate([low, high], axis=1).astype(np.int64)


def _lay_out(boxes):
    """The pixels of all the boxes, box after box and row after row: which box, which row and which column; (t,) each."""
    wide = boxes[:, 2] - boxes[:, 0]
    many = wide * (boxes[:, 3] - boxes[:, 1])
    solid = np.repeat(np.arange(len(boxes)), many)
    place = np.arange(len(solid)) - np.repeat(np.cumsum(many) - many, many)
    row, column = np.divmod(place, wide[solid])
    return solid, row + boxes[solid, 1], column + boxes[solid, 0]


def _check_image_size(image_size: int | tuple[int, int]) -> tuple[int, int]:
    height, width = (image_size, image_size) if np.ndim(image_size) == 0 else image_size
    if min(height, width) < MIN_IMAGE_SIZE:
        raise ValueError(
            f"image_size is {image_size}, but a scene needs {MIN_IMAGE_SIZE} pixels or more to a side: "
            f"pass {MIN_IMAGE_SIZE} or more, or a (height, width) of such."
        )
    return int(height), int(width)


def _check_split(split: str) -> None:
    if split not in SPLITS:
        raise ValueError(f"split is {split!r}, but the scenes have {', '.join(SPLITS)}: pass one of these.")
