"""What a model makes of one picture, and the page that shows it."""

import os
import re
import shutil
import socket
import urllib.request
from pathlib import Path
from time import monotonic, sleep

import numpy as np
import pytest
import torch
from PIL import Image

from hf_mim.data.image_processing import build_image_processor
from hf_mim.data.images import BrokenImageError
from hf_mim.data.scenes import render_scene
from hf_mim.evaluation.viewer import Viewer
from hf_mim.models.vit_mae.configuration_vit_mae import ViTMAEConfig
from hf_mim.models.vit_mae.modeling_vit_mae import ViTMAEForPreTraining
from setup_of import setup_arguments
from tiny import TINY, scrambled, tiny_model
from tiny_training import REPOSITORY, started

SPACE = REPOSITORY / "examples" / "space"
# 8 x 8 patches.
SQUARE = {"image_size": (32, 32), "patch_size": (4, 4), "num_channels": 3}
MAE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
MAE |= {"decoder_hidden_size": 16, "decoder_num_hidden_layers": 1, "decoder_num_attention_heads": 2}


def saved(model_type: str, folder: Path) -> Path:
    """A pretraining model and its image processor."""
    if model_type == "vit_mae":
        model = scrambled(ViTMAEForPreTraining(ViTMAEConfig(image_size=32, patch_size=4, **MAE)))
    else:
        model = tiny_model(model_type, "ForPreTraining", **SQUARE)
    model.save_pretrained(folder)
    build_image_processor((32, 32), 3, [0.5] * 3, [0.25] * 3).save_pretrained(folder)
    return folder


def scene(index: int) -> np.ndarray:
    return render_scene(index, image_size=32)[0]


def hidden(view) -> float:
    """The share of the pixels that are grey in what is masked and not in the picture."""
    return float((view.masked != view.picture).any(axis=2).mean())


@pytest.mark.parametrize("model_type", [*TINY, "vit_mae"])
def test_views_of_every_method(model_type, tmp_path):
    viewer = Viewer(saved(model_type, tmp_path))
    viewer.add_examples([scene(index) for index in range(6)])
    ratio = viewer.mask_ratio
    view = viewer.view(scene(3), num_neighbours=4)
    size = (256, 256, 3)
    assert view.picture.shape == view.masked.shape == view.colours.shape == size
    # The same picture is its own nearest neighbour.
    assert [row for row, _ in view.neighbours][0] == 3 and view.neighbours[0][1] == pytest.approx(1, abs=1e-4)
    assert len(view.neighbours) == 4 and viewer.example(3).shape == size
    assert (view.attention is None) == (model_type == "ijepa")
    assert (view.reconstructed is None) == (model_type not in ("pilamim", "vit_mae"))
    if view.reconstructed is not None:
        seen = (view.masked == view.picture).all(axis=2)
        assert np.array_equal(view.reconstructed[seen], view.picture[seen])
        assert not np.array_equal(view.reconstructed, view.picture)
    little, much = (viewer.view(scene(3), mask_ratio=value) for value in (0.25, 0.75))
    if model_type != "ijepa":
        # Of I-JEPA's context blocks targets are cut out besides.
        assert hidden(little) == pytest.approx(0.25, abs=0.05) and hidden(much) == pytest.approx(0.75, abs=0.05)
    assert hidden(little) < hidden(much)
    # Another seed is another mask, the same the same; the model stays as it was.
    assert np.array_equal(viewer.view(scene(3), mask_ratio=0.75).masked, much.masked)
    assert not np.array_equal(viewer.view(scene(3), mask_ratio=0.75, seed=1).masked, much.masked)
    assert viewer.mask_ratio == ratio


def test_an_encoder_alone_has_no_mask(tmp_path):
    tiny_model("ocl", "Model", **SQUARE).save_pretrained(tmp_path)
    viewer = Viewer(tmp_path)
    view = viewer.view(scene(0))
    assert viewer.mask_ratio is None and view.masked is None and view.reconstructed is None and view.neighbours == []


def test_what_cannot_be_shown(tmp_path):
    viewer = Viewer(saved("pilamim", tmp_path / "run"))
    with pytest.raises(BrokenImageError, match="broken.png"):
        (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n and no more")
        viewer.view(tmp_path / "broken.png")
    with pytest.raises(ValueError, match="mask_ratio is 0.999, which keeps 0 of 64 patches"):
        viewer.view(scene(0), mask_ratio=0.999)
    assert viewer.mask_ratio == 0.75
    with pytest.raises(ValueError, match="cannot be loaded"):
        Viewer(tmp_path / "nothing")
    # Weights in a pickle are not read.
    model = tiny_model("ocl", "Model", **SQUARE)
    model.config.save_pretrained(tmp_path / "pickled")
    torch.save(model.state_dict(), tmp_path / "pickled" / "pytorch_model.bin")
    with pytest.raises(ValueError, match="cannot be loaded"):
        Viewer(tmp_path / "pickled")


def test_files_of_a_space():
    front = (SPACE / "README.md").read_text(encoding="utf-8").split("---")[1]
    told = dict(line.split(": ", 1) for line in front.strip().splitlines())
    assert told["sdk"] == "gradio" and (SPACE / told["app_file"]).is_file()
    needed = [line for line in (SPACE / "requirements.txt").read_text().splitlines() if not line.startswith("#")]
    setup = setup_arguments()
    assert sorted(needed) == sorted(setup["install_requires"])
    (gradio,) = setup["extras_require"]["space"]
    assert f"gradio>={told['sdk_version'].rpartition('.')[0]}" in gradio
    assert f'"{gradio}"' in (SPACE / "app.py").read_text(encoding="utf-8")


CHROMIUM = shutil.which("chromium") or "/usr/bin/chromium"
CHROMIUM_FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


def wait_until(check, seconds: float = 60):
    end = monotonic() + seconds
    while monotonic() < end:
        found = check()
        if found:
            return found
        sleep(0.2)
    raise AssertionError("It did not come about in time.")


@pytest.mark.slow
def test_the_page_in_a_browser(tmp_path):
    pytest.importorskip("gradio")
    playwright = pytest.importorskip("playwright.sync_api")
    if not os.path.exists(CHROMIUM):
        pytest.skip("There is no Chromium.")
    run = saved("pilamim", tmp_path / "run")
    Image.fromarray(render_scene(5, image_size=64)[0]).save(tmp_path / "scene.png")
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n and no more")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    address = f"http://127.0.0.1:{port}"
    settings = {"GRADIO_ANALYTICS_ENABLED": "False", "NO_PROXY": "127.0.0.1", "GRADIO_TEMP_DIR": str(tmp_path / "up")}
    with started([str(SPACE / "app.py"), f"--model={run}", f"--port={port}"], **settings) as app:

        def answers() -> bool:
            assert app.poll() is None, app.stderr.read()
            try:
                return urllib.request.urlopen(address, timeout=5).status == 200
            except OSError:
                return False

        wait_until(answers, 120)
        with playwright.sync_playwright() as driver:
            browser = driver.chromium.launch(executable_path=CHROMIUM, args=CHROMIUM_FLAGS)
            page = browser.new_page(viewport={"width": 1400, "height": 1000})
            page.goto(address)

            def source(name: str) -> str:
                picture = page.locator(f"#{name} img").first
                return (picture.get_attribute("src") or "") if picture.count() else ""

            page.set_input_files("#picture input[type=file]", str(tmp_path / "scene.png"))
            names = ("picture", "masked", "reconstructed", "attention", "colours")
            first = wait_until(
                lambda: (found := {name: source(name) for name in names}) and all(found.values()) and found
            )
            wait_until(lambda: page.locator("#neighbours img").count() == 6)
            # More is hidden, and the picture stays.
            page.locator("#ratio input[type=number]").fill("0.9")
            page.locator("#ratio input[type=number]").press("Enter")
            wait_until(lambda: source("masked") != first["masked"])
            wait_until(lambda: source("reconstructed") != first["reconstructed"])
            if shot := os.environ.get("HF_MIM_SCREENSHOT"):
                page.screenshot(path=shot, full_page=True)
            # A broken file gives a message.
            page.reload()
            page.set_input_files("#picture input[type=file]", str(tmp_path / "broken.png"))
            told = wait_until(lambda: (texts := page.locator(".toast-body").all_inner_texts()) and " ".join(texts))
            assert "broken.png" in told and re.search("cannot be read|not a picture", told)
            browser.close()


@pytest.mark.slow
def test_a_page_without_a_model_is_a_line(tmp_path):
    pytest.importorskip("gradio")
    with started([str(SPACE / "app.py"), f"--model={tmp_path / 'none'}"]) as app:
        out, err = app.communicate(timeout=120)
    assert app.returncode == 1 and out == ""
    assert len(err.strip().splitlines()) == 1 and err.startswith("Error: The model ")
