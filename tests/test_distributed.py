"""Two processes on the CPU: the losses and weights of one process with the same effective batch."""

import json
import signal
import socket
import time

import pytest
import torch
from safetensors.torch import load_file

from hf_mim.training.checkpoints import find_damage
from tiny_training import (
    FLAGS,
    REPOSITORY,
    RUN_MIM,
    losses,
    run,
    started,
    tiny_config,
    tiny_trainer,
    write_pictures,
)

# 22 pictures less one held out: 5 steps of 4 in an epoch, and one left over.
# In float32: what is compared agrees within 1e-5.
EPOCHS = ["--num_train_epochs=2", "--save_strategy=no", "--eval_strategy=no", "--bf16=false"]
PARTS = ("loss", "loss_pixel", "loss_latent", "loss_cls")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def torchrun(*command: str) -> list[str]:
    port = f"--master_port={free_port()}"
    return ["-m", "torch.distributed.run", "--nproc_per_node=2", "--master_addr=127.0.0.1", port, *command]


def accelerate_launch(*command: str) -> list[str]:
    port = f"--main_process_port={free_port()}"
    return ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes=2", port, *command]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_pictures(tmp_path_factory.mktemp("pictures"), 22)


@pytest.fixture(scope="module")
def one_process(folder, tmp_path_factory):
    """The run that all others are compared with: one process, batches of 4."""
    from hf_mim.jobs.pretraining import main

    out = tmp_path_factory.mktemp("one")
    assert main([*FLAGS, *EPOCHS, f"--train_dir={folder}", f"--output_dir={out}"]) == 0
    return out


def assert_same_run(out, other) -> None:
    steps, reference = torch.tensor(losses(out, *PARTS)), torch.tensor(losses(other, *PARTS))
    assert len(reference) == 10
    torch.testing.assert_close(steps, reference, rtol=0, atol=1e-5)
    weights, wanted = load_file(out / "model.safetensors"), load_file(other / "model.safetensors")
    assert weights.keys() == wanted.keys()
    for name, value in weights.items():
        if name.endswith("k_proj.bias"):
            continue  # without effect: softmax cancels it, and Adam turns the rounding of its zero gradient into steps
        torch.testing.assert_close(
            value, wanted[name], rtol=0, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}"
        )


def test_accumulation_equals_one_batch(folder, one_process, tmp_path):
    from hf_mim.jobs.pretraining import main

    flags = ["--per_device_train_batch_size=2", "--gradient_accumulation_steps=2"]
    assert main([*FLAGS, *EPOCHS, *flags, f"--train_dir={folder}", f"--output_dir={tmp_path}"]) == 0
    assert_same_run(tmp_path, one_process)


@pytest.mark.parametrize("launcher", [torchrun, pytest.param(accelerate_launch, marks=pytest.mark.slow)])
def test_two_processes_equal_one(folder, one_process, tmp_path, launcher):
    flags = [*FLAGS, *EPOCHS, "--per_device_train_batch_size=2", f"--train_dir={folder}", f"--output_dir={tmp_path}"]
    result = run(launcher(RUN_MIM, *flags))
    assert result.returncode == 0, result.stderr
    assert_same_run(tmp_path, one_process)
    assert "unused" not in result.stderr
    # Said by one process only.
    for text in ("PiLaMIM:", "The model is in", "trained in", "raw pixels"):
        assert result.stdout.count(text) == 1, result.stdout
    state = json.loads((tmp_path / "trainer_state.json").read_text())
    assert [log["step"] for log in state["log_history"] if "loss" in log] == list(range(1, 11))


HELD_OUT = """
import json, os, sys
sys.path.insert(0, "tests")
import torch
from hf_mim import OCLConfig, OCLForPreTraining
from tiny_training import SIZES, tiny_data, tiny_trainer

folder = sys.argv[1]
world = int(os.environ.get("WORLD_SIZE", 1))
encoder = {name: value for name, value in SIZES.items() if not name.startswith("decoder")}
ocl = {"config": OCLConfig(**encoder), "model_class": OCLForPreTraining}
found = {}
# 7 and 9 pictures in batches of 4: whole, left over, and rounds in which the second process has none.
for name, method in (("pilamim", {}), ("ocl", ocl)):
    for number in (3, 7, 9, 12):
        for given in (True, False):
            sizes = {"per_device_train_batch_size": 4 // world}
            sizes |= {"per_device_eval_batch_size": 4} if given else {}
            trainer = tiny_trainer(f"{folder}/{name}", eval_data=tiny_data(number), **method, **sizes)
            metrics = trainer.evaluate()
            found[f"{name} {number} {given}"] = {key: value for key, value in metrics.items() if "loss" in key}
trainer = tiny_trainer(f"{folder}/rank", max_steps=2, per_device_train_batch_size=4 // world, **ocl)
trainer.train()
found["rank"] = {key: log[key] for log in trainer.state.log_history for key in ("rank_me", "uniformity") if key in log}
if trainer.is_world_process_zero():
    json.dump(found, open(f"{folder}/found.json", "w"))
if world > 1:
    torch.distributed.barrier()
    os._exit(0)  # as in test_stream_is_shared_out
"""


def test_held_out_losses_and_rank_are_those_of_one_process(tmp_path, processes):
    script = tmp_path / "held_out.py"
    script.write_text(HELD_OUT)
    for number, name in ((1, "one"), (2, "two")):
        (tmp_path / name).mkdir()
        result = processes([str(script), str(tmp_path / name)], number)
        assert result.returncode == 0, result.stderr
        assert "broadcast_buffers" not in result.stderr
    one, two = (json.loads((tmp_path / name / "found.json").read_text()) for name in ("one", "two"))
    assert one.keys() == two.keys() and len(one) == 17
    for case, metrics in one.items():
        assert two[case] == pytest.approx(metrics, abs=1e-6 if case != "rank" else 1e-4), case
    parts = {name: value for name, value in one["pilamim 7 True"].items() if name != "eval_loss"}
    assert one["pilamim 7 True"]["eval_loss"] == pytest.approx(sum(parts.values()), abs=1e-5)


def test_terminated_between_two_logs(folder, tmp_path):
    """Agreed in seconds, though the next log is far; both processes end by themselves."""
    flags = [
        *FLAGS,
        "--num_train_epochs=4000",
        "--save_strategy=no",
        "--logging_steps=100000",
        f"--train_dir={folder}",
    ]
    flags += ["--per_device_train_batch_size=2", f"--output_dir={tmp_path / 'out'}"]
    with started(torchrun(RUN_MIM, *flags)) as process:
        for line in process.stdout:
            if "effective batch" in line:
                break
        time.sleep(5)
        asked = time.monotonic()
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=60)
    assert time.monotonic() - asked < 20
    assert "launcher says" in out and "is harmless" in out
    (checkpoint,) = (tmp_path / "out").glob("checkpoint-*")
    assert find_damage(checkpoint) is None, err


def test_resuming_in_the_middle_of_an_epoch(folder, one_process, tmp_path, processes):
    """Stopped after 7 of 10 steps; then set_epoch reaches the sampler through neither shards nor skipped batches."""
    code = """
import sys
from transformers import TrainerCallback
from hf_mim.jobs import pretraining

class Stop(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 7:
            control.should_save = control.should_training_stop = True

class Trainer(pretraining.MIMTrainer):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, callbacks=[Stop()], **kwargs)

pretraining.MIMTrainer = Trainer
sys.exit(pretraining.main())
"""
    script = tmp_path / "stopping.py"
    script.write_text(code)
    out = tmp_path / "out"
    flags = [*FLAGS, *EPOCHS, "--per_device_train_batch_size=2", f"--train_dir={folder}", f"--output_dir={out}"]
    result = processes([str(script), *flags], 2)
    assert result.returncode == 0 and (out / "checkpoint-7" / "rng_state_1.pth").exists(), result.stderr
    result = processes([RUN_MIM, *flags], 2)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("Resuming from") == 1
    assert_same_run(out, one_process)


@pytest.mark.slow
def test_stream_is_shared_out(tmp_path):
    """Each process reads its own pictures; together they have read all, and none twice."""
    script = tmp_path / "streaming.py"
    script.write_text("""
import json, sys
sys.path.insert(0, "tests")
import torch
from test_trainer import Stream
from tiny_training import tiny_data, tiny_trainer
from hf_mim.data.pretraining import StreamingPretrainingDataset

class Recording(Stream):
    read = []
    def shard(self, num_shards, index):
        return Recording(self.rows[index::num_shards])
    def __iter__(self):
        Recording.read += list(self.rows)
        return super().__iter__()

folder = sys.argv[1]
import os
rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
data = StreamingPretrainingDataset(Recording(), tiny_data().transform, rank=rank, num_processes=world)
used = []
trainer = tiny_trainer(folder, data=data, max_steps=4, per_device_train_batch_size=2)
step = trainer.training_step
def counting(model, inputs, *rest):
    used.append(len(inputs["noise"]))
    return step(model, inputs, *rest)
trainer.training_step = counting
trainer.train()
json.dump([Recording.read, used], open(f"{folder}/rank{rank}.json", "w"))
# At the interpreter's end gloo's threads abort the process now and then (torch 2.15); all is written by now.
os._exit(0)
""")
    result = run(torchrun(str(script), str(tmp_path)))
    assert result.returncode == 0, result.stderr
    (read, used), (other_read, other_used) = (
        json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(2)
    )
    # Once or twice, since batches are read ahead.
    assert set(read) == set(range(0, 20, 2)) and set(other_read) == set(range(1, 20, 2))
    assert used == other_used == [2] * 4


@pytest.mark.slow
def test_first_bad_step_and_weights_of_any_process(tmp_path):
    """Process 1 meets an infinite loss; both stop, and name its step."""
    script = tmp_path / "bad.py"
    script.write_text("""
import os, sys
sys.path.insert(0, "tests")
from test_trainer import with_bad_picture
from tiny_training import tiny_trainer
from hf_mim.training.errors import plain_message

# With batches of 1 and this order, process 1 has picture 5 at step 3.
from hf_mim.data.pretraining import EpochSampler
EpochSampler.__iter__ = lambda self: iter([(0, index) for index in range(20)])
trainer = tiny_trainer(
    sys.argv[1], data=with_bad_picture(5), per_device_train_batch_size=1, logging_steps=100, save_strategy="steps",
    save_steps=2, num_train_epochs=1,
)
try:
    trainer.train()
except Exception as error:
    print(f"process {os.environ['RANK']}: {plain_message(error)}\\n", end="", flush=True)
    os._exit(0)  # as in test_stream_is_shared_out
""")
    result = run(torchrun(str(script), str(tmp_path)))
    assert result.returncode == 0, result.stderr
    for rank in range(2):
        assert f"process {rank}: The loss of step 3 is not finite" in result.stdout
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-2"]


FSDP = """
import os
import sys
sys.path.insert(0, "tests")
import torch
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from torch.distributed.tensor import DTensor
from hf_mim.training.checkpoints import checkpoint_to_resume
from tiny_training import tiny_config, tiny_data, tiny_trainer

# accelerate keeps FSDP for accelerators, and on a CPU trains without it. What is behind that door works on a CPU.
stock = AcceleratorState.__init__
def init(self, *args, fsdp_plugin=None, **kwargs):
    stock(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
    plugin = fsdp_plugin or self.__dict__.get("fsdp_plugin")
    if plugin is not None:
        self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, plugin
AcceleratorState.__init__ = init

folder, kind = sys.argv[1:]
config = tiny_config(ema_momentum=0.5)
settings = dict(
    config=config, max_steps=4, per_device_train_batch_size=2, save_strategy="steps", save_steps=2,
    eval_data=tiny_data(6), eval_strategy="steps", eval_steps=2, save_total_limit=None,
    fsdp=True, fsdp_config={"version": 2, "state_dict_type": kind},
)

def train(checkpoint=None):
    trainer = tiny_trainer(folder, **settings)
    assert trainer.is_fsdp_enabled
    trainer.train(resume_from_checkpoint=checkpoint)
    return trainer

def weights(trainer):
    values = trainer.model.state_dict()
    assert all(isinstance(value, DTensor) for value in values.values())
    return {name: value.full_tensor().clone() for name, value in values.items()}

first = train()
unbroken = weights(first)
checkpoint = checkpoint_to_resume(folder, f"{folder}/checkpoint-2", config)
resumed = train(checkpoint)
for name, value in weights(resumed).items():
    torch.testing.assert_close(value, unbroken[name], rtol=0, atol=0, msg=lambda text: f"{name}: {text}")
resumed.save_model()
torch.distributed.barrier()
os._exit(0)  # as in test_stream_is_shared_out
"""


@pytest.mark.slow
def test_sharded_checkpoint_goes_on_with_another_number_of_processes(tmp_path):
    start, stop = FSDP.partition("first = train()")[0], "torch.distributed.barrier()\nos._exit(0)\n"
    both, alone = tmp_path / "both.py", tmp_path / "alone.py"
    both.write_text(f"{start}train().save_state()\n{stop}")
    # As many pictures a step, by one process.
    start = start.replace("per_device_train_batch_size=2", "per_device_train_batch_size=4")
    alone.write_text(f"{start}train(f'{{folder}}/checkpoint-2').save_state()\n{stop}")
    folder, kind = str(tmp_path / "run"), "SHARDED_STATE_DICT"
    result = run(torchrun(str(both), folder, kind))
    assert result.returncode == 0, result.stderr
    straight = losses(folder, *PARTS)
    one = torchrun(str(alone), folder, kind)
    one[one.index("--nproc_per_node=2")] = "--nproc_per_node=1"
    result = run(one)
    assert result.returncode == 0, result.stderr
    assert torch.tensor(losses(folder, *PARTS)).sub(torch.tensor(straight)).abs().max() < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ddp", "fsdp2"])
def test_accelerate_configs(folder, one_process, tmp_path, name):
    """On CPUs the first is tried as it is; of the second the file is read, and accelerate leaves the sharding out."""
    config = str(REPOSITORY / "examples" / "accelerate_configs" / f"{name}.yaml")
    port = f"--main_process_port={free_port()}"
    launch = ["-m", "accelerate.commands.launch", "--config_file", config, "--num_processes=2", port]
    flags = [*FLAGS, *EPOCHS, "--per_device_train_batch_size=2", f"--train_dir={folder}", f"--output_dir={tmp_path}"]
    result = run([*launch, "--mixed_precision=no", RUN_MIM, *flags])
    assert result.returncode == 0, result.stderr
    assert_same_run(tmp_path, one_process)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["FULL_STATE_DICT", "SHARDED_STATE_DICT"])
def test_fsdp(tmp_path, kind):
    """Version 2: weights, target and losses of one process; and its checkpoints resume to the bit."""
    import hf_mim

    script = tmp_path / "fsdp.py"
    script.write_text(FSDP)
    result = run(torchrun(str(script), str(tmp_path / "two"), kind))
    assert result.returncode == 0, result.stderr
    one = tiny_trainer(tmp_path / "one", config=tiny_config(ema_momentum=0.5), max_steps=4)
    one.train()
    saved = hf_mim.PiLaMIMForPreTraining.from_pretrained(tmp_path / "two")
    assert saved.config.architectures == ["PiLaMIMForPreTraining"]
    for name, value in one.model.state_dict().items():
        if not name.endswith("k_proj.bias"):
            torch.testing.assert_close(saved.state_dict()[name], value, rtol=0, atol=1e-5)
    one.save_state()
    state = json.loads((tmp_path / "two" / "checkpoint-4" / "trainer_state.json").read_text())
    logs = [[log[name] for name in PARTS] for log in state["log_history"] if "loss" in log]
    torch.testing.assert_close(
        torch.tensor(logs), torch.tensor(losses(tmp_path / "one", *PARTS))[:, 1:], rtol=0, atol=1e-5
    )
