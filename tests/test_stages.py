"""Runs of several stages: what each leaves, and that stopping and resuming anywhere changes no bit."""

import gc
import json
import os
import re
import shutil
import signal

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForPreTraining, ViTConfig, ViTModel

from hf_mim import PiLaMIMForPreTraining
from hf_mim.data.image_processing import build_image_processor
from hf_mim.data.transforms import PretrainingTransform
from hf_mim.jobs import pretraining
from hf_mim.training.arguments import MIMTrainingArguments
from hf_mim.training.stages import set_later_stages_aside, stage_arguments, stage_seed
from hf_mim.training.trainer import MIMTrainer
from test_distributed import torchrun
from tiny_training import FLAGS, RUN_MIM, losses, run, tiny_config, write_pictures

# 21 pictures and one held out: 5 steps of 4 in an epoch.
COMMON = [
    *(f"{flag},drop_path_rate=0.5" if flag.startswith("--config_overrides") else flag for flag in FLAGS),
    "--model_type=dbot",
    "--base_learning_rate=0.5",
    "--save_strategy=no",
    "--eval_strategy=no",
    "--dataloader_persistent_workers=false",
]
TWO = ["--num_stages=2", "--max_steps=7"]


@pytest.fixture(scope="module", autouse=True)
def quick_collection():
    """Each run collects garbage several times, and a third of a second each goes into looking at what stays anyway."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_pictures(tmp_path_factory.mktemp("pictures"), 22)


def train(folder, out, *flags: str) -> int:
    data = [] if any(flag.startswith("--dataset_name") for flag in flags) else [f"--train_dir={folder}"]
    return pretraining.main([*COMMON, *flags, *data, f"--output_dir={out}"])


@pytest.fixture(autouse=True)
def no_results(request, monkeypatch):
    """Nothing is evaluated or drawn, but where a test is of that."""
    if "only_evaluated" not in request.node.name:
        monkeypatch.setattr(pretraining, "write_results", lambda *args: None)


slow = pytest.mark.slow


@pytest.fixture(scope="module")
def unbroken(folder, tmp_path_factory):
    """A run of two stages of 7 steps, never stopped."""
    out = tmp_path_factory.mktemp("unbroken")
    assert train(folder, out, *TWO) == 0
    return out


def assert_same_weights(one, two, name: str = "model.safetensors") -> None:
    first, second = load_file(one / name), load_file(two / name)
    assert first.keys() == second.keys()
    different = [key for key, value in first.items() if not torch.equal(value, second[key])]
    assert not different, different


def assert_same_run(one, two) -> None:
    for stage in ("stage-0", "stage-1"):
        assert_same_weights(one / stage, two / stage)
        assert losses(one / stage) == losses(two / stage)
    assert_same_weights(one, two)


class Killed(BaseException):
    """What no handler catches, as when the process is killed."""


def act_at(monkeypatch, stage: int, step: int, action) -> None:
    """Calls `action` before a step of a stage (the first is 0), once."""
    step_of = MIMTrainer.training_step

    def training_step(self, *args, **kwargs):
        if (self.stage, self.state.global_step) == (stage, step):
            monkeypatch.setattr(MIMTrainer, "training_step", step_of)
            action()
        return step_of(self, *args, **kwargs)

    monkeypatch.setattr(MIMTrainer, "training_step", training_step)


def kill():
    raise Killed


def interrupt():
    os.kill(os.getpid(), signal.SIGINT)


class TestLayout:
    def test_every_stage_is_kept_and_loads_by_itself(self, unbroken):
        assert sorted(path.name for path in unbroken.glob("stage-*")) == ["stage-0", "stage-1"]
        for name in ("stage-0", "stage-1", "."):
            model = AutoModelForPreTraining.from_pretrained(unbroken / name)
            encoder = AutoModel.from_pretrained(unbroken / name)
            for key, value in encoder.state_dict().items():
                assert torch.equal(model.encoder.state_dict()[key], value), key
            assert encoder(torch.zeros(1, 3, 16, 16)).pooler_output.shape == (1, 32)
        assert_same_weights(unbroken, unbroken / "stage-1")
        for name in ("config.json", "preprocessor_config.json", "features.json", "README.md", "loss_curves.png"):
            assert (unbroken / name).is_file(), name

    def test_teacher_of_stage_1_is_the_student_of_stage_0(self, unbroken):
        first, second = (AutoModelForPreTraining.from_pretrained(unbroken / f"stage-{stage}") for stage in (0, 1))
        pixel_values = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
        hidden_states = first.encoder(pixel_values, output_hidden_states=True).hidden_states[-1]
        features = hidden_states - hidden_states.mean(dim=-1, keepdim=True)
        expected = features / (features.square().sum(dim=-1, keepdim=True) / 31 + 1e-6).sqrt()
        torch.testing.assert_close(second.teacher_targets(pixel_values), expected, rtol=0, atol=1e-5)
        assert not torch.allclose(first.teacher_targets(pixel_values), expected, atol=0.1)

    def test_logs_carry_the_stage_and_each_has_the_whole_schedule(self, unbroken):
        for stage in (0, 1):
            logged = losses(unbroken / f"stage-{stage}", "stage", "learning_rate")
            assert [log[:2] for log in logged] == [(step, stage) for step in range(1, 8)]
            rates = [rate for _, _, rate in logged]
            assert rates[0] == 0.0 and max(rates) == rates[1] == pytest.approx(0.5 * 4 / 256)
            assert rates[1:] == sorted(rates[1:], reverse=True)
        assert "stage" not in (unbroken / "stage-0" / "stage.json").read_text()

    def test_students_and_data_of_the_stages_differ(self, folder, tmp_path, monkeypatch):
        starts, seen = {}, {0: [], 1: []}
        train_of, transform = MIMTrainer.train, PretrainingTransform.__call__

        def recording_train(self, *args, **kwargs):
            starts[self.stage] = {name: value.clone() for name, value in self.model.encoder.state_dict().items()}
            self.train_dataset.transform.stage = self.stage
            return train_of(self, *args, **kwargs)

        def recording_transform(self, picture, epoch, index):
            item = transform(self, picture, epoch, index)
            seen[self.stage].append((epoch, index, item["noise"]))
            return item

        monkeypatch.setattr(MIMTrainer, "train", recording_train)
        monkeypatch.setattr(PretrainingTransform, "__call__", recording_transform)
        assert train(folder, tmp_path, *TWO) == 0
        trained = load_file(tmp_path / "stage-0" / "model.safetensors")
        for name, value in starts[1].items():
            if name.endswith("weight") and value.ndim == 2:
                assert not torch.equal(value, starts[0][name]), name
                assert not torch.equal(value, trained[f"encoder.{name}"]), name
        orders = [[(epoch, index) for epoch, index, _ in seen[stage]] for stage in (0, 1)]
        assert orders[0] != orders[1]
        noise = [{(epoch, index): noise for epoch, index, noise in seen[stage]} for stage in (0, 1)]
        shared = noise[0].keys() & noise[1].keys()
        assert len(shared) > 10
        assert not any(torch.equal(noise[0][key], noise[1][key]) for key in shared)

    def test_stage_0_equals_a_run_of_one_stage(self, folder, unbroken, tmp_path):
        assert train(folder, tmp_path, "--max_steps=7") == 0
        assert_same_weights(tmp_path, unbroken / "stage-0")
        assert not list(tmp_path.glob("stage*"))
        assert "stage" not in json.loads((tmp_path / "trainer_state.json").read_text())["log_history"][0]

    def test_results_of_every_stage(self, unbroken):
        features = json.loads((unbroken / "features.json").read_text())["features"]
        names = [name.split(",")[0] for name in features if name.endswith("mean")]
        assert names == ["untrained", "stage 0", "trained"]
        assert "| stage 0, [CLS] |" in (unbroken / "README.md").read_text()

    def test_given_lengths(self, folder, tmp_path):
        assert train(folder, tmp_path / "steps", "--stage_steps", "2", "3") == 0
        assert [len(losses(tmp_path / "steps" / f"stage-{stage}")) for stage in (0, 1)] == [2, 3]
        assert train(folder, tmp_path / "epochs", "--stage_epochs", "1", "0.6", "--max_steps=50") == 0
        assert [len(losses(tmp_path / "epochs" / f"stage-{stage}")) for stage in (0, 1)] == [5, 3]


class TestResuming:
    # With checkpoints at steps 3 and 6 and at the stage's end, 7.
    PLACES = [(0, 4), (1, 0), (1, 5)]
    MORE = [(0, 2), (0, 6), (1, 2), (1, 6)]

    @pytest.mark.parametrize(("stage", "step"), PLACES + [pytest.param(*place, marks=slow) for place in MORE])
    def test_killed_and_run_again(self, folder, unbroken, tmp_path, monkeypatch, stage, step):
        flags = [*TWO, "--save_strategy=steps", "--save_steps=3"]
        act_at(monkeypatch, stage, step, kill)
        with pytest.raises(Killed):
            train(folder, tmp_path, *flags)
        assert train(folder, tmp_path, *flags) == 0
        assert_same_run(tmp_path, unbroken)

    # In the middle, at the end, and just after it.
    @pytest.mark.parametrize(("stage", "step"), [pytest.param(0, 3, marks=slow), (0, 6), (1, 0), (1, 6)])
    def test_interrupted_and_run_again(self, folder, unbroken, tmp_path, monkeypatch, capsys, stage, step):
        act_at(monkeypatch, stage, step, interrupt)
        assert train(folder, tmp_path, *TWO) == 130
        out = capsys.readouterr().out
        assert f"Stopped after step {step + 1}" in out and "the same command goes on from there" in out
        assert (tmp_path / f"stage-{stage}" / f"checkpoint-{step + 1}").is_dir()
        assert not (tmp_path / "model.safetensors").exists()
        assert train(folder, tmp_path, *TWO) == 0
        assert f"Resuming from {tmp_path}/stage-{stage}/checkpoint-{step + 1}" in capsys.readouterr().out
        assert_same_run(tmp_path, unbroken)

    @pytest.mark.parametrize("strategy", ["no", pytest.param("steps", marks=slow)])
    @pytest.mark.parametrize("function", ["save_stage", "mark_finished"])
    def test_killed_between_the_last_step_and_the_next_stage(
        self, folder, unbroken, tmp_path, monkeypatch, strategy, function
    ):
        flags = [*TWO, f"--save_strategy={strategy}", "--save_steps=100"]
        with monkeypatch.context() as patched:
            patched.setattr(pretraining, function, lambda *args: kill())
            with pytest.raises(Killed):
                train(folder, tmp_path, *flags)
        assert train(folder, tmp_path, *flags) == 0
        assert_same_run(tmp_path, unbroken)

    def test_request_that_comes_after_a_stage_stops_the_next(self, folder, unbroken, tmp_path, monkeypatch):
        """As with several processes, which agree only when logging."""
        train_of = MIMTrainer.train

        def late(self, *args, **kwargs):
            output = train_of(self, *args, **kwargs)
            (callback,) = (c for c in self.callback_handler.callbacks if type(c).__name__ == "SaveOnInterrupt")
            callback.requested = True
            return output

        with monkeypatch.context() as patched:
            patched.setattr(MIMTrainer, "train", late)
            assert train(folder, tmp_path, *TWO) == 130
        assert (tmp_path / "stage-1" / "checkpoint-1").is_dir()
        assert train(folder, tmp_path, *TWO) == 0
        assert_same_run(tmp_path, unbroken)

    def test_finished_run_is_only_evaluated(self, folder, tmp_path, monkeypatch):
        flags = [*TWO, "--save_strategy=steps", "--save_steps=100"]
        assert train(folder, tmp_path, *flags) == 0
        before = (tmp_path / "model.safetensors").read_bytes()
        (tmp_path / "features.json").unlink()
        for stage in (0, 1):
            act_at(monkeypatch, stage, 0, kill)
        assert train(folder, tmp_path, *flags) == 0
        assert (tmp_path / "features.json").is_file()
        assert (tmp_path / "model.safetensors").read_bytes() == before

    def test_one_more_stage(self, folder, unbroken, tmp_path):
        """A finished run of two stages goes on as one of three would have."""
        assert train(folder, tmp_path / "3", "--num_stages=3", "--max_steps=7") == 0
        assert train(folder, tmp_path / "2", *TWO) == 0
        assert train(folder, tmp_path / "2", "--num_stages=3", "--max_steps=7") == 0
        assert_same_run(tmp_path / "2", tmp_path / "3")
        assert_same_weights(tmp_path / "3" / "stage-1", unbroken)

    def test_from_a_named_checkpoint_of_a_stage(self, folder, unbroken, tmp_path):
        flags = [*TWO, "--save_strategy=steps", "--save_steps=3", "--save_total_limit=9"]
        assert train(folder, tmp_path, *flags) == 0
        assert train(folder, tmp_path, *flags, f"--resume_from_checkpoint={tmp_path}/stage-0/checkpoint-3") == 0
        assert_same_run(tmp_path, unbroken)
        assert (tmp_path / "_old-stage-1" / "model.safetensors").is_file()


class TestBeginningAnew:
    def test_sets_what_is_there_aside(self, folder, unbroken, tmp_path, monkeypatch):
        flags = [*TWO, "--save_strategy=steps", "--save_steps=3"]
        assert train(folder, tmp_path, *flags) == 0
        with monkeypatch.context() as patched:
            act_at(patched, 0, 4, kill)
            with pytest.raises(Killed):
                train(folder, tmp_path, *flags, "--resume_from_checkpoint=false")
        assert sorted(p.name for p in tmp_path.iterdir() if p.is_dir()) == ["_old-stage-1", "stage-0"]
        assert (tmp_path / "_old-stage-1" / "checkpoint-7").is_dir()
        assert (tmp_path / "stage-0" / "_old-checkpoint-7").is_dir()
        # Not from the old run's stage 1, nor from its end of stage 0.
        act_at(monkeypatch, 0, 3, interrupt)
        assert train(folder, tmp_path, *flags) == 130
        assert train(folder, tmp_path, *flags) == 0
        assert_same_run(tmp_path, unbroken)

    def test_nothing_set_aside_is_lost(self, tmp_path):
        stages = stage_arguments(MIMTrainingArguments(output_dir=str(tmp_path), num_stages=2))
        for content in "ab":
            (tmp_path / "stage-1").mkdir()
            (tmp_path / "stage-1" / content).touch()
            set_later_stages_aside(stages, 0)
        assert (tmp_path / "_old-stage-1" / "a").is_file() and (tmp_path / "_old-stage-1-2" / "b").is_file()


class TestOptimiserState:
    FLAGS = [*TWO, "--keep_optimizer_state"]

    def test_is_new_by_default_and_kept_when_asked(self, folder, unbroken, tmp_path, monkeypatch):
        states = []
        create = MIMTrainer.create_optimizer

        def recording(self, *args, **kwargs):
            optimizer = create(self, *args, **kwargs)
            states.append((len(optimizer.state_dict()["state"]), [group["lr"] for group in optimizer.param_groups]))
            return optimizer

        monkeypatch.setattr(MIMTrainer, "create_optimizer", recording)
        train(folder, tmp_path / "new", *TWO)
        train(folder, tmp_path / "kept", *self.FLAGS)
        (_, peak), (new, rates), (first, _), (kept, kept_rates) = states
        assert (new, first) == (0, 0) and kept > 50
        assert rates == kept_rates == peak == [pytest.approx(0.5 * 4 / 256)] * 2
        assert_same_weights(tmp_path / "kept" / "stage-0", unbroken / "stage-0")
        saved = torch.load(tmp_path / "kept" / "stage-0" / "optimizer.pt", weights_only=True)["state"]
        assert {int(state["step"]) for state in saved.values()} == {7}
        steps = losses(tmp_path / "kept" / "stage-1"), losses(unbroken / "stage-1")
        assert steps[0][0] == steps[1][0] and steps[0][-1] != steps[1][-1]

    @pytest.mark.parametrize(("stage", "step"), [(1, 0), (1, 3)])
    def test_resuming(self, folder, tmp_path, monkeypatch, stage, step):
        assert train(folder, tmp_path / "a", *self.FLAGS) == 0
        act_at(monkeypatch, stage, step, kill)
        with pytest.raises(Killed):
            train(folder, tmp_path / "b", *self.FLAGS, "--save_strategy=steps", "--save_steps=2")
        assert train(folder, tmp_path / "b", *self.FLAGS, "--save_strategy=steps", "--save_steps=2") == 0
        assert_same_run(tmp_path / "b", tmp_path / "a")


class TestArguments:
    @pytest.mark.parametrize(
        ("flags", "message"),
        [
            (["--num_stages=0"], "num_stages is 0; it must be at least 1"),
            (["--num_stages=-2"], "num_stages is -2"),
            (
                ["--num_stages=3", "--stage_epochs", "1", "2"],
                r"num_stages is 3, and stage_epochs has 2 numbers",
            ),
            (["--num_stages=1", "--stage_steps", "5", "6"], "num_stages is 1, and stage_steps has 2"),
            (["--stage_steps", "5", "0"], r"stage_steps is \[5, 0\]; expected one number above 0"),
            (["--stage_epochs", "-1"], "stage_epochs is .*above 0"),
            (["--stage_steps", "5", "--stage_epochs", "1"], "Both stage_epochs and stage_steps"),
            (["--keep_optimizer_state"], "num_stages is 1"),
            (["--num_stages=2", "--model_type=pilamim"], "pilamim is not trained in stages"),
            (["--num_stages=2", "--resume_from_checkpoint=true"], "There is no checkpoint in .*stage-0"),
            (["--num_stages=2", "--resume_from_checkpoint=/nowhere/checkpoint-5"], "is in no stage of this run"),
            (["--dataset_name=nowhere", "--streaming", "--stage_epochs", "1", "2"], "give --max_steps"),
        ],
    )
    def test_that_cannot_work_are_refused_before_anything_is_written(self, folder, tmp_path, capsys, flags, message):
        assert train(folder, tmp_path / "out", *flags) == 1
        assert re.search(f"Error: .*{message}", capsys.readouterr().err)
        assert not (tmp_path / "out").exists()

    def test_one_length_is_one_stage(self, tmp_path):
        args = MIMTrainingArguments(output_dir=str(tmp_path), stage_steps=[5])
        (own,) = stage_arguments(args)
        assert (own.max_steps, own.output_dir, own.seed) == (5, str(tmp_path), 42)

    def test_seeds_are_the_runs_own_and_then_far_apart(self):
        seeds = [stage_seed(seed, stage) for seed in range(50) for stage in range(10)]
        assert len(set(seeds)) == len(seeds)
        assert [stage_seed(seed, 0) for seed in range(50)] == list(range(50))
        assert all(0 <= seed < 2**32 for seed in seeds)


class TestDamage:
    @pytest.fixture
    def stopped(self, folder, tmp_path, monkeypatch):
        """A run whose stage 0 is finished, and stage 1 stopped."""
        with monkeypatch.context() as patched:
            act_at(patched, 1, 2, interrupt)
            assert train(folder, tmp_path, *TWO) == 130
        return tmp_path

    @pytest.mark.parametrize(
        ("name", "harm", "message"),
        [
            ("stage-0/model.safetensors", lambda p: p.write_bytes(p.read_bytes()[:999]), "damaged: model.safetensors"),
            ("stage-0/model.safetensors", lambda p: p.unlink(), "damaged: model.safetensors is missing"),
            ("stage-0/stage.json", lambda p: p.write_text("{"), "damaged: stage.json cannot be read"),
        ],
    )
    def test_is_named(self, folder, stopped, capsys, name, harm, message):
        harm(stopped / name)
        assert train(folder, stopped, *TWO) == 1
        err = capsys.readouterr().err
        assert message in err and "Traceback" not in err

    def test_damaged_checkpoint_is_set_aside_and_its_stage_begun_again(self, folder, stopped):
        (stopped / "stage-1" / "checkpoint-3" / "optimizer.pt").unlink()
        assert train(folder, stopped, *TWO) == 0
        assert (stopped / "stage-1" / "_old-checkpoint-3").is_dir()

    def test_finished_stage_of_another_run(self, folder, stopped, capsys):
        shutil.rmtree(stopped / "stage-1")
        assert train(folder, stopped, *TWO, "--weight_decay=0.3") == 1
        err = capsys.readouterr().err
        assert "stage-0 holds a stage of another run (weight_decay: 0.05 there, 0.3 here)" in err

    @pytest.mark.parametrize(
        ("flags", "message"),
        [
            (
                ["--num_stages=2", "--max_steps=8"],
                "trained with {'max_steps': 7, 'seed': 42}; asked for is {'max_steps': 8",
            ),
            (["--num_stages=2", "--num_train_epochs=2"], "asked for is {'num_train_epochs': 2"),
            ([*TWO, "--seed=1"], "asked for is {'max_steps': 7, 'seed': 1}"),
            ([*TWO, "--mask_ratio=0.5"], "another model (mask_ratio: 0.75 there, 0.5 here)"),
            ([*TWO, "--keep_optimizer_state"], "without --keep_optimizer_state?"),
        ],
    )
    def test_stage_of_other_settings(self, folder, stopped, capsys, flags, message):
        assert train(folder, stopped, *flags) == 1
        assert message in capsys.readouterr().err

    def test_later_stage_of_an_unfinished_one(self, folder, stopped, capsys):
        (stopped / "stage-0" / "stage.json").unlink()
        assert train(folder, stopped, *TWO, f"--resume_from_checkpoint={stopped}/stage-1/checkpoint-3") == 1
        assert "stage-0 is not finished" in capsys.readouterr().err


class TestFirstTeacher:
    def test_is_given_and_only_the_first(self, folder, tmp_path):
        sizes = {
            "num_hidden_layers": 3,
            "hidden_size": 24,
            "num_attention_heads": 2,
            "image_size": 16,
            "patch_size": 4,
        }
        torch.manual_seed(0)
        teacher = PiLaMIMForPreTraining(tiny_config(**sizes))
        teacher.save_pretrained(tmp_path / "teacher")
        build_image_processor((16, 16), 3, [0.5] * 3, [0.25] * 3).save_pretrained(tmp_path / "teacher")
        flags = [*TWO, f"--teacher_model_name_or_path={tmp_path / 'teacher'}"]
        assert train(folder, tmp_path / "out", *flags) == 0
        first, second = (AutoModelForPreTraining.from_pretrained(tmp_path / "out" / f"stage-{i}") for i in (0, 1))
        assert first.config.teacher_config["hidden_size"] == 24 and second.config.teacher_config is None
        for name, value in teacher.encoder.state_dict().items():
            assert torch.equal(first.teacher.network.state_dict()[name], value), name
        for name, value in first.encoder.state_dict().items():
            assert torch.equal(second.teacher.network.state_dict()[name], value), name
        # The student's pictures are normalised by ImageNet's mean, the teacher's are not.
        assert first.config.image_mean == pytest.approx([0.485, 0.456, 0.406])
        assert first.config.teacher_image_mean == [0.5] * 3 and second.config.teacher_image_mean is None

    def test_run_from_it_resumes(self, folder, tmp_path, monkeypatch):
        torch.manual_seed(0)
        ViTModel(
            ViTConfig(hidden_size=24, num_hidden_layers=2, num_attention_heads=2, image_size=16, patch_size=4)
        ).save_pretrained(tmp_path / "teacher")
        flags = [
            *TWO,
            f"--teacher_model_name_or_path={tmp_path / 'teacher'}",
            "--save_strategy=steps",
            "--save_steps=3",
        ]
        assert train(folder, tmp_path / "a", *flags) == 0
        for stage, step in ((0, 4), (1, 4)):
            act_at(monkeypatch, stage, step, kill)
            with pytest.raises(Killed):
                train(folder, tmp_path / "b", *flags)
        assert train(folder, tmp_path / "b", *flags) == 0
        assert_same_run(tmp_path / "b", tmp_path / "a")

    @pytest.mark.parametrize(
        ("flags", "sizes", "message"),
        [
            (["--model_type=pilamim"], {}, "--teacher_model_name_or_path is of dBOT; --model_type is pilamim"),
            ([], {"image_size": (16, 32), "patch_size": 8}, "2 x 4 patches .*the student into 4 x 4"),
            (["--num_channels=3"], {"num_channels": 1}, "takes pictures of 1 channels; these have 3. Leave --num_ch"),
        ],
    )
    def test_that_cannot_be_one_is_refused_before_training(self, folder, tmp_path, capsys, flags, sizes, message):
        PiLaMIMForPreTraining(tiny_config(**sizes)).save_pretrained(tmp_path / "teacher")
        flags = [f"--teacher_model_name_or_path={tmp_path / 'teacher'}", *flags]
        assert train(folder, tmp_path / "out", *flags) == 1
        assert re.search(message, capsys.readouterr().err)
        assert not (tmp_path / "out").exists()

    def test_that_is_not_there(self, folder, tmp_path, capsys):
        assert train(folder, tmp_path / "out", f"--teacher_model_name_or_path={tmp_path}/nowhere") == 1
        assert "--teacher_model_name_or_path" in capsys.readouterr().err


class TestTwoProcesses:
    def flags(self, folder, out) -> list[str]:
        flags = [*COMMON, *TWO, "--per_device_train_batch_size=2", "--save_strategy=steps", "--save_steps=3"]
        return [*flags, f"--train_dir={folder}", f"--output_dir={out}"]

    def test_broken_off_and_run_again(self, folder, tmp_path, processes):
        """In one launch: a run, and one that breaks off in stage 1 before its first checkpoint, and goes on."""
        script = tmp_path / "stages.py"
        script.write_text("""
import os, sys
from pathlib import Path
import torch
from hf_mim.data.arguments import DataArguments
from hf_mim.jobs import pretraining
from hf_mim.training.arguments import MIMTrainingArguments
from hf_mim.training.command import ModelArguments, parse_arguments
from hf_mim.training.trainer import MIMTrainer

pretraining.write_results = lambda *args: None
step_of, train_of = MIMTrainer.training_step, MIMTrainer.train
folder, flags = Path(sys.argv[1]), sys.argv[2:]
starts = []

def train(self, *args, **kwargs):
    starts.append({name: value.clone() for name, value in self.model.state_dict().items()})
    return train_of(self, *args, **kwargs)

def run(name):
    starts.clear()
    arguments = parse_arguments(
        (ModelArguments, DataArguments, MIMTrainingArguments), [*flags, f"--output_dir={folder / name}"]
    )
    return pretraining.pretrain(*arguments)

def training_step(self, *args, **kwargs):
    if (self.stage, self.state.global_step) == (1, 1):
        raise KeyboardInterrupt
    return step_of(self, *args, **kwargs)

MIMTrainer.train = train
assert run("unbroken") == 0
# Before DDP, which would send the first process's weights to the others.
torch.save(starts, folder / f"starts{os.environ['RANK']}.pt")
MIMTrainer.training_step = training_step
try:
    run("broken")
    raise AssertionError("it did not break off")
except KeyboardInterrupt:
    pass
assert len(starts) == 2
MIMTrainer.training_step = step_of
assert run("broken") == 0
assert len(starts) == 1, "stage 0 was trained again"
sys.stdout.flush()
os._exit(0)  # as in test_stream_is_shared_out
""")
        flags = self.flags(folder, tmp_path)[:-1]
        result = processes([str(script), str(tmp_path), *flags], 2)
        assert result.returncode == 0, result.stderr
        assert_same_run(tmp_path / "broken", tmp_path / "unbroken")
        one, other = (torch.load(tmp_path / f"starts{rank}.pt", weights_only=True) for rank in (0, 1))
        for stage in (0, 1):
            assert all(torch.equal(one[stage][name], value) for name, value in other[stage].items())

    @slow
    def test_killed_and_run_again(self, folder, tmp_path):
        script = tmp_path / "killed.py"
        script.write_text("""
import os, sys
from hf_mim.jobs import pretraining
from hf_mim.training.trainer import MIMTrainer

step_of = MIMTrainer.training_step

def training_step(self, *args, **kwargs):
    if (self.stage, self.state.global_step) == (1, 4):
        os._exit(9)
    return step_of(self, *args, **kwargs)

MIMTrainer.training_step = training_step
pretraining.main(sys.argv[1:])
""")
        out = tmp_path / "out"
        assert run(torchrun(RUN_MIM, *self.flags(folder, tmp_path / "unbroken"))).returncode == 0
        result = run(torchrun(str(script), *self.flags(folder, out)))
        assert result.returncode != 0 and (out / "stage-1" / "checkpoint-3").is_dir(), result.stderr
        assert not (out / "model.safetensors").exists()
        result = run(torchrun(RUN_MIM, *self.flags(folder, out)))
        assert result.returncode == 0, result.stderr
        assert result.stdout.count("Stage 1 (") == 1 and "Stage 0 (" not in result.stdout
        assert_same_run(out, tmp_path / "unbroken")
