"""The memory that training is told to take, before there is a device to try."""

import gc

import pytest
import torch
from transformers import TrainerCallback

import hf_mim
from tiny import TINY, tiny_batch, tiny_model
from tiny_training import run, tiny_trainer


def bytes_of(tensors) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


@pytest.mark.parametrize(
    "method", ["pilamim", *(pytest.param(name, marks=pytest.mark.slow) for name in TINY if name != "pilamim")]
)
def test_estimate_of_every_method(method):
    model = tiny_model(method, "ForPreTraining")
    few, many = (hf_mim.estimate_memory(model, size, precision="float32") for size in (8, 64))
    assert few.weights == many.weights == bytes_of([*model.parameters(), *model.buffers()])
    assert few.optimizer == 2 * bytes_of(p for p in model.parameters() if p.requires_grad)
    # Nothing of it was trained.
    assert all(p.grad is None and not p.is_meta for p in model.parameters())
    assert many.step > few.step and many.total == many.weights + many.optimizer + many.step
    held = Held()
    with torch.autograd.graph.saved_tensors_hooks(held.pack, lambda tensor: tensor):
        loss = model(**tiny_batch(model.config, batch_size=64)).loss
    # What the backward pass will read is a lower bound, and most of it.
    kept = held.total - bytes_of(p for p in model.parameters() if p.untyped_storage()._cdata in held.storages)
    assert kept < many.step < 3 * kept
    del loss


class Held:
    """Adds up what is kept for the backward pass."""

    def __init__(self):
        self.storages, self.total = {}, 0

    def pack(self, tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in self.storages:
            self.storages[storage._cdata] = storage
            self.total += storage.nbytes()
        return tensor


def test_of_a_config_and_of_several_devices():
    config = tiny_model("pilamim", "Model").config
    whole = hf_mim.estimate_memory(config, 16)
    assert whole == hf_mim.estimate_memory(hf_mim.PiLaMIMForPreTraining(config), 16)
    shared = hf_mim.estimate_memory(config, 16, shards=8)
    assert shared.optimizer == whole.optimizer // 8 and whole.weights // 8 < shared.weights < whole.weights
    with pytest.raises(ValueError, match="precision is 'int8'; expected one of float32"):
        hf_mim.estimate_memory(config, 16, precision="int8")
    with pytest.raises(ValueError, match="batch_size is 0"):
        hf_mim.estimate_memory(config, 0)


MEASURED = """
import sys
import torch
import hf_mim
from hf_mim.models.presets import preset_config
from hf_mim.models.vit.sizes import as_pair
from hf_mim.registry import method_class
method, precision = sys.argv[1:]
config = method_class(method, "Config")(**preset_config(method, "small", None))
estimate = hf_mim.estimate_memory(config, 8, precision=precision).total
# Of this program alone: what getrusage tells begins with the process that started it.
peak = lambda: 1024 * int(open("/proc/self/status").read().partition("VmHWM:")[2].split()[0])
# What the libraries load when they are first used is none of it.
tiny = method_class(method, "Config")(**preset_config(method, "tiny", None))
def train(config, batch):
    torch.manual_seed(0)
    model = method_class(method, "ForPreTraining")(config).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    for _ in range(2):
        pixel_values = torch.randn(batch, 3, *as_pair(config.image_size))
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16"):
            loss = model(pixel_values, noise=torch.rand(batch, config.num_patches)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if hasattr(model, "after_optimizer_step"):
            model.after_optimizer_step(0, 2)
train(tiny, 2)
before = peak()
train(config, 8)
print(estimate, peak() - before)
"""


@pytest.mark.slow
@pytest.mark.parametrize("method", ["pilamim", "vit_mae"])
def test_estimate_is_within_a_tenth_of_what_is_measured(method, tmp_path):
    script = tmp_path / "measured.py"
    script.write_text(MEASURED)
    # Memory that is given back at once is not counted as held.
    result = run([str(script), method, "float32"], MALLOC_MMAP_THRESHOLD_="1000000", MALLOC_TRIM_THRESHOLD_="1000000")
    assert result.returncode == 0, result.stderr
    estimate, measured = map(int, result.stdout.split())
    assert estimate == pytest.approx(measured, rel=0.1)


# --- garbage


def test_garbage_is_collected_between_steps(tmp_path):
    enabled = []
    # What the tests set aside.
    gc.unfreeze()

    class Collects(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            enabled.append(gc.isenabled())
            if state.global_step == 2 and fails:
                raise RuntimeError("in a step")

    for fails in (False, True):
        trainer = tiny_trainer(tmp_path, max_steps=3, callbacks=[Collects()])
        if fails:
            with pytest.raises(RuntimeError, match="in a step"):
                trainer.train()
        else:
            trainer.train()
        assert gc.isenabled() and gc.get_freeze_count() == 0
    assert enabled == [False] * 5
    gc.freeze()
