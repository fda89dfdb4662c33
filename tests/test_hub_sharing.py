"""Pushing to the Hub and loading from it, against a server of the Hub's interface on this machine."""

import json

import numpy as np
import pytest
import torch
from datasets import Dataset, Features, Image
from PIL import Image as PILImage

from fake_hub import fake_hub
from tiny_training import FLAGS, RUN_MIM, pictures, run

_FEATURES = """
import sys, hf_mim, numpy as np, torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModel
name, path = sys.argv[1:]
model, processor = AutoModel.from_pretrained(name), AutoImageProcessor.from_pretrained(name)
picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8))
with torch.no_grad():
    torch.save(model(**processor(picture, return_tensors="pt")).pooler_output, path)
"""


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


def run_at(hub, home, *command) -> None:
    result = run([*map(str, command)], **hub.environment(home))
    assert result.returncode == 0, result.stderr[-4000:]


def features(hub, home, name, path) -> torch.Tensor:
    run_at(hub, home, "-c", _FEATURES, name, path)
    return torch.load(path)


class TestPush:
    def test_what_was_trained_is_there_and_loads_by_its_name(self, hub, folder, tmp_path):
        flags = [f"--train_dir={folder}", f"--output_dir={tmp_path / 'out'}", "--max_steps=2", "--save_steps=1"]
        flags += ["--save_strategy=steps", "--push_to_hub=true", "--hub_model_id=me/mine"]
        # What an earlier run left.
        (tmp_path / "out" / "_old-checkpoint-9").mkdir(parents=True)
        (tmp_path / "out" / "_old-checkpoint-9" / "optimizer.pt").write_bytes(b"0")
        run_at(hub, tmp_path / "here", RUN_MIM, *FLAGS, *flags)
        there = hub.files["me/mine"]
        assert {"config.json", "model.safetensors", "preprocessor_config.json", "features.json"} <= set(there)
        assert not any("checkpoint-" in name for name in there)
        # Our card, which says what to load.
        card = there["README.md"].decode()
        assert 'AutoModel.from_pretrained("me/mine")' in card and "PiLaMIM" in card
        # Another machine.
        found = features(hub, tmp_path / "elsewhere", "me/mine", tmp_path / "found.pt")
        assert torch.equal(found, features(hub, tmp_path / "here", tmp_path / "out", tmp_path / "own.pt"))

    def test_stages_are_left_at_home(self, hub, folder, tmp_path):
        flags = ["--model_type=dbot", "--num_stages=2", f"--train_dir={folder}", f"--output_dir={tmp_path / 'out'}"]
        flags += ["--max_steps=1", "--save_strategy=steps", "--save_steps=1"]
        run_at(hub, tmp_path, RUN_MIM, *FLAGS, *flags, "--push_to_hub=true", "--hub_model_id=me/staged")
        there = hub.files["me/staged"]
        assert {"config.json", "model.safetensors", "README.md"} <= set(there)
        assert not any(name.startswith("stage-") for name in there)


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
