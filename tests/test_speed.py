"""What the log says of speed: arithmetic, waiting, and what limits it."""

import os
import subprocess
import time
from types import SimpleNamespace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from hf_mim.training import speed
from hf_mim.training.speed import SpeedMeter, training_operations
from tiny import TINY, tiny_batch, tiny_model
from tiny_training import REPOSITORY, tiny_data, tiny_trainer


@pytest.mark.parametrize("method", TINY)
def test_operations_are_those_of_a_training_step(method):
    model = tiny_model(method, "ForPreTraining").train()
    model.set_attn_implementation("eager")
    with FlopCounterMode(display=False) as counter:
        model(**tiny_batch(model.config, 4)).loss.backward()
    assert counter.get_total_flops() > 0
    assert training_operations(model, 4) == counter.get_total_flops() / 4
    # The model itself is left as it was.
    assert model.training and not any(p.is_meta for p in model.parameters())


ARGS = SimpleNamespace(
    effective_batch_size=10,
    train_batch_size=10,
    world_size=1,
    precision="float32",
    dataloader_num_workers=0,
    torch_compile=False,
)


class Clock:
    def __init__(self, monkeypatch):
        self.now = 0.0
        monkeypatch.setattr(speed.time, "monotonic", lambda: self.now)

    def train(self, meter, steps, *, waiting, working, beside=0.0):
        """Goes through steps of so many seconds each."""
        for step in range(1, steps + 1):
            with meter.waiting():
                self.now += waiting
            self.now += working
            meter.step_ended(step)
        with meter.not_training():
            self.now += beside


def meter_of(monkeypatch, **seconds):
    clock, meter = Clock(monkeypatch), SpeedMeter(torch.device("cpu"), 2e9)
    clock.train(meter, 5, **seconds)
    return meter, SimpleNamespace(global_step=5, max_steps=15)


def test_rates_by_a_clock(monkeypatch):
    meter, state = meter_of(monkeypatch, waiting=0.25, working=0.75, beside=5.0)
    said = meter.read(ARGS, state)
    # Evaluations count for the time that is left, and not for the speed of training.
    assert said.pop("GiB at most")
    assert said == {
        "images/s": "10",
        "of the time waiting for data": "25%",
        "TFLOP/s": "0.02",
        "left": "20 s",
    }
    assert meter.read(ARGS, state) == {}


@pytest.mark.parametrize(
    ("seconds", "cores", "changes", "limit", "advice"),
    [
        ({"waiting": 0.5, "working": 0.5}, 4, {}, "data, 50% of the time", "--dataloader_num_workers 3 (was 0)"),
        ({"waiting": 0.5, "working": 0.5}, 1, {}, "data, 50% of the time", "smaller pictures"),
        ({"waiting": 0.0, "working": 1.0}, 4, {}, "arithmetic on cpu", "--torch_compile true"),
        ({"waiting": 0.0, "working": 1.0}, 4, {"torch_compile": True}, "arithmetic on cpu", "more devices"),
        ({"waiting": 0.5, "working": 0.5, "beside": 5.0}, 4, {}, "checkpoints, 56% of the time", "larger --eval"),
    ],
)
def test_the_bottleneck_and_its_flag(monkeypatch, seconds, cores, changes, limit, advice):
    monkeypatch.setattr(speed, "process_cores", lambda: cores)
    meter, state = meter_of(monkeypatch, **seconds)
    line = meter.bottleneck(SimpleNamespace(**vars(ARGS) | changes), state)
    what, helps = line.split("; what helps: ")
    assert limit in what and helps.startswith(advice), line


def test_the_first_step_starts_things(monkeypatch):
    clock, meter = Clock(monkeypatch), SpeedMeter(torch.device("cpu"), 1.0)
    clock.train(meter, 1, waiting=100.0, working=100.0)
    assert meter.bottleneck(ARGS, SimpleNamespace(global_step=1)) is None
    clock.train(meter, 2, waiting=0.0, working=1.0)
    assert "0% of the time waiting" in meter.bottleneck(ARGS, SimpleNamespace(global_step=2))


def test_slow_data_is_told(tmp_path, capsys):
    data = tiny_data()
    read = data.transform
    data.transform = lambda *args: (time.sleep(0.02), read(*args))[1]
    tiny_trainer(tmp_path, data=data, max_steps=4).train()
    assert "What limits it: data, " in capsys.readouterr().out.splitlines()[-1]


def test_the_check_of_a_gpu_says_that_there_is_none(tmp_path):
    script, report = REPOSITORY / "examples" / "gpu_check.sh", tmp_path / "report.md"
    without = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    result = subprocess.run([script, report], capture_output=True, text=True, env=without)
    assert result.returncode == 3 and "no CUDA device" in result.stderr
    assert not report.exists()
