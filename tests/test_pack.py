"""`hf_mim pack`: what it writes, how it goes on, and that training on it is as on the files."""

import io
import json
import pickle
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from hf_mim.data.arguments import DataArguments
from hf_mim.data.images import read_image
from hf_mim.data.loading import load_images
from hf_mim.data.sources import open_splits, packed
from hf_mim.jobs import pack
from hf_mim.jobs.check import main as check


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two classes of 20 pictures, JPEG and PNG, of which one is broken."""
    root = tmp_path_factory.mktemp("pictures")
    random = np.random.default_rng(0)
    for i in range(40):
        kind = root / ("cats" if i % 2 else "dogs")
        kind.mkdir(exist_ok=True)
        smooth = Image.fromarray(random.integers(0, 256, (6, 8, 3), dtype=np.uint8)).resize((80, 60 if i % 3 else 90))
        smooth.save(kind / f"{i:02}.{'png' if i % 5 == 0 else 'jpg'}")
    (root / "cats" / "07.jpg").write_bytes(b"\xff\xd8\xff no picture")
    return root


def packed_as(folder, out, *flags) -> int:
    return pack.main([str(folder), str(out), "--num_workers=0", "--rows_per_shard=12", *flags])


def opened(root):
    return open_splits(DataArguments(train_dir=str(root), num_channels=3), seed=0)[0]


def test_what_is_packed_is_what_was_there(folder, tmp_path, capsys):
    assert packed_as(folder, tmp_path / "out") == 0
    out = capsys.readouterr().out
    assert "Packed 39 pictures" in out and "Left out: 1" in out
    index = json.loads((tmp_path / "out" / "index.json").read_text())
    # The broken one is the 4th of the cats, the first class.
    assert [shard["rows"] for shard in index["splits"]["train"]] == [11, 12, 12, 4]
    assert len(index["broken"]) == 1 and "07.jpg" in index["broken"][0]
    found, files = opened(tmp_path / "out"), opened(folder)
    whole = [i for i in range(40) if "07.jpg" not in files.name(i)]
    assert len(found) == 39 and found.label_names == files.label_names
    assert found.labels["label"].tolist() == files.labels["label"][whole].tolist()
    for i, j in enumerate(whole):
        # To the byte: nothing was to be made smaller.
        assert torch.equal(found[i], files[j])
    assert files.name(0).endswith(found.name(0).split(" ")[0])
    # A worker gets paths and numbers, not open files.
    assert torch.equal(pickle.loads(pickle.dumps(found))[38], found[38])


def test_datasets_reads_it_too(folder, tmp_path, capsys):
    from datasets import load_dataset

    packed_as(folder, tmp_path / "out")
    data = load_dataset(str(tmp_path / "out"), cache_dir=str(tmp_path / "cache"))["train"]
    assert data.features["label"].names == ["cats", "dogs"] and len(data) == 39
    assert data[0]["image"].size == (80, 60)


@pytest.mark.parametrize("size", [32, 75, 200])
def test_short_side(folder, tmp_path, size):
    packed_as(folder, tmp_path / "out", f"--short_side={size}")
    found, files = opened(tmp_path / "out"), opened(folder)
    for i, j in ((0, 0), (38, 39)):
        height, width = files[j].shape[1:]
        smaller = min(1.0, size / min(height, width))
        assert min(found[i].shape[1:]) == min(size, min(height, width))
        assert found[i].shape[2] == round(width * smaller) and found[i].shape[1] == round(height * smaller)
        kind = Image.open(io.BytesIO(found.stored(i)["bytes"])).format
        assert kind == ("PNG" if files.name(j).endswith("png") else "JPEG")
        if kind == "PNG" and smaller < 1:
            image = Image.open(files.name(j)).resize(found[i].shape[:0:-1], Image.Resampling.BICUBIC)
            assert torch.equal(found[i], read_image(image))


def test_goes_on_where_it_was_stopped(folder, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    whole = pack._write_shard
    written = []

    def full_disk(path, *args):
        if len(written) == 2:
            raise OSError(28, "No space left on device", str(path))
        written.append(path.name)
        whole(path, *args)

    monkeypatch.setattr(pack, "_write_shard", full_disk)
    assert packed_as(folder, out) == 1
    assert "No space left" in capsys.readouterr().err
    # Without an index it is no --train_dir yet.
    with pytest.raises(ValueError, match="index.json is missing, and there are shards beside it"):
        opened(out)
    assert not list(out.glob(".*"))
    times = {path.name: path.stat().st_mtime_ns for path in out.glob("*.parquet")}
    assert sorted(times) == sorted(written)
    monkeypatch.setattr(pack, "_write_shard", whole)
    assert packed_as(folder, out) == 0
    assert all((out / name).stat().st_mtime_ns == time for name, time in times.items())
    assert len(opened(out)) == 39
    assert packed_as(folder, out, "--short_side=20") == 1
    assert "other pictures or settings" in capsys.readouterr().err


def test_another_set_in_the_folder_is_refused(folder, tmp_path, capsys):
    """By the number of its pictures its shards have other names, and would lie beside the old ones."""
    out = tmp_path / "out"
    assert packed_as(folder, out) == 0
    before = {path.name: path.read_bytes() for path in out.iterdir()}

    def refused(data) -> None:
        assert packed_as(data, out) == 1
        assert "other pictures or settings: choose another folder" in capsys.readouterr().err
        assert {path.name: path.read_bytes() for path in out.iterdir()} == before

    refused(folder / "cats")
    # The same pictures, in the same order, with other names of their classes.
    named = shutil.copytree(folder, tmp_path / "named")
    (named / "dogs").rename(named / "frogs")
    refused(named)


def test_shards_that_do_not_fit_the_index(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(packed, "_RETRY_SECONDS", ())
    packed_as(folder, tmp_path / "out")
    shard = sorted((tmp_path / "out").glob("*.parquet"))[1]
    found, data = opened(tmp_path / "out"), shard.read_bytes()
    shard.unlink()
    with pytest.raises(OSError, match="can no longer be read"):
        found[13]
    with pytest.raises(ValueError, match="is missing, where index.json says"):
        opened(tmp_path / "out")
    shard.write_bytes(data[:-10])
    with pytest.raises(ValueError, match=f"has {len(data) - 10} bytes, where index.json says {len(data)}"):
        opened(tmp_path / "out")


def test_splits_and_check(folder, tmp_path, capsys):
    root = tmp_path / "splits"
    for split in ("train", "val"):
        (root / split).mkdir(parents=True)
        for path in sorted(folder.glob("dogs/*"))[: 5 if split == "train" else 3]:
            (root / split / path.name).write_bytes(path.read_bytes())
    assert packed_as(root, tmp_path / "out") == 0
    splits = load_images(DataArguments(train_dir=str(tmp_path / "out")))
    assert (len(splits.train), len(splits.validation)) == (5, 3)
    assert check([str(tmp_path / "out"), "--num_workers=0"]) == 0


def test_pictures_that_cannot_be_read_make_no_data_set(tmp_path, capsys):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.png").write_bytes(b"no picture")
    assert packed_as(tmp_path / "in", tmp_path / "out") == 1
    assert "in holds no picture that can be read. The first: " in capsys.readouterr().err
    assert not (tmp_path / "out" / "index.json").exists()


def test_pictures_that_would_lose_bits_are_refused(tmp_path, capsys):
    (tmp_path / "in").mkdir()
    np.save(tmp_path / "in" / "deep.npy", np.zeros((8, 8, 3), np.float32))
    assert packed_as(tmp_path / "in", tmp_path / "out") == 1
    assert "more than 8 bits" in capsys.readouterr().err


@pytest.mark.slow
def test_training_is_as_on_the_files_and_resumes(folder, tmp_path):
    from hf_mim.jobs import pretraining
    from tiny_training import FLAGS, losses

    (folder / "cats" / "07.jpg").write_bytes((folder / "cats" / "09.jpg").read_bytes())
    packed_as(folder, tmp_path / "out")
    flags = [*FLAGS, "--bf16=false", "--references=false", "--max_eval_samples=4", "--save_strategy=steps"]
    runs = {"files": (folder, "8", 0), "packed": (tmp_path / "out", "8", 2), "resumed": (tmp_path / "out", "5", 1)}
    for name, (data, steps, workers) in runs.items():
        out = [f"--train_dir={data}", f"--output_dir={tmp_path / name}", f"--dataloader_num_workers={workers}"]
        assert pretraining.main([*flags, *out, "--max_steps=8", f"--save_steps={steps}"]) == 0
    resumed = [*flags, f"--train_dir={tmp_path / 'out'}", f"--output_dir={tmp_path / 'resumed'}", "--max_steps=8"]
    resumed += [f"--resume_from_checkpoint={tmp_path / 'resumed' / 'checkpoint-5'}", "--save_steps=5"]
    assert pretraining.main(resumed) == 0
    assert losses(tmp_path / "files") == losses(tmp_path / "packed") == losses(tmp_path / "resumed")
