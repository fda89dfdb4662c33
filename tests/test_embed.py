"""`hf_mim embed`: a row an image, by any network, in parts that can be gone on from; and a page of the nearest."""

import html.parser
import json
import os
import shutil

import datasets
import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from transformers import Dinov2Config, Dinov2Model

import hf_mim.evaluation.embedding as embedding
from hf_mim.__main__ import main
from hf_mim.data.image_processing import build_image_processor
from hf_mim.evaluation.encoders import load_encoder
from hf_mim.evaluation.neighbours import nearest_page
from hf_mim.jobs.loading import load_subject
from tiny import tiny_model
from tiny_training import run as run_python

MEAN, STD = [0.4, 0.5, 0.6], [0.2, 0.3, 0.25]


@pytest.fixture
def run(tmp_path):
    folder = tmp_path / "run"
    tiny_model("pilamim", "ForPreTraining", image_size=32, patch_size=8, num_channels=3).save_pretrained(folder)
    build_image_processor((32, 32), 3, MEAN, STD).save_pretrained(folder)
    return folder


@pytest.fixture
def folder(tmp_path):
    """11 images in two classes; the last is a copy of the first, and one is broken."""
    random = np.random.default_rng(0)
    for index in range(11):
        path = tmp_path / "images" / "ab"[index % 2] / f"{index:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 256, (40, 48, 3), dtype=np.uint8)).save(path)
    (path.parent / "10.png").write_bytes((path.parent / "00.png").read_bytes())
    (tmp_path / "images" / "b" / "05.png").write_bytes(b"\x89PNG, or so")
    return tmp_path / "images"


def embed(*words) -> int:
    return main(["embed", *map(str, words), "--batch_size=4"])


def test_a_row_an_image(run, folder, tmp_path, capsys):
    assert embed(run, folder, tmp_path / "out.parquet", "--patches", "--num_workers=1") == 0
    table = pd.read_parquet(tmp_path / "out.parquet")
    assert list(table.columns) == ["image", "row", "cls", "mean", "patches", "label"]
    assert [os.path.basename(name) for name in table["image"]] == [
        f"{index:02d}.png" for index in (0, 2, 4, 6, 8, 10, 1, 3, 7, 9)
    ]
    assert table["label"].tolist() == ["a"] * 6 + ["b"] * 4
    subject = load_subject(str(run), _data(folder), hold_out=False)
    pixel_values = subject.processor([Image.open(name) for name in table["image"]], return_tensors="pt")
    expected = load_encoder(str(run)).features(pixel_values["pixel_values"], ["cls", "mean", "patches"])
    for name in ("cls", "mean"):
        np.testing.assert_allclose(np.stack(table[name]), expected[name].numpy(), atol=1e-5)
    patches = np.stack([np.stack(rows) for rows in table["patches"]])
    assert patches.dtype == np.float16
    np.testing.assert_allclose(patches, expected["patches"].numpy(), atol=2e-3)

    assert "05.png" in (tmp_path / "out.broken.txt").read_text()
    out = capsys.readouterr().out
    assert "10 images." in out and "1 images cannot be read" in out and "05.png" in out
    assert sorted(os.listdir(tmp_path)) == ["images", "out.broken.txt", "out.parquet", "run"]
    settings = json.loads(pq.read_schema(tmp_path / "out.parquet").metadata[b"hf_mim"])
    assert settings["image_size"] == [32, 32] and settings["image_mean"] == MEAN

    data = datasets.Dataset.from_parquet(str(tmp_path / "out.parquet"), cache_dir=str(tmp_path / "cache"))
    assert len(data) == 10 and data[3]["label"] == "a" and len(data[3]["patches"]) == 16
    np.testing.assert_array_equal(np.float32(data[3]["mean"]), table["mean"][3])


def _data(folder):
    from hf_mim.data.arguments import DataArguments

    return DataArguments(train_dir=str(folder))


def test_goes_on_from_its_parts(run, folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(embedding, "_ROWS", 4)
    assert embed(run, folder, tmp_path / "whole.parquet") == 0
    made = []
    right = embedding._embed

    def cut_off(encoder, images, rows, *args):
        made.append(rows.start)
        if len(made) == 3:
            raise KeyboardInterrupt
        return right(encoder, images, rows, *args)

    monkeypatch.setattr(embedding, "_embed", cut_off)
    capsys.readouterr()
    assert embed(run, folder, tmp_path / "out.parquet") == 130
    assert "Interrupted. The same command goes on" in (err := capsys.readouterr().err) and "Traceback" not in err
    assert not (tmp_path / "out.parquet").exists()
    assert sorted(os.listdir(tmp_path / "out.parquet.parts")) == ["000000000.parquet", "000000004.parquet", "key.json"]
    # Of other settings the parts are not gone on from.
    capsys.readouterr()
    assert embed(run, folder, tmp_path / "out.parquet", "--bf16") == 1
    assert "table of another bf16: remove it" in capsys.readouterr().err
    assert embed(run, folder, tmp_path / "out.parquet") == 0
    assert made == [0, 4, 8, 8]
    assert pq.read_table(tmp_path / "out.parquet").equals(pq.read_table(tmp_path / "whole.parquet"))
    # The broken one was in a part of the first run.
    assert "05.png" in (tmp_path / "out.broken.txt").read_text()
    assert not (tmp_path / "out.parquet.parts").exists()


@pytest.mark.slow
def test_several_processes_share_the_parts(run, folder, tmp_path):
    lines = ["import sys", "import hf_mim.evaluation.embedding as e", "from hf_mim.__main__ import main"]
    (tmp_path / "main.py").write_text("\n".join([*lines, "e._ROWS = 2", "sys.exit(main(sys.argv[1:]))"]))
    assert embed(run, folder, tmp_path / "one.parquet") == 0
    launch = ["-m", "accelerate.commands.launch", "--cpu", "--num_processes=2", str(tmp_path / "main.py"), "embed"]
    result = run_python([*launch, str(run), str(folder), str(tmp_path / "two.parquet"), "--nearest=2"])
    assert result.returncode == 0, result.stderr
    one, two = (pq.read_table(tmp_path / name) for name in ("one.parquet", "two.parquet"))
    assert one.drop_columns(["cls", "mean"]).equals(two.drop_columns(["cls", "mean"]))
    for name in ("cls", "mean"):
        np.testing.assert_allclose(*(np.stack(table.to_pandas()[name]) for table in (one, two)), atol=1e-5)
    assert (tmp_path / "two.html").is_file() and not (tmp_path / "two.parquet.parts").exists()
    assert result.stdout.count("10 images.") == 1


def test_any_vit_and_several_labels(tmp_path):
    """A network of transformers, and a data set on disk whose images have several labels, or none."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    Dinov2Model(Dinov2Config(**sizes, image_size=28, patch_size=14)).save_pretrained(tmp_path / "dino")
    features = datasets.Features(
        {"image": datasets.Image(), "tags": datasets.List(datasets.ClassLabel(names=["x", "y", "z"]))}
    )
    images = [Image.fromarray(np.full((28, 28, 3), 20 * index, np.uint8)) for index in range(3)]
    rows = {"image": images, "tags": [[0, 2], [], None]}
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(tmp_path / "data")
    assert embed(tmp_path / "dino", tmp_path / "data", tmp_path / "a.parquet") == 0
    assert embed(tmp_path / "dino", tmp_path / "b.parquet", f"--dataset_name={tmp_path / 'data'}") == 0
    table = pd.read_parquet(tmp_path / "a.parquet")
    assert [None if tags is None else list(tags) for tags in table["tags"]] == [["x", "z"], [], None]
    assert table["image"][1].startswith("row 1 of ") and table["row"].tolist() == [0, 1, 2]
    assert pq.read_table(tmp_path / "b.parquet").column("mean") == pq.read_table(tmp_path / "a.parquet").column("mean")


class Page(html.parser.HTMLParser):
    """Rows of (title, caption) in each section of a page; fails on what it has not closed."""

    def __init__(self, text: str):
        super().__init__()
        self.open, self.sections, self.sources = [], {}, []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        if tag not in ("meta", "img"):
            self.open.append(tag)
        if tag == "section":
            self.rows = self.sections.setdefault(attributes["id"], [])
        elif attributes.get("class") == "row":
            self.rows.append([])
        elif tag == "img":
            self.rows[-1].append([os.path.basename(attributes["title"]), ""])
            self.sources.append(attributes["src"])

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] == "figcaption":
            self.rows[-1][-1][1] += data


def test_page_of_the_nearest(run, folder, tmp_path):
    (folder / "a" / "02.png").rename(folder / "a" / "02 <b>&.png")
    assert embed(run, folder, tmp_path / "out.parquet", "--nearest=3", "--duplicates_above=0.999") == 0
    page = Page((tmp_path / "out.html").read_text())
    assert page.sections["duplicates"] == [[["00.png", "00.png"], ["10.png", "1.000 10.png"]]]
    rows = {row[0][0]: row[1:] for row in page.sections["neighbours"]}
    assert len(rows) == 10 and "02 <b>&.png" in rows and all(len(row) == 3 for row in rows.values())
    assert all(source.startswith("data:image/jpeg;base64,") for source in page.sources)
    table = pd.read_parquet(tmp_path / "out.parquet")
    features = np.stack(table["mean"]) - np.stack(table["mean"]).mean(axis=0)
    features /= np.linalg.norm(features, axis=1, keepdims=True)
    names = [os.path.basename(name) for name in table["image"]]
    for place, name in enumerate(names):
        similarity = features @ features[place]
        similarity[place] = -2
        nearest = [names[index] for index in np.argsort(-similarity)[:3]]
        # Of the two that are the same either may come first.
        assert [found.replace("10", "00") for found, _ in rows[name]] == [one.replace("10", "00") for one in nearest]


def test_page_of_many_is_short(run, folder, tmp_path):
    assert embed(run, folder, tmp_path / "out.parquet") == 0
    subject = load_subject(str(run), _data(folder), hold_out=False)
    page = Page(nearest_page(tmp_path / "out.parquet", subject.pictures, column="cls", num_shown=2, num_neighbours=20))
    assert [len(row) for row in page.sections["neighbours"]] == [10, 10]


# Bad input: a line each, nothing written over.


def refused(capsys, *words) -> str:
    capsys.readouterr()
    assert embed(*words) == 1
    lines = [line for line in capsys.readouterr().err.strip().splitlines() if line.startswith("Error: ")]
    assert len(lines) == 1
    return lines[0]


def test_bad_input(run, folder, tmp_path, capsys):
    out = tmp_path / "out.parquet"
    tiny_model("pilamim", "Model", num_channels=5).save_pretrained(tmp_path / "five")
    assert "takes pictures of 5 channels" in refused(capsys, tmp_path / "five", folder, out)
    (tmp_path / "empty").mkdir()
    assert "holds no picture" in refused(capsys, run, tmp_path / "empty", out)
    assert "IMAGES is missing" in refused(capsys, run, out)
    assert "--output is missing" in refused(capsys, run)
    assert "ends in .parquet" in refused(capsys, run, folder, tmp_path / "out.csv")
    assert "--nearest must be at least 1" in refused(capsys, run, folder, out, "--nearest=0")
    assert "from -1 to 1, got 3" in refused(capsys, run, folder, out, "--duplicates_above=3")
    assert "cannot be loaded" in refused(capsys, tmp_path / "nowhere", folder, out)
    cut = shutil.copytree(run, tmp_path / "cut") / "model.safetensors"
    cut.write_bytes(cut.read_bytes()[:-10])
    assert "cannot be loaded: Error while deserializing" in refused(capsys, tmp_path / "cut", folder, out)
    assert sorted(os.listdir(tmp_path)) == ["cut", "empty", "five", "images", "run"]
    for taken in ("out.parquet", "out.html", "out.broken.txt"):
        (tmp_path / taken).write_text("mine")
        assert f"{tmp_path / taken} exists" in refused(capsys, run, folder, out, "--nearest=2")
        assert (tmp_path / taken).read_text() == "mine"
        (tmp_path / taken).unlink()
