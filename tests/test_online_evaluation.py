"""k-NN and linear accuracy at each evaluation of pretraining, and the best model told by them."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import hf_mim
from hf_mim.data.dataset import ImageDataset, ImageStream
from hf_mim.data.image_processing import build_image_processor
from hf_mim.data.loading import ImageSplits
from hf_mim.evaluation.knn import knn_accuracy
from hf_mim.evaluation.linear import linear_probe_accuracy
from hf_mim.evaluation.online import OnlineEvaluation
from hf_mim.jobs.pretraining import main
from test_distributed import torchrun
from tiny_training import FLAGS, RUN_MIM, pictures, run, tiny_config, write_pictures

BEST = ["--eval_knn=true", "--load_best_model_at_end=true", "--metric_for_best_model=eval_knn_accuracy_label"]
STEPS = ["--eval_strategy=steps", "--eval_steps=2", "--save_strategy=steps", "--save_steps=2", "--max_steps=6"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two classes, one darker than the other."""
    root = tmp_path_factory.mktemp("classes")
    for name, seed in (("a", 0), ("b", 1)):
        (root / name).mkdir()
        for index, picture in enumerate(pictures(20, seed)):
            np.save(root / name / f"{index:02d}.npy", picture.astype(np.float32) / (255 if name == "a" else 300))
    return root


def splits(labels=True) -> ImageSplits:
    def split(number, seed):
        classes = {"label": np.arange(number) % 3, "parity": np.arange(number) % 2} if labels else None
        return ImageDataset(pictures(number, seed), 3, source="noise", labels=classes)

    return ImageSplits(split(24, 0), split(12, 1))


def processor():
    return build_image_processor((16, 16), 3, [0.5] * 3, [0.25] * 3)


def test_scores_are_those_of_the_encoder_on_whole_pictures():
    data = splits()
    evaluation = OnlineEvaluation(data, processor(), knn=True, linear=True)
    torch.manual_seed(0)
    encoder = hf_mim.PiLaMIMModel(tiny_config()).eval()
    metrics = evaluation(encoder)
    assert list(metrics) == evaluation.names
    assert evaluation.names == [
        *("knn_accuracy_label", "knn_accuracy_parity", "knn_accuracy"),
        *("linear_accuracy_label", "linear_accuracy_parity", "linear_accuracy"),
    ]
    features = []
    for split in (evaluation.train, evaluation.test):
        values = torch.stack([(split[i].float() / 255 - 0.5) / 0.25 for i in range(len(split))])
        with torch.no_grad():
            features.append((encoder(values).last_hidden_state[:, 0], torch.as_tensor(split.labels["parity"])))
    (train, train_labels), (test, test_labels) = features
    assert metrics["knn_accuracy_parity"] == knn_accuracy(train, train_labels, test, test_labels)
    assert metrics["linear_accuracy_parity"] == linear_probe_accuracy(train, train_labels, test, test_labels)
    assert metrics["knn_accuracy"] == pytest.approx(
        (metrics["knn_accuracy_label"] + metrics["knn_accuracy_parity"]) / 2
    )
    assert all(parameter.grad is None for parameter in encoder.parameters())


def test_training_is_not_touched(folder, tmp_path):
    # With stochastic depth, which draws from the global generator.
    given = [f"{flag},drop_path_rate=0.5" if flag.startswith("--config_overrides") else flag for flag in FLAGS]
    common = [*given, *STEPS, f"--train_dir={folder}"]
    assert main([*common, f"--output_dir={tmp_path / 'plain'}"]) == 0
    assert main([*common, "--eval_knn=true", "--online_probe=true", f"--output_dir={tmp_path / 'watched'}"]) == 0
    plain, watched = (load_file(tmp_path / name / "model.safetensors") for name in ("plain", "watched"))
    assert all(torch.equal(value, watched[name]) for name, value in plain.items())
    history = json.loads((tmp_path / "watched" / "trainer_state.json").read_text())["log_history"]
    logged = [log for log in history if "eval_knn_accuracy" in log]
    assert [log["step"] for log in logged] == [2, 4, 6]
    assert all(0 <= log[f"eval_{name}_accuracy_label"] <= 100 for log in logged for name in ("knn", "linear"))


def assert_best_is_kept(out) -> None:
    state = json.loads((out / "trainer_state.json").read_text())
    logged = {log["step"]: log["eval_knn_accuracy_label"] for log in state["log_history"] if "eval_loss" in log}
    assert list(logged) == [2, 4, 6]
    assert state["best_metric"] == max(logged.values())
    best = out / f"checkpoint-{state['best_global_step']}"
    assert logged[state["best_global_step"]] == state["best_metric"]
    saved, kept = load_file(best / "model.safetensors"), load_file(out / "model.safetensors")
    assert all(torch.equal(value, kept[name]) for name, value in saved.items())


def test_best_model_by_knn(folder, tmp_path, monkeypatch):
    # The middle one is best, so that neither the first nor the last checkpoint would do.
    # The second number is of the untrained network, which the verdict asks for once.
    found = iter([10.0, 90.0, 70.0, 20.0])
    monkeypatch.setattr("hf_mim.evaluation.online.accuracy", lambda *answers: next(found))
    assert (
        main([*FLAGS, *STEPS, *BEST, "--save_total_limit=5", f"--train_dir={folder}", f"--output_dir={tmp_path}"]) == 0
    )
    assert_best_is_kept(tmp_path)
    assert json.loads((tmp_path / "trainer_state.json").read_text())["best_global_step"] == 4


@pytest.mark.slow
def test_best_model_by_knn_of_two_processes(folder, tmp_path):
    flags = [*FLAGS, *STEPS, *BEST, "--save_total_limit=5", "--per_device_train_batch_size=2", f"--train_dir={folder}"]
    result = run(torchrun(RUN_MIM, *flags, f"--output_dir={tmp_path / 'two'}"))
    assert result.returncode == 0, result.stderr
    assert_best_is_kept(tmp_path / "two")
    # The features of two processes are those of one.
    assert (
        main(
            [
                *FLAGS,
                *STEPS,
                *BEST,
                "--save_total_limit=5",
                f"--train_dir={folder}",
                f"--output_dir={tmp_path / 'one'}",
            ]
        )
        == 0
    )
    logged = [
        [
            log["eval_knn_accuracy"]
            for log in json.loads((tmp_path / name / "trainer_state.json").read_text())["log_history"]
            if "eval_loss" in log
        ]
        for name in ("one", "two")
    ]
    assert logged[0] == pytest.approx(logged[1])
    results = [json.loads((tmp_path / name / "features.json").read_text())["features"] for name in ("one", "two")]
    for name in results[0]:
        assert results[0][name]["knn"] == pytest.approx(results[1][name]["knn"])


class TestMistakes:
    @pytest.fixture
    def fails(self, tmp_path, capsys):
        def fails(folder, *flags) -> str:
            assert (
                main([*FLAGS, "--max_steps=2", f"--train_dir={folder}", f"--output_dir={tmp_path / 'out'}", *flags])
                == 1
            )
            err = capsys.readouterr().err
            assert "Traceback" not in err and not (tmp_path / "out" / "model.safetensors").exists()
            return err

        return fails

    def test_no_labels(self, fails, tmp_path):
        unlabelled = write_pictures(tmp_path / "unlabelled", 12)
        err = fails(unlabelled, "--eval_knn=true", "--eval_strategy=epoch")
        assert "has no labels" in err and "--label_column_names" in err and "sub-folder" in err

    def test_no_evaluation(self, fails, folder):
        assert "give --eval_strategy" in fails(folder, "--online_probe=true")

    def test_metric_that_will_not_be_there(self, fails, folder):
        best = ["--eval_strategy=epoch", "--save_strategy=epoch", "--load_best_model_at_end=true"]
        assert "pass --eval_knn true" in fails(folder, *best, "--metric_for_best_model=eval_knn_accuracy")
        err = fails(folder, *best, "--eval_knn=true", "--metric_for_best_model=eval_knn_accuracy_colour")
        assert "knn_accuracy_label" in err

    def test_stream(self):
        data = splits()
        data.train = object.__new__(ImageStream)
        with pytest.raises(ValueError, match="leave out --streaming"):
            OnlineEvaluation(data, processor(), knn=True, linear=False)


def test_no_picture_is_read_before_the_first_evaluation(monkeypatch):
    read = []
    stock = ImageDataset.__getitem__
    monkeypatch.setattr(ImageDataset, "__getitem__", lambda data, index: read.append(index) or stock(data, index))
    evaluation = OnlineEvaluation(splits(), processor(), knn=True, linear=False)
    assert read == []
    evaluation(hf_mim.PiLaMIMModel(tiny_config()).eval())
    assert len(read) == 36
    # Only to leave out broken ones they are all looked at first.
    OnlineEvaluation(splits(), processor(), knn=True, linear=False, skip_broken=True)
    assert len(read) == 72
