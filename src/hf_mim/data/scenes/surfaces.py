"""Which solid is seen where in a picture: ray casting inside the solids' boxes."""

import numpy as np

from .arithmetic import apply, cos_sin, dot
from .geometry import CUBE, CYLINDER, SPHERE

# Where in a pixel its eight rays go, from its centre, in sixteenths. No two share a row or a column, so that an edge
# that moves across a pixel meets them one by one.
_RAYS = np.array([(1, -3), (-1, 3), (5, 1), (-3, -5), (-5, 5), (-7, -1), (3, 7), (7, -7)], dtype=np.float32) / 16
FAR = np.float32(1e9)
CORNERS = np.array([(x, y, z) for x in (-1, 1) for y in (-1, 1) for z in (-1, 1)], dtype=np.float64)


def find_surfaces(scene, height, width, focal):
    """What the solids show of themselves: one entry for each solid in each pixel that it is seen in, m in all.

    Returns:
        pixel: (m,) row * width + column.
        cover: (m,) share of the pixel that the solid fills, from 1/8 to 1.
        solid: (m,) which of the scene's solids, in ascending order.
        normal: (3, m) mean outward normal over that share; shorter than 1 where the pixel straddles an edge.
        point: (3, m) mean place in the world over that share.
    """
    size, rays = scene.half_size, len(_RAYS)
    (cos, sin), zero = cos_sin(scene.angle), np.zeros_like(scene.angle)
    turn = np.array([[cos, sin, zero], [-sin, cos, zero], [zero, zero, zero + 1]]).transpose(2, 0, 1)
    # In a solid's own frame it is the unit solid of its shape: the camera and its axes are moved there instead.
    origin = apply(turn, scene.camera - scene.center).T / size
    frame = apply(turn[:, None], scene.axes).transpose(1, 2, 0) / size
    origin, frame = origin.astype(np.float32), frame.astype(np.float32)

    boxes = boxes_of_pixels(*_bounds(scene, turn, height, width, focal), height, width)
    solid, row, column = lay_out(boxes)
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
    nearest = np.full((height, width, rays), FAR, dtype=np.float32)
    windows, first = [], 0
    for x0, y0, x1, y1 in boxes.tolist():
        last = first + (y1 - y0) * (x1 - x0)
        windows.append((nearest[y0:y1, x0:x1], depth[first:last].reshape(y1 - y0, x1 - x0, rays)))
        first = last
    for window, own in windows:
        np.minimum(window, own, out=window)
    for window, own in windows:
        own[own > window] = FAR
    seen = np.flatnonzero(depth < FAR)
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


def ground_depth(scene, height, focal):
    """Depth at which each row of pixels meets the ground, float32 of shape (height,)."""
    camera, axes = scene.camera.astype(np.float32), scene.axes.astype(np.float32)
    v = (np.arange(height, dtype=np.float32) + np.float32(0.5 - height / 2)) / np.float32(focal)
    # The camera is level from left to right, so that how far a ray goes to the ground depends on its row alone. Rays
    # that rise are let meet it very far away, where it has long faded into the backdrop: no horizon is seen.
    return camera[2] / np.maximum(-(axes[2, 2] + v * axes[1, 2]), np.float32(1e-3))


def _meet_sphere(start, step):
    """Depths (t, rays) at which rays meet the unit sphere, FAR for those that miss.

    A ray starts at `start` (3, t, 1) and is at `start + depth * step`, with `step` (3, t, rays).
    """
    a, b, c = dot(step, step), dot(start, step), dot(start, start) - 1
    inside = b * b - a * c
    return np.where(inside > 0, (-b - np.sqrt(np.maximum(inside, 0))) / a, FAR)


def _meet_cube(start, step):
    """As `_meet_sphere`, for the cube from -1 to 1."""
    enter, leave = _meet_slab(start, step)
    enter, leave = enter.max(axis=0), leave.min(axis=0)
    return np.where(enter < leave, enter, FAR)


def _meet_cylinder(start, step):
    """As `_meet_sphere`, for the upright cylinder of radius 1 from z = -1 to 1."""
    a, b, c = dot(step[:2], step[:2]), dot(start[:2], step[:2]), dot(start[:2], start[:2]) - 1
    inside = b * b - a * c
    root = np.sqrt(np.maximum(inside, 0))
    enter, leave = _meet_slab(start[2], step[2])
    enter, leave = np.maximum(enter, (-b - root) / a), np.minimum(leave, (root - b) / a)
    return np.where((inside > 0) & (enter < leave), enter, FAR)


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
    normal[:2, cylinder:] *= _power_16(np.sqrt(dot(part[:2], part[:2])))
    normal[2, cylinder:] *= _power_16(part[2])
    normal[:, cube:] /= np.sqrt(dot(normal[:, cube:], normal[:, cube:]))
    return normal


def _power_16(a):
    # By hand: numpy's power is many times slower.
    a = a * a
    a = a * a
    a = a * a
    return a * a


def _bounds(scene, turn, height, width, focal):
    """Lowest and highest pixel coordinates (x, y) of each solid: two arrays (n, 2)."""
    size = scene.half_size
    corners = apply(turn.transpose(0, 2, 1)[:, None], CORNERS) * size[:, None, None] + scene.center[:, None]
    spots = scene.project(corners.reshape(-1, 3), (height, width)).reshape(-1, 8, 2)
    # A sphere's outline is known exactly: the planes through the camera that touch it.
    seen = apply(scene.axes, scene.center - scene.camera)
    aside, depth, size = seen[:, :2], seen[:, 2:], size[:, None]
    spread = size * np.sqrt(aside**2 + depth**2 - size**2)
    middle, scale = np.array([width / 2, height / 2]), focal / (depth**2 - size**2)
    sphere = (scene.shape == SPHERE)[:, None]
    low = np.where(sphere, middle + scale * (aside * depth - spread), spots.min(axis=1))
    high = np.where(sphere, middle + scale * (aside * depth + spread), spots.max(axis=1))
    return low, high


def boxes_of_pixels(low, high, height, width):
    """Boxes of whole pixels around spots of the picture, cut at its border: (n, 4), as x0, y0, x1, y1."""
    corners = np.concatenate([np.floor(low), np.ceil(high)], axis=1)
    return np.minimum(np.maximum(corners, 0), [width, height, width, height]).astype(np.int64)


def lay_out(boxes):
    """The pixels of all the boxes, box after box and row after row: which box, which row, which column; (t,) each."""
    x0, y0, x1, y1 = boxes.T
    many = (x1 - x0) * (y1 - y0)
    solid = np.repeat(np.arange(len(boxes)), many)
    wide, x0, y0, before = np.array([x1 - x0, x0, y0, np.cumsum(many) - many]).take(solid, axis=1)
    row, column = np.divmod(np.arange(len(solid)) - before, wide)
    return solid, row + y0, column + x0
