"""Reading every picture of a data set once, and telling what is wrong with it."""

import hashlib
import io
from collections import Counter
from dataclasses import dataclass, field

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from .dataset import ImageDataset, stored_bytes
from .images import BrokenImageError, MissingImageError, OversizedImageError, pixel_limit, read_image

# What stops training, unless it is left out; the last stops it in any case.
FAULTS = ("missing", "broken", "oversized", "unfit")


@dataclass
class Inspection:
    """What was found in a data set.

    Attributes:
        pictures: what was read.
        faults: kind (`FAULTS`) to the messages, in order; each names its picture.
        forms: what a picture is stored as ("RGB, 8 bits a channel", "uint16 array, 5 channels") to how many are.
        odd: form to the names of its first pictures, for all forms but the most frequent.
        heights, widths: in pixels, int32 of shape (N,); 0 where the picture cannot be read.
        digests: of what is stored, uint64 of shape (N,).
    """

    pictures: ImageDataset
    faults: dict[str, list[str]]
    forms: Counter = field(default_factory=Counter)
    odd: dict[str, list[str]] = field(default_factory=dict)
    heights: np.ndarray = None
    widths: np.ndarray = None
    digests: np.ndarray = None

    @property
    def num_faulty(self) -> int:
        return sum(map(len, self.faults.values()))


def inspect_images(images: ImageDataset, *, num_workers: int = 0, max_named: int = 20) -> Inspection:
    """Reads all pictures once.

    Memory does not grow with the pictures' sizes, and with their number only by 16 bytes each.

    Args:
        num_workers (`int`): processes that read.
        max_named (`int`): how many pictures of each odd form are named.
    """
    number = len(images)
    found = Inspection(images, {kind: [] for kind in FAULTS})
    found.heights, found.widths = np.zeros(number, dtype=np.int32), np.zeros(number, dtype=np.int32)
    found.digests = np.zeros(number, dtype=np.uint64)
    reader = DataLoader(_Inspected(images), batch_size=16, num_workers=num_workers, collate_fn=list)
    first: dict[str, list[int]] = {}
    index = 0
    # None: no bar where nobody looks.
    with tqdm(total=number, unit=" pictures", disable=None, leave=False) as bar:
        for batch in reader:
            for fault, message, form, height, width, digest in batch:
                if fault:
                    found.faults[fault].append(message)
                else:
                    found.heights[index], found.widths[index] = height, width
                if form:
                    found.forms[form] += 1
                    if len(first.setdefault(form, [])) < max_named:
                        first[form].append(index)
                found.digests[index] = digest
                index += 1
            bar.update(len(batch))
    usual = found.forms.most_common(1)[0][0] if found.forms else None
    found.odd = {form: [images.name(i) for i in named] for form, named in first.items() if form != usual}
    return found


def find_copies(found: list[Inspection]) -> list[tuple[str, str]]:
    """Names of pictures that hold the same bytes as an earlier one, and of that one, over all that was inspected."""
    digests = np.concatenate([one.digests for one in found])
    _, first, group = np.unique(digests, return_index=True, return_inverse=True)
    copies = np.flatnonzero((first[group] != np.arange(len(digests))) & (digests != 0))
    starts = np.cumsum([0] + [len(one.digests) for one in found])

    def name(place: int) -> str:
        part = int(np.searchsorted(starts, place, side="right")) - 1
        return found[part].pictures.name(int(place - starts[part]))

    return [(name(place), name(first[group[place]])) for place in copies]


class _Inspected(Dataset):
    """What one picture has to tell: fault, message, form, height, width, digest."""

    def __init__(self, images: ImageDataset):
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[str | None, str, str | None, int, int, int]:
        images, form, digest = self.images, None, 0
        try:
            stored = images.stored(index)
            name = images.name(index)
            try:
                data = stored_bytes(stored)
            except FileNotFoundError as error:
                raise MissingImageError(f"{name}: there is no such file.") from error
            except OSError as error:
                raise BrokenImageError(f"{name}: cannot be read: {error.strerror}") from error
            if data:  # 0 is nobody's digest
                digest = int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little") or 1
            form = _form(stored, data, name)
            is_file = isinstance(stored, str | dict) and data
            image = read_image(
                data if is_file else stored,
                images.num_channels,
                name=name,
                max_image_pixels=images.max_image_pixels,
            )
        except MissingImageError as error:
            return "missing", str(error), form, 0, 0, digest
        except OversizedImageError as error:
            return "oversized", str(error), form, 0, 0, digest
        except BrokenImageError as error:
            return "broken", str(error), form, 0, 0, digest
        except ValueError as error:
            return "unfit", str(error), form, 0, 0, digest
        return None, "", form, image.shape[1], image.shape[2], digest


def _form(stored, data: bytes, name: str) -> str | None:
    from PIL import Image

    if isinstance(stored, Image.Image):
        return _form_of_image(stored)
    if isinstance(stored, np.ndarray | torch.Tensor):
        return _form_of_array(np.asarray(stored))
    if data.startswith(b"\x93NUMPY"):
        try:
            return _form_of_array(np.load(io.BytesIO(data), allow_pickle=False))
        except (ValueError, OSError, EOFError):
            return None
    try:
        with pixel_limit(name), Image.open(io.BytesIO(data)) as image:
            return _form_of_image(image)
    # Of a damaged file nearly anything, and reading it says what.
    except Exception:
        return None


def _form_of_image(image) -> str:
    bits = {"1": 1, "I": 32, "F": 32}.get(image.mode, 16 if image.mode.startswith("I;16") else 8)
    transparent = ", transparent" if image.info.get("transparency") is not None else ""
    animated = ", several pages or frames" if getattr(image, "n_frames", 1) > 1 else ""
    return f"{image.mode}, {bits} bit{'s' * (bits > 1)} a channel{transparent}{animated}"


def _form_of_array(array: np.ndarray) -> str:
    channels = 1 if array.ndim == 2 else min(array.shape[0], array.shape[-1]) if array.ndim == 3 else 0
    return f"{array.dtype} array, {channels} channel{'s' * (channels != 1)}"
