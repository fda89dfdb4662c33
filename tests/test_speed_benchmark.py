"""benchmarks/speed.py: what needs no measuring of minutes."""

import json
import sys

import pytest
from PIL import Image

from hf_mim.registry import MODEL_TYPES
from tiny_training import REPOSITORY


@pytest.fixture(scope="module")
def speed():
    sys.path.insert(0, str(REPOSITORY / "benchmarks"))
    try:
        import speed
    finally:
        sys.path.pop(0)
    return speed


def run(speed, monkeypatch, *words: str) -> None:
    monkeypatch.setattr(sys, "argv", ["speed.py", *words])
    speed.main()


def test_hours_of_the_recipes(speed, monkeypatch, tmp_path, capsys):
    run(speed, monkeypatch, "hours", "--images_per_second", "1000", "--output", str(tmp_path / "hours.json"))
    cases = json.loads((tmp_path / "hours.json").read_text())["cases"]
    # 800 epochs of 1,281,167 pictures at 1,000 a second; dBOT has two stages.
    assert cases["vit_mae_base_imagenet"]["hours"] == pytest.approx(284.7, abs=0.1)
    assert cases["dbot_base_imagenet"]["epochs"] == 1600
    assert {name.split("_")[0] for name in cases} >= {"pilamim", "tec", "ocl", "dbot", "ijepa"}
    assert "vit_mae_base_imagenet" in capsys.readouterr().out
    assert Image.open(tmp_path / "hours.png").width > 300


def test_data_is_measured(speed, monkeypatch, tmp_path, capsys):
    words = ["--num_pictures", "8", "--picture_size", "64", "--image_size", "32", "--workers", "0", "--rounds", "1"]
    run(speed, monkeypatch, "data", *words, "--output", str(tmp_path / "data.json"))
    cases = json.loads((tmp_path / "data.json").read_text())["cases"]
    assert list(cases) == ["float32, Pillow", "float32", "bytes", "bytes, packed", "bytes, normalised"]
    assert cases["float32, Pillow"]["times_pillow"] == 1 and all(
        case["images_per_second"] > 0 for case in cases.values()
    )


def test_a_step_of_every_method(speed):
    for method in (*MODEL_TYPES, *([speed.PEER] if speed.has_peer() else [])):
        case = speed.Case(f"{method}/fp32", "tiny", 2, "cpu")
        assert case.time(1) > 0 and case.loss().isfinite()
