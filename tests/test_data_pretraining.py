"""Sampler, data sets and collator under torch's DataLoader and accelerate's wrappers of it."""

import logging
import traceback
from itertools import islice

import numpy as np
import pytest
import torch
from accelerate import skip_first_batches
from accelerate.data_loader import DataLoaderShard, prepare_data_loader
from torch.utils.data import DataLoader, Dataset

from hf_mim.data.images import BrokenImageError
from hf_mim.data.pretraining import (
    EpochSampler,
    PretrainingDataset,
    StreamingPretrainingDataset,
    pretraining_collator,
)
from hf_mim.data.transforms import PretrainingTransform


class Pictures(Dataset):
    """Pictures that show their own number; those in `broken` cannot be read."""

    def __init__(self, length=24, broken=()):
        self.length = length
        self.broken = broken

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        if index in self.broken:
            raise BrokenImageError(f"folder/{index}.jpg: broken")
        return torch.full((3, 8, 8), index, dtype=torch.uint8)


class Tell:
    """A transform that says what it was given."""

    def __call__(self, picture, epoch, index):
        return {"pixel_values": picture[:1, 0, 0].float(), "noise": torch.tensor([float(epoch), float(index)])}


def loader(dataset, **kwargs):
    return DataLoader(dataset, collate_fn=pretraining_collator, **kwargs)


def seen(batches):
    """(picture, epoch, index) of every item, by batch."""
    return [
        [(int(p), int(e), int(i)) for p, (e, i) in zip(batch["pixel_values"], batch["noise"], strict=True)]
        for batch in batches
    ]


# --- the sampler


def test_every_index_once_and_in_another_order_each_epoch():
    sampler = EpochSampler(50, seed=1)
    orders = []
    for epoch in (0, 1, 2):
        sampler.set_epoch(epoch)
        items = list(sampler)
        assert len(sampler) == 50 and {e for e, _ in items} == {epoch}
        assert sorted(i for _, i in items) == list(range(50))
        orders.append(tuple(i for _, i in items))
    assert len(set(orders)) == 3
    again = EpochSampler(50, seed=1)
    again.set_epoch(2)
    assert tuple(i for _, i in again) == orders[2]  # no need to have gone through the epochs before
    assert [i for _, i in EpochSampler(50, seed=2)] != list(orders[0])
    assert list(EpochSampler(3, shuffle=False)) == [(0, 0), (0, 1), (0, 2)]


def prepared(num_workers=0, num_processes=1, process_index=0, **kwargs):
    """As the Trainer does it: a DataLoader through accelerate."""
    dataset = PretrainingDataset(Pictures(), Tell())
    sampler = EpochSampler(len(dataset), seed=5)
    made = loader(dataset, sampler=sampler, batch_size=4, drop_last=True, num_workers=num_workers, **kwargs)
    return sampler, prepare_data_loader(made, num_processes=num_processes, process_index=process_index)


@pytest.mark.parametrize("kwargs", [{}, {"num_workers": 2}, {"num_workers": 2, "persistent_workers": True}])
def test_the_epoch_reaches_every_worker(kwargs):
    _, batches = prepared(**kwargs)
    for epoch in (0, 1, 3):
        batches.set_epoch(epoch)  # by accelerate: the sampler is not touched by hand
        expected = EpochSampler(24, seed=5)
        expected.set_epoch(epoch)
        assert sum(seen(batches), []) == [(i, e, i) for e, i in expected]


def test_two_processes_share_what_one_would_see():
    _, whole = prepared()
    whole.set_epoch(1)
    whole = seen(whole)
    for process in (0, 1):
        _, part = prepared(num_processes=2, process_index=process)
        part.set_epoch(1)
        assert seen(part) == whole[process::2]


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("num_processes", [1, 2])
def test_resuming_in_the_middle_of_an_epoch(num_workers, num_processes):
    """What the Trainer does on resume. With two processes accelerate's set_epoch does not get through
    SkipBatchSampler(BatchSamplerShard(...)), so the trainer must set it on the sampler itself, as here."""
    _, batches = prepared(num_workers, num_processes, num_processes - 1)
    batches.set_epoch(2)
    expected = seen(batches)

    sampler, batches = prepared(num_workers, num_processes, num_processes - 1)
    batches = skip_first_batches(batches, 2)
    batches.set_epoch(2)
    assert sampler.epoch == (2 if num_processes == 1 else 0)  # accelerate 1.15: should this fail, rejoice
    sampler.set_epoch(2)
    assert seen(batches) == expected[2:]


def test_workers_change_nothing():
    pictures = [torch.randint(0, 256, (3, 12, 12), dtype=torch.uint8) for _ in range(16)]
    transform = PretrainingTransform((8, 8), 4, [0.5] * 3, [0.5] * 3, seed=3)
    runs = []
    for num_workers in (0, 2):
        torch.manual_seed(num_workers)  # and neither does the global generator
        dataset = PretrainingDataset(pictures, transform)
        runs.append(list(loader(dataset, sampler=EpochSampler(16), batch_size=4, num_workers=num_workers)))
    for a, b in zip(*runs, strict=True):
        assert a.keys() == b.keys() == {"pixel_values", "noise"}
        assert all(torch.equal(a[key], b[key]) for key in a)
    assert runs[0][0]["pixel_values"].shape == (4, 3, 8, 8) and runs[0][0]["noise"].shape == (4, 4)


# --- broken pictures


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_broken_picture_stops_with_its_name(num_workers):
    dataset = PretrainingDataset(Pictures(broken={7}), Tell())
    with pytest.raises(BrokenImageError, match=r"folder/7\.jpg: broken") as caught:
        list(loader(dataset, sampler=EpochSampler(24), batch_size=4, num_workers=num_workers))
    # The error holds its frames, and they hold it: left to the garbage collector, the workers would end in no order
    # and be waited for, 10 seconds.
    traceback.clear_frames(caught.tb)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_broken_pictures_are_replaced_and_counted_once(num_workers, caplog):
    dataset = PretrainingDataset(Pictures(broken={7, 8, 23}), Tell(), skip_broken=True)
    sampler = EpochSampler(24, shuffle=False)
    assert dataset.broken_indices == []
    with caplog.at_level(logging.WARNING):
        for epoch in (0, 1):
            sampler.set_epoch(epoch)
            items = sum(seen(loader(dataset, sampler=sampler, batch_size=4, num_workers=num_workers)), [])
            replaced = {7: 9, 8: 9, 23: 0}
            # the place keeps its own crop and noise
            assert items == [(replaced.get(i, i), epoch, i) for i in range(24)]
    assert dataset.broken_indices == [7, 8, 23]  # what workers found, too
    if num_workers == 0:
        assert sum("folder/7.jpg" in message for message in caplog.messages) == 1


def test_nothing_readable():
    dataset = PretrainingDataset(Pictures(3, broken={0, 1, 2}), Tell(), skip_broken=True)
    with pytest.raises(BrokenImageError, match="None of the 3 pictures"):
        dataset[0, 1]


# --- streams


class Stream:
    """Four files of three pictures; a worker gets whole files, as with `datasets`."""

    def __init__(self, files=((0, 1, 2), (3, 4, 5), (6, 7, 8), (9, 10, 11))):
        self.files = files
        self.epoch = 0

    def set_epoch(self, epoch):
        self.epoch = epoch

    def shard(self, num_shards, index):
        return Stream(self.files[index::num_shards])

    def __iter__(self):
        worker = torch.utils.data.get_worker_info()
        files = self.files[worker.id :: worker.num_workers] if worker else self.files
        for file in files:
            yield from (torch.full((3, 8, 8), number, dtype=torch.uint8) for number in file)


def test_a_stream_goes_on_with_the_next_pass():
    items = list(islice(StreamingPretrainingDataset(Stream(), Tell()), 30))
    found = [(int(item["pixel_values"]), *map(int, item["noise"])) for item in items]
    assert found == [(n % 12, n // 12, n % 12) for n in range(30)]


def test_processes_and_workers_see_different_pictures_with_different_crops():
    found = []
    for rank in (0, 1):
        dataset = StreamingPretrainingDataset(Stream(), Tell(), rank=rank, num_processes=2)
        batches = DataLoaderShard(dataset, batch_size=3, num_workers=2, collate_fn=pretraining_collator)
        found += sum(seen(islice(batches, 2)), [])
    assert sorted(picture for picture, _, _ in found) == list(range(12))
    assert len({(epoch, index) for _, epoch, index in found}) == 12


def test_a_worker_without_a_share_stops():
    dataset = StreamingPretrainingDataset(Stream(((0, 1, 2),)), Tell())
    batches = islice(loader(dataset, batch_size=3, num_workers=2), 2)
    assert [p for batch in seen(batches) for p, _, _ in batch] == [0, 1, 2] * 2


def test_an_empty_stream_says_so():
    with pytest.raises(ValueError, match="no picture that can be read"):
        next(iter(StreamingPretrainingDataset(Stream(()), Tell())))


def test_resuming_a_stream():
    def batches():
        dataset = StreamingPretrainingDataset(Stream(), Tell())
        return DataLoaderShard(dataset, batch_size=5, collate_fn=pretraining_collator)

    expected = seen(islice(batches(), 6))
    assert seen(islice(skip_first_batches(batches(), 4), 2)) == expected[4:]


def test_collator_stacks_known_keys_only():
    item = {"pixel_values": torch.zeros(3, 4, 4), "noise": torch.zeros(4), "name": "a.jpg"}
    batch = pretraining_collator([item, item])
    assert {key: tuple(value.shape) for key, value in batch.items()} == {"pixel_values": (2, 3, 4, 4), "noise": (2, 4)}


def test_sampler_takes_numpy_lengths():
    assert len(EpochSampler(np.int64(3))) == 3
