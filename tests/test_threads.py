"""Launchers set one thread a process; training takes the cores that fall to it."""

import os

import pytest
import torch

from hf_mim.training.arguments import MIMTrainingArguments, default_cpu_threads

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
