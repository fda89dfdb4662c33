"""Pushing to the Hub and loading from it, against a server of the Hub's interface on this machine."""

import json

import numpy as np
import pytest
import torch
from datasets import Dataset, Features, Image
from huggingface_hub import HfApi, ModelCard, constants
from huggingface_hub.errors import HTTPError
from PIL import Image as PILImage
from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoModelForPreTraining, pipeline

import hf_mim
from fake_hub import fake_hub
from hf_mim.evaluation.encoders import load_encoder
from hf_mim.hub import sharing
from hf_mim.hub.export import stock_format
from hf_mim.models.vit.repository import locate
from tiny import tiny_model
from tiny_training import FLAGS, RUN_MIM, pictures, run

# One who has transformers and not hf_mim: it cannot be imported.
_STRANGER = """
import sys
sys.modules["hf_mim"] = None
import numpy as np, torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModel
name, path = sys.argv[1:]
model, processor = AutoModel.from_pretrained(name), AutoImageProcessor.from_pretrained(name)
picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8))
with torch.no_grad():
    outputs = model(**processor(picture, return_tensors="pt"))
torch.save([type(model).__name__, outputs.last_hidden_state, outputs.pooler_output], path)
"""
# One who has it, on another machine: the classes and the flags find what is below the root.
_FRIEND = """
import sys, hf_mim, torch
from hf_mim.jobs.pretraining import main
path, *flags = sys.argv[1:]
model = hf_mim.PiLaMIMForPreTraining.from_pretrained("me/mine")
named = hf_mim.PiLaMIMForPreTraining.from_pretrained("me/mine", subfolder="pretraining")
classifier = hf_mim.PiLaMIMForImageClassification.from_pretrained("me/mine", num_labels=3)
assert torch.equal(classifier.encoder.layernorm.weight, named.encoder.layernorm.weight)
torch.save([model.state_dict(), named.state_dict()], path)
sys.exit(main([*flags, "--model_name_or_path=me/mine"]))
"""
SIZES_OF_BASE = {"image_size": 16, "patch_size": 4, "hidden_size": 32, "num_hidden_layers": 2}
SIZES_OF_BASE |= {"num_attention_heads": 2, "intermediate_size": 64}
_WEIGHTS = {"config.json", "model.safetensors", "preprocessor_config.json"}


@pytest.fixture
def hub():
    with fake_hub() as server:
        yield server


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "pictures").mkdir()
    for number, values in enumerate(pictures(12)):
        PILImage.fromarray(values).save(tmp_path / "pictures" / f"{number}.png")
    return tmp_path / "pictures"


def run_at(hub, home, *command) -> str:
    result = run([*map(str, command)], **hub.environment(home))
    assert result.returncode == 0, result.stderr[-4000:]
    return result.stdout + result.stderr


class TestPush:
    def test_what_was_trained_serves_those_with_and_without_hf_mim(self, hub, folder, tmp_path):
        out = tmp_path / "out"
        flags = [*FLAGS, f"--train_dir={folder}", "--max_steps=2"]
        pushing = ["--push_to_hub=true", "--hub_model_id=me/mine", "--hub_private_repo=true", "--save_strategy=steps"]
        # What an earlier run left, here and there.
        (out / "_old-checkpoint-9").mkdir(parents=True)
        (out / "_old-checkpoint-9" / "optimizer.pt").write_bytes(b"0")
        hub.files["me/mine"] = {"model-00001-of-00002.safetensors": b"old", "notes.txt": b"kept"}
        said = run_at(
            hub, tmp_path / "here", RUN_MIM, *flags, *pushing, "--save_steps=1", f"--output_dir={out}", "--bf16=false"
        )
        assert f"Pushed to {hub.endpoint}/me/mine." in said
        assert hub.commits == ["me/mine"] and hub.created["me/mine"]["visibility"] == "private"
        there = hub.files["me/mine"]
        below = {f"pretraining/{name}" for name in _WEIGHTS}
        assert _WEIGHTS | below | {"README.md", "run.json", "features.json", "use.py", "notes.txt"} <= set(there)
        assert not any("checkpoint-" in name or name.endswith((".pt", ".bin", ".lock")) for name in there)
        assert [name for name in there if name.startswith("model")] == ["model.safetensors"]
        assert json.loads(there["config.json"])["model_type"] == "vit"
        # The folder stays the run's own.
        assert json.loads((out / "config.json").read_text())["model_type"] == "pilamim"
        card = ModelCard(there["README.md"].decode())
        assert 'AutoModel.from_pretrained("me/mine")' in card.text and "PiLaMIM" in card.text
        assert 'hf_mim.PiLaMIMForPreTraining.from_pretrained("me/mine")' in card.text
        assert "![loss_curves](loss_curves.png)" in card.text and "loss_curves.png" in there
        assert '"effective_batch_size": 4' in card.text

        # The card's own words, run by a stranger.
        run_at(hub, tmp_path / "stranger", "-c", _STRANGER, "me/mine", tmp_path / "found.pt")
        name, tokens, pooled = torch.load(tmp_path / "found.pt")
        assert name == "ViTModel"
        model, processor = AutoModel.from_pretrained(out), AutoImageProcessor.from_pretrained(out)
        picture = PILImage.fromarray(pictures(1)[0])
        with torch.no_grad():
            own = model(**processor(picture, return_tensors="pt"))
        torch.testing.assert_close(tokens, own.last_hidden_state, rtol=0, atol=1e-5)
        torch.testing.assert_close(pooled, own.pooler_output, rtol=0, atol=1e-5)

        said = run_at(
            hub, tmp_path / "friend", "-c", _FRIEND, tmp_path / "weights.pt", *flags, f"--output_dir={tmp_path / 'on'}"
        )
        saved = hf_mim.PiLaMIMForPreTraining.from_pretrained(out).state_dict()
        for loaded in torch.load(tmp_path / "weights.pt"):
            assert all(torch.equal(saved[name], value) for name, value in loaded.items()) and set(saved) == set(loaded)
        # Nothing was built anew, and its card says what it was made of.
        assert "new: " not in said
        assert json.loads((tmp_path / "on" / "run.json").read_text())["decides"]["start"] == "me/mine"
        data = ModelCard.load(tmp_path / "on" / "README.md").data
        assert data.base_model == ["me/mine"] and data.base_model_relation == "finetune"

    def test_stages_are_left_at_home(self, hub, folder, tmp_path):
        flags = ["--model_type=dbot", "--num_stages=2", f"--train_dir={folder}", f"--output_dir={tmp_path / 'out'}"]
        flags += ["--max_steps=1", "--save_strategy=steps", "--save_steps=1"]
        run_at(hub, tmp_path, RUN_MIM, *FLAGS, *flags, "--push_to_hub=true", "--hub_model_id=me/staged")
        there = hub.files["me/staged"]
        assert _WEIGHTS | {"README.md", "pretraining/model.safetensors"} <= set(there)
        assert not any(name.startswith("stage-") for name in there)


# A classifier, by the card's own words.
_PIPELINE = """
import sys
sys.modules["hf_mim"] = None
import json
from transformers import pipeline
found = pipeline("image-classification", "me/sorted")(sys.argv[1])
print(json.dumps({one["label"]: one["score"] for one in found}))
"""


@pytest.mark.slow
def test_fine_tuned_and_taught(hub, tmp_path):
    for number, name in enumerate(("cat", "dog")):
        (tmp_path / "pictures" / name).mkdir(parents=True)
        for index, values in enumerate(pictures(12, seed=number)):
            PILImage.fromarray(values).save(tmp_path / "pictures" / name / f"{index}.png")
    sizes = [flag for flag in FLAGS if not flag.startswith("--config_overrides")]
    data = [f"--train_dir={tmp_path / 'pictures'}", "--max_steps=2", "--save_strategy=no", "--push_to_hub=true"]

    # A base of the Hub, which the card names.
    base = hf_mim.MaskedViTModel(hf_mim.MaskedViTConfig(**SIZES_OF_BASE))
    hf_mim.to_vit(base).save_pretrained(tmp_path / "base")
    hub.files["you/base"] = {path.name: path.read_bytes() for path in (tmp_path / "base").iterdir()}
    hub.files["you/base"]["README.md"] = b"---\nlicense: cc-by-nc-4.0\n---\n\n# Base\n"
    flags = [*FLAGS, "--model_type=tec", "--base_model_name_or_path=you/base", f"--output_dir={tmp_path / 'tec'}"]
    saving = ["--save_strategy=steps", "--save_steps=1", "--hub_strategy=checkpoint"]
    run_at(hub, tmp_path / "home", RUN_MIM, *flags, *data, "--hub_model_id=me/taught", *saving)
    # The optimiser on request; the last of two checkpoints.
    names = {name for name in hub.files["me/taught"] if name.startswith("last-checkpoint/")}
    assert {"last-checkpoint/optimizer.pt", "last-checkpoint/model.safetensors"} <= names
    assert json.loads(hub.files["me/taught"]["last-checkpoint/trainer_state.json"])["global_step"] == 2
    assert hub.commits == ["me/taught"] * 3
    data_of_card = ModelCard(hub.files["me/taught"]["README.md"].decode()).data
    assert (data_of_card.base_model, data_of_card.license) == (["you/base"], "cc-by-nc-4.0")
    assert b"forbids commercial use" in hub.files["me/taught"]["README.md"]

    # Fine-tuned from it by its name; the classifier pools by the mean, which DINOv2's does too.
    script = RUN_MIM.replace("run_mim", "run_image_classification")
    flags = [*sizes, "--model_name_or_path=me/taught", f"--output_dir={tmp_path / 'sorted'}"]
    flags = [flag for flag in flags if not flag.startswith(("--image_size", "--patch_size"))]
    run_at(hub, tmp_path / "home", script, *flags, *data, "--hub_model_id=me/sorted")
    assert AutoConfig.from_pretrained(tmp_path / "sorted").model_type == "tec"
    there = hub.files["me/sorted"]
    assert json.loads(there["config.json"])["model_type"] == "dinov2"
    assert not any(name.startswith("pretraining/") for name in there)
    card = ModelCard(there["README.md"].decode()).data
    assert card.base_model == ["me/taught"] and card.eval_results[0].metric_type == "accuracy"
    picture = tmp_path / "pictures" / "cat" / "0.png"
    said = run_at(hub, tmp_path / "stranger", "-c", _PIPELINE, picture)
    scores = json.loads(said.splitlines()[0])
    own = pipeline("image-classification", str(tmp_path / "sorted"))(str(picture))
    assert scores == pytest.approx({one["label"]: one["score"] for one in own}, abs=1e-4)


class TestCommit:
    """In this process, against the same server."""

    @pytest.fixture
    def push(self, hub, tmp_path, monkeypatch):
        monkeypatch.setattr(sharing, "_WAITS", (0, 0, 0))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        hub.files["me/mine"] = {"config.json": b"old", "model.safetensors": b"old", "pretraining/old.bin": b"old"}
        (tmp_path / "new").write_bytes(b"new")
        api = HfApi(endpoint=hub.endpoint, token="hf_nobody")

        def push(revision=None, create_pr=False):
            return sharing._commit(api, "me/mine", {"config.json": tmp_path / "new"}, revision, create_pr)

        return push

    @pytest.mark.parametrize("failures", [[503], [429, 500], [0]])
    def test_tried_again(self, hub, push, failures):
        hub.failures = failures.copy()
        assert push() == f"{hub.endpoint}/me/mine"
        # In one commit, which also takes away the weights that there are no more.
        assert hub.files["me/mine"] == {"config.json": b"new"}
        assert hub.commits == ["me/mine"]

    @pytest.mark.parametrize("failures", [[503] * 9, [0] * 9, [403]])
    def test_given_up_it_is_as_it_was(self, hub, push, failures):
        before = dict(hub.files["me/mine"])
        hub.failures = failures.copy()
        with pytest.raises(HTTPError):
            push()
        assert hub.files == {"me/mine": before} and not hub.commits
        # What is not allowed is not asked for again.
        assert len(failures) - len(hub.failures) == (1 if failures == [403] else 4)

    def test_branch(self, hub, push):
        before = dict(hub.files["me/mine"])
        push(revision="trial")
        assert hub.files == {"me/mine": before, "me/mine@trial": {"config.json": b"new"}}

    def test_pull_request(self, hub, push):
        before = dict(hub.files["me/mine"])
        assert push(create_pr=True) == f"{hub.endpoint}/me/mine/discussions/1"
        assert hub.files == {"me/mine": before, "me/mine@refs/pr/1": {"config.json": b"new"}}


class TestCopy:
    """A repository as a folder, as `git clone` and `hf download` leave it."""

    @pytest.fixture
    def copy(self, tmp_path):
        own = tiny_model("ocl", "ForPreTraining", image_size=(32, 32), patch_size=(8, 8), num_channels=3)
        hf_mim.export(own, tmp_path / "copy")
        own.save_pretrained(tmp_path / "copy" / "pretraining")
        return own, tmp_path / "copy"

    def test_classes_and_flags_find_what_is_below(self, copy):
        own, folder = copy
        for suffix in ("Model", "ForPreTraining", "Backbone", "ForImageClassification", "ForSemanticSegmentation"):
            model = getattr(hf_mim, f"OCL{suffix}").from_pretrained(folder)
            assert torch.equal(model.base_model.layernorm.weight, own.encoder.layernorm.weight)
        assert type(AutoModel.from_pretrained(folder)).__name__ == "ViTModel"
        assert type(AutoModelForPreTraining.from_pretrained(folder, subfolder="pretraining")) is type(own)
        assert type(load_encoder(str(folder)).model) is hf_mim.OCLModel
        assert locate(folder) == str(folder / "pretraining")
        # Below is a folder like others, which stays where it is.
        assert locate(folder / "pretraining") == str(folder / "pretraining")

    def test_others_stay_at_the_root(self, copy, tmp_path):
        own, folder = copy
        # A run with another in a folder of that name.
        own.save_pretrained(tmp_path / "run")
        (tmp_path / "run" / "pretraining").symlink_to(folder / "pretraining")
        assert locate(tmp_path / "run") == str(tmp_path / "run")
        for path in (tmp_path / "nothing", folder / "model.safetensors", "you/nothing"):
            assert locate(path) == str(path)
        # What is not of the method is read from the root, as ever.
        with pytest.raises(ValueError, match="not a complete pretraining checkpoint"):
            hf_mim.PiLaMIMForPreTraining.from_pretrained(folder)

    def test_which_form_the_root_has(self, tmp_path):
        square = {"image_size": (32, 32), "patch_size": (8, 8), "num_channels": 3}
        forms = {
            ("ocl", "ForPreTraining"): (square, "vit"),
            # A stock ViT would draw a pooler at random; of a grid that is no square there is nothing better.
            ("tec", "ForPreTraining"): (square | {"pooling": "mean"}, "dinov2"),
            ("dbot", "ForPreTraining"): ({"pooling": "mean"}, "vit"),
            ("pilamim", "ForPreTraining"): (square | {"num_register_tokens": 2}, "dinov2"),
            ("dbot", "ForImageClassification"): (square | {"pooling": "mean"}, "dinov2"),
            ("ocl", "ForImageClassification"): (square | {"pooling": "cls"}, "vit"),
            ("ocl", "Model"): (square | {"position_embedding": "rotary"}, None),
            ("pilamim", "ForSemanticSegmentation"): (square, None),
            ("ijepa", "ForPreTraining"): (square, None),
        }
        for number, ((model_type, suffix), (fields, form)) in enumerate(forms.items()):
            tiny_model(model_type, suffix, **fields).save_pretrained(tmp_path / str(number))
            assert stock_format(tmp_path / str(number)) == form, (model_type, suffix)


def test_data_set_of_the_hub(hub, tmp_path):
    column = [PILImage.fromarray(values) for values in pictures(12)]
    data = Dataset.from_dict({"image": column}, features=Features({"image": Image()}))
    data.to_parquet(str(tmp_path / "train.parquet"))
    hub.files["datasets/me/pictures"] = {"train.parquet": (tmp_path / "train.parquet").read_bytes()}
    flags = [*FLAGS, "--dataset_name=me/pictures", "--max_steps=2"]
    run_at(hub, tmp_path / "home", RUN_MIM, *flags, f"--output_dir={tmp_path / 'whole'}", "--validation_fraction=0.2")
    assert json.loads((tmp_path / "whole" / "features.json").read_text())
    run_at(
        hub,
        tmp_path / "home2",
        RUN_MIM,
        *flags,
        f"--output_dir={tmp_path / 'stream'}",
        "--streaming=true",
        "--max_eval_samples=3",
    )
    state = json.loads((tmp_path / "stream" / "trainer_state.json").read_text())
    assert state["global_step"] == 2 and np.isfinite(state["log_history"][0]["loss"])
