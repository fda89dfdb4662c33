"""The light that the ground and the solids send to the camera."""

import numpy as np

from .arithmetic import cos_sin, dot, exp_minus, norm
from .geometry import COLORS, CUBE, CYLINDER, SPHERE
from .surfaces import CORNERS, FAR, boxes_of_pixels, ground_depth, lay_out

# Radius of the ball that stands in for a solid of each shape, in units of its half height.
_BULK = (1.0, 1.2, 1.1)


def _to_linear(srgb: np.ndarray) -> np.ndarray:
    srgb = np.asarray(srgb) / 255
    return np.where(srgb < 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4)


_ALBEDO = _to_linear(list(COLORS.values())).astype(np.float32).T


def light_ground(scene, height, width, focal):
    """Light that each pixel gets from the ground, by lamp and by sky: two arrays (height, width), float32."""
    camera, axes = scene.camera.astype(np.float32), scene.axes.astype(np.float32)
    u = (np.arange(width, dtype=np.float32) + np.float32(0.5 - width / 2)) / np.float32(focal)
    v = ((np.arange(height, dtype=np.float32) + np.float32(0.5 - height / 2)) / np.float32(focal))[:, None]
    depth = ground_depth(scene, height, focal)[:, None]
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
    ahead = slope / norm(slope)
    length = 2 * size * norm(slope)
    reach = np.where(scene.shape == SPHERE, 2.4, 1.9) * radius
    # A shadow with its soft edge is inside the box of two squares, one around the solid's foot, one around the tip.
    points = np.zeros((len(size), 8, 3))
    points[:, :, :2] = scene.center[:, None, :2] + reach[:, None, None] * CORNERS[:, :2]
    points[:, ::2, :2] += (length[:, None] * ahead)[:, None]
    spots = scene.project(points.reshape(-1, 3), (height, width)).reshape(-1, 8, 2)
    boxes = boxes_of_pixels(spots.min(axis=1), spots.max(axis=1), height, width)
    solid, row, column = lay_out(boxes)

    cos, sin = cos_sin(scene.angle)
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


def shade(scene, solid, normal, point, lamp_color, sky_color):
    """Light that points of the solids send to the camera: (3, m) for red, green and blue, float32, from 0 up.

    Takes what `find_surfaces` gives, and the colours (3, 1) of the lamp and of the sky.
    """
    light, camera = scene.light.astype(np.float32), scene.camera.astype(np.float32)
    gaze = point - camera[:, None]
    gaze /= np.sqrt(dot(gaze, gaze))
    plain = np.sqrt(dot(normal, normal))
    normal = normal / plain
    facing = dot(normal, gaze)
    mirror = gaze - 2 * facing * normal
    grazing = np.square(np.square(1 + np.minimum(facing, 0)))
    metal = scene.metal[solid]
    size = scene.half_size.astype(np.float32)
    # To one another, solids are balls of about their own bulk.
    bulk = size * np.float32(_BULK)[scene.shape]
    center = scene.center.T.astype(np.float32)
    other = np.arange(len(size)) != solid[:, None]
    apart = center[:, None] - point[:, :, None]
    square = dot(apart, apart)

    # How much of the lamp the other solids leave to see: their shadows on this one.
    ahead = dot(apart, light)
    ball = np.sqrt(np.maximum(square - ahead * ahead, 0)) - bulk
    free = np.where(other & (ahead > 0), _soft_edge(ball, np.maximum(ahead, 0)), 1).min(axis=1)
    lit = np.maximum(dot(normal, light) + 0.12, 0) / 1.12 * free
    upward = 0.5 + 0.5 * normal[2]
    rise = np.maximum(point[2], 0) / size[solid]
    ambient = 0.2 + 0.22 * upward
    ambient *= 1 - 0.65 * (1 - upward) * exp_minus(rise)

    # What a mirror would show: the bright ground, brightest towards the lamp and dark close to the solid, under a dim
    # studio with two wide soft lamps.
    down = np.maximum(-mirror[2], 0.05)
    across = np.sqrt(mirror[0] * mirror[0] + mirror[1] * mirror[1]) + 1e-3
    lampward = np.maximum((mirror[0] * light[0] + mirror[1] * light[1]) / across, 0)
    floor = (1 - exp_minus(0.9 * rise / down)) * (0.5 + 1.6 * np.square(np.square(lampward))) + 0.08
    room = 0.14 + 0.38 * np.maximum(mirror[2], 0)
    shown = floor + _smooth(mirror[2] * 4 + 0.5) * (room - floor)
    toward = np.maximum(dot(mirror, light), 0)
    window = _smooth(toward * 10 - 8.6) * free
    broad = np.square(np.square(np.square(toward)))
    tight = np.square(np.square(np.square(broad)))
    fill = np.float32([-0.75 * light[0], 0.45 * light[1], 0.62])
    shown += 0.55 * _smooth(dot(mirror, fill / norm(fill)) * 6 - 4.8)
    # An edge between two faces shows a blur of everything.
    clear = _smooth(plain * 30 - 29)
    shown = 0.4 + clear * (shown - 0.4)
    window *= clear

    # And of the other solids, the nearest.
    ahead = dot(apart, mirror[:, :, None])
    inside = np.maximum(1 - (square - ahead * ahead) / (bulk * bulk), 0)
    inside *= other & (ahead > 0)
    met = np.where(inside > 0, ahead - bulk * np.sqrt(inside), FAR).argmin(axis=1)
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
