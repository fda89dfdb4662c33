"""The baseline: transformers' ViTMAE under our trainer, and stock again on disk."""

import json

import pytest
import torch
import transformers
from transformers import AutoConfig, AutoModel, ViTModel

import hf_mim
from hf_mim.evaluation.encoders import load_encoder, untrained_encoder
from hf_mim.jobs.pretraining import main
from hf_mim.models.vit.encoders import encoder_from
from hf_mim.models.vit_mae.configuration_vit_mae import ViTMAEConfig
from hf_mim.models.vit_mae.modeling_vit_mae import ViTMAEForPreTraining, ViTMAEModel
from hf_mim.registry import method_class
from hf_mim.training.trainer import MIMTrainer
from tiny import scrambled, slow_position_table
from tiny_training import FLAGS, RUN_MIM, SIZES, losses, run, tiny_config, write_pictures

# Of tiny_training's flags, with sizes that differ from every default.
SIZES = SIZES | {"num_channels": 3}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_pictures(tmp_path_factory.mktemp("pictures"), 22)


def build(**fields) -> ViTMAEForPreTraining:
    torch.manual_seed(0)
    return ViTMAEForPreTraining(ViTMAEConfig(**(SIZES | fields))).eval()


def stock_model(**fields) -> transformers.ViTMAEForPreTraining:
    """As a checkpoint that people have: stock code, trained weights, MAE's tables."""
    torch.manual_seed(1)
    config = ViTMAEConfig(**(SIZES | fields)).to_dict()
    model = scrambled(transformers.ViTMAEForPreTraining(transformers.ViTMAEConfig(**config))).eval()
    model.vit.embeddings.position_embeddings.data = slow_position_table(4, 4, 32)
    model.decoder.decoder_pos_embed.data = slow_position_table(4, 4, 16)
    return model


def batch(channels: int = 3):
    generator = torch.Generator().manual_seed(2)
    return {
        "pixel_values": torch.randn(3, channels, 16, 16, generator=generator),
        "noise": torch.rand(3, 16, generator=generator),
    }


def tables(model) -> tuple[torch.Tensor, torch.Tensor]:
    return model.vit.embeddings.position_embeddings, model.decoder.decoder_pos_embed


def assert_tables(model) -> None:
    for table, dim in zip(tables(model), (32, 16), strict=True):
        torch.testing.assert_close(table.detach().cpu(), slow_position_table(4, 4, dim), rtol=0, atol=1e-6)
        assert not table.requires_grad


class TestModel:
    @pytest.mark.parametrize("fields", [{}, {"norm_pix_loss": True, "qkv_bias": False, "mask_ratio": 0.5}])
    def test_loss_and_gradients_are_the_stock_ones(self, fields):
        stock = stock_model(**fields)
        model = build(**fields)
        model.load_state_dict(stock.state_dict())
        expected, actual = stock(**batch()), model(**batch())
        assert actual.loss.item() == actual.loss_pixel.item() == expected.loss.item()
        assert torch.equal(actual.logits, expected.logits) and torch.equal(actual.mask, expected.mask)
        expected.loss.backward()
        actual.loss.backward()
        gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
        stock_gradients = {name: p.grad for name, p in stock.named_parameters() if p.requires_grad}
        assert gradients.keys() == stock_gradients.keys()
        assert all(torch.equal(gradients[name], value) for name, value in stock_gradients.items())

    def test_stock_tables_are_zero_and_ours_are_not(self):
        """When transformers mends its tables the subclass can lose its own."""
        stock = transformers.ViTMAEForPreTraining(transformers.ViTMAEConfig(**SIZES))
        assert all(not table.any() for table in tables(stock))
        assert_tables(build())

    def test_initial_values(self):
        model = build()
        for name, weight in model.named_parameters():
            if name.endswith("bias"):
                assert not weight.any(), name
            elif "layernorm" in name or "decoder_norm" in name:
                assert (weight == 1).all(), name
            elif weight.ndim in (2, 4):
                maps = 3 if name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight")) else 1
                bound = (6 / (maps * weight.shape[0] + weight[0].numel())) ** 0.5
                assert 0.8 * bound < weight.abs().max() <= bound, name
        for token in (model.vit.embeddings.cls_token, model.decoder.mask_token):
            assert 0.005 < token.std() < 0.04

    def test_tables_through_saving_and_meta(self, tmp_path):
        build().save_pretrained(tmp_path)
        assert_tables(ViTMAEForPreTraining.from_pretrained(tmp_path))
        build().vit.save_pretrained(tmp_path / "encoder")
        with pytest.raises(ValueError, match="no weights for decoder"):
            ViTMAEForPreTraining.from_pretrained(tmp_path / "encoder")
        assert_tables(ViTMAEForPreTraining.from_pretrained(tmp_path / "encoder", initialize_missing=True))
        with torch.device("meta"):
            model = ViTMAEForPreTraining(ViTMAEConfig(**SIZES))
        assert all(table.device.type == "meta" and not table.requires_grad for table in tables(model))

    def test_without_noise_the_encoder_sees_all_in_order(self):
        model = scrambled(build())
        pixel_values = batch()["pixel_values"]
        with torch.no_grad():
            features = model.encoder(pixel_values).last_hidden_state
            expected = encoder_from(stock_from(model).vit)(pixel_values).last_hidden_state
            assert features.shape == (3, 17, 32)
            torch.testing.assert_close(features, expected, rtol=0, atol=1e-5)
            # In training mode too.
            assert torch.equal(model.train().encoder(pixel_values).last_hidden_state, features)
            assert model.encoder(**batch()).last_hidden_state.shape == (3, 5, 32)

    def test_forward_without_noise_still_masks(self):
        torch.manual_seed(0)
        outputs = build()(batch()["pixel_values"])
        assert outputs.mask.sum(dim=1).tolist() == [12.0] * 3 and torch.isfinite(outputs.loss)

    def test_stock_loads_ours_and_ours_stock(self, tmp_path):
        ours = scrambled(build())
        for table, dim in zip(tables(ours), (32, 16), strict=True):
            table.data = slow_position_table(4, 4, dim)
        ours.save_pretrained(tmp_path / "ours")
        stock, info = transformers.ViTMAEForPreTraining.from_pretrained(tmp_path / "ours", output_loading_info=True)
        assert not info["missing_keys"] and not info["unexpected_keys"]
        assert type(stock.config) is transformers.ViTMAEConfig and stock.config.layer_norm_eps == 1e-6
        assert stock(**batch()).loss.item() == ours(**batch()).loss.item()
        stock = stock_model()
        stock.save_pretrained(tmp_path / "stock")
        loaded = ViTMAEForPreTraining.from_pretrained(tmp_path / "stock")
        assert loaded(**batch()).loss.item() == stock(**batch()).loss.item()
        assert_tables(loaded)

    def test_plain_transformers_reads_what_is_saved(self, fork, tmp_path):
        build().save_pretrained(tmp_path)
        code = (
            "import sys; from transformers import AutoModel, AutoModelForPreTraining\n"
            f"print(type(AutoModel.from_pretrained({str(tmp_path)!r})).__name__)\n"
            f"model = AutoModelForPreTraining.from_pretrained({str(tmp_path)!r})\n"
            "print(type(model).__name__, type(model).__module__.split('.')[0], 'hf_mim' in sys.modules)"
        )
        assert fork(code).split() == ["ViTMAEModel", "ViTMAEForPreTraining", "transformers", "False"]

    def test_auto_classes_stay_stock(self, tmp_path):
        build().save_pretrained(tmp_path)
        assert type(AutoModel.from_pretrained(tmp_path)) is transformers.ViTMAEModel
        assert type(AutoConfig.from_pretrained(tmp_path)) is transformers.ViTMAEConfig
        assert method_class("vit_mae", "Model") is ViTMAEModel
        with pytest.raises(ValueError, match="vit_mae"):
            method_class("vit_mae", "ForImageClassification")

    def test_exports(self, tmp_path):
        model = scrambled(build())
        pixel_values = batch()["pixel_values"]
        model.save_pretrained(tmp_path)
        with torch.no_grad():
            expected = model.encoder(pixel_values).last_hidden_state
            for source in (model, model.encoder, AutoModel.from_pretrained(tmp_path), stock_from(model)):
                exported = hf_mim.to_vit(source)
                assert type(exported) is ViTModel
                outputs = exported(pixel_values)
                torch.testing.assert_close(outputs.last_hidden_state, expected, rtol=0, atol=1e-5)
                torch.testing.assert_close(outputs.pooler_output, expected[:, 0], rtol=0, atol=1e-5)

    def test_reconstruction_of_normalised_pixels(self):
        """A model that predicted its targets would give the picture back."""
        model = build(norm_pix_loss=True)
        pixel_values, noise = batch().values()
        target = model.patchify(pixel_values)
        target = (target - target.mean(-1, keepdim=True)) / (target.var(-1, keepdim=True) + 1e-6).sqrt()
        model.decoder.forward = lambda *args, **kwargs: transformers.utils.ModelOutput(logits=target)
        mask, pixels = model.reconstruct(pixel_values, noise)
        torch.testing.assert_close(pixels, pixel_values, rtol=0, atol=1e-5)
        hidden = (noise.argsort(1).argsort(1) >= 4).float().reshape(3, 1, 4, 4)
        assert torch.equal(mask[:, :, ::4, ::4], hidden) and torch.equal(mask[:, :, 3::4, 3::4], hidden)

    @pytest.mark.parametrize(
        ("fields", "message"),
        [
            ({"image_size": (16, 32)}, "16 x 32.*squares"),
            ({"patch_size": [4, 2]}, "4 x 2.*squares"),
            ({"image_size": 18}, "18.*not divisible"),
            ({"mask_ratio": 1.5}, "mask_ratio is 1.5"),
            ({"decoder_num_attention_heads": 3}, "decoder_num_attention_heads is 3"),
            ({"hidden_size": 30}, "multiple of 4"),
        ],
    )
    def test_what_does_not_fit(self, fields, message):
        with pytest.raises(Exception, match=message):
            ViTMAEConfig(**(SIZES | fields))
        with pytest.raises(ValueError, match="noise has the shape"):
            build()(batch()["pixel_values"], noise=torch.zeros(3, 15))


def stock_from(model) -> transformers.ViTMAEForPreTraining:
    stock = transformers.ViTMAEForPreTraining(transformers.ViTMAEConfig(**model.config.to_dict())).eval()
    stock.load_state_dict(model.state_dict())
    return stock


def pretrain(folder, out, *flags: str, common=FLAGS) -> int:
    common = [*common, "--model_type=vit_mae", "--max_steps=6", "--dataloader_persistent_workers=false"]
    return main([*common, f"--train_dir={folder}", f"--output_dir={out}", *flags])


class TestTraining:
    def test_from_first_flag_to_last_file(self, folder, tmp_path, capsys):
        assert pretrain(folder, tmp_path, "--eval_strategy=steps", "--eval_steps=3") == 0
        out = capsys.readouterr().out
        assert out.startswith("MAE: 0.0 M parameters in the encoder") or "\nMAE: " in out
        assert (tmp_path / "reconstructions" / "step-6.png").is_file()
        results = json.loads((tmp_path / "features.json").read_text())
        assert "trained, [CLS]" in results["features"]
        card = (tmp_path / "README.md").read_text()
        assert "ViTMAE" in card and "He et al." in card and "to_vit(AutoModel" in card
        history = json.loads((tmp_path / "trainer_state.json").read_text())["log_history"]
        assert all(log["loss_pixel"] == pytest.approx(log["loss"], rel=1e-5) for log in history if "loss" in log)
        assert_tables(transformers.ViTMAEForPreTraining.from_pretrained(tmp_path).requires_grad_(False))

    def test_features_are_those_of_the_whole_picture(self, folder, tmp_path, monkeypatch):
        assert pretrain(folder, tmp_path, "--max_steps=2") == 0
        encoder = load_encoder(str(tmp_path))
        assert untrained_encoder(encoder).tokens(batch()["pixel_values"])[0].shape == (3, 17, 32)
        network = ViTMAEForPreTraining.from_pretrained(tmp_path).encoder.eval()
        expected = network(batch()["pixel_values"]).last_hidden_state
        torch.testing.assert_close(encoder.tokens(batch()["pixel_values"])[0], expected)

    def test_resuming_equals_not_stopping(self, folder, tmp_path):
        assert pretrain(folder, tmp_path / "a", "--save_strategy=steps", "--save_steps=4", "--save_total_limit=9") == 0
        checkpoint = tmp_path / "a" / "checkpoint-4"
        assert pretrain(folder, tmp_path / "b", f"--resume_from_checkpoint={checkpoint}") == 0
        weights = [ViTMAEForPreTraining.from_pretrained(tmp_path / name).state_dict() for name in "ab"]
        assert all(torch.equal(weights[0][name], value) for name, value in weights[1].items())
        assert losses(tmp_path / "a") == losses(tmp_path / "b")

    def test_grey_pictures_and_presets(self, tmp_path):
        import numpy as np

        pictures = tmp_path / "pictures"
        pictures.mkdir()
        for index in range(12):
            np.save(pictures / f"{index}.npy", np.random.default_rng(index).random((28, 28), dtype=np.float32))
        flags = [flag for flag in FLAGS if not flag.startswith(("--image_size", "--patch_size", "--config_over"))]
        flags += ["--preset=tiny", "--image_size=28", "--num_channels=1", "--max_steps=2"]
        assert pretrain(pictures, tmp_path / "out", *flags[-4:], common=flags) == 0
        config = AutoConfig.from_pretrained(tmp_path / "out")
        assert (config.image_size, config.patch_size, config.num_channels, config.intermediate_size) == (28, 4, 1, 512)
        assert config.decoder_intermediate_size == 256

    def test_rectangles_are_refused_before_training(self, folder, tmp_path, capsys):
        assert pretrain(folder, tmp_path, "--image_size", "16", "32") == 1
        assert "squares only" in capsys.readouterr().err

    @pytest.mark.parametrize("kind", ["stock", "ours", "pilamim", "vit"])
    def test_continuing(self, folder, tmp_path, monkeypatch, kind):
        source = {
            "stock": stock_model,
            "ours": lambda: scrambled(build()),
            "pilamim": lambda: scrambled(hf_mim.PiLaMIMForPreTraining(tiny_config())),
            "vit": lambda: scrambled(ViTModel(transformers.ViTConfig(**encoder_sizes()))),
        }[kind]().eval()
        source.save_pretrained(tmp_path / "source")
        begun = {}

        def record(trainer, *args, **kwargs):
            begun["model"] = trainer.model
            raise KeyboardInterrupt

        monkeypatch.setattr(MIMTrainer, "train", record)
        flags = [flag for flag in FLAGS if not flag.startswith(("--config_overrides", "--image_size", "--patch_size"))]
        flags.append("--config_overrides=decoder_hidden_size=16,decoder_num_hidden_layers=1")
        if kind in ("stock", "ours"):
            flags.pop()
        assert pretrain(folder, tmp_path / "out", f"--model_name_or_path={tmp_path / 'source'}", common=flags) == 130
        model = begun["model"]
        pixel_values = batch()["pixel_values"]
        with torch.no_grad():
            encoder = source if kind == "vit" else hf_mim.to_vit(source)
            expected = encoder(pixel_values).last_hidden_state
            torch.testing.assert_close(model.encoder(pixel_values).last_hidden_state, expected, rtol=0, atol=1e-5)
        assert not any(table.requires_grad for table in tables(model))
        if kind in ("stock", "ours"):
            assert torch.equal(model.decoder.decoder_pred.weight, source.decoder.decoder_pred.weight)
        assert not hasattr(model.config, "pooling")

    @pytest.mark.slow
    def test_two_processes_equal_one(self, folder, tmp_path):
        flags = [*FLAGS, "--model_type=vit_mae", "--max_steps=4", f"--train_dir={folder}", "--bf16=false"]
        one = run([RUN_MIM, *flags, "--per_device_train_batch_size=4", f"--output_dir={tmp_path / 'one'}"])
        assert one.returncode == 0, one.stderr
        torchrun = ["-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port=0", "--standalone"]
        flags = [*flags, "--per_device_train_batch_size=2", f"--output_dir={tmp_path / 'two'}"]
        two = run([*torchrun, RUN_MIM, *flags])
        assert two.returncode == 0, two.stderr
        for (_, a), (_, b) in zip(losses(tmp_path / "one"), losses(tmp_path / "two"), strict=True):
            assert a == pytest.approx(b, abs=1e-5)


def encoder_sizes() -> dict:
    return {name: value for name, value in SIZES.items() if not name.startswith("decoder")} | {
        "intermediate_size": 128
    }
