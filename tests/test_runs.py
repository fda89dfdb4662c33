"""Whose run it is: what was decided otherwise is another run, and one run at a time is in a folder."""

import json
import os
import shutil
import signal

import numpy as np
import pytest

from hf_mim.data.dataset import ImageDataset
from hf_mim.data.sources.folder import from_folder
from hf_mim.jobs import embed, finetuning, linear_probe, pack, pretraining, representation_report
from hf_mim.training.arguments import MIMTrainingArguments
from hf_mim.training.callbacks import SaveOnInterrupt
from hf_mim.training.errors import plain_message
from hf_mim.training.run_lock import only_run_in
from tiny_training import FLAGS, pictures, started, tiny_trainer, write_pictures
from tiny_training import run as run_process

RUN = ["--num_train_epochs=2", "--save_strategy=steps", "--save_steps=5", "--references=false", "--bf16=false"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_pictures(tmp_path_factory.mktemp("pictures"), 22)


@pytest.fixture(scope="module")
def finished(folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "out"
    assert pretraining.main([*FLAGS, *RUN, f"--train_dir={folder}", f"--output_dir={out}"]) == 0
    return out


@pytest.fixture
def run(finished, tmp_path):
    shutil.copytree(finished, tmp_path / "out")
    return tmp_path / "out"


def error_of(capsys) -> str:
    err = capsys.readouterr().err
    (line,) = [line for line in err.splitlines() if line.startswith("Error: ")]
    assert "Traceback" not in err
    return line


class TestAnotherRun:
    @pytest.mark.parametrize(
        ("flag", "said"),
        [
            ("--seed=7", "seed: 42 there, 7 here"),
            ("--per_device_train_batch_size=8", "effective_batch_size: 4 there, 8 here"),
            ("--base_learning_rate=0.1", "learning_rate: "),
            ("--num_train_epochs=4", "num_train_epochs: 2.0 there, 4.0 here"),
            ("--lr_scheduler_type=constant", "lr_scheduler_type: 'cosine' there, 'constant' here"),
            ("--weight_decay=0.1", "weight_decay: 0.05 there, 0.1 here"),
            ("--crop_scale_min=0.5", "crop_scale_min: 0.2 there, 0.5 here"),
            ("--horizontal_flip=false", "horizontal_flip: True there, False here"),
            ("--bf16=true", "precision: 'float32' there, 'bfloat16' here"),
            ("--max_train_samples=12", "pictures) there"),
        ],
    )
    def test_is_refused(self, run, folder, capsys, flag, said):
        weights = (run / "model.safetensors").read_bytes()
        flags = [*FLAGS, *RUN, f"--train_dir={folder}", f"--output_dir={run}", flag]
        assert pretraining.main(flags) == 1
        line = error_of(capsys)
        assert said in line and "another --output_dir" in line and "--resume_from_checkpoint false" in line
        assert (run / "model.safetensors").read_bytes() == weights

    def test_other_pictures_of_the_same_names_and_sizes(self, run, folder, tmp_path, capsys):
        other = write_pictures(tmp_path / "other", 22, seed=1)
        assert pretraining.main([*FLAGS, *RUN, f"--train_dir={other}", f"--output_dir={run}"]) == 1
        assert "(data: " in (line := error_of(capsys)) and str(other) in line
        # Without a checkpoint it is the finished model that would be taken for the new one's.
        larger = [flag.replace("hidden_size=32", "hidden_size=64") for flag in FLAGS]
        for checkpoint in run.glob("checkpoint-*"):
            shutil.rmtree(checkpoint)
        assert pretraining.main([*FLAGS, *RUN, f"--train_dir={other}", f"--output_dir={run}"]) == 1
        assert str(other) in error_of(capsys)
        assert pretraining.main([*larger, *RUN, f"--train_dir={folder}", f"--output_dir={run}"]) == 1
        assert "another model (" in (line := error_of(capsys)) and "hidden_size: 32 there, 64 here" in line
        flags = [*FLAGS, *RUN, f"--train_dir={other}", f"--output_dir={run}", "--resume_from_checkpoint=false"]
        assert pretraining.main(flags) == 0
        assert json.loads((run / "run.json").read_text())["decides"]["data"] == str(other)

    def test_begun_anew_and_stopped_goes_on_without_being_told_so_again(self, run, folder, monkeypatch):
        """The old run's record is no longer the folder's."""
        flags = [*FLAGS, *RUN, f"--train_dir={folder}", f"--output_dir={run}", "--weight_decay=0.1"]

        def stopping(callback, args, state, control, **kwargs):
            if state.global_step == 6:
                os.kill(os.getpid(), signal.SIGTERM)

        with monkeypatch.context() as patch:
            patch.setattr(SaveOnInterrupt, "on_step_begin", stopping)
            assert pretraining.main([*flags, "--resume_from_checkpoint=false"]) == 130
        assert (run / "_old-run.json").is_file()
        assert pretraining.main(flags) == 0
        assert json.loads((run / "run.json").read_text())["decides"]["weight_decay"] == 0.1

    def test_a_copy_of_the_pictures_logging_and_saving_make_no_other_run(self, run, folder, tmp_path, capsys):
        shutil.copytree(folder, tmp_path / "copy")
        flags = [f"--train_dir={tmp_path / 'copy'}", f"--output_dir={run}", "--logging_steps=2", "--save_steps=3"]
        flags += ["--per_device_train_batch_size=2", "--gradient_accumulation_steps=2", "--dataloader_num_workers=1"]
        before = (run / "model.safetensors").read_bytes()
        assert pretraining.main([*FLAGS, *RUN, *flags]) == 0
        assert "Nothing is left to train" in capsys.readouterr().out
        assert (run / "model.safetensors").read_bytes() == before

    def test_the_card_tells_the_record(self, finished):
        record = json.loads((finished / "run.json").read_text())
        checkpoint = json.loads((finished / "checkpoint-10" / "run.json").read_text())
        assert record == checkpoint
        assert record["also"]["per_device_train_batch_size"] == 4 and "torch" in record["also"]["versions"]
        card = (finished / "README.md").read_text()
        assert all(text in card for text in ("precision: float32", "seed: 42", "smallest crop: 0.2 of the area"))

    def test_fine_tuning(self, tmp_path, capsys):
        for name, seed in (("a", 0), ("b", 1)):
            write_pictures(tmp_path / "data" / name, 12, seed=seed)
        flags = [*FLAGS, f"--train_dir={tmp_path / 'data'}", f"--output_dir={tmp_path / 'out'}", "--max_steps=2"]
        flags = [flag for flag in flags if not flag.startswith("--config_overrides")]
        flags += ["--config_overrides=hidden_size=32,num_hidden_layers=2,num_attention_heads=2"]
        assert finetuning.main([*flags, "--save_strategy=no"]) == 0
        capsys.readouterr()
        assert finetuning.main([*flags, "--layer_decay=0.5"]) == 1
        assert "layer_decay: 0.75 there, 0.5 here" in error_of(capsys)


class TestContentFingerprint:
    def test_of_files(self, folder, tmp_path):
        of = lambda path: from_folder([str(path)], 3)[0].content_fingerprint()  # noqa: E731
        shutil.copytree(folder, tmp_path / "copy", copy_function=shutil.copyfile)
        assert of(tmp_path / "copy") == of(folder)
        (tmp_path / "copy" / "000.npy").rename(tmp_path / "copy" / "0000.npy")
        assert of(tmp_path / "copy") != of(folder)
        assert of(write_pictures(tmp_path / "other", 22, seed=1)) != of(folder)

    def test_of_arrays_and_columns(self):
        datasets = pytest.importorskip("datasets")
        from hf_mim.data.sources.datasets import from_datasets

        def column(seed):
            rows = {"image": list(pictures(5, seed))}
            features = datasets.Features({"image": datasets.Array3D((16, 16, 3), "uint8")})
            split = datasets.Dataset.from_dict(rows, features=features)
            return from_datasets({"train": split}, 3, source="x")["train"].content_fingerprint()

        def array(seed):
            return ImageDataset(pictures(5, seed), 3, source="x").content_fingerprint()

        for of in (column, array):
            assert of(0) == of(0) != of(1)

    def test_reads_few_of_many(self, monkeypatch):
        read = []
        values = np.zeros((3000, 2, 2, 3), dtype=np.uint8)
        data = ImageDataset(values, 3, source="x")
        monkeypatch.setattr(ImageDataset, "stored", lambda self, index: read.append(index) or values[index])
        data.content_fingerprint()
        assert len(read) == 256 and read[0] == 0 and read[-1] == 2999


class TestOneRunAFolder:
    HOLD = "import sys, time; from hf_mim.training.run_lock import only_run_in\n"
    HOLD += "with only_run_in(sys.argv[1]): print('in', flush=True); time.sleep(60)"

    def test_the_second_is_refused_until_the_first_is_killed(self, tmp_path, capsys):
        # As the parts of `table.parquet` are called.
        out = tmp_path / "table.parquet.parts"
        with started(["-c", self.HOLD, str(out)]) as process:
            assert process.stdout.readline() == "in\n"
            said = f"Another run is writing into .*process {process.pid} on"
            with pytest.raises(ValueError, match=said), only_run_in(out):
                pass
            # A trainer without a job, and jobs that read weights or pictures: before they read any.
            with pytest.raises(ValueError, match=said):
                tiny_trainer(out, max_steps=1).train()
            jobs = [
                (linear_probe, ["--model_name_or_path=x", f"--output_dir={out}"], "--output_dir"),
                (representation_report, ["--model_names_or_paths=x", f"--output_dir={out}"], "--output_dir"),
                (pack, ["nowhere", str(out)], "--output_dir"),
                (embed, ["x", "nowhere", str(tmp_path / "table.parquet")], "--output"),
            ]
            for job, flags, named in jobs:
                assert job.main(flags) == 1
                assert "Another run is writing into" in (line := error_of(capsys)) and f"another {named}." in line
            process.send_signal(signal.SIGKILL)
        with only_run_in(out):
            assert out.is_dir()

    def test_deletes_what_a_killed_process_had_begun(self, tmp_path):
        for name in (".features.123.tmp.json", ".hidden.json", "mine.1.tmp.json", "reconstructions/.step-5.7.tmp.png"):
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).touch()
        with only_run_in(tmp_path):
            assert {path.name for path in tmp_path.rglob("*") if path.is_file()} == {
                *(".lock", ".hidden.json", "mine.1.tmp.json")
            }

    def test_a_trainer_within_a_job_is_the_same_run(self, tmp_path):
        out = tmp_path / "out"
        with only_run_in(out):
            tiny_trainer(out, max_steps=1).train()
            with only_run_in(tmp_path / "out" / ".." / "out"):
                pass
            assert (out / ".lock").is_file()
            code = f"from hf_mim.training.run_lock import only_run_in\nwith only_run_in({str(out)!r}): pass"
            assert "Another run is writing into" in run_process(["-c", code]).stderr
        assert not out.exists()

    def test_leaves_nothing(self, tmp_path):
        with only_run_in(tmp_path / "out"):
            pass
        assert not (tmp_path / "out").exists()
        with only_run_in(tmp_path / "out"):
            (tmp_path / "out" / "kept").touch()
        assert os.listdir(tmp_path / "out") == ["kept"]

    @pytest.mark.parametrize("place", ["{}/file", "{}/file/below", "/proc/nowhere"])
    def test_no_folder(self, folder, tmp_path, capsys, place):
        (tmp_path / "file").touch()
        out = place.format(tmp_path)
        assert pretraining.main([*FLAGS, *RUN, f"--train_dir={folder}", f"--output_dir={out}"]) == 1
        assert f"--output_dir {out}" in error_of(capsys)


class TestRanges:
    @pytest.mark.parametrize(
        ("name", "value"),
        [
            ("per_device_train_batch_size", 0),
            ("per_device_eval_batch_size", 0),
            ("gradient_accumulation_steps", 0),
            ("learning_rate", -1.0),
            ("learning_rate", float("nan")),
            ("base_learning_rate", -1e-3),
            ("num_train_epochs", -1),
            ("num_train_epochs", 0),
            ("max_steps", 0),
            ("max_steps", -5),
            ("weight_decay", -0.1),
            ("adam_beta2", 1.0),
            ("max_grad_norm", -1.0),
            ("save_total_limit", 0),
            ("save_steps", 0),
            ("logging_steps", 0),
            ("logging_steps", -3),
            ("eval_steps", 1.5),
            ("seed", -1),
            ("dataloader_num_workers", -1),
            ("warmup_epochs", -1.0),
            ("warmup_steps", -1),
        ],
    )
    def test_are_said_in_a_line(self, tmp_path, name, value):
        with pytest.raises(ValueError, match=rf"--{name} is {value}; expected"):
            MIMTrainingArguments(str(tmp_path), **{name: value})

    def test_warmup_longer_than_training(self, tmp_path):
        with pytest.raises(ValueError, match="--warmup_epochs is 5, more than the 3 epochs"):
            MIMTrainingArguments(str(tmp_path), warmup_epochs=5, num_train_epochs=3)
        with pytest.raises(ValueError, match="--warmup_steps is 50, more than the 30 steps"):
            MIMTrainingArguments(str(tmp_path), warmup_steps=50, max_steps=30)
        MIMTrainingArguments(str(tmp_path), warmup_steps=50, num_train_epochs=1)


def test_a_worker_that_the_system_ended(folder, tmp_path, capsys, monkeypatch):
    """As the kernel does for want of memory."""
    from hf_mim.data.transforms import PretrainingTransform

    def killed(self, picture, epoch, index):
        os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(PretrainingTransform, "__call__", killed)
    flags = [*FLAGS, *RUN, f"--train_dir={folder}", f"--output_dir={tmp_path / 'out'}", "--dataloader_num_workers=1"]
    assert pretraining.main(flags) == 1
    line = error_of(capsys)
    assert "for want of memory" in line and "fewer --dataloader_num_workers" in line


def test_other_errors_of_torch_keep_their_stack():
    assert plain_message(RuntimeError("DataLoader worker is confused")) is None


def test_shown_pictures_are_of_all_classes():
    from hf_mim.data.loading import spread_indices

    shown = spread_indices(1000, 8)
    assert shown == sorted(shown) == spread_indices(1000, 8) and len({index // 250 for index in shown}) >= 3
    assert spread_indices(3, 8) == [0, 1, 2]
