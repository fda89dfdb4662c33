"""Segmentation and depth by frozen patches: by hand, beside what is known of the truth, and at the end of the jobs."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from hf_mim.data.dataset import IGNORED, ImageDataset
from hf_mim.data.image_processing import annotation_transform, build_image_processor, evaluation_transform
from hf_mim.evaluation import dense
from hf_mim.evaluation.dense import RawPatches, evaluate_dense, raw_patches
from hf_mim.evaluation.encoders import FeatureEncoder
from hf_mim.evaluation.report import dense_table, describe_dense
from hf_mim.jobs.pretraining import main as pretrain
from hf_mim.jobs.representation_report import main as report
from hf_mim.models.pilamim.configuration_pilamim import PiLaMIMConfig
from hf_mim.models.pilamim.modeling_pilamim import PiLaMIMModel
from tiny_training import FLAGS, write_pictures

SIZE, PATCH = 32, 4


class Told:
    """An encoder whose patch features are a function of the picture's patches (batch, rows, columns, pixels)."""

    device = torch.device("cpu")

    def __init__(self, function):
        self.function = function

    def patches(self, pixel_values):
        return self.function(RawPatches((PATCH, PATCH)).patches(pixel_values))


def striped(number, seed=0):
    """Pictures of a dark band on the left and a bright one on the right, whose border is one of patches; and which."""
    rng = np.random.default_rng(seed)
    borders = rng.choice(np.arange(1, SIZE // PATCH), (number, 1, 1)) * PATCH
    bands = (np.arange(SIZE) >= borders).astype(np.uint8).repeat(SIZE, axis=1)
    return (100 + 100 * bands[..., None]).repeat(3, axis=3), bands


def data(number, seed=0, **changes):
    values, bands = striped(number, seed)
    depth = np.where(bands == 1, 4.0, 8.0).astype(np.float32)
    annotations = {"mask": bands, "depth": depth} | changes
    annotations = {name: column for name, column in annotations.items() if column is not None}
    return ImageDataset(values, 3, source="bands", annotations=annotations, mask_names=["left", "right"])


PROCESSOR = build_image_processor((SIZE, SIZE), 3, [0.5] * 3, [0.25] * 3)


def test_raw_patches_by_hand():
    pictures = torch.arange(2 * 3 * 4 * 6.0).view(2, 3, 4, 6)
    patches = RawPatches((2, 3)).patches(pictures)
    assert patches.shape == (2, 2, 2, 3 * 2 * 3)
    torch.testing.assert_close(patches[1, 1, 0], pictures[1, :, 2:4, 0:3].flatten())
    # With its neighbours: 3 x 3 patches, beyond the border the nearest pixels again.
    around = RawPatches((2, 3), neighbours=True).patches(pictures)
    assert around.shape == (2, 2, 2, 3 * 6 * 9)
    first = around[0, 0, 0].view(3, 6, 9)
    torch.testing.assert_close(first[:, 2:, 3:], pictures[0, :, 0:4, 0:6])
    torch.testing.assert_close(first[:, :2, 3:], pictures[0, :, :1, 0:6].expand(-1, 2, -1))
    # Large patches are averaged down: the mean of a patch stays.
    pictures = torch.rand(1, 3, 64, 64)
    small = RawPatches((32, 32)).patches(pictures)
    assert small.shape == (1, 2, 2, 3 * 8 * 8)
    torch.testing.assert_close(small[0, 0, 1].view(3, -1).mean(dim=1), pictures[0, :, :32, 32:].flatten(1).mean(dim=1))
    assert RawPatches((32, 32), neighbours=True).patches(pictures).shape == (1, 2, 2, 3 * 12 * 12)


def test_shares_of_a_patch_by_hand():
    mask = torch.tensor([[[0, 0, 1, IGNORED], [0, 1, 1, 2], [2, 2, 7, 7], [2, 2, -1, 7]]])
    # Class 7 is none of the three: as IGNORED.
    expected = torch.tensor([[[3.0, 1, 0], [0, 2, 1], [0, 0, 4], [0, 0, 0]]])
    torch.testing.assert_close(dense._shares(mask, (2, 2), 3), expected)


def test_features_that_tell_all_and_nothing():
    generator = torch.Generator().manual_seed(0)
    encoders = {
        "all": Told(lambda patches: patches),
        "nothing": Told(lambda patches: torch.randn(*patches.shape[:3], 6, generator=generator)),
    }
    results, rows = evaluate_dense(encoders, data(60), data(20, seed=1), PROCESSOR, num_shown=3)
    assert (results["num_train"], results["num_test"], results["classes"]) == (60, 20, ["left", "right"])
    told, untold = results["features"]["all"], results["features"]["nothing"]
    # Between two patches the logits cross half-way, where the band ends.
    assert told["linear_miou"] > 97 and told["knn_miou"] > 97
    # All but the pixels that are interpolated between a near and a far patch.
    assert told["depth_r2"] > 85 and told["depth_delta1"] > 85
    assert abs(untold["depth_r2"]) < 5 and untold["linear_miou"] < 75
    assert told["depth_rmse"] < 0.4 * untold["depth_rmse"]
    assert list(rows) == [
        "picture",
        "mask: truth",
        "mask: all",
        "mask: nothing",
        "depth: truth",
        "depth: all",
        "depth: nothing",
    ]
    assert all(row.shape == (3, SIZE, SIZE, 3) and row.dtype == np.uint8 for row in rows.values())
    # What was told of the mask is nearly the truth.
    assert (rows["mask: all"] == rows["mask: truth"]).all(axis=3).mean() > 0.97
    assert dense_table(results)[1][:2] == ["all", f"{told['knn_miou']:.1f}"]
    assert "60 training pictures, tested on 20 held out" in describe_dense(results)


def test_scores_are_those_of_the_maps():
    """mIoU, R2, RMSE and delta_1 of the judge, beside a count over what it says of every pixel."""
    test = data(9, seed=1)
    noisy = Told(lambda patches: patches[..., :1] + 0.8 * torch.randn(patches.shape[:3], generator=draw).unsqueeze(3))
    draw = torch.Generator().manual_seed(0)
    maps = []
    judge = dense._Judge.judge

    def watch(self, patches, batch, num_shown):
        told = judge(self, patches, batch, len(patches))
        maps.extend(
            (one["mask"], one["depth"], mask, depth, self.mean_depth)
            for one, mask, depth in zip(told, batch["mask"], batch["depth"], strict=True)
        )
        return told

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dense._Judge, "judge", watch)
        results, _ = evaluate_dense({"noisy": noisy}, data(40), test, PROCESSOR, batch_size=4)
    scores = results["features"]["noisy"]
    mask, depth, true_mask, true_depth, usual = (np.stack(column) for column in zip(*maps, strict=True))
    iou = [100 * ((mask == k) & (true_mask == k)).sum() / ((mask == k) | (true_mask == k)).sum() for k in range(2)]
    assert min(iou) > 20 and max(iou) < 95
    np.testing.assert_allclose(scores["linear_iou"], iou)
    np.testing.assert_allclose(scores["linear_miou"], np.mean(iou))
    error = np.square(depth.astype(np.float64) - true_depth)
    np.testing.assert_allclose(scores["depth_rmse"], np.sqrt(error.mean()), rtol=1e-5)
    np.testing.assert_allclose(
        scores["depth_r2"], 100 * (1 - error.sum() / np.square(usual - true_depth).sum()), rtol=1e-3
    )
    near = np.maximum(depth / true_depth, true_depth / depth) < 1.25
    np.testing.assert_allclose(scores["depth_delta1"], 100 * near.mean())


def test_what_is_not_known_does_not_count():
    values, bands = striped(30)
    depth = np.where(bands == 1, 4.0, 8.0).astype(np.float32)
    # The upper half is not known. There, another picture would be wrong.
    bands[:, : SIZE // 2], depth[:, : SIZE // 2] = IGNORED, 0
    values[:, : SIZE // 2] = np.random.default_rng(0).integers(0, 256, values[:, : SIZE // 2].shape)
    pictures = ImageDataset(
        values, 3, source="bands", annotations={"mask": bands, "depth": depth}, mask_names=["left", "right", "never"]
    )
    scores = evaluate_dense({"all": Told(lambda p: p)}, pictures, pictures, PROCESSOR)[0]["features"]["all"]
    # A class that is neither there nor told has no part in the mean.
    assert scores["linear_iou"][2] is None and min(scores["linear_iou"][:2]) > 90
    assert scores["depth_delta1"] > 80


@pytest.mark.parametrize("left", ["mask", "depth"])
def test_masks_alone_and_depths_alone(left):
    other = {"mask": "depth", "depth": "mask"}[left]
    splits = [data(12, seed=seed, **{other: None}) for seed in (0, 1)]
    results, rows = evaluate_dense(raw_patches((PATCH, PATCH)), *splits, PROCESSOR, num_shown=2)
    assert all(
        any(key.startswith(word) for word in {"mask": ("knn", "linear"), "depth": ("depth",)}[left])
        for scores in results["features"].values()
        for key in scores
    )
    assert not any(row.startswith(other) for row in rows) and f"{left}: raw patches" in rows
    assert "classes" in results if left == "mask" else "classes" not in results
    head, *body = dense_table(results)
    assert len(body) == 2 and all(len(row) == len(head) for row in body)


def test_features_that_are_not_finite_are_not_evaluated():
    encoders = {"broken": Told(lambda patches: patches / 0), "whole": Told(lambda patches: patches)}
    results, rows = evaluate_dense(encoders, data(12), data(4), PROCESSOR)
    assert set(results["features"]["broken"].values()) == {None} and "mask: broken" not in rows
    assert results["features"]["whole"]["linear_miou"] > 90
    assert dense_table(results)[1] == ["broken", "-", "-", "-", "-", "-"]


def test_splits_without_truth():
    bare = ImageDataset(striped(3)[0], 3, source="bands")
    with pytest.raises(ValueError, match="neither masks nor depths"):
        evaluate_dense(raw_patches((PATCH, PATCH)), bare, data(3), PROCESSOR)


@pytest.mark.parametrize("num_channels", [1, 3])
@pytest.mark.parametrize("size", [(16, 16), (16, 32), (128, 128)])
def test_maps_follow_their_pictures(num_channels, size):
    """What the processor resizes and crops, it does to a map alike: where the picture is bright, the map says 1."""
    picture = np.zeros((40, 60, num_channels), dtype=np.uint8)
    picture[8:24, 20:50] = 255
    processor = build_image_processor(size, num_channels, [0.0] * num_channels, [1.0] * num_channels)
    seen = evaluation_transform(processor, num_channels)(picture)[0]
    told = annotation_transform(processor, num_channels)(picture[..., 0] // 255)
    assert told.shape == seen.shape == size and told.dtype == torch.float32
    assert set(told.unique().tolist()) == {0.0, 1.0}
    # Away from the blurred border.
    sure = (seen < 0.02) | (seen > 0.98)
    assert sure.float().mean() > 0.7 and torch.equal(told[sure], (seen[sure] > 0.5).float())
    # Numbers stay what they are, large ones too.
    deep = annotation_transform(processor, num_channels)(np.full((40, 60), 1234.5, dtype=np.float32))
    assert torch.equal(deep, torch.full(size, 1234.5))


def test_patches_of_any_vit_and_workers(tmp_path):
    """Batches and workers change nothing; the encoder's own patches are what is judged."""
    torch.manual_seed(0)
    config = PiLaMIMConfig(
        image_size=SIZE, patch_size=PATCH, hidden_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    encoder = FeatureEncoder(PiLaMIMModel(config).eval())
    splits = data(10), data(6, seed=1)
    first, rows = evaluate_dense({"vit": encoder}, *splits, PROCESSOR, batch_size=4)
    again, same = evaluate_dense({"vit": encoder}, *splits, PROCESSOR, batch_size=4, num_workers=1)
    assert first == again and all(np.array_equal(rows[name], same[name]) for name in rows)
    assert first["features"]["vit"]["linear_miou"] > 60


def test_at_the_end_of_a_run_and_in_a_report(tmp_path, capsys):
    """On scenes, which have masks and depths: numbers, table, card and pictures."""
    cache = f"--data_cache_dir={tmp_path / 'cache'}"
    few = ["--max_train_samples=12", "--max_eval_samples=6", cache]
    run = tmp_path / "run"
    assert pretrain([*FLAGS, *few, "--num_train_epochs=1", f"--output_dir={run}"]) == 0
    said = capsys.readouterr().out
    found = json.loads((run / "features.json").read_text())["dense"]
    assert found["classes"] == ["background", "sphere", "cube", "cylinder"]
    assert (found["num_train"], found["num_test"]) == (12, 6)
    assert list(found["features"]) == ["raw patches", "raw 3 x 3 patches", "untrained", "trained"]
    for scores in found["features"].values():
        assert all(np.isfinite(scores[key]) for key in ("knn_miou", "linear_miou", "depth_r2", "depth_rmse"))
        assert len(scores["linear_iou"]) == 4 and 0 <= scores["linear_miou"] <= 100
    # The saved encoder's own patches, by the saved processor: what the report finds again.
    assert found["features"]["trained"] != found["features"]["untrained"]
    card = (run / "README.md").read_text()
    for text in (said, card):
        assert "12 training pictures, tested on 6 held out" in text and "linear mIoU" in text
    assert str(run / "dense.png") in said
    # A picture row; masks and depths: the truth, two references by pixels, and two networks.
    height = Image.open(run / "dense.png").size[1]
    assert height == 11 * 130

    pytest.importorskip("sklearn")
    models = [str(run), str(shutil.copytree(run, tmp_path / "b"))]
    out = tmp_path / "report"
    flags = ["--use_cpu", "--num_shown=2", f"--feature_cache_dir={tmp_path / 'features'}", f"--output_dir={out}"]
    assert report([*few, *flags, "--model_names_or_paths", *models]) == 0
    names = ["raw patches", "raw 3 x 3 patches", "run untrained", "run", "b untrained", "b"]
    again = json.loads((out / "report.json").read_text())["dense"]["features"]
    assert list(again) == names
    for key in ("linear_miou", "depth_rmse"):
        assert again["run"][key] == pytest.approx(found["features"]["trained"][key], rel=0.02)
    readme = (out / "README.md").read_text()
    assert "![Segmentation and depth](dense.png)" in readme
    said = capsys.readouterr().out
    assert all(f"| {name} |" in readme and name in said for name in names)
    # A picture; masks and depths: the truth and six rows each.
    assert Image.open(out / "dense.png").size[1] == (1 + 2 * 7) * 130


def test_data_without_masks_has_no_such_table(tmp_path, capsys):
    folder = write_pictures(tmp_path / "pictures", 8)
    assert pretrain([*FLAGS, "--max_steps=1", f"--train_dir={folder}", f"--output_dir={tmp_path / 'run'}"]) == 0
    assert "dense" not in json.loads((tmp_path / "run" / "features.json").read_text())
    assert "mIoU" not in capsys.readouterr().out and not (tmp_path / "run" / "dense.png").exists()
