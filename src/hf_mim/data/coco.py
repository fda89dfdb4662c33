"""
Objects as COCO words them: a JSON file of a folder of pictures, or a column of a data set.

All of them are looked at when they are read. They are kept as JSON in one array, of which a picture's are decoded when
they are asked for: Python's lists of them would be copied into every worker, page by page.
"""

import hashlib
import io
import json
import math
import os
from dataclasses import dataclass

import numpy as np
from transformers.utils import logging

from .arguments import DataArguments
from .dataset import ImageDataset
from .detection import ObjectArguments, Objects, SceneObjects, add_objects
from .loading import check_images, hold_out, load_images, subset
from .sources.datasets import sibling_column
from .sources.folder import FileImages, check_folder

logger = logging.get_logger(__name__)

_ORIENTATION = 0x0112
# How far a box may reach out of its picture, in pixels: coordinates are rounded.
_TOLERANCE = 1.0


class RecordedObjects:
    """
    [`Objects`] by index, of records `{"box": [x0, y0, x1, y1], "class": int, "crowd": bool, "area": float,
    "segmentation": ...}`, where the last is COCO's, or None.

    Args:
        records: A list of them for each picture.
        sizes: (height, width) of each picture.
        rows (`np.ndarray`): The index of each picture.
    """

    def __init__(self, records: list[list[dict]], sizes: list[tuple[int, int]], rows: np.ndarray):
        lines = [json.dumps(one).encode() for one in records]
        self.ends = np.cumsum([0, *map(len, lines)])
        self.data = np.frombuffer(b"".join(lines), dtype=np.uint8)
        self.sizes = np.array(sizes, dtype=np.int64).reshape(-1, 2)
        self.places = np.zeros(int(rows.max(initial=-1)) + 1, dtype=np.int64)
        self.places[rows] = np.arange(len(rows))

    def fingerprint(self) -> str:
        return hashlib.sha256(self.data).hexdigest()

    def __getitem__(self, index: int) -> Objects:
        place = self.places[index]
        records = json.loads(self.data[self.ends[place] : self.ends[place + 1]].tobytes())
        size = tuple(self.sizes[place].tolist())
        masks = None
        if all(record["segmentation"] is not None for record in records):
            masks = np.zeros((len(records), *size), dtype=bool)
            for mask, record in zip(masks, records, strict=True):
                mask[:] = decode_mask(record["segmentation"], size)
        return Objects(
            boxes=np.array([record["box"] for record in records], dtype=np.float32).reshape(-1, 4),
            classes=np.array([record["class"] for record in records], dtype=np.int64),
            crowds=np.array([record["crowd"] for record in records], dtype=bool),
            areas=np.array([record["area"] for record in records], dtype=np.float32),
            masks=masks,
        )


def check_segmentation(segmentation, size: tuple[int, int]) -> None:
    """
    Looks at COCO's polygons ([x, y, x, y, ...] in pixels, one or several) or run lengths of a picture of `size`.

    Raises:
        ValueError: If it is neither, or of another size; what is wrong, to be put behind the object's name.
    """
    if isinstance(segmentation, dict):
        counts, found = segmentation.get("counts"), segmentation.get("size")
        if found is None or tuple(found) != tuple(size):
            raise ValueError(f"run lengths of {found} pixels (height, width), and the picture has {list(size)}")
        if not isinstance(counts, list | str):
            raise ValueError("run lengths without counts")
        total = sum(counts) if isinstance(counts, list) else None
        if total is not None and total != size[0] * size[1]:
            raise ValueError(f"run lengths that add up to {total} pixels, and the picture has {size[0] * size[1]}")
        return
    if not isinstance(segmentation, list):
        raise ValueError("neither polygons nor run lengths")
    for polygon in segmentation:
        if not isinstance(polygon, list) or len(polygon) < 6 or len(polygon) % 2:
            raise ValueError("a polygon that is no list of at least three points (x, y, x, y, ...)")


def decode_mask(segmentation, size: tuple[int, int]) -> np.ndarray:
    """A mask, uint8 (height, width), of polygons or run lengths that were checked."""
    from faster_coco_eval.core import mask

    height, width = size
    if isinstance(segmentation, list):
        return mask.decode(mask.merge(mask.frPyObjects(segmentation, height, width)))
    if isinstance(segmentation["counts"], list):
        segmentation = mask.frPyObjects(segmentation, height, width)
    return mask.decode(segmentation)


@dataclass
class DetectionSplits:
    """
    Pictures with objects, which were all looked at.

    Attributes:
        train, validation: To train on, of which each has objects; and held out.
        names: Of the classes.
        with_masks: Whether masks are there and wanted.
        fingerprint: Of all objects.
    """

    train: ImageDataset
    validation: ImageDataset
    names: list[str]
    with_masks: bool
    fingerprint: str


def load_objects(data_args: DataArguments, object_args: ObjectArguments, seed: int) -> DetectionSplits:
    """
    The pictures that the flags name, with their objects.

    Raises:
        ValueError: Nothing there, or not what it should be; the message names the file and says what to do.
    """
    if bool(object_args.train_annotations) != bool(data_args.train_dir):
        raise ValueError("--train_dir and --train_annotations go together: a folder of pictures, and a JSON of them.")
    if object_args.train_annotations and bool(object_args.validation_annotations) != bool(data_args.validation_dir):
        raise ValueError("--validation_dir and --validation_annotations go together: give both, or neither.")
    if object_args.objects_column_name and not data_args.dataset_name:
        raise ValueError("--objects_column_name is of --dataset_name: give it, or leave the column out.")
    if data_args.train_dir:
        found = _of_folders(data_args, object_args)
    elif data_args.dataset_name:
        found = _of_columns(data_args, object_args, seed)
    else:
        return _of_scenes(data_args, object_args, seed)
    train, *held_out = found
    check_images(train.pictures)
    train.pictures = train.pictures.select(np.flatnonzero(train.numbers))
    validation = held_out[0].pictures if held_out else None
    if not len(train.pictures) or (held_out and not held_out[0].numbers.any()):
        source = train.pictures.source if not len(train.pictures) else validation.source
        raise ValueError(f"No picture of {source} has an object: there is nothing to learn or to judge by.")
    train_pictures = train.pictures
    if validation is None:
        train_pictures, validation = hold_out(train_pictures, data_args.validation_fraction)
    has_masks = all(split.has_masks for split in found)
    if object_args.masks and not has_masks:
        raise ValueError(f"--masks: not every object of {train.pictures.source} has one. Leave the flag out.")
    return DetectionSplits(
        train=subset(train_pictures, data_args.max_train_samples),
        validation=subset(validation, data_args.max_eval_samples),
        names=train.names,
        with_masks=has_masks and object_args.masks is not False,
        fingerprint=" ".join(split.fingerprint for split in found),
    )


def _of_scenes(data_args, object_args, seed) -> DetectionSplits:
    pictures = load_images(data_args, seed=seed)
    for split in (pictures.train, pictures.validation):
        add_objects(split, SceneObjects(split.annotations))
    # The first class of the masks is the ground.
    names = pictures.train.mask_names[1:]
    return DetectionSplits(pictures.train, pictures.validation, names, object_args.masks is not False, "scenes")


@dataclass
class _Split:
    """Pictures of one source with objects, and what is known of these: how many each has that count, and so on."""

    pictures: ImageDataset
    names: list[str]
    numbers: np.ndarray
    has_masks: bool
    fingerprint: str


@dataclass
class _Classes:
    """The classes that objects may have: their numbers by what the data calls them, and their names."""

    numbers: dict
    names: list[str]


def _of_folders(data_args, object_args) -> list[_Split]:
    files = [object_args.train_annotations, object_args.validation_annotations]
    folders = [data_args.train_dir, data_args.validation_dir]
    found, classes = [], None
    for path, folder in zip(files, folders, strict=True):
        if path is not None:
            pictures, raw, classes = _read_coco(path, check_folder(folder), data_args, classes)
            found.append(_attach(pictures, raw, classes, object_args))
    return found


def _read_coco(path: str, folder: str, data_args, known: _Classes | None):
    """The pictures that a JSON lists, their annotations, and the classes, which have to be the `known` ones."""
    table = _read_table(path)
    names = {one["id"]: str(one["name"]) for one in _entries(table, "categories", ("id", "name"), path)}
    classes = _Classes({id: number for number, id in enumerate(sorted(names))}, [names[id] for id in sorted(names)])
    if not names:
        raise ValueError(f"{path} has no categories: there is nothing to tell apart.")
    if known is not None and (classes.numbers, classes.names) != (known.numbers, known.names):
        raise ValueError(
            f"{path} has the categories {', '.join(classes.names)}, and the training's are {', '.join(known.names)}: "
            "their ids and names have to be the same."
        )
    images = _entries(table, "images", ("id", "file_name"), path)
    if not images:
        raise ValueError(f"{path} lists no images.")
    rows = {image["id"]: row for row, image in enumerate(images)}
    files = [image["file_name"] for image in images]
    missing = [name for name in files if not os.path.isfile(os.path.join(folder, name))]
    if missing:
        raise ValueError(
            f"{os.path.join(folder, missing[0])} does not exist, and {path} lists it ({len(missing)} of {len(files)} "
            "are missing). Is it the right folder?"
        )
    if len(rows) < len(images):
        raise ValueError(f"{path} gives the same id to several images.")
    raw = [[] for _ in images]
    for annotation in _entries(table, "annotations", ("image_id", "category_id", "bbox"), path):
        where = f"{path}, annotation {annotation.get('id', '(without id)')}"
        if annotation["image_id"] not in rows:
            raise ValueError(f"{where}: there is no image of the id {annotation['image_id']}.")
        row = rows[annotation["image_id"]]
        raw[row].append(annotation | {"category": annotation["category_id"], "where": f"{where}, of {files[row]}"})
    pictures = ImageDataset(
        FileImages(folder, files),
        data_args.num_channels or 3,
        source=folder,
        max_image_pixels=data_args.max_image_pixels,
    )
    for image, size in zip(images, _sizes(pictures), strict=True):
        said = tuple(image.get(side) for side in ("height", "width"))
        if None not in said and said != size:
            raise ValueError(
                f"{os.path.join(folder, image['file_name'])} has {size[0]} x {size[1]} pixels (height x width), and "
                f"{path} says {said[0]} x {said[1]}."
            )
    return pictures, raw, classes


def _read_table(path: str) -> dict:
    try:
        with open(os.path.expanduser(path), encoding="utf-8") as file:
            table = json.load(file)
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}.") from error
    except ValueError as error:
        raise ValueError(f"{path} is no JSON: {error}.") from error
    if not isinstance(table, dict):
        raise ValueError(f"{path} holds a {type(table).__name__}; expected images, annotations and categories.")
    return table


def _entries(table: dict, name: str, fields: tuple[str, ...], path: str) -> list[dict]:
    entries = table.get(name)
    if not isinstance(entries, list):
        raise ValueError(f"{path} has no list of {name}; expected images, annotations and categories, as COCO's has.")
    for number, entry in enumerate(entries):
        lacking = [field for field in fields if not isinstance(entry, dict) or field not in entry]
        if lacking:
            raise ValueError(f"{path}: entry {number} of {name} has no {lacking[0]}.")
    return entries


def _of_columns(data_args, object_args, seed) -> list[_Split]:
    pictures = load_images(data_args, seed=seed)
    splits = (pictures.train, pictures.validation)
    columns = [
        sibling_column(split, object_args.objects_column_name, ["objects", "annotations"], "--objects_column_name")
        for split in splits
    ]
    raw, classes = [], None
    for split, column in zip(splits, columns, strict=True):
        entries = [_as_list(column[int(row)], split.name(index)) for index, row in enumerate(split._rows)]
        classes = classes or _column_classes(column)
        raw.append(entries)
    if classes is None:
        found = sorted({one["category"] for entries in raw for objects in entries for one in objects})
        classes = _Classes({value: number for number, value in enumerate(found)}, [str(value) for value in found])
    return [_attach(split, entries, classes, object_args) for split, entries in zip(splits, raw, strict=True)]


def _column_classes(column) -> _Classes | None:
    """The classes of a column of objects, where its type names them."""
    feature = column.dataset.features[column.column]
    while hasattr(feature, "feature"):
        feature = feature.feature
    if isinstance(feature, list):
        feature = feature[0]
    category = feature.get("category", feature.get("category_id")) if isinstance(feature, dict) else None
    while hasattr(category, "feature"):
        category = category.feature
    names = getattr(category, "names", None)
    return None if names is None else _Classes({number: number for number in range(len(names))}, list(names))


def _as_list(objects, name: str) -> list[dict]:
    """A picture's objects, whether they come as a list of dicts or as a dict of lists."""
    if objects is None:
        return []
    if isinstance(objects, dict):
        number = len(objects.get("bbox") or [])
        columns = {key: value for key, value in objects.items() if isinstance(value, list) and len(value) == number}
        objects = [{key: value[place] for key, value in columns.items()} for place in range(number)]
    entries = []
    for place, one in enumerate(objects):
        where = f"{name}, object {place}"
        category = one.get("category", one.get("category_id"))
        if one.get("bbox") is None or category is None:
            raise ValueError(f"{where} has no bbox and category; it has {', '.join(one)}.")
        entries.append(one | {"category": category, "where": where})
    return entries


def _attach(pictures: ImageDataset, raw: list[list[dict]], classes: _Classes, args: ObjectArguments) -> _Split:
    """Gives pictures their objects, each of which is looked at."""
    sizes, records, broken = _sizes(pictures), [], []
    for entries, size in zip(raw, sizes, strict=True):
        kept = []
        for entry in entries:
            try:
                kept.append(_record(entry, size, classes, with_mask=args.masks is not False))
            except _BrokenObject as error:
                if not args.skip_broken_objects:
                    raise ValueError(f"{error} Mend it, or leave such objects out: --skip_broken_objects.") from error
                broken.append(str(error))
        records.append(kept)
    if broken:
        logger.warning(f"{len(broken)} broken objects are left out, the first one: {broken[0]}")
    objects = RecordedObjects(records, sizes, pictures._rows)
    add_objects(pictures, objects)
    return _Split(
        pictures=pictures,
        names=classes.names,
        numbers=np.array([sum(not record["crowd"] for record in kept) for kept in records]),
        has_masks=all(record["segmentation"] is not None for kept in records for record in kept),
        fingerprint=objects.fingerprint(),
    )


class _BrokenObject(Exception):
    """An object that cannot be learnt."""


def _record(entry: dict, size: tuple[int, int], classes: _Classes, with_mask: bool) -> dict:
    """As [`RecordedObjects`] has it."""
    where, bbox = entry["where"], entry["bbox"]
    if entry["category"] not in classes.numbers:
        raise ValueError(f"{where}: there is no category {entry['category']!r}; there are {', '.join(classes.names)}.")
    numbers = isinstance(bbox, list | tuple) and len(bbox) == 4 and all(isinstance(one, int | float) for one in bbox)
    if not numbers or not all(map(math.isfinite, bbox)):
        raise ValueError(f"{where}: the box is {bbox}; expected four numbers: x, y, width, height.")
    x, y, width, height = bbox
    if width <= 0 or height <= 0:
        raise _BrokenObject(f"{where}: the box {list(bbox)} (x, y, width, height) is empty.")
    if min(x, y) < -_TOLERANCE or x + width > size[1] + _TOLERANCE or y + height > size[0] + _TOLERANCE:
        raise _BrokenObject(
            f"{where}: the box {list(bbox)} (x, y, width, height) reaches out of its picture of {size[1]} x {size[0]} "
            "pixels (width x height)."
        )
    box = [max(0.0, x), max(0.0, y), min(size[1], x + width), min(size[0], y + height)]
    if box[2] <= box[0] or box[3] <= box[1]:
        raise _BrokenObject(f"{where}: the box {list(bbox)} (x, y, width, height) is empty within its picture.")
    segmentation = (entry.get("segmentation") or None) if with_mask else None
    if segmentation is not None:
        if isinstance(segmentation, dict) and isinstance(segmentation.get("counts"), bytes):
            segmentation = segmentation | {"counts": segmentation["counts"].decode("ascii")}
        try:
            check_segmentation(segmentation, size)
        except ValueError as error:
            raise _BrokenObject(f"{where}: its segmentation is {error}.") from error
    return {
        "box": box,
        "class": classes.numbers[entry["category"]],
        "crowd": bool(entry.get("iscrowd", 0)),
        "area": float(entry.get("area") or 0.0),
        "segmentation": segmentation,
    }


def _sizes(pictures: ImageDataset) -> list[tuple[int, int]]:
    """(height, width) of every picture as `read_image` gives it, mostly without decoding it."""
    return [
        _size_in_file(pictures.stored(index)) or tuple(pictures[index].shape[1:]) for index in range(len(pictures))
    ]


def _size_in_file(value) -> tuple[int, int] | None:
    """By the file's header, turned upright; None where there is none that says it."""
    from PIL import Image

    if isinstance(value, dict):
        value = value.get("bytes") or value.get("path")
    try:
        with Image.open(io.BytesIO(value) if isinstance(value, bytes) else value) as image:
            # A TIFF turns itself.
            turned = image.format != "TIFF" and image.getexif().get(_ORIENTATION, 1) >= 5
            return image.size if turned else image.size[::-1]
    except Exception:  # whatever is wrong is told where it is decoded
        return None
