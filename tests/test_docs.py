"""README and the pages in docs/: short, whole, and with Python that runs."""

import contextlib
import io
import re

import numpy as np
import pytest
import yaml
from PIL import Image
from transformers import ViTImageProcessor

import hf_mim
from tiny_training import REPOSITORY

DOCS = REPOSITORY / "docs"
PAGES = [REPOSITORY / "README.md", *sorted(DOCS.glob("**/*.md"))]
NAMES = [page.relative_to(REPOSITORY).as_posix() for page in PAGES]
# A block of Python with the comment, if any, that says why it is not run.
BLOCK = re.compile(r"(?:<!-- not run: ([^>]+?) -->\s*)?^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
# As tables and images in text; of a link its target, without its heading.
LINK = re.compile(r"\]\((?!\w+:)([^)\s]+)\)")


def blocks(text: str) -> list[tuple[str, str]]:
    """(why it is not run or "", code) of every Python block."""
    return BLOCK.findall(text)


def without_code(text: str) -> str:
    return re.sub(r"^```.*?^```$|`[^`\n]+`", "", text, flags=re.MULTILINE | re.DOTALL)


def anchor(heading: str) -> str:
    """The name of a heading in links."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-")


def pages_of(nav) -> list[str]:
    """The pages in a nav of mkdocs, in order."""
    if isinstance(nav, str):
        return [nav]
    entries = nav.values() if isinstance(nav, dict) else nav
    return [page for entry in entries for page in pages_of(entry)]


def test_what_is_found():
    text = "a\n\n```python\nx = 1\n```\n\n<!-- not run: no Hub -->\n\n```python\ny\n```\n\n```\npip\n```\n"
    assert blocks(text) == [("", "x = 1\n"), ("no Hub", "y\n")]
    assert LINK.findall("[a](b.md#c), ![d](e.png), [f](https://g.h), [i](#j)") == ["b.md#c", "e.png", "#j"]
    assert pages_of(["a.md", {"B": ["c.md", {"D": "e.md"}]}]) == ["a.md", "c.md", "e.md"]
    assert anchor("Is it *working*? (yes)") == "is-it-working-yes"


def test_readme_is_short():
    assert len((REPOSITORY / "README.md").read_text(encoding="utf-8").splitlines()) <= 130


def test_every_page_is_in_the_nav_once():
    # Plain YAML, as long as no option is a Python object.
    nav = yaml.safe_load((REPOSITORY / "mkdocs.yml").read_text(encoding="utf-8"))["nav"]
    assert sorted(pages_of(nav)) == sorted(page.relative_to(DOCS).as_posix() for page in DOCS.glob("**/*.md"))


@pytest.mark.parametrize("name", NAMES)
def test_links_lead_somewhere(name):
    page = REPOSITORY / name
    for link in LINK.findall(without_code(page.read_text(encoding="utf-8"))):
        path, _, heading = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), f"{name} links to {link}"
        if heading:
            headings = re.findall(r"^#+ (.+)$", target.read_text(encoding="utf-8"), flags=re.MULTILINE)
            assert heading in map(anchor, headings), f"{name} links to {link}"


def test_all_public_names_have_an_entry():
    entries = re.findall(r"^::: (\S+)$", (DOCS / "reference.md").read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert sorted(entry.rpartition(".")[2] for entry in entries) == sorted(hf_mim.__all__)
    for entry in entries:
        module, _, name = entry.rpartition(".")
        assert getattr(hf_mim, name).__module__ == module


@pytest.fixture
def user_folder(tmp_path, monkeypatch):
    """A folder to work in, as a reader has it: pictures in folders of classes, and what the demo made."""
    random = np.random.default_rng(0)
    for index in range(64):
        path = tmp_path / "my_pictures" / "ab"[index % 2] / f"{index:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(path)
    for folder, method in (("demo", "PiLaMIM"), ("mae", "ViTMAE")):
        config = getattr(hf_mim, f"{method}Config").from_preset("tiny", image_size=64)
        getattr(hf_mim, f"{method}ForPreTraining")(config).save_pretrained(tmp_path / "runs" / folder)
        ViTImageProcessor(size={"height": 64, "width": 64}).save_pretrained(tmp_path / "runs" / folder)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    return tmp_path


@pytest.mark.parametrize(
    "name", [name for name, page in zip(NAMES, PAGES, strict=True) if blocks(page.read_text(encoding="utf-8"))]
)
def test_python_runs(name, user_folder):
    """Every block in order, each with the names of those before."""
    names = {"__name__": "docs", "image": Image.new("RGB", (80, 60))}
    text = (REPOSITORY / name).read_text(encoding="utf-8")
    for reason, code in blocks(text):
        # The page's lines in what is raised.
        above = text[: text.index(code)].count("\n")
        program = compile("\n" * above + code, name, "exec")
        if not reason:
            with contextlib.redirect_stdout(io.StringIO()):
                exec(program, names)
