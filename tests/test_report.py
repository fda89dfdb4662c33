"""The representation report: its folder, its pictures, and what is refused."""

import json
import sys

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from transformers import Dinov2WithRegistersConfig, Dinov2WithRegistersModel

import hf_mim
from hf_mim.data.image_processing import build_image_processor
from hf_mim.evaluation.encoders import load_encoder
from hf_mim.evaluation.representation import attention_pictures, embed_tsne, enlarge, patch_colours
from hf_mim.jobs.representation_report import main, short_names
from test_distributed import torchrun
from tiny_training import REPOSITORY, pictures, run, tiny_config, write_pictures

pytest.importorskip("sklearn")
SCRIPT = str(REPOSITORY / "examples" / "run_representation_report.py")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("classes")
    for number, name in enumerate(("cat", "dog")):
        (root / name).mkdir()
        for index, picture in enumerate(pictures(16, number)):
            np.save(root / name / f"{index:02d}.npy", picture.astype(np.float32) / (255 + 100 * number))
    return root


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A pretraining checkpoint, an encoder alone of a finer grid, and a stock ViT with registers."""
    root = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    hf_mim.PiLaMIMForPreTraining(tiny_config()).save_pretrained(root / "whole")
    build_image_processor((16, 16), 3, [0.4] * 3, [0.2] * 3).save_pretrained(root / "whole")
    hf_mim.PiLaMIMModel(tiny_config(patch_size=2)).save_pretrained(root / "encoder")
    sizes = {"image_size": 16, "patch_size": 4, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**sizes)).save_pretrained(root / "dino")
    return root


def flags(folder, out, *more):
    common = [f"--train_dir={folder}", "--validation_fraction=0.5", f"--output_dir={out}", "--use_cpu", "--bf16=false"]
    return [*common, f"--feature_cache_dir={out}-cache", *more]


class TestPictures:
    def test_attention_is_bright_where_it_is(self):
        attention = torch.zeros(2, 3, 4, 4)
        attention[0, 0, 1, 2] = 0.9
        attention[1] = 0.25  # everywhere alike
        sheet = attention_pictures(torch.full((2, 3, 32, 32), 0.5), attention).astype(int)
        assert sheet.shape == (2, 32, 32, 3)
        brightness = sheet[0].sum(axis=2)
        row, column = np.unravel_index(brightness.argmax(), brightness.shape)
        assert 8 <= row < 16 and 16 <= column < 24
        assert brightness[0, 0] < brightness.max() / 2
        assert np.ptp(sheet[1]) < 150 and (sheet[1] == sheet[1, 0, 0]).all()

    def test_attention_leaves_the_picture_visible(self):
        picture = torch.zeros(1, 1, 8, 8)
        picture[..., 4:] = 1.0
        sheet = attention_pictures(picture, torch.ones(1, 1, 2, 2)).astype(int)
        assert np.abs(sheet[0, :, 6] - sheet[0, :, 1] - 0.35 * 255).max() <= 1

    def test_like_patches_have_like_colours(self):
        generator = torch.Generator().manual_seed(0)
        kinds = torch.randn(4, 16, generator=generator)
        layout = torch.randint(0, 4, (5, 3, 6), generator=generator)
        colours = patch_colours(kinds[layout], 2, (12, 24))
        assert colours.shape == (2, 12, 24, 3)
        # One colour a patch, and as many as there are kinds.
        tiles = colours.reshape(2, 3, 4, 6, 4, 3).transpose(0, 1, 3, 2, 4, 5).reshape(2, 3, 6, 16, 3)
        assert (tiles == tiles[:, :, :, :1]).all()
        found = {}
        for kind, colour in zip(layout[:2].flatten().tolist(), tiles[:, :, :, 0].reshape(-1, 3).tolist(), strict=True):
            assert found.setdefault(kind, colour) == colour
        assert len({tuple(colour) for colour in found.values()}) == 4
        # A shift and the order of the pictures do not matter.
        assert np.abs(patch_colours(kinds[layout] + 7.0, 2, (12, 24)).astype(int) - colours.astype(int)).max() <= 2

    def test_patch_features_of_few_dimensions(self):
        assert patch_colours(torch.randn(2, 3, 3, 2), 2, (6, 6))[..., 2].max() == 0
        assert patch_colours(torch.zeros(2, 3, 3, 8), 1, (6, 6)).shape == (1, 6, 6, 3)

    def test_enlarge(self):
        picture = torch.tensor([[[[0.0, 1.0]]]])
        assert enlarge(picture, (2, 4)).tolist() == [[[[0.0, 0.0, 1.0, 1.0]] * 2]]
        assert enlarge(torch.rand(1, 1, 224, 224), (112, 112)).shape == (1, 1, 112, 112)

    def test_tsne_parts_what_is_apart(self):
        generator = torch.Generator().manual_seed(0)
        centres = torch.tensor([[10.0, 0, 0], [0, 10.0, 0]])
        classes = torch.arange(60) % 2
        places = embed_tsne(centres[classes] + torch.randn(60, 3, generator=generator), seed=1)
        assert places.shape == (60, 2) and np.isfinite(places).all()
        distances = ((places[:, None] - places[None]) ** 2).sum(axis=2) + 1e9 * np.eye(60)
        assert (classes.numpy()[distances.argmin(axis=1)] == classes.numpy()).all()
        assert embed_tsne(torch.randn(5, 3, generator=generator)).shape == (5, 2)


def test_names():
    assert short_names(["runs/a", "b/c"]) == {"a": "runs/a", "c": "b/c"}
    assert short_names(["a/checkpoint-9", "b/checkpoint-9"]) == {
        "a/checkpoint-9": "a/checkpoint-9",
        "b/checkpoint-9": "b/checkpoint-9",
    }
    assert list(short_names(["x/a/c", "y/a/c", "b"])) == ["x/a/c", "y/a/c", "b"]


def test_report_of_three_models(folder, models, tmp_path, capsys):
    out = tmp_path / "report"
    paths = [str(models / name) for name in ("whole", "encoder", "dino")]
    assert (
        main(flags(folder, out, "--model_names_or_paths", *paths, "--num_shown=3", "--tsne_classes", "dog", "cat"))
        == 0
    )
    said = capsys.readouterr().out
    files = {
        "README.md",
        "report.json",
        "scores.png",
        "tsne.png",
        "attention.png",
        "patch_pca.png",
        "reconstructions.png",
        "attention_distance.png",
        "singular_values.png",
    }
    assert {path.name for path in out.iterdir()} == files
    found = json.loads((out / "report.json").read_text())
    assert found["models"] == dict(zip(("whole", "encoder", "dino"), paths, strict=True))
    assert all(len(p["top_singular_share"]) == len(p["attention_distance"]) for p in found["properties"].values())
    names = ["raw pixels"]
    names += [f"{n} untrained, {p}" for n in ("whole", "encoder", "dino") for p in ("[CLS]", "mean")]
    names += [f"{n}, {p}" for n in ("whole", "encoder", "dino") for p in ("[CLS]", "mean")]
    assert list(found["features"]) == names
    for scores in found["features"].values():
        assert 0 <= scores["knn"]["label"] <= 100 and 0 <= scores["linear"]["label"] <= 100
    attentive = found["attentive"]["accuracy"]
    assert list(attentive) == [f"{n}{kind}" for n in ("whole", "encoder", "dino") for kind in (" untrained", "")]
    assert all(0 <= scores["label"] <= 100 for scores in attentive.values())
    readme = (out / "README.md").read_text()
    assert "| dino, attentive |" in readme and "Attentive: a probe with one query" in readme
    for name in [*files - {"README.md", "report.json"}, *names]:
        assert name in readme, name
    assert "raw pixels" in said and str(out / "README.md") in said
    # Sheets: a picture row and one a model; reconstructions only of the model that has a decoder.
    sizes = {path.name: Image.open(path).size for path in out.glob("*.png")}
    assert sizes["attention.png"] == sizes["patch_pca.png"] == (104 + 3 * 114, 4 * 114)
    assert sizes["reconstructions.png"] == (104 + 3 * 114, 3 * 114)
    sheet = np.asarray(Image.open(out / "attention.png")).astype(int)
    rows = [sheet[i * 114 : i * 114 + 112, 104:216] for i in range(4)]
    assert all(np.abs(a - b).mean() > 1 for i, a in enumerate(rows) for b in rows[:i])
    # A second report finds its features.
    cached = len(list((tmp_path / "report-cache").iterdir()))
    assert cached == 2 * len(names)
    assert main(flags(folder, out, "--model_names_or_paths", paths[0], "--references=false")) == 0
    assert len(list((tmp_path / "report-cache").iterdir())) == cached
    assert list(json.loads((out / "report.json").read_text())["features"]) == ["whole, [CLS]", "whole, mean"]


def test_pictures_of_another_size_and_too_few_for_tsne(folder, models, tmp_path, capsys):
    out = tmp_path / "report"
    given = [f"--model_names_or_paths={models / 'whole'}", "--image_size=24", "--max_tested=4", "--references=false"]
    assert main(flags(folder, out, *given)) == 0
    found = json.loads((out / "report.json").read_text())
    assert len(found["properties"]["whole"]["attention_distance"]) == 2 and "tsne.png" not in found["pictures"]
    assert "t-SNE is left out" in capsys.readouterr().out


def test_model_without_cls(folder, tmp_path, capsys):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
    transformers.IJepaModel(transformers.IJepaConfig(image_size=16, patch_size=4, **sizes)).save_pretrained(
        tmp_path / "jepa"
    )
    given = [f"--model_names_or_paths={tmp_path / 'jepa'}", "--references=false"]
    assert main(flags(folder, tmp_path / "out", *given)) == 1
    assert "has no [CLS], which pooling cls reads: use mean" in capsys.readouterr().err
    assert main(flags(folder, tmp_path / "out", *given, "--poolings=mean")) == 0
    found = json.loads((tmp_path / "out" / "report.json").read_text())
    assert "attention.png" not in found["pictures"] and "patch_pca.png" in found["pictures"]


def test_numbers_are_kept_when_drawing_fails(folder, models, tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device", "scores.png")

    monkeypatch.setattr("hf_mim.jobs.representation_report.draw_scores", full)
    given = [f"--model_names_or_paths={models / 'whole'}", "--references=false"]
    assert main(flags(folder, tmp_path / "out", *given)) == 1
    assert list(json.loads((tmp_path / "out" / "report.json").read_text())["features"]) == [
        "whole, [CLS]",
        "whole, mean",
    ]


def test_pictures_without_labels(models, tmp_path):
    unlabelled = write_pictures(tmp_path / "unlabelled", 12)
    out = tmp_path / "report"
    assert main(flags(unlabelled, out, f"--model_names_or_paths={models / 'encoder'}", "--references=false")) == 0
    pictures = {"attention.png", "patch_pca.png", "attention_distance.png", "singular_values.png"}
    assert {path.name for path in out.iterdir()} == {"README.md", "report.json"} | pictures
    assert "The data has no labels: RankMe" in (out / "README.md").read_text()


@pytest.mark.slow
def test_two_processes_write_one_report(folder, models, tmp_path):
    given = [f"--model_name_or_path={models / 'encoder'}", "--references=false"]
    assert main(flags(folder, tmp_path / "one", *given)) == 0
    result = run(torchrun(SCRIPT, *flags(folder, tmp_path / "two", *given)))
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("RankMe") == 1
    one, two = (json.loads((tmp_path / name / "report.json").read_text())["features"] for name in ("one", "two"))
    for name, scores in one.items():
        assert scores["knn"] == pytest.approx(two[name]["knn"])
        assert scores["rank_me"] == pytest.approx(two[name]["rank_me"], rel=1e-4)


def test_channels_and_mean_are_the_models_own(models, tmp_path):
    from hf_mim.data.arguments import DataArguments
    from hf_mim.jobs.loading import load_subject

    hf_mim.PiLaMIMModel(tiny_config(num_channels=1, image_size=(16, 8))).save_pretrained(tmp_path / "grey")
    (tmp_path / "pictures").mkdir()
    for index, picture in enumerate(pictures(6)):
        Image.fromarray(picture).save(tmp_path / "pictures" / f"{index}.png")
    data = DataArguments(train_dir=str(tmp_path / "pictures"))
    grey = load_subject(str(tmp_path / "grey"), data)
    assert grey.pictures.train[0].shape[0] == 1 and grey.image_size == (16, 8) and len(grey.mean) == 1
    whole = load_subject(str(models / "whole"), data)
    assert whole.mean == [0.4] * 3 and whole.std == [0.2] * 3 and whole.image_size == (16, 16)
    larger = load_subject(str(models / "whole"), DataArguments(train_dir=data.train_dir, image_size=[24]))
    assert larger.mean == [0.4] * 3 and larger.processor.crop_size.height == 24
    assert load_encoder(str(models / "whole")).digest() == whole.encoder.digest()
    with pytest.raises(ValueError, match="grey takes pictures of 1 channels"):
        load_subject(str(tmp_path / "grey"), DataArguments(train_dir=str(write_pictures(tmp_path / "arrays", 6))))


class TestMistakes:
    @pytest.mark.parametrize(
        ("given", "message"),
        [
            (["--model_names_or_paths", "nowhere"], "nowhere cannot be loaded"),
            (["--poolings", "max"], "expected cls"),
            (["--poolings", "last_7"], "has 2 blocks"),
            (["--tsne_label", "colour"], "the data has the labels label"),
            (["--tsne_classes", "cow"], "label has cat, dog"),
            (["--num_shown", "0"], "at least 1"),
            (["--streaming"], "--streaming"),
        ],
    )
    def test_are_said_before_work_starts(self, folder, models, tmp_path, capsys, given, message):
        model = [] if given[0] == "--model_names_or_paths" else ["--model_names_or_paths", str(models / "whole")]
        assert main(flags(folder, tmp_path / "out", *model, *given)) == 1
        err = capsys.readouterr().err
        assert message in err and "Traceback" not in err
        assert not (tmp_path / "out").exists() and not (tmp_path / "out-cache").exists()

    def test_no_or_the_same_model(self, folder, models, tmp_path, capsys):
        assert main(flags(folder, tmp_path / "out")) == 1
        assert "--model_names_or_paths is missing" in capsys.readouterr().err
        assert main(flags(folder, tmp_path / "out", "--model_names_or_paths", "a", "a")) == 1
        assert "twice" in capsys.readouterr().err

    def test_scikit_learn_is_missing(self, folder, models, tmp_path, capsys, monkeypatch):
        monkeypatch.setitem(sys.modules, "sklearn.manifold", None)
        assert main(flags(folder, tmp_path / "out", f"--model_names_or_paths={models / 'whole'}")) == 1
        assert "pip install scikit-learn" in capsys.readouterr().err
