"""`hf_mim check`: what it finds in a data set, and its exit status."""

import sys

import numpy as np
import pytest
from PIL import Image

from hf_mim import __main__ as command
from hf_mim.data.dataset import ImageDataset
from hf_mim.data.inspection import inspect_images
from hf_mim.jobs.check import main


def save(path, value=0, mode="RGB", size=(8, 6)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, value).save(path)


def folder(root):
    for split, number in (("train", 6), ("val", 3)):
        for n in range(number):
            save(root / split / "ab"[n % 2] / f"{n}.png", (10 * n, number, 0), size=(8 + n, 6))
    return root


def check(capsys, *argv):
    status = main([str(arg) for arg in argv] + ["--num_workers=0"])
    said = capsys.readouterr()
    return status, said.out + said.err


def test_nothing_wrong(tmp_path, capsys):
    status, said = check(capsys, folder(tmp_path))
    assert status == 0
    for line in (
        f"Training: 6 pictures of {tmp_path}/train\n  height: 6 to 6, median 6\n  width: 8 to 13, median 10.5\n"
        "  stored as RGB, 8 bits a channel: 6\n  label label: 2 classes\n    a: 3\n    b: 3\n",
        f"Held out: 3 pictures of {tmp_path}/val",
        "Copies: 0 pictures",
        "All 9 pictures can be read.",
    ):
        assert line in said


def test_everything_wrong(tmp_path, capsys):
    train = folder(tmp_path) / "train" / "a"
    (train / "empty.png").write_bytes(b"")
    (train / "gone.png").symlink_to(tmp_path / "nowhere")
    (train / "cut.png").write_bytes((train / "0.png").read_bytes()[:50])
    save(train / "large.png", size=(100, 100))
    save(train / "grey.png", 7, mode="L")
    save(tmp_path / "val" / "b" / "leak.png", (0, 6, 0))
    np.save(train / "array.npy", np.zeros((5, 5, 2), dtype=np.uint8))
    (train / "x.heic").write_bytes(b"x")
    status, said = check(capsys, "--train_dir", tmp_path, "--max_image_pixels=5000")
    assert status == 1
    for line in (
        f"  missing (no picture in the row): 1\n    {train}/gone.png: there is no such file.",
        "  broken: 2\n",
        f"    {train}/empty.png: the file is empty",
        f"    {train}/cut.png: broken or cut off",
        f"(--max_image_pixels): 1\n    {train}/large.png: 100 x 100 are 10000 pixels",
        f"(--num_channels): 1\n    {train}/array.npy: has 2",
        f"  odd, L, 8 bits a channel: 1\n    {train}/grey.png",
        f"Copies: 1 pictures hold the same bytes as another.\n    {tmp_path}/val/b/leak.png = {train}/0.png",
        "5 of 16 pictures cannot be trained on",
    ):
        assert line in said, line


def test_data_sets_and_rows_without_a_picture(tmp_path, capsys):
    from datasets import ClassLabel, Dataset, Features, List
    from datasets import Image as Column

    picture = Image.new("RGB", (4, 4))
    data = Dataset.from_dict(
        {"image": [picture, None] * 5, "tags": [[0, 1], None] * 5},
        features=Features({"image": Column(), "tags": List(ClassLabel(names=["x", "y"]))}),
    )
    for split in ("train", "test"):
        data.to_parquet(tmp_path / f"{split}.parquet")
    status, said = check(capsys, tmp_path, "--max_listed=2")
    assert status == 1
    assert "missing (no picture in the row): 5\n" in said and "... and 3 more" in said
    assert "label tags (multi-label): 2 classes; 5 pictures have none\n    x: 5\n    y: 5" in said
    assert check(capsys, tmp_path / "train.parquet")[0] == 1


def test_workers_find_the_same(tmp_path):
    values = [np.full((4, 4 + n, 3), n, dtype=np.uint8) for n in range(40)] + [None]
    found = [inspect_images(ImageDataset(values, 3, source="x"), num_workers=n) for n in (0, 2)]
    for name in ("heights", "widths", "digests"):
        assert np.array_equal(*(getattr(one, name) for one in found))
    assert found[0].faults == found[1].faults and len(found[0].faults["missing"]) == 1
    assert found[0].widths.tolist() == [*range(4, 44), 0] and found[0].forms == found[1].forms


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["nowhere/at/all"], "could not be loaded"),
        (["--train_dir=nowhere"], "nowhere does not exist"),
        (["--dataset_name=x", "--streaming"], "leave out --streaming"),
        (["--max_listed=-1"], "--max_listed must not be negative"),
    ],
)
def test_errors_are_one_line(argv, message, capsys):
    status, said = check(capsys, *argv)
    assert status == 1 and message in said and "Traceback" not in said


def test_a_broken_picture_points_to_the_check():
    from hf_mim.data.images import BrokenImageError
    from hf_mim.training.errors import plain_message

    assert "`hf_mim check` with the same flags" in plain_message(BrokenImageError("a.png: broken."))


def test_the_command(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["hf_mim"])
    folder(tmp_path)
    assert command.main(["check", str(tmp_path), "--num_workers=2"]) == 0
    assert "All 9 pictures can be read." in capsys.readouterr().out
