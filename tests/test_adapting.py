"""Going on from trained weights by a part of them: the last blocks, or low-rank updates."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForPreTraining, ViTConfig, ViTModel

import hf_mim
from hf_mim.jobs.pretraining import main
from hf_mim.models.vit.encoders import encoder_from
from hf_mim.registry import method_class
from hf_mim.training.arguments import MIMTrainingArguments
from hf_mim.training.building import build_config
from hf_mim.training.command import ModelArguments
from hf_mim.training.trainable import add_encoder_lora, check_partial_pretraining, train_last_blocks
from tiny import TINY, scrambled, tiny_batch, tiny_model
from tiny_training import write_pictures

SIZES = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 48}
SIZES |= {"image_size": 16, "patch_size": 4}


def pretraining_model(method):
    if method == "vit_mae":
        decoder = {"decoder_hidden_size": 16, "decoder_num_attention_heads": 2, "decoder_num_hidden_layers": 1}
        config = method_class("vit_mae", "Config")(**SIZES, **decoder)
        model = scrambled(method_class("vit_mae", "ForPreTraining")(config))
        return model, {"pixel_values": torch.randn(2, 3, 16, 16), "noise": torch.rand(2, 16)}
    model = tiny_model(method, "ForPreTraining")
    return model, tiny_batch(model.config)


def trained_names(encoder):
    return {name for name, parameter in encoder.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize("method", [*TINY, "vit_mae"])
def test_the_last_blocks_alone(method):
    model, batch = pretraining_model(method)
    train_last_blocks(model, 2)
    model.train()(**batch).loss.backward()
    names = trained_names(model.encoder)
    parts = {".".join(name.split(".")[:2]) for name in names if not name.startswith("embeddings.cls_adapter")}
    assert parts == {"layers.1", "layers.2", "layernorm.weight", "layernorm.bias"}
    assert any("cls_adapter" in name for name in names) == (method == "tec")
    for name, parameter in model.named_parameters():
        assert parameter.grad is None or parameter.requires_grad, name
    assert all(p.grad is not None for n, p in model.encoder.named_parameters() if n in names and "cls" not in n)
    # What is not the encoder's is trained as ever.
    rest = [p.requires_grad for n, p in model.named_parameters() if n.startswith(("decoder", "predictor"))]
    rest += [p.requires_grad for n, p in model.named_parameters() if "_decoder." in n]
    assert method == "ocl" or any(rest)


@pytest.mark.parametrize("method", [*TINY, "vit_mae"])
def test_low_rank_updates_alone(method):
    pytest.importorskip("peft")
    model, batch = pretraining_model(method)
    with torch.no_grad():
        before = model(**batch).loss
    tuner = add_encoder_lora(model, 2)
    names = {name for name in trained_names(model.encoder) if "cls_adapter" not in name}
    assert names and all("lora_" in name for name in names)
    assert {name.split(".")[-4] for name in names} == {"q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2"}
    with torch.no_grad():
        torch.testing.assert_close(model(**batch).loss, before)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for step in range(2):
        loss = model.train()(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        model.after_optimizer_step(step, 2)
    model.eval()
    with torch.no_grad():
        tuned = model(**batch).loss
        assert (tuned - before).abs() > 1e-6
        if method == "pilamim":
            followed = model.target_encoder.layers[0].attention.q_proj.weight
            adapted = model.encoder.layers[0].attention.q_proj
            start = adapted.base_layer.weight
            assert (followed - start).norm() > 0 and adapted.get_delta_weight("default").norm() > 0
        tuner.merge_and_unload()
        torch.testing.assert_close(model(**batch).loss, tuned)
    assert not any("lora" in name or "base_layer" in name for name in model.state_dict())


@pytest.fixture(scope="module")
def vit(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vit")
    torch.manual_seed(0)
    scrambled(ViTModel(ViTConfig(**SIZES), add_pooling_layer=False)).save_pretrained(folder)
    return folder


def test_a_run_by_low_rank_updates(vit, tmp_path):
    """Resumed to the bit; saved merged, and as PEFT's adapter of the weights that it began with."""
    peft = pytest.importorskip("peft")
    data = write_pictures(tmp_path / "data")
    flags = [f"--model_name_or_path={vit}", "--lora_rank=2", f"--train_dir={data}", "--learning_rate=0.01"]
    flags += ["--per_device_train_batch_size=4", "--max_steps=4", "--config_overrides=decoder_num_hidden_layers=1"]
    flags += ["--save_strategy=steps", "--save_steps=2", "--warmup_steps=0", "--weight_decay=0"]
    assert main([*flags, f"--output_dir={tmp_path / 'a'}"]) == 0
    resume = f"--resume_from_checkpoint={tmp_path / 'a' / 'checkpoint-2'}"
    assert main([*flags, f"--output_dir={tmp_path / 'b'}", resume]) == 0
    weights = [load_file(tmp_path / name / "model.safetensors") for name in "ab"]
    assert not any("lora" in name or "base_layer" in name for name in weights[0])
    assert all(torch.equal(weights[0][name], value) for name, value in weights[1].items())
    pixel_values = torch.randn(2, 3, 16, 16)
    start = encoder_from(str(vit))
    with torch.no_grad():
        trained = AutoModel.from_pretrained(tmp_path / "a").eval()(pixel_values).last_hidden_state
        assert (start(pixel_values).last_hidden_state - trained).abs().max() > 1e-4
        adapted = peft.PeftModel.from_pretrained(start, tmp_path / "a" / "adapter").eval()
        torch.testing.assert_close(adapted(pixel_values=pixel_values).last_hidden_state, trained, rtol=0, atol=1e-5)
    assert adapted.peft_config["default"].base_model_name_or_path == str(vit)
    assert isinstance(hf_mim.to_vit(AutoModel.from_pretrained(tmp_path / "a")), ViTModel)


@pytest.mark.parametrize(
    ("method", "part"), [("tec", "base"), pytest.param("dbot", "teacher", marks=pytest.mark.slow)]
)
def test_a_smaller_student_of_other_patches(vit, tmp_path, method, part, capsys):
    """Half as wide, of patches half as large as the base's; the end of the run compares it with the base."""
    data = write_pictures(tmp_path / "data", 60)
    sizes = "hidden_size=16,num_hidden_layers=2,num_attention_heads=2,intermediate_size=32,decoder_hidden_size=16"
    sizes += ",decoder_num_attention_heads=2" + (",adapter_group_size=1" if method == "tec" else "")
    flags = [f"--model_type={method}", f"--{part}_model_name_or_path={vit}", "--image_size=16", "--patch_size=2"]
    flags += [f"--config_overrides={sizes}", "--validation_fraction=0.5", f"--train_dir={data}", "--max_steps=1"]
    assert main([*flags, f"--output_dir={tmp_path / 'out'}", "--per_device_train_batch_size=4"]) == 0
    model = AutoModelForPreTraining.from_pretrained(tmp_path / "out")
    assert model.config.grid_size == (8, 8) and getattr(model, part).own_grid == (4, 4)
    assert getattr(model, part).hidden_size == 2 * model.config.hidden_size
    assert "RankMe: " in capsys.readouterr().out
    than = [one["than"] for one in json.loads((tmp_path / "out" / "features.json").read_text())["comparisons"]]
    assert than == ["what it began with", "untrained"]


def test_the_table_of_the_docs_is_what_was_counted():
    root = Path(__file__).parents[1]
    rows = json.loads((root / "benchmarks" / "results" / "adapting_base.json").read_text())["rows"]
    lines = (root / "docs" / "adapt.md").read_text(encoding="utf-8").splitlines()
    table = [line for line in lines if line.startswith(("| MAE", "| PiLaMIM", "| OCL", "| TEC"))]
    assert len(table) == len(rows)
    for line, row in zip(table, rows, strict=True):
        cells = [cell.strip(" `") for cell in line.strip("| ").split("|")]
        assert cells[1].removeprefix("--") == row["way"]
        assert cells[2] == f"{row['trained_of_encoder'] / 1e6:.1f} / {row['trained'] / 1e6:.1f}"
        sizes = ("weights_mib", "gradients_and_moments_mib", "kept_mib_an_image")
        assert cells[3:] == [f"{row[name]:.0f}" for name in sizes]


@pytest.mark.parametrize(
    ("flags", "training", "message"),
    [
        ({"trainable_blocks": 0}, {}, "trainable_blocks is 0; the encoder has 3 blocks: give 1 to 3"),
        ({"trainable_blocks": 4}, {}, "trainable_blocks is 4"),
        ({"lora_rank": 0}, {}, "lora_rank is 0"),
        ({"lora_rank": 2, "trainable_blocks": 2}, {}, "leave one out"),
        ({"lora_rank": 2, "model_name_or_path": None}, {}, "untrained: give --model_name_or_path"),
        ({"trainable_blocks": 1, "model_name_or_path": None}, {}, "untrained: give --model_name_or_path"),
        ({"trainable_blocks": 1, "model_type": "dbot"}, {"num_stages": 2, "max_steps": 4}, "--num_stages"),
        ({"lora_rank": 2}, {"fsdp": "full_shard"}, "FSDP"),
    ],
)
def test_what_cannot_be_meant(vit, tmp_path, flags, training, message):
    args = ModelArguments(**({"model_type": "ocl", "model_name_or_path": str(vit)} | flags))
    config = build_config(args, None, None)
    config.num_hidden_layers = 3
    training_args = MIMTrainingArguments(str(tmp_path), **{"max_steps": 4} | training)
    with pytest.raises(ValueError, match=message):
        check_partial_pretraining(args, config, training_args)
