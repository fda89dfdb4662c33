"""What a loss that is not finite leaves behind, and the command that does its step again."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import hf_mim.__main__ as command
from hf_mim.jobs.replay import find_steps, is_same, main, replay_step
from hf_mim.training.losses import NonFiniteLossError
from test_trainer import with_bad_picture
from tiny_training import tiny_config, tiny_data, tiny_trainer

# A picture of 20 that is not finite.
BAD = 9


def broken_run(folder, **settings):
    defaults = {"num_train_epochs": 1, "save_strategy": "steps", "save_steps": 1, "logging_steps": 100}
    trainer = tiny_trainer(folder, data=with_bad_picture(BAD), **(defaults | settings))
    with pytest.raises(NonFiniteLossError) as error:
        trainer.train()
    return trainer, str(error.value)


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    """A run on a CPU whose loss became NaN, its folder, and what it said."""
    run = tmp_path_factory.mktemp("run")
    trainer, said = broken_run(run)
    return trainer, run, said


def test_what_is_left_behind(kept):
    trainer, run, said = kept
    assert f"`hf_mim replay {run}`" in said
    step = json.loads((run / "nonfinite" / "step.json").read_text())
    assert BAD in step["indices"] and len(step["indices"]) == 4
    assert step["losses"]["loss"] == step["losses"]["loss_pixel"] == "nan"
    assert step["checkpoint"] is None or step["checkpoint"].endswith(f"checkpoint-{step['step'] - 1}")
    # The batch is what these indices are.
    batch = load_file(run / "nonfinite" / "batch.safetensors")
    for row, index in enumerate(step["indices"]):
        item = trainer.train_dataset[step["epoch"], index]
        assert torch.equal(batch["noise"][row], item["noise"])
        assert torch.equal(batch["pixel_values"][row].isnan(), item["pixel_values"].isnan())
    # The weights are those that the step began with: still finite, and the checkpoint's.
    weights = load_file(run / "nonfinite" / "model" / "model.safetensors")
    assert all(value.isfinite().all() for value in weights.values())
    if step["checkpoint"] is not None:
        saved = load_file(f"{step['checkpoint']}/model.safetensors")
        assert all(torch.equal(value, saved[name]) for name, value in weights.items())
    assert (run / "nonfinite" / "optimizer.pt").is_file()


def test_replay_gives_the_same_loss(kept, capsys):
    _, run, _ = kept
    assert main([str(run)]) == 0
    said = capsys.readouterr().out
    assert "loss: nan (in the run nan)" in said and "The losses are those of the run." in said
    assert f"not finite as they were given to the network: {BAD}\n" in said
    assert "first output that is not finite: " in said and "first output that is not finite: none" not in said
    assert command.COMMANDS["replay"][0] == "hf_mim.jobs.replay"


def test_without_the_fault_it_is_finite(kept, tmp_path, capsys):
    _, run, _ = kept
    shutil.copytree(run, tmp_path / "run")
    (folder,) = find_steps(tmp_path / "run")
    batch = load_file(folder / "batch.safetensors")
    save_file({name: value.nan_to_num() for name, value in batch.items()}, folder / "batch.safetensors")
    found = replay_step(folder)
    assert all(value == value for value in found.losses.values())
    assert (found.module, found.gradient, found.inputs, found.weights) == (None, None, [], [])
    assert main([str(tmp_path / "run")]) == 1
    assert "The losses are not those of the run." in capsys.readouterr().out


def test_the_first_layer_at_fault_is_named(tmp_path, capsys):
    """Of a network that overflows in the middle; and stochastic depth draws as it did."""
    trainer = tiny_trainer(
        tmp_path, config=tiny_config(drop_path_rate=0.5), data=tiny_data(), max_steps=2, bf16=False, seed=3
    )
    with torch.no_grad():
        trainer.model.pixel_decoder.head.bias[0] = float("inf")
    with pytest.raises(NonFiniteLossError):
        trainer.train()
    (folder,) = find_steps(tmp_path)
    kept, found = json.loads((folder / "step.json").read_text()), replay_step(folder)
    assert found.module == "pixel_decoder.head" and found.weights == ["pixel_decoder.head.bias"]
    # To the bit, with the same blocks left out.
    assert {name: str(value) for name, value in found.losses.items()} == kept["losses"]
    assert found.losses["loss_cls"] == found.losses["loss_cls"]


def test_micro_batches(tmp_path):
    trainer, _ = broken_run(tmp_path, gradient_accumulation_steps=2, per_device_train_batch_size=2)
    step = json.loads((tmp_path / "nonfinite" / "step.json").read_text())
    assert BAD in step["indices"] and len(step["indices"]) == 2
    batch = load_file(tmp_path / "nonfinite" / "batch.safetensors")
    item = trainer.train_dataset[0, step["indices"][0]]
    assert torch.equal(batch["noise"][0], item["noise"])


def test_where_losses_are_read_late_the_next_run_keeps_the_step(tmp_path, monkeypatch, capsys):
    """As on a GPU, where reading each loss would make the host wait."""
    monkeypatch.setattr("hf_mim.training.nonfinite.READS_AT_ONCE", ())
    _, said = broken_run(tmp_path)
    assert "The same command again goes the same way" in said
    step = json.loads((tmp_path / "nonfinite" / "step.json").read_text())
    assert not step["has_state"] and BAD in step["indices"] and not (tmp_path / "nonfinite" / "model").exists()
    assert main([str(tmp_path)]) == 1
    assert "Start the training's command again" in capsys.readouterr().err
    trainer = tiny_trainer(
        tmp_path,
        data=with_bad_picture(BAD),
        num_train_epochs=1,
        save_strategy="steps",
        save_steps=1,
        logging_steps=100,
    )
    with pytest.raises(NonFiniteLossError, match="hf_mim replay"):
        trainer.train(resume_from_checkpoint=True if list(tmp_path.glob("checkpoint-*")) else None)
    assert json.loads((tmp_path / "nonfinite" / "step.json").read_text())["step"] == step["step"]
    assert main([str(tmp_path)]) == 0


def test_a_new_run_forgets(kept, tmp_path):
    _, run, _ = kept
    shutil.copytree(run, tmp_path / "run")
    tiny_trainer(tmp_path / "run", max_steps=1).train()
    assert not (tmp_path / "run" / "nonfinite").exists()


def test_mistakes(tmp_path, capsys):
    assert main([str(tmp_path)]) == 1
    assert "no step of that run had a loss that is not finite" in capsys.readouterr().err
    assert main([]) == 1 and "give the folder of the run" in capsys.readouterr().err
    assert main([str(tmp_path), "--precision=int8"]) == 1 and "'int8'" in capsys.readouterr().err
    assert is_same(float("nan"), float("nan")) and not is_same(float("nan"), 1.0) and not is_same(1.0, 2.0)
