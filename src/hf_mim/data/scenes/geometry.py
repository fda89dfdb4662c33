"""What a scene is of: which solids stand where, under which lamp, before which camera; and its labels."""

import math
from dataclasses import dataclass

import numpy as np

from .arithmetic import apply, cos_sin, dot, norm

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
        return dot((self.center - self.camera).T, self.axes[2])

    def project(self, points: np.ndarray, image_size: int | tuple[int, int]) -> np.ndarray:
        """Pixel coordinates (x to the right, y down; pixel [0, 0] covers 0 to 1) of world points (n, 3), as (n, 2)."""
        height, width = check_image_size(image_size)
        right, down, forward = apply(self.axes, points - self.camera).T
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
    check_series(split, seed)
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
    cos, sin = cos_sin(np.array([elevation, azimuth, lamp_azimuth, lamp_height]))
    level = distance * cos[0]
    camera = np.array([level * sin[1], -level * cos[1], distance * sin[0]])
    target = np.array([0.12 * jitter[3], 0.15 + 0.15 * jitter[4], 0.1])
    forward = (target - camera) / norm(target - camera)
    right = np.array([forward[1], -forward[0], 0.0]) / norm(forward[:2])
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
        first, second = np.partition(dot((center - camera).T, forward), 1)[:2]
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
    seen = (apply(axes[:, :2], spots) - apply(axes, camera)).tolist()
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


def check_image_size(image_size: int | tuple[int, int]) -> tuple[int, int]:
    sides = (image_size, image_size) if np.ndim(image_size) == 0 else tuple(image_size)
    if len(sides) != 2 or min(sides) < MIN_IMAGE_SIZE:
        raise ValueError(
            f"image_size is {image_size}, but a scene needs {MIN_IMAGE_SIZE} pixels or more to a side: "
            f"pass {MIN_IMAGE_SIZE} or more, or a (height, width) of such."
        )
    return int(sides[0]), int(sides[1])


def check_series(split: str, seed: int) -> None:
    if split not in SPLITS:
        raise ValueError(
            f"split is {split!r}, but the splits of the scenes are {', '.join(SPLITS)}: pass one of these."
        )
    if not 0 <= seed < 2**63:
        raise ValueError(f"seed is {seed}, but seeds go from 0 to 2**63 - 1: pass a number in that range.")
