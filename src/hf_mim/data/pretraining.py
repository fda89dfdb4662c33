"""What a training loop draws from: samplers and data sets whose items know their epoch.

An item is asked for by `(epoch, index)`, not by `index`: the epoch then reaches a worker with the request, which an
attribute of the data set would not (persistent workers keep the copy that they started with).
"""

import logging
from collections.abc import Iterator
from itertools import chain, repeat

import numpy as np
import torch
from torch.utils.data import Dataset, IterableDataset, Sampler, default_collate, get_worker_info

from .images import BrokenImageError

logger = logging.getLogger(__name__)

# Shards that are shuffled together, and are read from at one time.
WINDOW_SHARDS = 16
# Of an order that is not drawn, as many numbers are made at a time.
_CHUNK = 65536
_STACKED = ("pixel_values", "noise", "targets")


class EpochSampler(Sampler[tuple[int, int]]):
    """Yields `(epoch, index)` for every index below `length`, in an order that is a function of (seed, epoch).

    Of pictures in many shards, the shards are put in a new order each epoch, and the pictures of up to 16 that follow
    one another are shuffled; so reading moves on through the files, and what is held does not grow with their number.

    Args:
        length (`int`): number of samples.
        seed (`int`): not negative.
        shuffle (`bool`): False gives 0, 1, 2, ... in every epoch.
        shard_ends (`np.ndarray`, *optional*): ascending, for each shard the index after its last sample; the last is
            `length`.

    Attributes:
        start (`int`): samples at the beginning of an epoch whose places are kept, and whose indices are not to be
            used: those that a resumed run has seen. That takes 20 nanoseconds each, whatever the order.
    """

    def __init__(self, length: int, *, seed: int = 0, shuffle: bool = True, shard_ends: np.ndarray | None = None):
        self.length = length
        self.seed = seed
        self.shuffle = shuffle
        self.shard_ends = shard_ends if shard_ends is not None and len(shard_ends) > WINDOW_SHARDS else None
        self.epoch = self.start = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[tuple[int, int]]:
        epoch, start = self.epoch, min(self.start, self.length)
        windows = self._windows(epoch, start)
        return chain(repeat((epoch, -1), start), chain.from_iterable(zip(repeat(epoch), w.tolist()) for w in windows))

    def _windows(self, epoch: int, start: int) -> Iterator[np.ndarray]:
        """The order of an epoch without its first `start` indices, in parts; of those before, none is drawn."""
        if not self.shuffle:
            for first in range(start, self.length, _CHUNK):
                yield np.arange(first, min(first + _CHUNK, self.length))
            return
        if self.shard_ends is None:
            order = self._generator(epoch).permutation(np.arange(self.length))
            for first in range(start, self.length, _CHUNK):
                yield order[first : first + _CHUNK]
            return
        firsts = np.concatenate(([0], self.shard_ends[:-1]))
        shards = self._generator(epoch).permutation(len(firsts))
        # As many in each: of the last, two or three alone would hardly be shuffled.
        windows = np.array_split(shards, -(-len(shards) // WINDOW_SHARDS))
        for window, chosen in enumerate(windows):
            number = int((self.shard_ends[chosen] - firsts[chosen]).sum())
            if start < number:
                indices = np.concatenate([np.arange(firsts[shard], self.shard_ends[shard]) for shard in chosen])
                yield self._generator(epoch, 1 + window).permutation(indices)[start:]
            start = max(0, start - number)

    def _generator(self, *of: int) -> np.random.Generator:
        # PCG64, where the samples' own streams are Philox: the two cannot meet.
        return np.random.Generator(np.random.PCG64([self.seed, *of]))


class PretrainingDataset(Dataset):
    """Map-style: `dataset[epoch, index]` is a transformed picture.

    Args:
        pictures: a sequence of pictures, `pictures[i]` being a tensor of shape `(channels, height, width)`.
        transform: `(picture, epoch, index) -> dict of tensors`, as `PretrainingTransform`.
        skip_broken (`bool`): put the next readable picture in the place of a broken one, and note it; see
            `broken_indices`. False lets the `BrokenImageError` through.
    """

    def __init__(self, pictures, transform, *, skip_broken: bool = False):
        self.pictures = pictures
        self.transform = transform
        # By index, what a frozen network has of each picture, where that is known: a dict of arrays.
        self.targets = None
        # One flag per picture, in memory that the workers share: each can be set twice without being counted twice.
        self._broken = torch.zeros(len(pictures), dtype=torch.bool).share_memory_() if skip_broken else None

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, epoch_and_index: tuple[int, int]) -> dict[str, torch.Tensor]:
        epoch, index = epoch_and_index
        _, picture = self._read(index)
        item = self.transform(picture, epoch, index)
        return item if self.targets is None else item | {"targets": self.targets[index]}

    @property
    def broken_indices(self) -> list[int]:
        """Indices of the broken pictures met so far by this process and its workers (`skip_broken` only)."""
        return [] if self._broken is None else self._broken.nonzero().flatten().tolist()

    @property
    def num_broken(self) -> int:
        """How many `broken_indices` there are; a stream counts alike."""
        return len(self.broken_indices)

    def _read(self, index: int) -> tuple[int, torch.Tensor]:
        """The picture, and where it stands: another place where it takes that of a broken one."""
        if self._broken is None:
            return index, self.pictures[index]
        for candidate in range(index, index + len(self)):
            candidate %= len(self)
            if self._broken[candidate]:
                continue
            try:
                return candidate, self.pictures[candidate]
            except BrokenImageError as error:
                self._broken[candidate] = True
                logger.warning("Skipped a broken picture: %s", error)
        raise BrokenImageError(f"None of the {len(self)} pictures can be read.")


class StreamingPretrainingDataset(IterableDataset):
    """An endless stream of transformed pictures, for data that is read in order.

    Args:
        pictures: as `ImageStream`: iterates over tensors of shape `(channels, height, width)`, shares itself out
            among the workers of a `DataLoader`, and has `set_epoch` and `shard(num_shards, index)`.
        transform: `(picture, epoch, index) -> dict of tensors`, as `PretrainingTransform`.
        rank, num_processes (`int`): which share of the pictures this process takes, out of how many.

    After the last picture it begins again, with new crops and a new order; so every process has as many batches as any
    other, whatever their shares, and training stops at `--max_steps`, which it needs.

    Crop, flip and noise are functions of (seed, pass, place in the stream). The place counts the streams apart (one
    per process and worker), so unlike those of a map-style data set they depend on how many workers and processes
    there are. A resumed run repeats the stream from its start up to where it was, reading all of it.
    """

    def __init__(self, pictures, transform, *, rank: int = 0, num_processes: int = 1):
        self.pictures = pictures.shard(num_processes, rank) if num_processes > 1 else pictures
        self.transform = transform
        self.rank = rank
        self.num_processes = num_processes

    @property
    def num_broken(self) -> int:
        """As `ImageStream.num_broken`."""
        return self.pictures.num_broken

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        worker = get_worker_info()
        worker_id, num_workers = (worker.id, worker.num_workers) if worker else (0, 1)
        stream = self.rank * num_workers + worker_id
        num_streams = self.num_processes * num_workers
        # A stream of its own: `datasets` keeps a stream's epoch in memory that all workers share, and one that is a
        # pass ahead would change the order, and so the share, of the others.
        pictures = self.pictures.shard(1, 0)
        epoch = 0
        while True:
            pictures.set_epoch(epoch)
            place = -1
            for place, picture in enumerate(pictures):
                yield self.transform(picture, epoch, place * num_streams + stream)
            if place < 0:  # a worker that has no share, where there are more workers than files
                if worker is None:
                    raise ValueError("The stream holds no picture that can be read.")
                return
            epoch += 1


class RawCollator:
    """
    Stacks what a `raw` transform gives: uint8 `pixel_values`, a quarter of what float32 would be to hand over, which
    its `normalise` makes float32. A batch with a picture of floats in it is normalised here.

    Args:
        transform: As `PretrainingTransform`.
    """

    def __init__(self, transform):
        self.transform = transform

    def __call__(self, items: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        if any(item["pixel_values"].dtype != torch.uint8 for item in items):
            items = [item | {"pixel_values": self.transform.normalise(item["pixel_values"])} for item in items]
        return pretraining_collator(items)


def pretraining_collator(items: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Stacks items: `pixel_values` (batch, channels, height, width), `noise` (batch, patches) and any `targets`."""
    # torch's own stacks straight into shared memory when it runs in a worker
    return default_collate([{key: item[key] for key in _STACKED if key in item} for item in items])
