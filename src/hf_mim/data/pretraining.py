"""What a training loop draws from: samplers and data sets whose items know their epoch.

An item is asked for by `(epoch, index)`, not by `index`: the epoch then reaches a worker with the request, which an
attribute of the data set would not (persistent workers keep the copy that they started with).
"""

import logging
from collections.abc import Iterator

import numpy as np
import torch
from torch.utils.data import Dataset, IterableDataset, Sampler, default_collate, get_worker_info

from .images import BrokenImageError

logger = logging.getLogger(__name__)


class EpochSampler(Sampler[tuple[int, int]]):
    """Yields `(epoch, index)` for every index below `length`, in an order that is a function of (seed, epoch).

    Args:
        length (`int`): number of samples.
        seed (`int`): not negative.
        shuffle (`bool`): False gives 0, 1, 2, ... in every epoch.
    """

    def __init__(self, length: int, *, seed: int = 0, shuffle: bool = True):
        self.length = length
        self.seed = seed
        self.shuffle = shuffle
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[tuple[int, int]]:
        epoch = self.epoch
        order = np.arange(self.length)
        if self.shuffle:
            # PCG64, where the samples' own streams are Philox: the two cannot meet.
            order = np.random.Generator(np.random.PCG64([self.seed, epoch])).permutation(order)
        return iter([(epoch, index) for index in order.tolist()])


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
        # One flag per picture, in memory that the workers share: each can be set twice without being counted twice.
        self._broken = torch.zeros(len(pictures), dtype=torch.bool).share_memory_() if skip_broken else None

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, epoch_and_index: tuple[int, int]) -> dict[str, torch.Tensor]:
        epoch, index = epoch_and_index
        _, picture = self._read(index)
        return self.transform(picture, epoch, index)

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
    """Stacks items into `pixel_values` (batch, channels, height, width) and `noise` (batch, patches)."""
    # torch's own stacks straight into shared memory when it runs in a worker
    return default_collate([{key: item[key] for key in ("pixel_values", "noise")} for item in items])
