"""Resuming only from whole checkpoints of the same network, and saying what to do otherwise, before any training."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from hf_mim.files import replacing, write_json
from hf_mim.jobs.pretraining import main
from hf_mim.training.checkpoints import checkpoint_to_resume, checkpoints_in, find_damage, rotate_checkpoints
from tiny_training import FLAGS, tiny_config, tiny_data, tiny_trainer, write_pictures


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of 4 steps with checkpoint-2 and checkpoint-4."""
    folder = tmp_path_factory.mktemp("trained")
    tiny_trainer(folder, max_steps=4, save_strategy="steps", save_steps=2).train()
    return folder


@pytest.fixture
def run(trained, tmp_path):
    shutil.copytree(trained, tmp_path / "run")
    return tmp_path / "run"


def truncate(path, share: float = 0.5) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])


def resume(run, requested=None, config=None):
    return checkpoint_to_resume(str(run), requested, config or tiny_config())


class TestWhichOne:
    def test_the_last(self, run):
        assert [path.name for path in checkpoints_in(str(run))] == ["checkpoint-2", "checkpoint-4"]
        for requested in (None, "true", "True", True):
            assert resume(run, requested) == str(run / "checkpoint-4")

    def test_by_number_not_by_name(self, run):
        shutil.copytree(run / "checkpoint-4", run / "checkpoint-10")
        assert resume(run) == str(run / "checkpoint-10")
        assert [path.name for path in checkpoints_in(str(run))][-1] == "checkpoint-10"

    def test_the_one_asked_for(self, run):
        assert resume(run, str(run / "checkpoint-2")) == str(run / "checkpoint-2")

    def test_none(self, run, tmp_path):
        assert resume(run, "false") is None and resume(run, False) is None
        assert resume(tmp_path / "nowhere") is None
        (tmp_path / "empty").mkdir()
        assert resume(tmp_path / "empty") is None

    def test_asked_for_and_not_there(self, run, tmp_path):
        with pytest.raises(ValueError, match="no checkpoint in .*nowhere to resume from"):
            resume(tmp_path / "nowhere", "true")
        with pytest.raises(ValueError, match="checkpoint-3, is not a folder"):
            resume(run, str(run / "checkpoint-3"))


DAMAGES = {
    "weights cut off": ("model.safetensors", truncate),
    "weights nearly whole": ("model.safetensors", lambda path: truncate(path, 0.999)),
    "weights empty": ("model.safetensors", lambda path: path.write_bytes(b"")),
    "weights missing": ("model.safetensors", lambda path: path.unlink()),
    "optimiser missing": ("optimizer.pt", lambda path: path.unlink()),
    "optimiser cut off": ("optimizer.pt", truncate),
    "optimiser nearly whole": ("optimizer.pt", lambda path: truncate(path, 0.999)),
    "scheduler missing": ("scheduler.pt", lambda path: path.unlink()),
    "scheduler empty": ("scheduler.pt", lambda path: path.write_bytes(b"")),
    "random state cut off": ("rng_state.pth", truncate),
    "random state missing": ("rng_state.pth", lambda path: path.unlink()),
    "state missing": ("trainer_state.json", lambda path: path.unlink()),
    "state cut off": ("trainer_state.json", truncate),
    "state of no run": ("trainer_state.json", lambda path: path.write_text("[]")),
    "state without its step": ("trainer_state.json", lambda path: path.write_text("{}")),
    "config missing": ("config.json", lambda path: path.unlink()),
    "config cut off": ("config.json", truncate),
}


class TestDamage:
    def test_none(self, run):
        assert find_damage(run / "checkpoint-2") is None

    @pytest.mark.parametrize("damage", DAMAGES)
    def test_is_named_with_the_fix(self, run, damage):
        name, harm = DAMAGES[damage]
        harm(run / "checkpoint-4" / name)
        with pytest.raises(ValueError) as error:
            resume(run, str(run / "checkpoint-4"))
        message = str(error.value)
        assert f"{run / 'checkpoint-4'} is damaged: {name}" in message
        assert f"--resume_from_checkpoint {run / 'checkpoint-2'}" in message
        assert "--resume_from_checkpoint false" in message
        # Not asked for, it is passed over, and set aside when training begins.
        assert resume(run) == str(run / "checkpoint-2")

    def test_older_ones_that_are_damaged_too_are_not_named(self, run):
        for folder in ("checkpoint-2", "checkpoint-4"):
            truncate(run / folder / "model.safetensors")
        with pytest.raises(ValueError, match="checkpoint-4 is damaged") as error:
            resume(run, str(run / "checkpoint-4"))
        assert "checkpoint-2" not in str(error.value)
        assert resume(run) is None

    def test_is_set_aside_with_a_warning(self, run, caplog, capfd):
        truncate(run / "checkpoint-4" / "optimizer.pt")
        trainer = tiny_trainer(run, max_steps=4, save_strategy="steps", save_steps=2)
        trainer.train(resume_from_checkpoint=resume(run))
        said = caplog.text + "".join(capfd.readouterr())
        assert "checkpoint-4 is damaged (optimizer.pt is truncated), and is now called _old-checkpoint-4" in said
        assert trainer.num_steps_trained == 2 and find_damage(run / "checkpoint-4") is None
        assert (run / "_old-checkpoint-4").is_dir()

    @pytest.mark.parametrize("edit", ["lacks", "has besides"])
    def test_weights_that_are_not_the_networks(self, run, edit):
        """The files are whole: only loading can tell, and the stock Trainer would train on."""
        path = run / "checkpoint-4" / "model.safetensors"
        weights = load_file(path)
        weights["odd"] = weights.pop("encoder.layernorm.bias") if edit == "lacks" else torch.zeros(1)
        save_file(weights, path, metadata={"format": "pt"})
        trainer = tiny_trainer(run, max_steps=4)
        with pytest.raises(ValueError, match=f"{edit} (encoder.layernorm.bias|odd)"):
            trainer.train(resume_from_checkpoint=str(run / "checkpoint-4"))
        assert trainer.state.global_step == 0

    def test_weights_only(self, tmp_path):
        tiny_trainer(tmp_path, max_steps=2, save_strategy="steps", save_steps=2, save_only_model=True).train()
        with pytest.raises(ValueError, match="optimizer.pt is missing.*--save_only_model|scheduler.pt is missing"):
            resume(tmp_path)


class TestAnotherModel:
    @pytest.mark.parametrize("change", [{"hidden_size": 64}, {"mask_ratio": 0.5}, {"ema_momentum": 0.9}])
    def test_is_refused(self, run, change):
        (name, value), *_ = change.items()
        with pytest.raises(ValueError, match=f"another model .*{name}: .* there, {value} here.*another --output_dir"):
            resume(run, config=tiny_config(**change))
        assert resume(run, "false", tiny_config(**change)) is None

    def test_other_method(self, run):
        path = run / "checkpoint-4" / "config.json"
        config = json.loads(path.read_text())
        path.write_text(json.dumps(config | {"model_type": "vit_mae"}))
        with pytest.raises(ValueError, match="model_type: 'vit_mae' there, 'pilamim' here"):
            resume(run)

    def test_equal_by_value(self, run):
        assert resume(run, config=tiny_config(patch_size=(4, 4), image_size=[16, 16])) is not None


class TestBeforeAnyTraining:
    """Through the script's `main`: exit status 1, one line, nothing trained or written."""

    @pytest.fixture(autouse=True)
    def no_step(self, monkeypatch):
        def step(*args, **kwargs):
            raise AssertionError("a step was trained")

        monkeypatch.setattr("transformers.Trainer.training_step", step)

    @pytest.fixture
    def folder(self, tmp_path):
        return write_pictures(tmp_path / "pictures", 12)

    def check(self, capsys, run, flags: list[str], message: str) -> None:
        before = {path: path.stat().st_mtime_ns for path in sorted(run.rglob("*"))}
        assert main([*FLAGS, f"--output_dir={run}", *flags]) == 1
        err = capsys.readouterr().err
        errors = [line for line in err.splitlines() if line.startswith("Error: ")]
        assert len(errors) == 1 and message in errors[0] and "Traceback" not in err, err
        assert {path: path.stat().st_mtime_ns for path in sorted(run.rglob("*"))} == before

    @pytest.mark.parametrize("damage", ["weights cut off", "optimiser cut off", "state cut off"])
    def test_damaged_checkpoint(self, capsys, run, folder, damage):
        name, harm = DAMAGES[damage]
        harm(run / "checkpoint-4" / name)
        asked = f"--resume_from_checkpoint={run / 'checkpoint-4'}"
        self.check(capsys, run, [f"--train_dir={folder}", asked], f"damaged: {name}")

    def test_another_models_checkpoint(self, capsys, run, folder):
        self.check(capsys, run, [f"--train_dir={folder}", "--mask_ratio=0.5"], "another model (mask_ratio: 0.75 there")

    @pytest.mark.parametrize(
        ("flags", "message"),
        [
            (["--patch_size=5"], "5"),
            (["--mask_ratio=0"], "mask_ratio is 0"),
            (["--resume_from_checkpoint=true"], "There is no checkpoint in"),
            (["--resume_from_checkpoint=nowhere"], "nowhere, is not a folder"),
            (["--num_channels=2"], "2"),
            (["--train_dir=nowhere"], "nowhere"),
            (["--dataset_name=nowhere/nothing", "--streaming"], "--max_steps"),
            (["--per_device_train_batch_size=64"], "fewer than the 64 of one step"),
            (["--model_name_or_path=nowhere"], "nowhere"),
            (["--no_such_flag"], "There is no flag --no_such_flag"),
        ],
    )
    def test_bad_flags(self, capsys, tmp_path, folder, flags, message):
        data = [] if flags[0].startswith(("--train_dir", "--dataset_name")) else [f"--train_dir={folder}"]
        (tmp_path / "run").mkdir()
        self.check(capsys, tmp_path / "run", [*data, *flags], message)

    def test_first_picture_is_broken(self, capsys, tmp_path):
        folder = write_pictures(tmp_path / "pictures", 3)
        for path in folder.iterdir():
            truncate(path)
        (tmp_path / "run").mkdir()
        self.check(capsys, tmp_path / "run", [f"--train_dir={folder}"], str(folder))


def test_optimiser_of_another_network_is_no_checkpoint_of_this_one(run):
    """What `torch.load` would find only after the data has been prepared."""
    torch.save({"state": {}, "param_groups": []}, run / "checkpoint-4" / "optimizer.pt")
    trainer = tiny_trainer(run, max_steps=6)
    with pytest.raises(ValueError):
        trainer.train(resume_from_checkpoint=str(run / "checkpoint-4"))


class TestSaving:
    """A checkpoint is whole under its name, or not there."""

    @pytest.fixture
    def stopping(self, monkeypatch):
        """Ends training as a kill would, once the file that is named has been written."""

        class Killed(BaseException):
            pass

        def stop_after(method):
            stock = getattr(transformers.Trainer, method)

            def stopped(trainer, *args, **kwargs):
                stock(trainer, *args, **kwargs)
                if trainer.state.global_step == 4:
                    raise Killed

            monkeypatch.setattr(transformers.Trainer, method, stopped)
            # A killed process tidies nothing up.
            monkeypatch.setattr("hf_mim.training.saving.shutil.rmtree", lambda *args, **kwargs: None)
            return Killed

        return stop_after

    @pytest.mark.parametrize("method", ["_save", "_save_optimizer_and_scheduler", "_save_rng_state"])
    def test_killed_in_between(self, tmp_path, stopping, method):
        settings = {"max_steps": 6, "save_strategy": "steps", "save_steps": 2, "save_total_limit": 1}
        with pytest.raises(stopping(method)):
            tiny_trainer(tmp_path, **settings).train()
        assert [path.name for path in checkpoints_in(tmp_path)] == ["checkpoint-2"]
        assert find_damage(tmp_path / "checkpoint-2") is None
        assert (tmp_path / "_saving" / "checkpoint-4").is_dir()

    def test_goes_on_and_tidies_up(self, run):
        shutil.copytree(run / "checkpoint-4", run / "_saving" / "checkpoint-6")
        trainer = tiny_trainer(run, max_steps=4, save_strategy="steps", save_steps=2)
        trainer.train(resume_from_checkpoint=True)
        assert trainer.num_steps_trained == 0 and not (run / "_saving").exists()

    def test_the_same_step_again_replaces_it(self, run):
        (run / "checkpoint-4" / "mark").touch()
        trainer = tiny_trainer(run, max_steps=4, save_strategy="steps", save_steps=2)
        trainer.train(resume_from_checkpoint=str(run / "checkpoint-2"))
        assert find_damage(run / "checkpoint-4") is None and not (run / "checkpoint-4" / "mark").exists()

    def test_limit_and_best(self, tmp_path):
        """The best checkpoint is kept besides the last, and its place is recorded as it is called at the end."""
        settings = {"max_steps": 8, "save_strategy": "steps", "save_steps": 2, "save_total_limit": 2}
        settings |= {"eval_strategy": "steps", "eval_steps": 2, "metric_for_best_model": "loss"}
        tiny_trainer(tmp_path, eval_data=tiny_data(6), load_best_model_at_end=True, **settings).train()
        kept = checkpoints_in(tmp_path)
        assert len(kept) <= 2 and kept[-1].name == "checkpoint-8"
        state = json.loads((kept[-1] / "trainer_state.json").read_text())
        best = Path(state["best_model_checkpoint"])
        assert best.parent == tmp_path and best.is_dir() and best.name == f"checkpoint-{state['best_global_step']}"

    def test_half_deleted_ones_are_no_checkpoints(self, tmp_path, monkeypatch):
        for number in (2, 4, 10):
            (tmp_path / f"checkpoint-{number}").mkdir()
        monkeypatch.setattr("hf_mim.training.checkpoints.shutil.rmtree", lambda *args, **kwargs: None)
        rotate_checkpoints(tmp_path, 2, best=None)
        assert [path.name for path in checkpoints_in(tmp_path)] == ["checkpoint-4", "checkpoint-10"]

    def test_the_model_at_the_end_replaces_file_by_file(self, tmp_path, monkeypatch):
        trainer = tiny_trainer(tmp_path, max_steps=1)
        trainer.train()
        trainer.save_model()
        before = (tmp_path / "model.safetensors").read_bytes()
        (tmp_path / "model-00001-of-00002.safetensors").write_bytes(b"an older, larger model's")
        with torch.no_grad():
            next(trainer.model.parameters()).add_(1)

        def half(model, folder, **kwargs):
            (Path(folder) / "model.safetensors").write_bytes(b"half")
            raise KeyboardInterrupt

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(type(trainer.model), "save_pretrained", half)
            trainer.save_model()
        assert (tmp_path / "model.safetensors").read_bytes() == before
        trainer.save_model()
        assert (tmp_path / "model.safetensors").read_bytes() != before
        assert [path.name for path in tmp_path.glob("model*")] == ["model.safetensors"]


def test_a_file_is_whole_or_as_it_was(tmp_path):
    write_json(tmp_path / "a.json", {"a": 1})
    with pytest.raises(KeyboardInterrupt), replacing(tmp_path / "a.json") as temporary:
        temporary.write_text("{")
        raise KeyboardInterrupt
    assert json.loads((tmp_path / "a.json").read_text()) == {"a": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]
