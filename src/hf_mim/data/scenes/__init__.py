"""The embedded data set: pictures in the manner of CLEVR, drawn by numpy, with labels known exactly.

A scene is a ground plane seen in perspective by a jittered camera under a jittered lamp, with 3 to 10 solids on it:
spheres, cubes and cylinders in CLEVR's eight colours, two sizes and two materials (matte rubber, shiny metal). Scene
`index` of a split is a pure function of `(seed, split, index)`: nothing else, not the image size, the order or the
process, changes it or its labels, nor does the machine: what is drawn is the same to the bit on any that computes
by IEEE 754, since the functions whose last bits differ between processors are not used (see `arithmetic`).

Four labels, each an integer class (`SCENE_LABELS` has the names):

* `count` (8 classes): the number of solids, 3 to 10.
* `distance` (6 classes): the depth of the nearest solid's centre along the camera's axis (the "third pixel coordinate"
  of CLEVR), in VTAB's bins, whose edges are 0, 8, 8.5, 9, 9.5, 10 and 100.
* `shape` (3 classes) and `color` (8 classes) of that nearest solid, which is nearer than any other by `DEPTH_GAP` or
  more, so that the labels never hang on a hair.

`annotate_scene` tells of every pixel which solid it shows, of which shape, and how far away that is.

Importing this package costs numpy alone.
"""

from .annotations import MASK_CLASSES, SceneAnnotations, annotate_scene
from .dataset import SCENES_VERSION, scenes
from .drawing import render_scene
from .geometry import (
    COLORS,
    DISTANCE_EDGES,
    MAX_OBJECTS,
    MIN_OBJECTS,
    SCENE_LABELS,
    SHAPES,
    SPLITS,
    Scene,
    sample_scene,
)

__all__ = [
    "COLORS",
    "DISTANCE_EDGES",
    "MASK_CLASSES",
    "MAX_OBJECTS",
    "MIN_OBJECTS",
    "SCENES_VERSION",
    "SCENE_LABELS",
    "SHAPES",
    "SPLITS",
    "Scene",
    "SceneAnnotations",
    "annotate_scene",
    "render_scene",
    "sample_scene",
    "scenes",
]
