"""Folders of very many files, whose listing is kept, and tar files that are read as they are."""

import io
import os
import pickle
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image

from hf_mim.data.arguments import DataArguments
from hf_mim.data.loading import load_images
from hf_mim.data.sources import folder, index_cache, open_splits, tars
from hf_mim.jobs import pack
from test_pack import opened


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """Where listings are kept, of few files too."""
    monkeypatch.setattr(index_cache, "FOLDER", tmp_path / "cache")
    monkeypatch.setattr(index_cache, "LEAST", 1)
    return tmp_path / "cache"


def touch(path, ago: float = 3600.0) -> None:
    """A file, in a folder that was last changed some time ago."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    past = os.stat(path).st_mtime - ago
    os.utime(path.parent, (past, past))


@pytest.fixture
def pictures(tmp_path):
    root = tmp_path / "pictures"
    for name in ("b/2.jpg", "b/1.png", "a/3.jpg", "a/deep/4.jpg", "a/5.jpg", "a/note.txt"):
        touch(root / name)
    os.utime(root, (1e9, 1e9))
    os.utime(root / "a", (1e9, 1e9))
    return root


def listed(monkeypatch) -> list:
    """Grows by one whenever a folder is looked through."""
    calls, look = [], folder._list
    monkeypatch.setattr(folder, "_list", lambda root, endings: [calls.append(root), look(root, endings)][1])
    return calls


def test_a_listing_is_kept(pictures, monkeypatch, caplog):
    calls = listed(monkeypatch)
    wanted = ["a/3.jpg", "a/5.jpg", "a/deep/4.jpg", "b/1.png", "b/2.jpg"]
    for _ in range(2):
        (data,) = folder.from_folder([str(pictures)], 3)
        assert [os.path.relpath(data.stored(i), pictures) for i in range(5)] == wanted
        assert data.labels["label"].tolist() == [0, 0, 0, 1, 1] and data.label_names == {"label": ["a", "b"]}
        assert "1 .txt" in caplog.text and len(calls) == 1
        caplog.clear()


@pytest.mark.parametrize(
    ("change", "number"),
    [
        (lambda root: (root / "a" / "deep" / "6.jpg").touch(), 6),
        (lambda root: (root / "b" / "1.png").unlink(), 4),
        (lambda root: (root / "a" / "deep").rename(root / "c"), 5),
        (lambda root: ((root / "new").mkdir(), (root / "new" / "7.gif").touch()), 6),
    ],
)
def test_a_folder_that_changed_is_listed_again(pictures, monkeypatch, change, number):
    calls = listed(monkeypatch)
    assert len(folder.find_images(pictures)) == 5
    change(pictures)
    assert len(folder.find_images(pictures)) == number and len(calls) == 2
    # Just now: it may change within the same tick of the clock.
    assert len(folder.find_images(pictures)) == number and len(calls) == 3


def test_what_is_kept_may_be_damaged_or_have_no_place(pictures, cache, monkeypatch):
    calls = listed(monkeypatch)
    folder.find_images(pictures)
    (file,) = cache.iterdir()
    file.write_bytes(file.read_bytes()[:-30])
    assert len(folder.find_images(pictures)) == 5 and len(calls) == 2
    monkeypatch.setattr(folder, "_FORM", "of another version")
    assert len(folder.find_images(pictures)) == 5 and len(calls) == 3
    (pictures / "file").touch()
    monkeypatch.setattr(index_cache, "FOLDER", pictures / "file" / "no folder")
    assert len(folder.find_images(pictures)) == 5


# --- tar files


def jpeg(number: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(number).integers(0, 256, (20, 24, 3), dtype=np.uint8)).save(file, "JPEG")
    return file.getvalue()


def write_tar(path, samples: dict[str, bytes]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, data in samples.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))


@pytest.fixture
def shards(tmp_path):
    """Three tar files of four pictures, with classes and texts."""
    root = tmp_path / "tars"
    root.mkdir()
    for shard in range(3):
        samples = {}
        for i in range(4 * shard, 4 * shard + 4):
            # Names of more than 100 letters have headers of their own.
            key = f"{'long' * 30}/{i:04}" if shard == 1 else f"{i:04}"
            samples |= {f"{key}.jpg": jpeg(i), f"{key}.cls": b"%d" % (i % 3), f"{key}.json": b"{}"}
        write_tar(root / f"train-{shard:03}.tar", samples)
    return root


def test_tars_as_they_are(shards, cache):
    for _ in range(2):
        pictures = opened(shards)
        assert len(pictures) == 12 and pictures.shard_ends.tolist() == [4, 8, 12]
        assert pictures.labels["label"].tolist() == [i % 3 for i in range(12)]
        for i in (0, 5, 11):
            assert pictures.stored(i)["bytes"] == jpeg(i) and f"{i:04}.jpg" in pictures.name(i)
        assert torch.equal(pickle.loads(pickle.dumps(pictures))[7], pictures[7])
        fingerprint = pictures.content_fingerprint()
        assert opened(shards).content_fingerprint() == fingerprint
    assert len(list(cache.iterdir())) == 1
    splits = load_images(DataArguments(train_dir=str(shards), validation_fraction=0.25))
    assert (len(splits.train), len(splits.validation)) == (9, 3) and splits.train.shard_ends[-1] == 9


def test_tars_are_indexed_again_when_they_change(shards):
    opened(shards)
    write_tar(shards / "train-001.tar", {"x.jpg": jpeg(50)})
    pictures = opened(shards)
    assert len(pictures) == 9 and pictures.stored(4)["bytes"] == jpeg(50)
    # One picture has no class.
    assert not pictures.labels


def test_tars_pack(shards, tmp_path, capsys):
    assert pack.main([str(shards), str(tmp_path / "packed"), "--num_workers=0"]) == 0
    packed, pictures = opened(tmp_path / "packed"), opened(shards)
    assert packed.labels["label"].tolist() == pictures.labels["label"].tolist()
    assert all(torch.equal(packed[i], pictures[i]) for i in range(12))


def test_bad_tars(shards, tmp_path):
    path, pictures = shards / "train-002.tar", opened(shards)
    data = path.read_bytes()
    for damage in (
        data[:3000],
        b"no tar at all",
        data[: data.index(b"0010.jpg") + 300],
        data[: data.index(b"0010.jpg") + 900],
    ):
        path.write_bytes(damage)
        with pytest.raises(ValueError, match="train-002.tar cannot be read .*copy it again"):
            opened(shards)
    with pytest.raises(OSError, match="cut short since"):
        pictures.stored(11)
    (tmp_path / "texts").mkdir()
    write_tar(tmp_path / "texts" / "0.tar", {"a.txt": b"words"})
    with pytest.raises(ValueError, match="the tar files hold no picture"):
        opened(tmp_path / "texts")
    assert not tars.has_tars(tmp_path)
    write_tar(tmp_path / "texts" / "0.tar", {"a.jpg": jpeg(0)})
    with pytest.raises(ValueError, match="holds no tar files"):
        open_splits(DataArguments(train_dir=str(tmp_path / "texts"), validation_dir=str(tmp_path)), seed=0)
