"""README and docs: their code runs, their links lead somewhere, and README can be read in a few minutes."""

import re

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

import hf_mim
from tiny_training import REPOSITORY, SIZES, pictures

PAGES = [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").rglob("*.md"))]
NAMES = [str(path.relative_to(REPOSITORY)) for path in PAGES]
_BLOCK = re.compile(r"^(?P<note><!-- not run: .+ -->\n)?```python\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"\]\((?!http)([^)#\s]*)(#[^)]*)?\)")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Where the code of a page runs: with a small network at each path that the pages name."""
    monkeypatch.chdir(tmp_path)
    for name in ("demo", "mae", "mine"):
        if name == "mae":
            sizes = {key: value for key, value in SIZES.items() if key != "image_size"}
            model = hf_mim.ViTMAEForPreTraining(hf_mim.ViTMAEConfig(**sizes, image_size=16))
        else:
            model = hf_mim.PiLaMIMForPreTraining(hf_mim.PiLaMIMConfig(**SIZES))
        model.save_pretrained(f"runs/{name}")
        processor = hf_mim.data.image_processing.build_image_processor((16, 16), 3, [0.5] * 3, [0.5] * 3)
        processor.save_pretrained(f"runs/{name}")
    return tmp_path


@pytest.mark.parametrize("path", PAGES, ids=NAMES)
def test_code_runs_as_printed(path, folder):
    images = list(np.repeat(pictures(16), 2, axis=1).repeat(2, axis=2))
    names = {
        "hf_mim": hf_mim,
        "pictures": images,
        "image": Image.fromarray(images[0]),
        "normalised": [torch.randn(3, 32, 32) for _ in range(8)],
    }
    for block in _BLOCK.finditer(path.read_text()):
        code = compile(block["code"], str(path), "exec")
        if block["note"] is None:
            exec(code, names)


@pytest.mark.parametrize("path", PAGES, ids=NAMES)
def test_links_lead_somewhere(path):
    for target, _ in _LINK.findall(path.read_text()):
        assert not target or (path.parent / target).exists(), f"{path}: {target}"


def test_readme_is_short():
    assert len((REPOSITORY / "README.md").read_text().splitlines()) <= 130


def test_every_page_is_in_the_navigation():
    def pages(entries):
        for entry in entries:
            if isinstance(entry, str):
                yield entry
            else:
                (value,) = entry.values()
                yield from [value] if isinstance(value, str) else pages(value)

    listed = list(pages(yaml.safe_load((REPOSITORY / "mkdocs.yml").read_text())["nav"]))
    assert sorted(listed) == [str(path.relative_to(REPOSITORY / "docs")) for path in PAGES[1:]]
