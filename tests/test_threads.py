"""What is chosen by the machine: threads where a launcher set one a process, workers, pinned memory."""

import os
import shutil
from types import SimpleNamespace

import pytest
import torch

from hf_mim.training import arguments, machine
from hf_mim.training.arguments import MIMTrainingArguments, default_cpu_threads
from tiny_training import tiny_data, tiny_trainer

CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, None),
        ({"OMP_NUM_THREADS": "1"}, None),
        ({"OMP_NUM_THREADS": "1", "ACCELERATE_MIXED_PRECISION": "no"}, CORES),
        ({"OMP_NUM_THREADS": "3", "ACCELERATE_MIXED_PRECISION": "no"}, None),
        ({"OMP_NUM_THREADS": "1", "TORCHELASTIC_RUN_ID": "none", "LOCAL_WORLD_SIZE": str(CORES)}, 1),
        ({"OMP_NUM_THREADS": "1", "TORCHELASTIC_RUN_ID": "none", "LOCAL_WORLD_SIZE": "999"}, 1),
    ],
)
def test_only_a_launchers_choice_is_overruled(monkeypatch, environment, expected):
    for name in ("OMP_NUM_THREADS", "ACCELERATE_MIXED_PRECISION", "TORCHELASTIC_RUN_ID", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert default_cpu_threads() == expected


def test_cpu_threads_is_a_flag(tmp_path, threads):
    torch.set_num_threads(1)
    MIMTrainingArguments(output_dir=str(tmp_path), use_cpu=True, cpu_threads=2)
    assert torch.get_num_threads() == 2


@pytest.mark.parametrize(
    ("cores", "on_cpu", "shared_gib", "expected"),
    [
        # On two cores a process that loads would take one of those that train.
        (1, True, 8, 0),
        (2, True, 8, 0),
        (8, True, 8, 2),
        (64, True, 8, 4),
        (1, False, 8, 0),
        (2, False, 8, 1),
        (12, False, 8, 11),
        (64, False, 8, 16),
        # Docker's default: workers would be killed by the first large batch.
        (12, False, 1 / 16, 0),
    ],
)
def test_workers_fit_the_machine(monkeypatch, cores, on_cpu, shared_gib, expected):
    monkeypatch.setattr(machine, "process_cores", lambda: cores)
    monkeypatch.setattr(machine.Path, "is_dir", lambda path: True)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=shared_gib * 2**30))
    assert machine.default_workers(on_cpu) == expected


class Stream(torch.utils.data.IterableDataset):
    def __iter__(self):
        return iter(())


def test_no_more_workers_than_batches_nor_any_for_a_stream(tmp_path, monkeypatch):
    monkeypatch.setattr(arguments, "default_workers", lambda on_cpu: 3)
    batches = {"per_device_train_batch_size": 4, "dataloader_persistent_workers": True}
    # 20 pictures are 5 batches, 8 pictures 2.
    for number, workers in ((20, 3), (8, 2)):
        trainer = tiny_trainer(tmp_path, data=tiny_data(number), **batches)
        assert trainer.get_train_dataloader().num_workers == workers
    for asked, expected in ({}, 0), ({"dataloader_num_workers": 2}, 2):
        trainer = tiny_trainer(tmp_path, max_steps=1, **batches | asked)
        trainer.train_dataset = Stream()
        loader = trainer.get_train_dataloader()
        assert loader.num_workers == expected and loader.persistent_workers is (expected > 0)
    assert trainer.args.dataloader_num_workers == 2


def test_pinned_memory_is_for_gpus(tmp_path):
    args = MIMTrainingArguments(output_dir=str(tmp_path), use_cpu=True)
    assert not args.dataloader_pin_memory and not args.accelerator_config.non_blocking
