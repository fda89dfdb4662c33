"""`examples/run_mim.py` from the first flag to the last file, in its own process where signals or exits matter."""

import json
import os
import shutil
import signal

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoImageProcessor, AutoModel, ViTConfig, ViTMAEConfig, ViTMAEForPreTraining, ViTModel

import hf_mim
from hf_mim.data.image_processing import build_image_processor
from hf_mim.jobs.pretraining import main
from hf_mim.models.vit.encoders import encoder_from
from hf_mim.models.vit.position import sincos_position_table
from hf_mim.training.arguments import supports_bf16
from hf_mim.training.trainer import MIMTrainer
from tiny_training import (
    FLAGS,
    FORCED_BF16,
    RUN_MIM,
    losses,
    run,
    started,
    tiny_config,
    write_pictures,
)

VIT = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_pictures(tmp_path_factory.mktemp("pictures"), 22)


def pretrain(folder, out, *flags: str) -> int:
    common = ["--num_train_epochs=2", "--dataloader_persistent_workers=false"]
    return main([*FLAGS, *common, f"--train_dir={folder}", f"--output_dir={out}", *flags])


class TestProcess:
    def test_mistake_is_one_line_and_status_1(self, processes):
        result = processes([RUN_MIM, "--learning_rat=1"])
        assert result.returncode == 1 and result.stdout == ""
        assert (
            result.stderr.strip()
            == "Error: There is no flag --learning_rat=1. Run the script with --help for all flags."
        )

    def test_bug_keeps_its_stack(self, tmp_path, processes):
        script = tmp_path / "broken.py"
        script.write_text(
            "import sys, torch\n"
            "from hf_mim.jobs import pretraining\n"
            "pretraining.build_model = lambda *args: torch.zeros(2) + torch.zeros(3)\n"
            "sys.exit(pretraining.main())\n"
        )
        pictures = write_pictures(tmp_path / "pictures", 8)
        result = processes([str(script), *FLAGS, f"--train_dir={pictures}", f"--output_dir={tmp_path / 'out'}"])
        assert result.returncode == 1
        assert "Traceback" in result.stderr and "size of tensor a" in result.stderr

    @pytest.mark.parametrize(
        "number", [signal.SIGINT, *(pytest.param(n, marks=pytest.mark.slow) for n in (signal.SIGTERM, signal.SIGUSR1))]
    )
    def test_interrupted_and_run_again(self, folder, tmp_path, number, processes):
        """The checkpoint is written in the middle of an epoch, and the run ends as one that was not interrupted."""
        flags = [
            *FLAGS,
            "--num_train_epochs=20",
            "--save_strategy=no",
            "--eval_strategy=no",
            "--references=false",
            # Torch takes 5 seconds to end each worker that was kept.
            "--dataloader_persistent_workers=false",
            f"--train_dir={folder}",
        ]
        first = [*flags, "--dataloader_num_workers=2", f"--output_dir={tmp_path / 'broken'}"]
        with started([RUN_MIM, *first]) as process:
            for line in process.stdout:
                if ", epoch 1.60: " in line:
                    break
            if number == signal.SIGINT:  # as a terminal does, to all processes of the group, loading ones too
                os.killpg(process.pid, number)
            else:
                process.send_signal(number)
            out, err = process.communicate(timeout=120)
        assert process.returncode == 130, err
        assert out.count("Interrupted: finishing the step and saving") == 1
        assert "the same command goes on from there" in out and "Traceback" not in err
        (checkpoint,) = (tmp_path / "broken").glob("checkpoint-*")
        step = int(checkpoint.name.split("-")[1])
        assert 8 <= step < 100
        assert not (tmp_path / "broken" / "model.safetensors").exists()
        result = processes([RUN_MIM, *first])
        assert result.returncode == 0 and f"Resuming from {checkpoint}" in result.stdout, result.stderr
        # A process too: the bits depend on the number of threads.
        assert processes([RUN_MIM, *flags, f"--output_dir={tmp_path / 'unbroken'}"]).returncode == 0
        broken, unbroken = (load_file(tmp_path / name / "model.safetensors") for name in ("broken", "unbroken"))
        assert all(torch.equal(broken[name], value) for name, value in unbroken.items())
        assert losses(tmp_path / "broken") == losses(tmp_path / "unbroken")


class TestRun:
    def test_writes_what_it_says(self, folder, tmp_path, capsys):
        assert pretrain(folder, tmp_path, "--eval_strategy=epoch") == 0
        out = capsys.readouterr().out
        for name in (
            "config.json",
            "model.safetensors",
            "preprocessor_config.json",
            "loss_curves.png",
            "features.json",
        ):
            assert (tmp_path / name).is_file(), name
        assert (tmp_path / "reconstructions" / "step-10.png").is_file()
        bf16 = supports_bf16(use_cpu=True) if FORCED_BF16 is None else FORCED_BF16
        assert f", {'bfloat16' if bf16 else 'float32'} on cpu" in out
        assert "effective batch 4" in out and str(tmp_path / "loss_curves.png") in out
        encoder = AutoModel.from_pretrained(tmp_path)
        assert encoder(torch.zeros(1, 3, 16, 16)).pooler_output.shape == (1, 32)
        history = json.loads((tmp_path / "trainer_state.json").read_text())["log_history"]
        assert all(
            f"eval_{name}" in log for log in history if "eval_loss" in log for name in ("loss_pixel", "loss_cls")
        )
        assert sum("eval_loss" in log for log in history) == 2

    def test_finished_run_is_only_evaluated(self, folder, tmp_path, monkeypatch, capsys):
        assert pretrain(folder, tmp_path, "--max_steps=7") == 0
        weights = (tmp_path / "model.safetensors").read_bytes()
        (tmp_path / "features.json").unlink()

        def step(*args, **kwargs):
            raise AssertionError("a step was trained")

        monkeypatch.setattr(MIMTrainer, "training_step", step)
        assert pretrain(folder, tmp_path, "--max_steps=7") == 0
        assert (tmp_path / "features.json").is_file()
        assert (tmp_path / "model.safetensors").read_bytes() == weights
        assert len(losses(tmp_path)) == 7

    def test_from_zero_though_there_is_a_checkpoint(self, folder, tmp_path):
        pretrain(folder, tmp_path / "a", "--max_steps=6")
        first = losses(tmp_path / "a")
        assert pretrain(folder, tmp_path / "a", "--max_steps=6", "--resume_from_checkpoint=false") == 0
        assert losses(tmp_path / "a") == first

    def test_without_references(self, folder, tmp_path):
        assert pretrain(folder, tmp_path, "--references=false") == 0
        assert list(json.loads((tmp_path / "features.json").read_text())["features"]) == [
            "trained, [CLS]",
            "trained, mean",
        ]

    def test_bfloat16(self, folder, tmp_path, capsys):
        assert pretrain(folder, tmp_path, "--bf16=true") == 0
        assert "bfloat16 on cpu" in capsys.readouterr().out
        assert {value.dtype for value in load_file(tmp_path / "model.safetensors").values()} == {torch.float32}

    def test_loss_that_is_not_finite(self, folder, tmp_path, capsys):
        flags = [
            "--learning_rate=1e30",
            "--warmup_steps=3",
            "--save_strategy=steps",
            "--save_steps=1",
            "--max_steps=8",
        ]
        assert pretrain(folder, tmp_path, *flags) == 1
        err = capsys.readouterr().err
        (line,) = [line for line in err.splitlines() if line.startswith("Error: ")]
        assert "is not finite" in line and "Traceback" not in err
        kept = sorted(tmp_path.glob("checkpoint-*"))[-1]
        assert f"The last good checkpoint is {kept}." in line
        model = hf_mim.PiLaMIMForPreTraining.from_pretrained(kept)
        assert all(value.isfinite().all() for value in model.state_dict().values())
        assert not (tmp_path / "model.safetensors").exists()

    def test_saved_processor_reads_16_bits_as_training_did(self, tmp_path):
        (tmp_path / "deep").mkdir()
        values = np.random.default_rng(0).integers(0, 65536, (12, 16, 16), dtype=np.uint16)
        for number, picture in enumerate(values):
            Image.fromarray(picture).save(tmp_path / "deep" / f"{number}.png")
        assert pretrain(tmp_path / "deep", tmp_path / "out", "--num_train_epochs=1") == 0
        processor = AutoImageProcessor.from_pretrained(tmp_path / "out")
        found = processor(Image.open(tmp_path / "deep" / "0.png"), return_tensors="pt")["pixel_values"][0]
        mean, std = (torch.tensor(getattr(processor, name))[:, None, None] for name in ("image_mean", "image_std"))
        torch.testing.assert_close(found, (torch.from_numpy(values[0] / 65535).float() - mean) / std)

    def test_rectangles_of_one_channel(self, tmp_path):
        pictures = tmp_path / "pictures"
        pictures.mkdir()
        for index in range(12):
            np.save(pictures / f"{index}.npy", np.random.default_rng(index).random((20, 30), dtype=np.float32))
        flags = ["--image_size", "16", "32", "--patch_size", "4", "8", "--num_channels=1", "--max_steps=2"]
        assert pretrain(pictures, tmp_path / "out", *flags) == 0
        assert AutoModel.from_pretrained(tmp_path / "out")(torch.zeros(1, 1, 16, 32)).last_hidden_state.shape[1] == 17


class TestBrokenPictures:
    @pytest.fixture
    def damaged(self, folder, tmp_path):
        shutil.copytree(folder, tmp_path / "damaged")
        for name in ("005.npy", "011.npy"):
            path = tmp_path / "damaged" / name
            path.write_bytes(path.read_bytes()[:200])
        return tmp_path / "damaged"

    @pytest.mark.parametrize("workers", [0, 1])
    def test_are_named(self, damaged, tmp_path, capsys, workers):
        assert pretrain(damaged, tmp_path / "out", f"--dataloader_num_workers={workers}") == 1
        err = capsys.readouterr().err
        (line,) = [line for line in err.splitlines() if line.startswith("Error: ")]
        assert str(damaged / "005.npy") in line or str(damaged / "011.npy") in line
        assert "Traceback" not in err

    @pytest.mark.parametrize("workers", [0, 2])
    def test_are_skipped_and_counted(self, damaged, tmp_path, capsys, workers):
        flags = ["--skip_broken_images", f"--dataloader_num_workers={workers}", "--num_train_epochs=3"]
        assert pretrain(damaged, tmp_path / "out", *flags) == 0
        assert "Skipped 2 broken pictures" in capsys.readouterr().out
        assert len(losses(tmp_path / "out")) == 15


class TestStreaming:
    def test_needs_max_steps(self, tmp_path, capsys):
        flags = [*FLAGS, "--streaming", f"--dataset_name={tmp_path}", f"--output_dir={tmp_path / 'out'}"]
        assert main(flags) == 1
        assert "give --max_steps" in capsys.readouterr().err
        assert not (tmp_path / "out").exists()


def save_pretraining(folder):
    model = hf_mim.PiLaMIMForPreTraining(tiny_config(decoder_hidden_size=24))
    model.save_pretrained(folder)
    return model.encoder


def save_encoder(folder):
    model = hf_mim.PiLaMIMModel(tiny_config(intermediate_size=48))
    model.save_pretrained(folder)
    return model


def save_vit(folder):
    model = ViTModel(ViTConfig(image_size=16, patch_size=4, **VIT))
    torch.nn.init.normal_(model.embeddings.position_embeddings)
    model.save_pretrained(folder)
    return encoder_from(model)


def save_vit_mae(folder):
    sizes = {"decoder_hidden_size": 16, "decoder_num_hidden_layers": 1, "decoder_num_attention_heads": 2}
    model = ViTMAEForPreTraining(
        ViTMAEConfig(image_size=16, patch_size=4, decoder_intermediate_size=32, **VIT, **sizes)
    )
    # transformers 5.23 leaves zeros, where the checkpoints that people have hold MAE's table.
    model.vit.embeddings.position_embeddings.data = sincos_position_table(4, 4, 32)
    model.save_pretrained(folder)
    return encoder_from(model.vit)


class TestContinuing:
    @pytest.mark.parametrize(
        ("save", "new"),
        [
            (save_pretraining, []),
            (save_encoder, ["pixel_decoder", "latent_decoder"]),
            (save_vit, ["pixel_decoder", "latent_decoder"]),
            (save_vit_mae, ["pixel_decoder", "latent_decoder"]),
        ],
    )
    def test_begins_with_the_weights(self, folder, tmp_path, monkeypatch, caplog, capfd, save, new):
        torch.manual_seed(3)
        source = save(tmp_path / "source").state_dict()
        begun = {}
        train = MIMTrainer.train

        def recording(trainer, *args, **kwargs):
            begun.update({name: value.clone() for name, value in trainer.model.state_dict().items()})
            return train(trainer, *args, **kwargs)

        monkeypatch.setattr(MIMTrainer, "train", recording)
        flags = [flag for flag in FLAGS if not flag.startswith(("--config_overrides", "--image_size", "--patch_size"))]
        out = ["--max_steps=2", f"--train_dir={folder}", f"--output_dir={tmp_path / 'out'}"]
        assert main([*flags, f"--model_name_or_path={tmp_path / 'source'}", *out]) == 0
        assert len(losses(tmp_path / "out")) == 2
        encoder = {
            name.removeprefix("encoder."): value for name, value in begun.items() if name.startswith("encoder.")
        }
        assert encoder.keys() == source.keys()
        assert all(torch.equal(value, source[name]) for name, value in encoder.items())
        if new:
            assert all(torch.equal(begun[f"target_encoder.{name}"], value) for name, value in source.items())
        said = caplog.text + "".join(capfd.readouterr())
        assert ("starts as a copy of the encoder" in said) is bool(new)
        assert all(name in said for name in new)

    def test_normalises_as_before_and_in_float32(self, folder, tmp_path, monkeypatch):
        hf_mim.PiLaMIMForPreTraining(tiny_config()).to(torch.bfloat16).save_pretrained(tmp_path / "source")
        build_image_processor((16, 16), 3, [0.1, 0.2, 0.3], [0.5] * 3).save_pretrained(tmp_path / "source")
        flags = [f"--model_name_or_path={tmp_path / 'source'}", "--max_steps=1"]
        assert pretrain(folder, tmp_path / "out", *flags) == 0
        settings = json.loads((tmp_path / "out" / "preprocessor_config.json").read_text())
        assert settings["image_mean"] == [0.1, 0.2, 0.3] and settings["image_std"] == [0.5] * 3
        weights = load_file(tmp_path / "out" / "model.safetensors")
        assert {value.dtype for value in weights.values()} == {torch.float32}

    def test_wrong_size(self, folder, tmp_path, capsys):
        save_vit(tmp_path / "source")
        assert pretrain(folder, tmp_path / "out", f"--model_name_or_path={tmp_path / 'source'}", "--patch_size=8") == 1
        assert "patch_size: (8, 8) is asked for" in capsys.readouterr().err

    def test_decoders_of_other_sizes(self, folder, tmp_path, capsys):
        save_pretraining(tmp_path / "source")
        flags = [f"--model_name_or_path={tmp_path / 'source'}", "--config_overrides=decoder_hidden_size=32"]
        kept = [flag for flag in FLAGS if not flag.startswith("--config_overrides")]
        assert main([*kept, *flags, f"--train_dir={folder}", f"--output_dir={tmp_path / 'out'}"]) == 1
        assert "decoder" in capsys.readouterr().err

    def test_other_kinds_of_models(self, folder, tmp_path, capsys):
        from transformers import SwinConfig, SwinModel

        SwinModel(SwinConfig(image_size=32, embed_dim=8, depths=[1], num_heads=[2])).save_pretrained(tmp_path / "a")
        assert pretrain(folder, tmp_path / "out", f"--model_name_or_path={tmp_path / 'a'}") == 1
        assert "vit_mae" in capsys.readouterr().err


class TestTracking:
    def test_tensorboard(self, folder, tmp_path, monkeypatch):
        event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
        monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "board"))
        assert (
            pretrain(folder, tmp_path / "out", "--report_to=tensorboard", "--eval_strategy=steps", "--eval_steps=4")
            == 0
        )
        events = event_accumulator.EventAccumulator(str(next((tmp_path / "board").rglob("events.*")).parent))
        events.Reload()
        scalars = events.Tags()["scalars"]
        for name in ("loss", "loss_pixel", "loss_latent", "loss_cls", "learning_rate"):
            written = [(event.step, event.value) for event in events.Scalars(f"train/{name}")]
            if name != "learning_rate":
                wanted = losses(tmp_path / "out", name)
                assert written == [(step, pytest.approx(value, rel=1e-5)) for step, value in wanted]
        assert {"eval/loss", "eval/loss_pixel", "eval/loss_latent", "eval/loss_cls"} <= set(scalars)
        assert "reconstructions" in events.Tags()["images"]
        assert [event.step for event in events.Images("reconstructions")] == [4, 8, 10]

    @pytest.mark.slow
    def test_trackio(self, folder, tmp_path):
        pytest.importorskip("trackio")
        script = [RUN_MIM, *FLAGS, "--num_train_epochs=2", f"--train_dir={folder}", f"--output_dir={tmp_path / 'out'}"]
        os.environ["TRACKIO_DIR"] = str(tmp_path / "trackio")
        try:
            result = run([*script, "--report_to=trackio", "--project=tiny"])
        finally:
            del os.environ["TRACKIO_DIR"]
        assert result.returncode == 0, result.stderr
        assert list((tmp_path / "trackio").rglob("*.db")) and list((tmp_path / "trackio").rglob("*.png"))
