"""
What leaves the lab, in the hands of one who has no hf_mim: transformers, timm, onnxruntime and torch.

The stranger is a process in which hf_mim cannot be imported, not a second virtual environment: installing torch and
the others anew would take minutes and a network, and would be the same packages.
"""

import json

import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModel

import hf_mim
from fake_hub import fake_hub
from tiny_training import FLAGS, RUN_MIM, pictures, run

# Fetches the repository by its name, and does there what the file beside each form says.
_STRANGER = """
import os, shutil, sys
sys.modules["hf_mim"] = None
import torch
from huggingface_hub import snapshot_download
picture, path, *files = sys.argv[1:]
# Of a copy: what the Hub's cache holds are links.
shutil.copytree(snapshot_download("me/mine"), "copy")
found = {}
for file in files:
    folder, name = os.path.split(os.path.join("copy", file))
    shutil.copy(picture, os.path.join(folder, "image.jpg"))
    here = os.getcwd()
    os.chdir(folder)
    names = {}
    exec(open(name).read(), names)
    os.chdir(here)
    kept = {key: names[key] for key in ("tokens", "patches", "outputs", "weights") if key in names}
    found[file] = torch.from_numpy(names["pixel_values"]), kept
torch.save(found, path)
assert "timm" in sys.modules and "onnxruntime" in sys.modules and sys.modules["hf_mim"] is None
"""
# The file or folder of each form, and the file that says how it is used.
FORMS = {
    "vit": (None, "use.py"),
    "dinov2": ("dinov2", "dinov2/use.py"),
    "timm": ("timm.safetensors", "timm.safetensors.py"),
    "onnx": ("encoder.onnx", "encoder.onnx.py"),
    "torch-export": ("encoder.pt2", "encoder.pt2.py"),
    "safetensors": ("weights.safetensors", "weights.safetensors.py"),
}


def patches_of(kept: dict) -> torch.Tensor:
    """(1, L, D), whatever a form calls them."""
    if "tokens" in kept:
        return kept["tokens"][:, 1:].detach()
    return torch.as_tensor(kept["patches"] if "patches" in kept else kept["outputs"]["patches"]).detach()


@pytest.mark.slow
def test_every_form_by_name(tmp_path, monkeypatch):
    pytest.importorskip("onnxruntime")
    (tmp_path / "pictures").mkdir()
    for number, values in enumerate(pictures(24)):
        Image.fromarray(values).save(tmp_path / "pictures" / f"{number}.png")
    out = tmp_path / "out"
    with fake_hub() as hub:
        flags = [*FLAGS, f"--train_dir={tmp_path / 'pictures'}", f"--output_dir={out}", "--max_steps=20"]
        flags += ["--save_strategy=no", "--push_to_hub=true", "--hub_model_id=me/mine"]
        result = run([RUN_MIM, *flags], **hub.environment(tmp_path / "here"))
        assert result.returncode == 0, result.stderr[-4000:]
        exported = tmp_path / "exported"
        for form, (name, _) in FORMS.items():
            if name is not None:
                hf_mim.export(str(out), exported / name, form)
        for path in exported.rglob("*"):
            if path.is_file():
                hub.files["me/mine"][path.relative_to(exported).as_posix()] = path.read_bytes()

        picture = tmp_path / "image.png"
        Image.fromarray(pictures(1, seed=5)[0]).save(picture)
        there = tmp_path / "there"
        there.mkdir()
        (there / "stranger.py").write_text(_STRANGER)
        monkeypatch.setattr("tiny_training.REPOSITORY", there)
        result = run(
            ["stranger.py", str(picture), "found.pt", *(use for _, use in FORMS.values())],
            **hub.environment(tmp_path / "elsewhere"),
        )
        assert result.returncode == 0, result.stderr[-4000:]
    found = torch.load(there / "found.pt", weights_only=False)
    model, processor = AutoModel.from_pretrained(out), AutoImageProcessor.from_pretrained(out)
    pixel_values = processor(Image.open(picture), return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        expected = model(pixel_values).last_hidden_state[:, 1:]
    assert set(found) == {use for _, use in FORMS.values()}
    for use, (read, kept) in found.items():
        torch.testing.assert_close(read, pixel_values, rtol=0, atol=1e-5)
        if "weights" in kept:
            own = model.state_dict()
            assert set(own) <= set(kept["weights"])
            assert all(torch.equal(value, kept["weights"][name]) for name, value in own.items())
        else:
            torch.testing.assert_close(
                patches_of(kept), expected, rtol=0, atol=1e-4, msg=lambda text, use=use: f"{use}: {text}"
            )
    # No code comes with the repository that would have to be trusted.
    assert "auto_map" not in json.loads(hub.files["me/mine"]["config.json"])
