"""I-JEPA: the release's numbers, blocks by noise, and transformers' own model once it is saved."""

import json
import logging
import subprocess
import sys

import pytest
import torch
import transformers

import hf_mim
from golden import Golden, block_grad_norms
from hf_mim.evaluation.encoders import load_encoder
from hf_mim.jobs import finetuning, pretraining
from hf_mim.models.ijepa.blocks import Blocks, draw_blocks
from hf_mim.models.ijepa.configuration_ijepa import IJepaConfig
from hf_mim.models.ijepa.modeling_ijepa import IJepaForPreTraining, IJepaModel
from tiny import scrambled, slow_position_table, tiny_batch, tiny_config, tiny_model
from tiny_training import FORCED_BF16, RUN_MIM, environment, losses, run, write_pictures

# Small, and other than every default; grids of 4 x 4 patches.
FLAGS = [
    "--model_type=ijepa",
    "--image_size=16",
    "--patch_size=4",
    "--config_overrides=hidden_size=32,num_hidden_layers=2,num_attention_heads=2,predictor_hidden_size=16,"
    "predictor_num_hidden_layers=1",
    "--per_device_train_batch_size=4",
    "--use_cpu",
    "--report_to=none",
    "--logging_steps=1",
    "--disable_tqdm=true",
    *([] if FORCED_BF16 is None else [f"--bf16={FORCED_BF16}"]),
]


@pytest.fixture(scope="module")
def golden():
    return Golden("ijepa")


def original(golden):
    return hf_mim.from_original(golden.state, "ijepa", config=golden.config)


class TestGolden:
    def test_loss_predictions_and_gradients(self, golden):
        model = original(golden).train()
        outputs = model(**golden.input)
        golden.assert_numbers(outputs)
        assert outputs.loss.item() == outputs.loss_latent.item()
        golden.assert_tensor("prediction", outputs.predicted_latents.permute(1, 2, 0, 3, 4).flatten(0, 2))
        golden.assert_tensor("target", outputs.target_latents.transpose(0, 1).flatten(0, 1))
        outputs.loss.backward()
        norms = block_grad_norms(model.encoder.layers, "encoder.blocks")
        norms |= block_grad_norms(model.predictor.layers, "predictor.predictor_blocks")
        projection = model.encoder.embeddings.patch_embeddings.projection
        modules = {
            "encoder.patch_embed.proj": projection,
            "encoder.norm": model.encoder.layernorm,
            "predictor.predictor_embed": model.predictor.embed,
            "predictor.predictor_norm": model.predictor.layernorm,
            "predictor.predictor_proj": model.predictor.head,
        }
        norms |= {f"{n}.{k}": getattr(m, k).grad.norm().item() for n, m in modules.items() for k in ("weight", "bias")}
        norms["predictor.mask_token"] = model.predictor.mask_token.grad.norm().item()
        golden.assert_grad_norms(norms)

    @torch.no_grad()
    def test_encoders(self, golden):
        model = original(golden)
        pixel_values = golden.input["pixel_values"]
        ids_context = golden.input["ids_context"].transpose(0, 1).flatten(0, 1)
        golden.assert_tensor("context", model.encoder(pixel_values, ids_keep=ids_context).last_hidden_state)
        golden.assert_tensor("target_encoder_output", model.target_encoder(pixel_values).last_hidden_state)

    def test_sizes_are_read_off_the_weights(self, golden):
        heads = {name: golden.config[name] for name in ("num_attention_heads", "predictor_num_attention_heads")}
        model = hf_mim.from_original(golden.state, "ijepa", config=heads)
        golden.assert_numbers(model(**golden.input))


def test_several_context_blocks_each_predict_each_target(golden):
    model = original(golden)
    ids_context, ids_target = golden.input["ids_context"], golden.input["ids_target"]
    other = ids_context.flip(0) if len(ids_context) > 1 else ids_context
    pixel_values = golden.input["pixel_values"]
    with torch.no_grad():
        both = model(pixel_values, ids_context=torch.cat((ids_context, other), dim=1), ids_target=ids_target)
        alone = [model(pixel_values, ids_context=ids, ids_target=ids_target) for ids in (ids_context, other)]
    for i, outputs in enumerate(alone):
        torch.testing.assert_close(both.predicted_latents[:, :, [i]], outputs.predicted_latents, rtol=0, atol=1e-5)
    assert both.loss.item() == pytest.approx(sum(outputs.loss.item() for outputs in alone) / 2, rel=1e-5)


class TestBlocks:
    CONFIG = IJepaConfig(image_size=64, patch_size=8)

    def draws(self, number=64, config=CONFIG):
        noise = torch.rand(number, config.num_patches, generator=torch.Generator().manual_seed(0))
        return noise, *draw_blocks(noise, config, config.target_blocks.smallest)

    @pytest.mark.parametrize("grid", [(8, 8), (14, 14), (16, 16), (4, 12)])
    def test_sizes_are_of_the_range_and_smaller_than_the_grid(self, grid):
        for scale, ratio in (((0.15, 0.2), (0.75, 1.5)), ((0.85, 1.0), (1.0, 1.0))):
            rows, columns = Blocks(grid, scale, ratio).sizes(torch.arange(4096) / 4096)
            assert rows.min() >= 1 and columns.min() >= 1 and rows.max() < grid[0] and columns.max() < grid[1]
        rows, columns = Blocks((100, 100), (0.15, 0.2), (0.75, 1.5)).sizes(torch.tensor([0.0, 0.5, 1.0]))
        assert (rows * columns / 10000 - torch.tensor([0.15, 0.175, 0.2])).abs().max() < 0.004
        assert (rows / columns - torch.tensor([0.75, 1.125, 1.5])).abs().max() < 0.03

    def test_targets_are_of_rectangles_and_no_target_is_seen(self):
        _, ids_context, ids_target = self.draws()
        assert ids_context.shape == (64, 1, 16) and ids_target.shape == (64, 4, 9)
        for ids in (ids_context, ids_target):
            assert (ids.diff(dim=-1) > 0).all() and ids.min() >= 0 and ids.max() < 64
        rows, columns = ids_target // 8, ids_target % 8
        for places in (rows, columns):
            assert (places.amax(-1) - places.amin(-1)).max() <= 3
        overlap = (ids_context.flatten(1).unsqueeze(2) == ids_target.flatten(1).unsqueeze(1)).any(-1).sum(1)
        # Only where the targets leave too few.
        assert (overlap == 0).float().mean() > 0.85

    def test_every_place_is_seen_and_predicted(self):
        _, ids_context, ids_target = self.draws(2000)
        for ids in (ids_context, ids_target):
            assert ids.flatten().bincount(minlength=64).min() > 50

    def test_too_few_free_patches_free_the_last_targets(self):
        config = IJepaConfig(image_size=64, patch_size=8, mask_ratio=0.3)
        noise, ids_context, _ = self.draws(200, config)
        assert ids_context.shape == (200, 1, 44)
        draws = noise[:, :12] * 4096
        targets = config.target_blocks.masks((draws - draws.floor()).unflatten(1, (4, 3)))
        seen = torch.zeros(200, 64, dtype=torch.bool).scatter(1, ids_context[:, 0], True)
        draws = noise[:, 12:15] * 4096
        reach = config.context_blocks.masks((draws - draws.floor()).unsqueeze(1)) & (targets.sum(1, keepdim=True) == 1)
        seen, hidden = (reach & targets & part.unsqueeze(1) for part in (seen, ~seen))
        for first, last in ((0, 1), (1, 2), (2, 3)):
            freed = seen[:, first].any(1)
            assert freed.any() and not hidden[freed, last].any()

    def test_overlap_is_allowed_when_asked(self):
        config = IJepaConfig(image_size=64, patch_size=8, allow_overlap=True)
        _, ids_context, ids_target = self.draws(64, config)
        overlap = (ids_context.flatten(1).unsqueeze(2) == ids_target.flatten(1).unsqueeze(1)).any(-1).any(1)
        assert overlap.float().mean() > 0.9

    def test_a_picture_has_its_blocks_whatever_the_batch(self):
        noise, ids_context, ids_target = self.draws()
        one = draw_blocks(noise[5:6], self.CONFIG, 9)
        assert torch.equal(one[0], ids_context[5:6]) and torch.equal(one[1], ids_target[5:6])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"image_size": (24, 16)}, "3 x 4 patches; 1 context and 4 target blocks need 15"),
        ({"target_scale": (0.3, 0.2)}, "target_scale is .0.3, 0.2.; expected two numbers"),
        ({"predictor_num_attention_heads": 5}, "predictor_num_attention_heads is 5, which does not divide"),
        ({"predictor_hidden_size": 50}, "predictor_hidden_size is 50.*multiple of 4"),
        ({"ema_momentum_end": 0.9}, "ema_momentum is 0.996 and ema_momentum_end 0.9"),
        ({"num_target_blocks": 0}, "num_target_blocks is 0"),
        ({"mask_ratio": 1.0}, "mask_ratio is 1.0"),
        ({"use_cls_token": True}, "use_cls_token is True; I-JEPA has False only"),
        ({"position_embedding": "learned"}, "position_embedding is 'learned'; I-JEPA has 'sincos' only"),
    ],
)
def test_what_does_not_fit_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        IJepaForPreTraining(tiny_config("ijepa", **fields))


class TestModel:
    def test_shapes_losses_and_gradients(self):
        model = tiny_model("ijepa", "ForPreTraining").train()
        batch = tiny_batch(model.config)
        outputs = model(**batch)
        assert outputs.ids_context.shape == (3, 1, 12) and outputs.mask.sum(1).tolist() == [36.0] * 3
        assert outputs.predicted_latents.shape[:3] == (3, 4, 1)
        assert outputs.target_latents.mean(-1).abs().max() < 1e-5
        given = model(batch["pixel_values"], ids_context=outputs.ids_context, ids_target=outputs.ids_target)
        assert torch.equal(given.loss, outputs.loss)
        outputs.loss.backward()
        for name, parameter in model.named_parameters():
            assert (parameter.grad is None) == name.startswith("target_encoder."), name
        with pytest.raises(ValueError, match="ids_target has the shape .3, 4.; expected .batch_size, blocks, patches"):
            model(**batch, ids_target=torch.zeros(3, 4, dtype=torch.long))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            rounded = model(**batch)
        assert rounded.loss.dtype == torch.float32
        assert rounded.loss.item() == pytest.approx(outputs.loss.item(), rel=0.02)

    def test_target_follows_and_starts_equal(self):
        model = tiny_model("ijepa", "ForPreTraining", scramble=False)
        target, encoder = model.target_encoder.state_dict(), model.encoder.state_dict()
        assert all(torch.equal(value, target[name]) for name, value in encoder.items())
        with torch.no_grad():
            model.encoder.layernorm.weight.fill_(3.0)
        model.after_optimizer_step(0, 10)
        torch.testing.assert_close(model.target_encoder.layernorm.weight, torch.full((32,), 1.0 + 2 * 0.004))

    def test_initial_values(self):
        model = tiny_model("ijepa", "ForPreTraining", scramble=False, hidden_size=256, predictor_hidden_size=256)
        for name, weight in model.named_parameters():
            if "layernorm" in name or name.endswith("bias"):
                assert set(weight.unique().tolist()) == {1.0 if name.endswith("weight") else 0.0}, name
            elif weight.numel() > 5000:
                assert weight.std().item() == pytest.approx(0.02, rel=0.05), name
        for table, dim in ((model.encoder.embeddings, 256), (model.predictor, 256)):
            expected = slow_position_table(4, 12, dim)[:, 1:]
            torch.testing.assert_close(table.position_embeddings, expected, rtol=0, atol=1e-6)

    def test_saving_keeps_all_of_pretraining(self, tmp_path):
        model = tiny_model("ijepa", "ForPreTraining")
        model.save_pretrained(tmp_path)
        loaded = IJepaForPreTraining.from_pretrained(tmp_path)
        assert loaded.config.predictor_hidden_size == 48 and loaded.config.decoder_hidden_size == 48
        assert not any(parameter.requires_grad for parameter in loaded.target_encoder.parameters())
        state = model.state_dict()
        assert state.keys() == loaded.state_dict().keys()
        assert all(torch.equal(value, state[name]) for name, value in loaded.state_dict().items())
        batch = tiny_batch(model.config)
        with torch.no_grad():
            assert torch.equal(loaded(**batch).loss, model(**batch).loss)


class TestStock:
    @torch.no_grad()
    def test_ours_is_stock_once_saved(self, tmp_path):
        model = tiny_model("ijepa", "ForPreTraining")
        model.save_pretrained(tmp_path / "ours")
        pixel_values = tiny_batch(model.config)["pixel_values"]
        ours = model.encoder(pixel_values)
        for stock_class in (transformers.AutoModel, transformers.IJepaModel):
            stock, info = stock_class.from_pretrained(tmp_path / "ours", output_loading_info=True)
            assert type(stock) is transformers.IJepaModel and not info["missing_keys"]
            tokens = stock(pixel_values).last_hidden_state
            torch.testing.assert_close(tokens, ours.last_hidden_state, rtol=0, atol=1e-5)
        torch.testing.assert_close(ours.pooler_output, tokens.mean(dim=1), rtol=0, atol=1e-5)
        classifier, info = transformers.AutoModelForImageClassification.from_pretrained(
            tmp_path / "ours", num_labels=4, output_loading_info=True
        )
        assert {name.split(".")[0] for name in info["missing_keys"]} == {"classifier"}
        stock.save_pretrained(tmp_path / "stock")
        again = IJepaModel.from_pretrained(tmp_path / "stock")
        state = model.encoder.state_dict()
        assert all(torch.equal(value, state[name]) for name, value in again.state_dict().items())

    @torch.no_grad()
    def test_a_stock_checkpoint_is_read_with_its_own_positions(self, tmp_path, caplog):
        torch.manual_seed(0)
        sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
        stock = scrambled(transformers.IJepaModel(transformers.IJepaConfig(image_size=16, patch_size=4, **sizes)))
        stock.eval().save_pretrained(tmp_path / "stock")
        pixel_values = torch.randn(2, 3, 16, 16)
        expected = stock(pixel_values).last_hidden_state
        ours = load_encoder(str(tmp_path / "stock")).model
        assert type(ours) is IJepaModel
        torch.testing.assert_close(ours(pixel_values).last_hidden_state, expected, rtol=0, atol=1e-5)
        with pytest.raises(ValueError, match="no weights for predictor .*initialize_missing=True"):
            IJepaForPreTraining.from_pretrained(tmp_path / "stock")
        with caplog.at_level(logging.WARNING, "hf_mim"):
            model = IJepaForPreTraining.from_pretrained(tmp_path / "stock", initialize_missing=True)
        assert "target encoder: it starts as a copy" in caplog.text
        for network in (model.encoder, model.target_encoder):
            torch.testing.assert_close(network(pixel_values).last_hidden_state, expected, rtol=0, atol=1e-5)

    def test_to_vit_says_what_is_missing(self):
        with pytest.raises(ValueError, match="no .CLS. token"):
            hf_mim.to_vit(tiny_model("ijepa", "ForPreTraining"))


def test_original_checkpoint_of_networks_beside_each_other(golden, tmp_path):
    nested = {part: {} for part in ("encoder", "predictor", "target_encoder")}
    for name, value in golden.state.items():
        part, _, rest = name.partition(".")
        nested[part][f"module.{rest}"] = value
    torch.save(nested | {"epoch": 300, "opt": {"state": {0: {"step": torch.ones(())}}}}, tmp_path / "jepa.pth.tar")
    model = hf_mim.from_original(tmp_path / "jepa.pth.tar", "ijepa", config=golden.config)
    golden.assert_numbers(model(**golden.input))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """In sub-folders, which are their classes."""
    folder = tmp_path_factory.mktemp("pictures")
    for seed, name in enumerate("ab"):
        write_pictures(folder / name, 12, seed)
    return folder


def pretrain(folder, out, *flags: str) -> int:
    common = [*FLAGS, "--max_steps=4", "--dataloader_persistent_workers=false", "--references=false"]
    return pretraining.main([*common, f"--train_dir={folder}", f"--output_dir={out}", *flags])


class TestTraining:
    def test_from_first_flag_to_last_file(self, pictures, tmp_path, capsys):
        out = tmp_path / "out"
        assert pretrain(pictures, out, "--save_strategy=steps", "--save_steps=2", "--save_total_limit=9") == 0
        said = capsys.readouterr().out
        assert "I-JEPA: " in said and "to_vit" not in said
        features = json.loads((out / "features.json").read_text())["features"]
        assert list(features) == ["trained, mean"]
        card = (out / "README.md").read_text()
        assert "last_hidden_state.mean(dim=1)" in card and "`IJepaModel`" in card and "Assran" in card
        assert all(a == pytest.approx(b, rel=1e-5) for _, a, b in losses(out, "loss", "loss_latent"))

        code = (
            "import sys\nfrom transformers import AutoModel\n"
            f"model, info = AutoModel.from_pretrained({str(out)!r}, output_loading_info=True)\n"
            "print(type(model).__name__, len(info['missing_keys']), 'hf_mim' in sys.modules)"
        )
        result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment())
        assert result.stdout.split() == ["IJepaModel", "0", "False"], result.stderr

        assert pretrain(pictures, tmp_path / "b", f"--resume_from_checkpoint={out / 'checkpoint-2'}") == 0
        whole, resumed = (IJepaForPreTraining.from_pretrained(folder) for folder in (out, tmp_path / "b"))
        assert all(torch.equal(whole.state_dict()[name], value) for name, value in resumed.state_dict().items())
        assert losses(out) == losses(tmp_path / "b")

        # Going on, at another image size, keeps the predictor's sizes and all weights but positions.
        args = [flag for flag in FLAGS if not flag.startswith(("--image_size", "--patch_size", "--config_over"))]
        more = [*args, f"--train_dir={pictures}", f"--output_dir={tmp_path / 'c'}", f"--model_name_or_path={out}"]
        more += ["--image_size=24", "--max_steps=1", "--learning_rate=0"]
        assert pretraining.main(more) == 0
        gone_on = IJepaForPreTraining.from_pretrained(tmp_path / "c")
        assert gone_on.config.predictor_hidden_size == 16 and gone_on.config.grid_size == (6, 6)
        assert torch.equal(gone_on.predictor.head.weight, whole.predictor.head.weight)

        # A classifier on the mean of the patches.
        tuned = [
            "--max_steps=1",
            "--per_device_train_batch_size=4",
            "--use_cpu",
            "--report_to=none",
            f"--output_dir={tmp_path / 'tuned'}",
        ]
        assert finetuning.main([f"--model_name_or_path={out}", f"--train_dir={pictures}", *tuned]) == 0
        config = json.loads((tmp_path / "tuned" / "config.json").read_text())
        assert (config["model_type"], config["pooling"], config["use_cls_token"]) == ("masked_vit", "mean", False)

    @pytest.mark.slow
    def test_two_processes_equal_one(self, pictures, tmp_path):
        flags = [*FLAGS, "--max_steps=4", f"--train_dir={pictures}", "--bf16=false", "--references=false"]
        one = run([RUN_MIM, *flags, f"--output_dir={tmp_path / 'one'}"])
        assert one.returncode == 0, one.stderr
        torchrun = ["-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port=0", "--standalone"]
        flags = [*flags, "--per_device_train_batch_size=2", f"--output_dir={tmp_path / 'two'}"]
        two = run([*torchrun, RUN_MIM, *flags])
        assert two.returncode == 0, two.stderr
        for (_, a), (_, b) in zip(losses(tmp_path / "one"), losses(tmp_path / "two"), strict=True):
            assert a == pytest.approx(b, abs=1e-5)
