"""What a frozen network has of each picture, computed once: the same losses, resumed, refused where it is wrong."""

import json

import numpy as np
import pytest
import torch
from transformers import ViTConfig, ViTModel

import hf_mim
from hf_mim.data.arguments import DataArguments
from hf_mim.data.pretraining import pretraining_collator
from hf_mim.jobs.pretraining import main
from hf_mim.training.arguments import MIMTrainingArguments
from hf_mim.training.command import ModelArguments
from hf_mim.training.target_cache import FOLDER, TargetCache, check_cached_targets
from tiny import scrambled, tiny_batch, tiny_model
from tiny_training import SIZES, losses, tiny_data, write_pictures

WHOLE = {"crop_scale_min": 1.0, "horizontal_flip": False}


@pytest.mark.parametrize("method", ["tec", "dbot"])
def test_targets_that_are_given_are_those_that_are_computed(method):
    model = tiny_model(method, "ForPreTraining")
    batch = tiny_batch(model.config)
    targets = model.frozen_targets(batch["pixel_values"])
    expected = model(**batch)
    assert torch.equal(model(**batch, targets=targets).loss, expected.loss)
    rounded = {name: value.half() if value.is_floating_point() else value.int() for name, value in targets.items()}
    torch.testing.assert_close(model(**batch, targets=rounded).loss, expected.loss, rtol=1e-3, atol=0)
    # They are those of whole pictures, and nothing else is looked at.
    other = {name: value.flip(0) for name, value in targets.items()}
    assert not torch.allclose(model(**batch, targets=other).loss, expected.loss, rtol=1e-3)


def cache_model():
    torch.manual_seed(0)
    sizes = SIZES | {"decoder_num_hidden_layers": 1}
    return scrambled(hf_mim.TECForPreTraining(hf_mim.TECConfig(**sizes, adapter_group_size=1, attention_top_k=4)))


def whole_pictures(number=10):
    data = tiny_data(number)
    data.transform.crop_scale, data.transform.horizontal_flip = (1.0, 1.0), False
    return data


def test_filled_stopped_and_gone_on(tmp_path, monkeypatch):
    monkeypatch.setattr("hf_mim.training.target_cache._BATCHES_COUNTED", 1)
    model, data = cache_model(), whole_pictures()
    counted = []

    class Stopped(Exception):
        pass

    def frozen_targets(pixel_values, stop_at=None):
        counted.append(len(pixel_values))
        if len(counted) == stop_at:
            raise Stopped
        return type(model).frozen_targets(model, pixel_values)

    model.frozen_targets = lambda pixel_values: frozen_targets(pixel_values, stop_at=3)
    with pytest.raises(Stopped):
        TargetCache(tmp_path, 10, {"network": "a"}).fill(model, data, batch_size=4)
    model.frozen_targets = frozen_targets
    state = torch.get_rng_state()
    again = TargetCache(tmp_path, 10, {"network": "a"})
    assert again.done == 8
    again.fill(model, data, batch_size=4)
    assert counted == [4, 4, 2, 2] and torch.equal(state, torch.get_rng_state())
    cache = TargetCache(tmp_path, 10, {"network": "a"})
    cache.fill(model, data, batch_size=4)
    assert len(counted) == 4
    for index in (0, 7, 9):
        expected = model.frozen_targets(data[0, index]["pixel_values"][None])
        for name, value in cache[index].items():
            torch.testing.assert_close(
                torch.from_numpy(value).float(), expected[name][0].float(), rtol=2e-3, atol=2e-3
            )
    assert cache[0]["features"].dtype == np.float16 and cache[0]["rows"].dtype == np.int32
    with pytest.raises(ValueError, match=r"what another network has.*\(network differ\): delete it"):
        TargetCache(tmp_path, 10, {"network": "b"})
    data.targets = cache
    batch = pretraining_collator([data[3, index] for index in (4, 2)])
    assert batch["targets"]["features"].shape[0] == 2
    # Whole pictures are the same in every epoch.
    assert torch.equal(data[0, 4]["pixel_values"], data[9, 4]["pixel_values"])


@pytest.mark.parametrize(
    ("method", "part"), [("tec", "base"), pytest.param("dbot", "teacher", marks=pytest.mark.slow)]
)
def test_a_run_by_cached_targets(tmp_path, method, part):
    """The losses of one that computes them each time, to what float16 leaves out."""
    torch.manual_seed(0)
    sizes = {name: SIZES[name] for name in ("image_size", "patch_size", "hidden_size", "num_hidden_layers")}
    vit = ViTConfig(**sizes, num_attention_heads=2, intermediate_size=48)
    scrambled(ViTModel(vit, add_pooling_layer=False)).save_pretrained(tmp_path / "vit")
    data = write_pictures(tmp_path / "data")
    overrides = "decoder_hidden_size=16,decoder_num_attention_heads=2,decoder_num_hidden_layers=1,hidden_size=32"
    overrides += ",num_hidden_layers=2,num_attention_heads=2"
    overrides += ",adapter_group_size=1,attention_top_k=4" if method == "tec" else ""
    flags = [f"--model_type={method}", f"--{part}_model_name_or_path={tmp_path / 'vit'}", f"--train_dir={data}"]
    flags += ["--image_size=16", "--patch_size=4", f"--config_overrides={overrides}", "--max_steps=3", "--bf16=false"]
    flags += ["--crop_scale_min=1", "--horizontal_flip=false", "--per_device_train_batch_size=8", "--logging_steps=1"]
    flags += ["--references=false", "--use_cpu", "--disable_tqdm=true", "--dataloader_persistent_workers=false"]
    flags += ["--eval_strategy=no"]
    assert main([*flags, "--dataloader_num_workers=0", f"--output_dir={tmp_path / 'plain'}"]) == 0
    cached = [*flags, "--cache_base_features=true", f"--output_dir={tmp_path / 'cached'}"]
    assert main([*cached, f"--dataloader_num_workers={int(method == 'dbot')}"]) == 0
    np.testing.assert_allclose(losses(tmp_path / "cached"), losses(tmp_path / "plain"), rtol=1e-3)
    index = json.loads((tmp_path / "cached" / FOLDER / "index.json").read_text())
    assert index["done"] == index["num"] == 19


@pytest.mark.parametrize(
    ("model", "data", "training", "message"),
    [
        ({"model_type": "pilamim"}, WHOLE, {}, "PiLaMIM learns from no frozen network"),
        ({}, {}, {}, r"give --crop_scale_min 1 --horizontal_flip false \(they are 0.2 and true\)"),
        ({}, WHOLE | {"horizontal_flip": True}, {}, r"\(they are 1 and true\)"),
        ({}, WHOLE | {"dataset_name": "x", "streaming": True, "train_dir": None}, {}, "leave out --streaming"),
        ({"model_type": "dbot"}, WHOLE, {"num_stages": 2}, "Leave out --num_stages"),
        ({}, WHOLE, {"fsdp": "full_shard"}, "does not work with FSDP"),
    ],
)
def test_where_it_cannot_be_meant(tmp_path, model, data, training, message):
    model_args = ModelArguments(**({"model_type": "tec", "cache_base_features": True} | model))
    data_args = DataArguments(**({"train_dir": "x"} | data))
    with pytest.raises(ValueError, match=message):
        check_cached_targets(model_args, data_args, MIMTrainingArguments(str(tmp_path), max_steps=4, **training))
