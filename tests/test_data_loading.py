"""From flags to pictures: every kind of source, what is held out, and what an error says."""

import gzip
import itertools
import json
import os
import pickle
import struct
from collections import Counter
from dataclasses import fields
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader
from transformers import HfArgumentParser, TrainingArguments

from hf_mim.data.dataset import ImageDataset, ImageStream
from hf_mim.data.images import BrokenImageError
from hf_mim.data.loading import (
    DataArguments,
    check_images,
    compute_mean_std,
    load_images,
    resolve_mean_std,
    without_broken,
)
from hf_mim.data.pretraining import (
    EpochSampler,
    PretrainingDataset,
    StreamingPretrainingDataset,
    pretraining_collator,
)
from hf_mim.data.sources.folder import find_images
from hf_mim.data.sources.idx import read_idx
from hf_mim.data.transforms import PretrainingTransform
from tiny_training import run

SHARED = Path(os.environ.get("HF_MIM_SHARED", Path(__file__).parents[2] / "shared"))
FASHION_MNIST = SHARED / "data" / "fashion-mnist"


@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path):
    import datasets
    import huggingface_hub.constants

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    # `datasets` waits for 5 seconds after every pass over a stream of parquet
    monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0, raising=False)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def colour(value, size=(8, 8)):
    return Image.fromarray(np.full((*size, 3), value, dtype=np.uint8))


def make_folder(root, classes=("b", "a"), num=3):
    """Pictures of all sorts; the value of each is its number."""
    for c, name in enumerate(classes):
        (root / name).mkdir(parents=True)
        for n in range(num):
            suffix = ("png", "JPG", "webp", "bmp")[n % 4]
            colour(10 * c + n).save(root / name / f"{n}.{suffix}", **({"lossless": True} if suffix == "webp" else {}))
    return root


def args(**kwargs):
    return DataArguments(**{key: str(value) if isinstance(value, Path) else value for key, value in kwargs.items()})


# --- flags


def test_flags_parse_beside_training_arguments(tmp_path):
    names = {field.name for field in fields(DataArguments)}
    assert not names & {field.name for field in fields(TrainingArguments)}
    parser = HfArgumentParser((DataArguments, TrainingArguments))
    flags = "--image_size 32 64 --num_channels 2 --image_mean 0.1 0.2 --image_std 1 2 --no_horizontal_flip"
    found, _ = parser.parse_args_into_dataclasses([*flags.split(), "--output_dir", str(tmp_path)])
    assert found.image_height_width == (32, 64) and found.horizontal_flip is False
    assert found.image_mean == [0.1, 0.2] and found.image_std == [1.0, 2.0]
    assert args(image_size=[28]).image_height_width == args(image_size=28).image_height_width == (28, 28)
    assert args().image_height_width is None and args(image_mean=["auto"], image_std="auto").image_mean == "auto"
    (tmp_path / "recipe.json").write_text(json.dumps({"image_mean": [0.5] * 3, "image_std": [0.5] * 3}))
    (found,) = HfArgumentParser(DataArguments).parse_json_file(str(tmp_path / "recipe.json"))
    assert found.image_mean == [0.5] * 3


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"image_size": [1, 2, 3]}, "--image_size must be one number or two"),
        ({"image_size": [0]}, "--image_size"),
        ({"num_channels": 0}, "--num_channels must be at least 1"),
        ({"validation_fraction": 1.0}, "--validation_fraction"),
        ({"crop_scale_min": 0.0}, "--crop_scale_min"),
        ({"max_train_samples": 0}, "--max_train_samples must be at least 1"),
        ({"streaming": True}, "--streaming needs --dataset_name"),
        ({"dataset_name": "a", "train_dir": "b"}, "leave one out"),
        ({"validation_dir": "a"}, "--validation_dir goes with --train_dir"),
        ({"num_channels": 3, "image_mean": ["0.5"]}, r"one number per channel \(3\), got 1"),
        ({"image_mean": ["x", "y", "z"]}, "must be numbers"),
        ({"image_mean": ["0.5"] * 3}, "Give both"),
        ({"image_mean": ["0.5"] * 3, "image_std": ["0"] * 3}, "--image_std must be above 0"),
    ],
)
def test_bad_flags(kwargs, message):
    with pytest.raises(ValueError, match=message):
        DataArguments(**kwargs)


# --- folders


def test_folder_with_classes(tmp_path):
    make_folder(tmp_path / "train")
    make_folder(tmp_path / "val", classes=("c", "a"), num=1)
    splits = load_images(args(train_dir=tmp_path / "train", validation_dir=tmp_path / "val"))
    assert len(splits.train) == 6 and len(splits.validation) == 2
    assert splits.train.label_names == splits.validation.label_names == {"label": ["a", "b", "c"]}
    assert splits.train.labels["label"].tolist() == [0, 0, 0, 1, 1, 1]
    assert splits.validation.labels["label"].tolist() == [0, 2]
    assert [splits.train.name(i) for i in (0, 5)] == [str(tmp_path / "train" / p) for p in ("a/0.png", "b/2.webp")]
    assert [int(splits.train[i].float().mean()) for i in range(6)] == [10, 11, 12, 0, 1, 2]


def test_flat_folder_in_which_other_things_lie(tmp_path):
    colour(1).save(tmp_path / "b.PNG")
    colour(0).save(tmp_path / "a.jpeg")
    np.save(tmp_path / "c.npy", np.full((8, 8), 2, dtype=np.uint8))
    colour(9).save(tmp_path / ".hidden.png")
    (tmp_path / ".git").mkdir()
    colour(9).save(tmp_path / ".git" / "x.png")
    (tmp_path / "notes.txt").write_text("no picture")
    (tmp_path / "loop").symlink_to(tmp_path)
    assert find_images(tmp_path) == ["a.jpeg", "b.PNG", "c.npy"]
    splits = load_images(args(train_dir=tmp_path))
    assert splits.train.labels == {} and len(splits.train) == 2 and len(splits.validation) == 1
    assert {int(p[0, 0, 0]) for s in (splits.train, splits.validation) for p in s} == {0, 1, 2}


@pytest.mark.parametrize("classes", [("only",), ("x/2020", "x/2021")])
def test_one_sub_folder_is_no_class(tmp_path, classes):
    assert load_images(args(train_dir=make_folder(tmp_path, classes))).train.labels == {}


def test_names_that_are_not_ascii(tmp_path):
    colour(3).save(tmp_path / "ein schönes Bild 図.png")
    colour(3).save(tmp_path / "z.png")
    splits = load_images(args(train_dir=tmp_path))
    assert {splits.train.name(0), splits.validation.name(0)} == {str(p) for p in tmp_path.glob("*.png")}
    assert splits.train[0].shape == (3, 8, 8)


def test_what_is_held_out_never_changes(tmp_path):
    make_folder(tmp_path, num=20)
    runs = [load_images(args(train_dir=tmp_path, validation_fraction=0.25), seed=seed) for seed in (0, 1)]
    train, held = (
        [[s.name(i) for i in range(len(s))] for s in part] for part in zip(*map(vars_of, runs), strict=True)
    )
    assert train[0] == train[1] and held[0] == held[1]
    assert len(held[0]) == 10 and not set(held[0]) & set(train[0]) and train[0] == sorted(train[0])
    few = load_images(args(train_dir=tmp_path, max_train_samples=8, max_eval_samples=4, validation_fraction=0.25))
    assert len(few.train) == 8 and len(few.validation) == 4
    assert len(set(few.train.labels["label"])) == 2  # not the first eight, which are all of class a


def vars_of(splits):
    return splits.train, splits.validation


# --- splits


@pytest.mark.parametrize(
    ("folders", "train", "held_out"),
    [
        (("train", "val"), "train", "val"),
        (("Training", "TEST"), "Training", "TEST"),
        (("train", "test", "dev"), "train", "dev"),
        (("train", "valid", "test"), "train", "valid"),
        (("images/train", "images/validation"), "images/train", "images/validation"),
    ],
)
def test_split_names_are_splits(tmp_path, folders, train, held_out):
    for number, name in enumerate(folders):
        make_folder(tmp_path / name, num=number + 1)
    (tmp_path / "README.md").write_text("x") if "/" not in train else None
    splits = load_images(args(train_dir=tmp_path))
    assert splits.train.source == str(tmp_path / train) and splits.validation.source == str(tmp_path / held_out)
    assert splits.train.label_names == splits.validation.label_names == {"label": ["a", "b"]}
    beside = load_images(args(train_dir=tmp_path / train))
    assert (beside.train.source, beside.validation.source) == (splits.train.source, splits.validation.source)
    asked = load_images(args(train_dir=tmp_path, train_split=Path(held_out).name, validation_split="train"))
    assert (asked.train.source, asked.validation.source) == (splits.validation.source, splits.train.source)


def test_one_split_alone(tmp_path):
    make_folder(tmp_path / "train" / "train")
    splits = load_images(args(train_dir=tmp_path / "train"))
    assert splits.train.labels["label"].tolist() and len(splits.train) + len(splits.validation) == 6
    make_folder(tmp_path / "b" / "test")
    with pytest.raises(
        ValueError, match="--train_split train: .*b has the splits test. To train .* --train_split test"
    ):
        load_images(args(train_dir=tmp_path / "b"))
    assert len(load_images(args(train_dir=tmp_path / "b", train_split="test")).train) == 5
    with pytest.raises(ValueError, match="--validation_split val: .* has the splits train"):
        load_images(args(train_dir=tmp_path / "train", validation_split="val"))


def test_classes_that_are_named_as_splits(tmp_path):
    make_folder(tmp_path / "one", classes=("cat", "test", "train"), num=2)
    with pytest.raises(ValueError, match=r"holds test, train and also cat: are these splits or classes\? .*one/train"):
        load_images(args(train_dir=tmp_path / "one"))
    make_folder(tmp_path / "two", classes=("cat", "train"), num=2)
    assert load_images(args(train_dir=tmp_path / "two")).train.label_names == {"label": ["cat", "train"]}


def test_splits_of_both_folders(tmp_path):
    for name in ("a/train", "a/val", "b/test", "c"):
        make_folder(tmp_path / name)
    for folder, source in (("b", "b/test"), ("c", "c")):
        splits = load_images(args(train_dir=tmp_path / "a", validation_dir=tmp_path / folder))
        assert splits.train.source == str(tmp_path / "a/train")
        assert splits.validation.source == str(tmp_path / source)


def test_splits_of_idx_files(tmp_path):
    arrays = make_idx(tmp_path)
    write_idx(tmp_path / "validation-images-idx3-ubyte", np.zeros((3, 5, 6), dtype=np.uint8))
    assert len(load_images(args(train_dir=tmp_path)).validation) == 3
    splits = load_images(args(train_dir=tmp_path, train_split="test"))
    assert np.array_equal(splits.train[0][0], arrays["t10k"][0])
    for name in ("train-images-idx3-ubyte", "validation-images-idx3-ubyte"):
        (tmp_path / name).unlink()
    with pytest.raises(ValueError, match="has the splits test. To train on it: --train_split test"):
        load_images(args(train_dir=tmp_path))


def test_splits_of_datasets_in_any_case(tmp_path):
    from datasets import DatasetDict

    DatasetDict({"Training": make_dataset(6), "Dev": make_dataset(3)}).save_to_disk(tmp_path / "a")
    splits = load_images(args(dataset_name=tmp_path / "a"))
    assert (len(splits.train), len(splits.validation)) == (6, 3)


def test_torchvision_image_folder_of_splits(tmp_path):
    for name in ("train", "val"):
        make_folder(tmp_path / name)
    with pytest.raises(ValueError, match=r"holds splits \(train, val\), not classes: --train_dir"):
        load_images(args(dataset_name="torchvision:ImageFolder", train_dir=tmp_path))


# --- what a folder holds


@pytest.mark.parametrize("flag", ["train_dir", "dataset_name"])
def test_archives_are_refused_with_the_remedy(tmp_path, flag):
    for ending, remedy in ((".zip", "unzip"), (".tar", "tar xf"), (".tar.gz", "tar xf")):
        path = tmp_path / f"x{ending}"
        path.write_bytes(b"")
        with pytest.raises(
            ValueError, match=f"--{flag} .*x{ending}: .*Unpack it once .*{remedy}.*--train_dir .*/x[.]$"
        ):
            load_images(args(**{flag: path}))


def test_other_endings_are_counted_and_said(tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr("hf_mim.data.sources.folder.logger.warning", said.append)
    for n in range(2):
        colour(n).save(tmp_path / f"{n}.jfif", format="JPEG")
        (tmp_path / f"{n}.HEIC").write_bytes(b"x")
    (tmp_path / "LICENSE").write_text("x")
    assert find_images(tmp_path) == ["0.jfif", "1.jfif"]
    assert said == [f"{tmp_path}: files left out for their endings: 2 .heic, 1 no ending."]
    for path in tmp_path.glob("*.jfif"):
        path.unlink()
    with pytest.raises(ValueError, match="holds no picture. It holds files that end in 2 .heic, 1 no ending"):
        find_images(tmp_path)


def test_order_of_a_folder(tmp_path):
    for name in ("b/x.png", "b.png", "a/b/c.png", "a/b.png", "a.b/c.png", "a-b.png", "Z.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "b" / "up").symlink_to(tmp_path)
    (tmp_path / "linked").symlink_to(tmp_path / "a")  # once is enough
    (tmp_path / "gone.png").symlink_to(tmp_path / "nowhere.png")
    found = find_images(tmp_path)
    assert found == sorted(found, key=lambda path: Path(path).parts)
    assert set(found) == {
        "b/x.png", "b.png", "a/b/c.png", "a/b.png", "a.b/c.png", "a-b.png", "Z.png", "gone.png",
    }  # fmt: skip


def test_listing_costs_about_a_scan(tmp_path, monkeypatch):
    """Each folder is looked at and scanned once, no file on its own: counted, not timed."""
    for c in range(5):
        (tmp_path / str(c)).mkdir()
        for n in range(20):
            (tmp_path / str(c) / f"{n}.png").touch()
    calls = Counter()

    def counted(name):
        call = getattr(os, name)

        def count(*args, **kwargs):
            calls[name] += 1
            return call(*args, **kwargs)

        return count

    for name in ("scandir", "listdir", "stat", "lstat"):
        monkeypatch.setattr(os, name, counted(name))
    assert len(find_images(tmp_path)) == 100
    assert calls["scandir"] == 6 and not calls["listdir"]
    assert calls["stat"] + calls["lstat"] <= 2 * 6


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda root: root / "missing", "missing does not exist, expected a folder"),
        (
            lambda root: (root / "a.png").write_bytes(b"") and None or root / "a.png",
            "a.png is a file, expected a folder",
        ),
        (lambda root: root, r"holds no picture. Files that are read: \.jpg, .*\.npy"),
        (lambda root: make_folder(root, ("a",), 1), "has 1 picture, and no split to hold out"),
    ],
)
def test_bad_folders(tmp_path, make, message):
    with pytest.raises(ValueError, match=message):
        load_images(args(train_dir=make(tmp_path)))


def test_checking_the_first_picture(tmp_path):
    make_folder(tmp_path)
    assert check_images(load_images(args(train_dir=tmp_path)).train).shape == (3, 8, 8)
    with pytest.raises(ValueError, match=r"a/0.png: has 3 \(RGB\) channels, expected 5. Pass --num_channels 3"):
        check_images(load_images(args(train_dir=tmp_path, num_channels=5)).train)
    (tmp_path / "a" / "0.png").write_bytes(b"")
    with pytest.raises(BrokenImageError, match="a/0.png: the file is empty"):
        check_images(load_images(args(train_dir=tmp_path)).train)
    with pytest.raises(ValueError, match="x holds no picture that can be read"):
        check_images(ImageDataset([], 3, source="x"))


def test_broken_pictures_can_be_left_out_everywhere(tmp_path):
    make_folder(tmp_path)
    (tmp_path / "a" / "0.png").write_bytes(b"")
    flags = args(
        train_dir=tmp_path, validation_dir=tmp_path, skip_broken_images=True, image_mean="auto", image_std="auto"
    )
    pictures = load_images(flags).train
    assert int(check_images(pictures, skip_broken=True)[0, 0, 0]) == 11
    assert np.allclose(resolve_mean_std(flags, pictures)[0], np.mean([11, 12, 0, 1, 2]) / 255, atol=1e-3)
    with pytest.raises(BrokenImageError, match="a/0.png"):
        compute_mean_std(pictures)
    readable = without_broken(pictures)
    assert len(readable) == 5 and readable.labels["label"].tolist() == [0, 0, 1, 1, 1]


# --- idx files


def write_idx(path, array):
    data = bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)


def make_idx(root, suffix=""):
    rng = np.random.default_rng(0)
    arrays = {}
    for split, num in (("train", 12), ("t10k", 4)):
        arrays[split] = rng.integers(0, 256, (num, 5, 6), dtype=np.uint8)
        write_idx(root / f"{split}-images-idx3-ubyte{suffix}", arrays[split])
        write_idx(root / f"{split}-labels-idx1-ubyte{suffix}", np.arange(num, dtype=np.uint8) % 3)
    return arrays


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_idx(tmp_path, suffix):
    arrays = make_idx(tmp_path, suffix)
    splits = load_images(args(train_dir=tmp_path, num_channels=1))
    assert len(splits.train) == 12 and len(splits.validation) == 4
    assert np.array_equal(splits.train[3][0], arrays["train"][3])
    assert np.array_equal(splits.validation[1][0], arrays["t10k"][1])
    assert splits.train.labels["label"].tolist() == [0, 1, 2] * 4
    assert splits.train.label_names == {"label": ["0", "1", "2"]}
    assert splits.train.name(3) == f"row 3 of {tmp_path}/train-images-idx3-ubyte{suffix}"
    assert load_images(args(train_dir=tmp_path)).train[0].shape == (3, 5, 6)


def test_idx_without_labels_or_test(tmp_path):
    write_idx(tmp_path / "images-idx3-ubyte", np.zeros((40, 4, 4), dtype=np.uint8))
    splits = load_images(args(train_dir=tmp_path, num_channels=1))
    assert len(splits.train) == 38 and len(splits.validation) == 2 and splits.train.labels == {}


def test_idx_with_nothing_in_it(tmp_path):
    write_idx(tmp_path / "train-images-idx3-ubyte", np.zeros((0, 4, 4), dtype=np.uint8))
    with pytest.raises(ValueError, match="train-images-idx3-ubyte is empty: there is nothing to train on"):
        load_images(args(train_dir=tmp_path))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "begins with nothing, expected 000008"),
        (b"\0\0\x0d\x03" + bytes(20), "begins with 00000d03"),
        (b"\0\0\x08\x03\0\0", "cut off within its header"),
        (b"\0\0\x08\x01\0\0\0\x05abc", r"holds 3 values, but its header says 5 \(\(5,\)\)"),
        (b"\0\0\x08\x01\0\0\0\x02abc", "holds 3 values, but its header says 2"),
        (b"\0\0\x08\x03" + b"\xff" * 12, "its header says"),
    ],
)
def test_damaged_idx(tmp_path, data, message):
    (tmp_path / "x-ubyte").write_bytes(data)
    with pytest.raises(ValueError, match="x-ubyte: .*" + message):
        read_idx(tmp_path / "x-ubyte")


def test_damaged_gzip(tmp_path):
    make_idx(tmp_path, ".gz")
    path = tmp_path / "train-images-idx3-ubyte.gz"
    path.write_bytes(path.read_bytes()[:60])
    with pytest.raises(ValueError, match="train-images-idx3-ubyte.gz: cannot be read"):
        load_images(args(train_dir=tmp_path))


def test_idx_labels_of_another_number(tmp_path):
    make_idx(tmp_path)
    write_idx(tmp_path / "train-labels-idx1-ubyte", np.zeros(3, dtype=np.uint8))
    with pytest.raises(ValueError, match="holds 3 labels for the 12 pictures"):
        load_images(args(train_dir=tmp_path))


@pytest.mark.skipif(not FASHION_MNIST.is_dir(), reason=f"{FASHION_MNIST} is not here")
def test_the_real_fashion_mnist():
    splits = load_images(args(train_dir=FASHION_MNIST, num_channels=1))
    assert len(splits.train) == 60000 and len(splits.validation) == 10000
    assert splits.train.labels["label"][:10].tolist() == [9, 0, 0, 3, 0, 2, 7, 2, 5, 5]
    assert np.bincount(splits.validation.labels["label"]).tolist() == [1000] * 10
    mean, std = compute_mean_std(splits.train, 2000)
    assert abs(mean[0] - 0.2860) < 0.005 and abs(std[0] - 0.3530) < 0.005  # the published numbers


# --- datasets


def make_dataset(num=10, **extra):
    from datasets import ClassLabel, Dataset, Features, Image, Value

    columns = {"image": [colour(i) for i in range(num)], "shape": [i % 2 for i in range(num)], "n": list(range(num))}
    features = {"image": Image(), "shape": ClassLabel(names=["round", "square"]), "n": Value("int32")}
    return Dataset.from_dict(columns, features=Features(features))


def make_parquet(root, num_files=4):
    root.mkdir(exist_ok=True)
    for split, num in (("train", 12), ("test", 4)):
        files = num_files if split == "train" else 1
        for n in range(files):
            make_dataset(num).shard(files, n, contiguous=True).to_parquet(
                root / f"{split}-{n:05}-of-{files:05}.parquet"
            )
    return root


def test_parquet_folder(tmp_path):
    splits = load_images(args(dataset_name=make_parquet(tmp_path / "data")))
    assert len(splits.train) == 12 and len(splits.validation) == 4  # the split called test
    assert int(splits.train[7].float().mean()) == 7
    assert splits.train.label_names == {"shape": ["round", "square"]}
    assert splits.train.labels["shape"].tolist() == [0, 1] * 6
    assert splits.train.name(7) == f"row 7 of {tmp_path / 'data'} (train)"
    part = splits.train.select([5, 3])
    assert [int(p.float().mean()) for p in part] == [5, 3] and part.labels["shape"].tolist() == [1, 1]
    assert part.name(0) == splits.train.name(5) and int(part.select([1])[0].float().mean()) == 3
    again = pickle.loads(pickle.dumps(part))
    assert torch.equal(again[0], part[0])


def test_saved_to_disk(tmp_path):
    from datasets import DatasetDict

    make_dataset(40).save_to_disk(tmp_path / "one")
    splits = load_images(args(dataset_name=tmp_path / "one", label_column_names=["n", "shape"]))
    assert len(splits.train) == 38 and len(splits.validation) == 2
    assert splits.train.label_names["n"] == [str(i) for i in range(40)]
    for part in vars_of(splits):
        assert [int(p.float().mean()) for p in part] == part.labels["n"].tolist()
    DatasetDict({"fit": make_dataset(6), "val": make_dataset(3)}).save_to_disk(tmp_path / "two")
    splits = load_images(args(dataset_name=tmp_path / "two", train_split="fit"))
    assert (len(splits.train), len(splits.validation)) == (6, 3)
    with pytest.raises(ValueError, match="--train_split train: .* has the splits fit, val"):
        load_images(args(dataset_name=tmp_path / "two"))
    with pytest.raises(ValueError, match="leave out --streaming"):
        load_images(args(dataset_name=tmp_path / "two", streaming=True))


def test_rows_without_a_label(tmp_path):
    make_dataset(6).map(lambda row: {"shape": None if row["n"] == 2 else row["shape"]}).save_to_disk(tmp_path / "a")
    splits = load_images(args(dataset_name=tmp_path / "a", label_column_names=["n", "shape"]))
    labels = splits.train.labels
    assert [(n, s) for n, s in zip(labels["n"], labels["shape"], strict=True) if s < 0] == [(2, -1)]


def test_missing_pictures_are_broken_and_missing_labels_are_none(tmp_path):
    from datasets import ClassLabel, Dataset, Features, Image, Value

    names = ["cat", None, "dog", "cat"]
    data = Dataset.from_dict(
        {
            "image": [colour(0), None, colour(2), colour(3)],
            "name": names,
            "number": [0.5, None, float("nan"), 1.5],
            "shape": [1, None, 0, -1],
        },
        features=Features(
            {
                "image": Image(),
                "name": Value("string"),
                "number": Value("float32"),
                "shape": ClassLabel(names=["a", "b"]),
            }
        ),
    )
    data.to_parquet(tmp_path / "train.parquet")
    labels = ["name", "number", "shape"]
    flags = {"dataset_name": tmp_path / "train.parquet"}
    (tmp_path / "both").mkdir()
    for split in ("train", "test"):
        data.to_parquet(tmp_path / "both" / f"{split}.parquet")
    pictures = load_images(args(dataset_name=tmp_path / "both", label_column_names=labels)).validation
    assert pictures.labels["name"].tolist() == [0, -1, 1, 0] and pictures.label_names["name"] == ["cat", "dog"]
    assert pictures.labels["number"].tolist() == [0, -1, -1, 1]
    assert pictures.labels["shape"].tolist() == [1, -1, 0, -1]
    with pytest.raises(BrokenImageError, match=r"row 1 of .*both \(test\): the picture is missing \(None\)"):
        pictures[1]
    assert len(without_broken(pictures)) == 3 and pictures.content_fingerprint()
    flags |= {"streaming": True, "max_eval_samples": 2, "skip_broken_images": True}
    splits = load_images(args(**flags))
    assert splits.validation.labels["shape"].tolist() == [1, -1]
    assert len(without_broken(splits.validation)) == 1 and len(list(splits.train)) == 2


@pytest.mark.parametrize("streaming", [False, True])
def test_missing_arrays(tmp_path, streaming):
    from datasets import Dataset, Features, List, Value

    array = np.ones((4, 4, 5), dtype=np.uint8).tolist()
    features = Features({"bands": List(List(List(Value("uint8"))))})
    Dataset.from_dict({"bands": [array, None, None, array]}, features=features).to_parquet(tmp_path / "a.parquet")
    flags = {"image_column_name": "bands", "num_channels": 5, "max_eval_samples": 2, "skip_broken_images": True}
    splits = load_images(args(dataset_name=tmp_path / "a.parquet", streaming=streaming, **flags))
    if streaming:
        assert len(list(splits.train)) == 1 and len(without_broken(splits.validation)) == 1
    else:
        assert len(without_broken(splits.train)) + len(without_broken(splits.validation)) == 2


def test_missing_picture_of_torchvision():
    from hf_mim.data.sources.torchvision import _FirstOfEach

    pictures = ImageDataset(_FirstOfEach([(None, 1), (colour(1), 0)]), 3, source="x")
    assert len(without_broken(pictures)) == 1


# --- multi-label


@pytest.mark.parametrize("kind", ["classes", "numbers", "names", "bits", "bools"])
def test_multi_label_columns(tmp_path, kind):
    from datasets import ClassLabel, Dataset, Features, Image, List, Value

    values, feature, names = {
        "classes": ([[0, 2], [], None, [1]], List(ClassLabel(names=["a", "b", "c"])), ["a", "b", "c"]),
        "numbers": ([[3, 9], [], None, [5]], List(Value("int32")), ["3", "5", "9"]),
        "names": ([["a", "c"], [], None, ["b"]], List(Value("string")), ["a", "b", "c"]),
        "bits": ([[1, 0, 1], [0, 0, 0], None, [0, 1, 0]], List(Value("int64")), ["0", "1", "2"]),
        "bools": (
            [[True, False, True], [False] * 3, None, [False, True, False]],
            List(Value("bool")),
            ["0", "1", "2"],
        ),
    }[kind]
    data = Dataset.from_dict(
        {"image": [colour(n) for n in range(4)], "tags": values},
        features=Features({"image": Image(), "tags": feature}),
    )
    (tmp_path / "a").mkdir()
    for split in ("train", "test"):
        data.to_parquet(tmp_path / "a" / f"{split}.parquet")
    wanted = None if kind == "classes" else ["tags"]
    for streaming in (False, True) if kind == "classes" else (False,):
        splits = load_images(args(dataset_name=tmp_path / "a", label_column_names=wanted, streaming=streaming))
        pictures = splits.validation
        assert pictures.multi_label("tags") and pictures.label_names == {"tags": names}
        assert pictures.labels["tags"].dtype == np.int8
        assert pictures.labels["tags"].tolist() == [[1, 0, 1], [0, 0, 0], [-1] * 3, [0, 1, 0]]
        assert pictures.select([3, 0]).labels["tags"].tolist() == [[0, 1, 0], [1, 0, 1]]


def test_labels_of_other_types_are_refused(tmp_path):
    from datasets import Dataset

    data = make_dataset(4)
    Dataset.from_dict({"image": data["image"][:], "box": [{"x": 1}] * 4}).cast_column(
        "image", data.features["image"]
    ).save_to_disk(tmp_path / "a")
    with pytest.raises(ValueError, match="--label_column_names box: .* expected classes"):
        load_images(args(dataset_name=tmp_path / "a", label_column_names=["box"]))


def test_true_causes_are_said(tmp_path):
    (tmp_path / "a.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(ValueError, match="a.parquet could not be loaded: .*Parquet magic bytes"):
        load_images(args(dataset_name=tmp_path / "a.parquet"))


def test_one_parquet_file(tmp_path):
    make_dataset(20).to_parquet(tmp_path / "a.parquet")
    assert len(load_images(args(dataset_name=tmp_path / "a.parquet")).train) == 19


@pytest.mark.parametrize("kind", ["Array3D", "list"])
def test_arrays_of_five_channels(tmp_path, kind):
    from datasets import Array3D, Dataset, Features, List, Value

    arrays = np.random.default_rng(0).integers(0, 65536, (6, 5, 4, 7), dtype=np.uint16)
    feature = Array3D((5, 4, 7), "uint16") if kind == "Array3D" else List(List(List(Value("uint16"))))
    dataset = Dataset.from_dict({"bands": arrays.tolist()}, features=Features({"bands": feature}))
    dataset.save_to_disk(tmp_path / "data")
    splits = load_images(
        args(dataset_name=tmp_path / "data", num_channels=5, image_column_name=None if kind == "Array3D" else "bands")
    )
    found = torch.stack([*splits.train, *splits.validation])
    assert found.dtype == torch.float32 and found.shape == (6, 5, 4, 7)
    expected = torch.from_numpy(arrays.astype(np.float32) / 65535)
    assert all(any(torch.allclose(a, b) for b in expected) for a in found)


def test_bad_columns(tmp_path):
    from datasets import Dataset

    make_dataset().save_to_disk(tmp_path / "a")
    Dataset.from_dict({"text": ["x"], "n": [1]}).save_to_disk(tmp_path / "b")
    both = make_dataset()
    both.map(lambda row: {"image2": row["image"]}).save_to_disk(tmp_path / "c")
    # Older `datasets` cannot write an empty one.
    pyarrow.parquet.ParquetWriter(tmp_path / "d.parquet", make_dataset().data.schema).close()
    for name, kwargs, message in (
        (
            "a",
            {"image_column_name": "img"},
            r"--image_column_name img: .* It has: image \(Image\), shape \(ClassLabel\)",
        ),
        ("a", {"label_column_names": ["x"]}, "--label_column_names x: .* It has: image, shape, n"),
        ("b", {}, r"no column of pictures .* It has: text \(Value\), n \(Value\)"),
        ("c", {}, "pictures in image, image2. Choose one by --image_column_name"),
        ("d.parquet", {}, "could not be loaded: .* no data"),
    ):
        with pytest.raises(ValueError, match=message):
            load_images(args(dataset_name=tmp_path / name, **kwargs))
    with pytest.raises(ValueError, match="--dataset_name nobody/nothing could not be loaded"):
        load_images(args(dataset_name="nobody/nothing"))


def test_a_broken_picture_in_a_row(tmp_path):
    from datasets import Dataset, Features, Image

    values = [{"bytes": b"no picture", "path": "x.png"}] * 2
    Dataset.from_dict({"image": values}, features=Features({"image": Image()})).save_to_disk(tmp_path / "a")
    pictures = load_images(args(dataset_name=tmp_path / "a")).train
    with pytest.raises(BrokenImageError, match=r"x.png \(row \d of .*a \(train\)\): not a picture"):
        pictures[0]


@pytest.mark.parametrize("source", ["folder", "parquet", "idx"])
def test_workers_read_the_same(tmp_path, source):
    if source == "folder":
        flags = args(train_dir=make_folder(tmp_path / "x", num=6))
    elif source == "parquet":
        flags = args(dataset_name=make_parquet(tmp_path / "x"))
    else:
        make_idx(tmp_path)
        flags = args(train_dir=tmp_path)
    pictures = load_images(flags).train
    transform = PretrainingTransform((8, 8), 4, [0.5] * 3, [0.5] * 3)
    runs = [
        list(
            DataLoader(
                PretrainingDataset(pictures, transform),
                sampler=EpochSampler(len(pictures)),
                batch_size=4,
                num_workers=num_workers,
                collate_fn=pretraining_collator,
            )
        )
        for num_workers in (0, 2)
    ]
    assert len(runs[0]) == len(runs[1]) > 1
    for a, b in zip(*runs, strict=True):
        assert torch.equal(a["pixel_values"], b["pixel_values"]) and torch.equal(a["noise"], b["noise"])


# --- streaming


def test_streaming_arrays(tmp_path):
    from datasets import Dataset, Features, List, Value

    arrays = np.random.default_rng(0).integers(0, 256, (6, 4, 7, 5), dtype=np.uint8)
    features = Features({"bands": List(List(List(Value("uint8"))))})
    Dataset.from_dict({"bands": arrays.tolist()}, features=features).to_parquet(tmp_path / "a.parquet")
    splits = load_images(
        args(
            dataset_name=tmp_path / "a.parquet",
            streaming=True,
            num_channels=5,
            image_column_name="bands",
            max_eval_samples=2,
        )
    )
    assert np.array_equal(torch.stack(list(splits.validation)).permute(0, 2, 3, 1), arrays[:2])
    assert sorted(p.sum().item() for p in splits.train) == sorted(arrays[2:].sum((1, 2, 3)).tolist())


def test_files_as_plain_bytes(tmp_path):
    """Parquet that something else wrote: bytes, or a struct of bytes and path, and no word of pictures."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    data = [row["bytes"] for row in make_dataset(4).cast_column("image", encoded())["image"]]
    structs = [{"bytes": entry, "path": None} for entry in data]
    pq.write_table(pa.table({"plain": data, "struct": structs}), tmp_path / "a.parquet")
    for column in ("plain", "struct"):
        for streaming in (False, True):
            splits = load_images(
                args(
                    dataset_name=tmp_path / "a.parquet",
                    image_column_name=column,
                    streaming=streaming,
                    max_eval_samples=1,
                )
            )
            pictures = [*splits.train, *splits.validation]
            assert sorted(int(p.float().mean()) for p in pictures) == [0, 1, 2, 3]


def encoded():
    from datasets import Image

    return Image(decode=False)


def test_streaming(tmp_path):
    splits = load_images(args(dataset_name=make_parquet(tmp_path / "data"), streaming=True), seed=1)
    assert isinstance(splits.train, ImageStream)
    first, second = ([int(p.float().mean()) for p in each_pass(splits.train, epoch)] for epoch in (0, 1))
    assert sorted(first) == sorted(second) == list(range(12)) and first != second
    assert [int(p.float().mean()) for p in each_pass(splits.train, 0)] == first
    assert len(splits.validation) == 4 and splits.validation.labels["shape"].tolist() == [0, 1, 0, 1]
    memory = splits.train.take(5)
    assert isinstance(memory, ImageDataset) and len(memory) == 5
    assert [int(p.float().mean()) % 2 for p in memory] == memory.labels["shape"].tolist()
    assert check_images(splits.train).shape == (3, 8, 8)
    assert len(compute_mean_std(splits.train, 4)[0]) == 3


def each_pass(stream, epoch):
    stream.set_epoch(epoch)
    return list(stream)


def test_streaming_without_a_held_out_split(tmp_path):
    make_dataset(20).to_parquet(tmp_path / "a.parquet")
    flags = args(dataset_name=tmp_path / "a.parquet", streaming=True, max_eval_samples=5, max_train_samples=6)
    splits = load_images(flags)
    assert [int(p.float().mean()) for p in splits.validation] == [0, 1, 2, 3, 4]
    assert sorted(int(p.float().mean()) for p in splits.train) == [5, 6, 7, 8, 9, 10]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_streaming_over_processes_and_workers(tmp_path, num_workers):
    """Every picture once in a pass, whoever reads it."""
    make_parquet(tmp_path / "data")
    found = []
    for rank in (0, 1):
        pictures = load_images(args(dataset_name=tmp_path / "data", streaming=True)).train
        transform = PretrainingTransform((8, 8), 4, [0.0] * 3, [1.0] * 3)
        dataset = StreamingPretrainingDataset(pictures, transform, rank=rank, num_processes=2)
        batches = iter(DataLoader(dataset, batch_size=3, num_workers=num_workers, collate_fn=pretraining_collator))
        for _ in range(2):
            found += (next(batches)["pixel_values"].mean(dim=(1, 2, 3)) * 255).round().int().tolist()
    assert sorted(found) == list(range(12))


def test_a_worker_that_is_a_pass_ahead_does_not_change_the_order_of_another(tmp_path, monkeypatch):
    make_parquet(tmp_path / "data")
    pictures = load_images(args(dataset_name=tmp_path / "data", streaming=True)).train
    transform = PretrainingTransform((8, 8), 4, [0.0] * 3, [1.0] * 3)
    dataset = StreamingPretrainingDataset(pictures, transform, rank=1, num_processes=2)

    def one_pass():
        items = itertools.islice(iter(dataset), 6)
        return [round(float(item["pixel_values"].mean()) * 255) for item in items]

    expected = one_pass()
    set_epoch = ImageStream.set_epoch

    def and_another_goes_ahead(self, epoch):
        set_epoch(self, epoch)
        dataset.pictures.stream.set_epoch(epoch + 3)

    monkeypatch.setattr(ImageStream, "set_epoch", and_another_goes_ahead)
    assert one_pass() == expected


def test_streaming_leaves_out_broken_pictures(tmp_path):
    from datasets import Dataset, Features, Image

    good = make_dataset(3)["image"][:]
    values = [good[0], {"bytes": b"broken", "path": "x.png"}, good[2]]
    Dataset.from_dict({"image": values}, features=Features({"image": Image()})).to_parquet(tmp_path / "train.parquet")
    flags = {"dataset_name": tmp_path / "train.parquet", "streaming": True, "max_eval_samples": 1}
    with pytest.raises(BrokenImageError, match=r"x.png \(in .*train.parquet\)"):
        list(load_images(args(**flags)).train)
    stream = load_images(args(**flags, skip_broken_images=True)).train
    assert len(list(stream)) == 1 and stream.num_broken == 1


# --- torchvision


def test_torchvision(tmp_path):
    """CIFAR10's files, as torchvision wants them, small."""
    from torchvision.datasets import CIFAR10

    root = tmp_path / CIFAR10.base_folder
    root.mkdir()
    rng = np.random.default_rng(0)
    for name, _ in [*CIFAR10.train_list, *CIFAR10.test_list]:
        entry = {"data": rng.integers(0, 256, (2, 3072), dtype=np.uint8), "labels": [3, 7]}
        (root / name).write_bytes(pickle.dumps(entry))
    (root / CIFAR10.meta["filename"]).write_bytes(pickle.dumps({"label_names": list("abcdefghij")}))
    flags = args(dataset_name="torchvision:CIFAR10", train_dir=tmp_path)
    with pytest.raises(ValueError, match="--validation_split valid: torchvision:CIFAR10 has the splits train, test"):
        load_images(args(dataset_name="torchvision:CIFAR10", train_dir=tmp_path, validation_split="valid"))
    with pytest.raises(ValueError, match=r"torchvision.datasets.CIFAR10\(.*download=True\)"):
        load_images(flags)  # its checksums are not those of the real files
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CIFAR10, "_check_integrity", lambda self: True)
        patch.setattr("torchvision.datasets.cifar.check_integrity", lambda *_: True)
        splits = load_images(flags)
        turned = load_images(args(dataset_name="torchvision:CIFAR10", train_dir=tmp_path, train_split="test"))
    assert len(splits.train) == 10 and len(splits.validation) == 2
    assert len(turned.train) == 2 and len(turned.validation) == 10
    assert splits.train[0].shape == (3, 32, 32)
    assert splits.train.labels["label"].tolist() == [3, 7] * 5
    assert splits.train.label_names["label"] == list("abcdefghij")
    assert splits.validation.name(1) == "row 1 of torchvision:CIFAR10 False"


def test_labels_that_are_not_there(tmp_path):
    make_folder(tmp_path)
    with pytest.raises(ValueError, match="--label_column_names count: the data has the labels label"):
        load_images(args(train_dir=tmp_path, label_column_names=["count"]))
    assert load_images(args(train_dir=tmp_path, label_column_names=["label"])).train.labels.keys() == {"label"}


def test_torchvision_broken_picture(tmp_path):
    make_folder(tmp_path)
    pictures = load_images(args(dataset_name="torchvision:ImageFolder", train_dir=tmp_path)).train
    for path in tmp_path.rglob("*.png"):
        path.write_bytes(b"broken")
    with pytest.raises(BrokenImageError, match="picture 0 of ImageFolder"):
        pictures[0]


def test_torchvision_idx(tmp_path):
    (tmp_path / "FashionMNIST" / "raw").mkdir(parents=True)
    arrays = make_idx(tmp_path / "FashionMNIST" / "raw")
    splits = load_images(args(dataset_name="torchvision:FashionMNIST", train_dir=tmp_path, num_channels=1))
    assert np.array_equal(splits.train[2][0], arrays["train"][2]) and len(splits.validation) == 4


def test_torchvision_folder_without_splits(tmp_path):
    make_folder(tmp_path)
    splits = load_images(args(dataset_name="torchvision:ImageFolder", train_dir=tmp_path))
    assert len(splits.train) == 5 and len(splits.validation) == 1
    assert splits.train.label_names == {"label": ["a", "b"]}


def test_torchvision_errors(tmp_path):
    for name, root, message in (
        ("cifar10", tmp_path, "Did you mean torchvision:CIFAR10?"),
        ("Nothing", tmp_path, "no data set Nothing"),
        ("CIFAR10", None, "needs --train_dir"),
        ("CIFAR10", tmp_path / "x", "does not exist"),
        ("CIFAR100", tmp_path, "download=True"),
        ("STL10", tmp_path, "download=True"),
    ):
        with pytest.raises(ValueError, match=message):
            load_images(args(dataset_name=f"torchvision:{name}", train_dir=root))


# --- the embedded scenes


def test_scenes_by_default(tmp_path):
    flags = args(max_train_samples=6, max_eval_samples=4, image_size=[32], data_cache_dir=tmp_path)
    splits = load_images(flags)
    assert len(splits.train) == 6 and len(splits.validation) == 4
    assert splits.train[0].shape == (3, 32, 32) and splits.train[0].dtype == torch.uint8
    assert set(splits.train.labels) == {"count", "distance", "shape", "color"}
    assert all(column.shape == (6,) for column in splits.train.labels.values())
    assert len(splits.train.label_names["count"]) == 8
    assert not torch.equal(splits.train[0], splits.validation[0])
    from hf_mim.data.scenes import scenes

    drawn = scenes("train", 6, image_size=32, seed=0, cache_dir=str(tmp_path))
    assert np.array_equal(splits.train[5].permute(1, 2, 0), np.array(drawn[5]["image"]))


@pytest.mark.parametrize("kept", [True, False])
def test_scenes_are_annotated_where_asked_for(tmp_path, monkeypatch, kept):
    from hf_mim.data.scenes import annotate_scene
    from hf_mim.data.sources import scenes as source

    monkeypatch.setattr(source, "_MAX_BYTES", 1 << 30 if kept else 0)
    splits = load_images(args(max_train_samples=6, max_eval_samples=4, image_size=[32, 48], data_cache_dir=tmp_path))
    assert splits.validation.mask_names == ["background", "sphere", "cube", "cylinder"]
    # Annotations follow their pictures through a choice of some, whatever is forgotten of the labels.
    chosen = splits.validation.select([3, 1])
    chosen.keep_labels(["count"])
    for index, scene in ((0, 3), (1, 1), (0, 3)):
        item = chosen.annotated(index, ["mask", "instances", "depth", "boxes", "classes"])
        known = annotate_scene(scene, split="validation", image_size=(32, 48))
        assert torch.equal(item.pop("image"), splits.validation[scene])
        assert item.keys() == vars(known).keys()
        for name, value in item.items():
            assert isinstance(value, torch.Tensor) and np.array_equal(value.numpy(), getattr(known, name))
    assert chosen.annotated(0, []).keys() == {"image"}
    with pytest.raises(KeyError, match="heat"):
        chosen.annotated(0, ["heat"])


# --- mean and standard deviation


def test_mean_and_std_by_hand():
    pictures = ImageDataset(
        [np.array([[[0, 255, 7]]], dtype=np.uint8), np.array([[[255, 255, 7]]], dtype=np.uint8)], 3, source="x"
    )
    mean, std = compute_mean_std(pictures)
    assert np.allclose(mean, [0.5, 1.0, 7 / 255])
    assert np.allclose(std, [0.5, 1.0, 1.0])  # a channel that never changes is not divided by 0
    floats = ImageDataset([np.array([[[2.0, 4.0]]], dtype=np.float32)], 1, source="x")
    assert compute_mean_std(floats) == ([3.0], [1.0])


def test_which_mean_and_std():
    pictures = ImageDataset([np.array([[0, 255]], dtype=np.uint8)], 3, source="x")
    assert resolve_mean_std(args(), pictures)[0] == [0.485, 0.456, 0.406]
    assert np.allclose(resolve_mean_std(args(image_mean=["auto"], image_std=["auto"]), pictures)[0], [0.5] * 3)
    assert resolve_mean_std(args(image_mean=["1"] * 3, image_std=["2"] * 3), pictures) == ([1.0] * 3, [2.0] * 3)
    grey = ImageDataset([np.array([[0, 255]], dtype=np.uint8)], 1, source="x")
    assert np.allclose(resolve_mean_std(args(num_channels=1), grey), [[0.5], [0.5]])


# --- packages that are not there


_WITHOUT = """
import sys
class Without:
    def find_spec(name, path=None, target=None):
        if name.split(".")[0] in ("datasets", "evaluate", "timm", "matplotlib", "tifffile"):
            raise ModuleNotFoundError(f"no {name}", name=name)
sys.meta_path.insert(0, Without)
from hf_mim.data.loading import DataArguments, check_images, load_images, resolve_mean_std
for root in sys.argv[1:]:
    pictures = load_images(DataArguments(train_dir=root))
    check_images(pictures.train), resolve_mean_std(DataArguments(train_dir=root), pictures.train)
from hf_mim.missing import say_missing
for flags in ({}, {"dataset_name": "x"}):
    try:
        load_images(DataArguments(**flags))
    except ImportError as error:
        print(say_missing(error))
"""


def test_what_is_not_asked_for_need_not_be_there(tmp_path):
    make_folder(tmp_path / "folder")
    (tmp_path / "idx").mkdir()
    make_idx(tmp_path / "idx")
    result = run(["-c", _WITHOUT, str(tmp_path / "idx"), str(tmp_path / "folder")])
    assert result.returncode == 0, result.stderr
    message = "The package datasets is wanted for this and is not installed: pip install datasets"
    assert result.stdout.splitlines() == [message] * 2


# --- other channels among the pictures


def test_other_channels_among_the_pictures(tmp_path):
    """Three channels take them all; any other number names the picture that does not fit."""
    for n, mode in enumerate(("RGB", "L", "RGBA", "P", "CMYK", "1", "LA", "I;16")):
        Image.new(mode, (8, 8)).save(tmp_path / f"{n}.{'jpg' if mode == 'CMYK' else 'png'}")
    splits = load_images(args(train_dir=tmp_path))
    assert {tuple(p.shape) for s in (splits.train, splits.validation) for p in s} == {(3, 8, 8)}
    rgba = load_images(args(train_dir=tmp_path, num_channels=4)).train
    message = r"0.png: has 3 \(RGB\) channels, expected 4.*--num_channels 3.*`hf_mim check` with the same flags"
    with pytest.raises(ValueError, match=message):
        [rgba[i] for i in range(len(rgba))]
