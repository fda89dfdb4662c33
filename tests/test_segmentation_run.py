"""Segmenters trained by the script, what they are judged by, and masks that are not as they should be."""

import json
import shutil
import weakref

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file

from hf_mim.data.arguments import DataArguments
from hf_mim.data.dense import DenseTransform
from hf_mim.data.segmentation import MaskArguments, load_masked
from hf_mim.evaluation.segmentation import Confusion
from hf_mim.evaluation.windows import sliding_maps, window_starts
from hf_mim.jobs.segmentation import CLASSES, main
from hf_mim.training import dense_trainers
from hf_mim.training.command import parse_arguments
from hf_mim.training.presets import SEGMENTATION_PRESETS
from tiny import tiny_model
from tiny_training import REPOSITORY, run

SMALL = [
    "--model_type=tec",
    "--image_size=16",
    "--config_overrides=hidden_size=16,num_hidden_layers=4,num_attention_heads=2",
    "--max_train_samples=16",
    "--max_eval_samples=3",
    "--max_steps=4",
    "--warmup_epochs=0",
    "--save_steps=2",
    "--eval_strategy=no",
    "--logging_steps=1",
    "--use_cpu",
    "--disable_tqdm=true",
    "--bf16=false",
]


def test_scenes_from_end_to_end_and_resumed_to_the_bit(tmp_path, capsys):
    flags = [*SMALL, "--per_device_train_batch_size=4", "--photometric_jitter=true", f"--data_cache_dir={tmp_path}"]
    out, again = tmp_path / "out", tmp_path / "again"
    assert main([*flags, f"--output_dir={out}"]) == 0
    results = json.loads((out / "results.json").read_text())
    assert set(results["iou"]) == {"background", "sphere", "cube", "cylinder"} and results["num_test"] == 3
    assert 0 < results["miou"] < results["pixel_accuracy"] <= 100
    assert f"mIoU: {results['miou']:.2f} %" in capsys.readouterr().out
    assert Image.open(out / "segmentation.png").size[1] > 300
    assert "pipeline_tag: image-segmentation" in (out / "README.md").read_text()
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8))
    found = transformers.pipeline("image-segmentation", str(out))(picture)
    assert found and all(one["mask"].size == (30, 20) and one["label"] in results["iou"] for one in found)

    again.mkdir()
    shutil.copytree(out / "checkpoint-2", again / "checkpoint-2")
    assert main([*flags, f"--output_dir={again}"]) == 0
    first, second = (load_file(folder / "model.safetensors") for folder in (out, again))
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
    # Of what was trained the encoder is taken; frozen, it stays as it is.
    frozen = tmp_path / "frozen"
    of_network = ("--model_type", "--config_overrides")
    rest = [flag for flag in flags if not flag.startswith(of_network)]
    start = ["--trainable=head", f"--model_name_or_path={out}", "--segmentation_head=upernet"]
    assert main([*rest, *start, f"--output_dir={frozen}"]) == 0
    head = load_file(frozen / "model.safetensors")
    assert all(torch.equal(head[name], value) for name, value in first.items() if name.startswith("encoder."))


@pytest.mark.slow
def test_two_processes_count_what_one_does(tmp_path):
    flags = ["-m", "hf_mim", "segment", *SMALL, f"--data_cache_dir={tmp_path}", f"--output_dir={tmp_path / 'out'}"]
    assert run([*flags, "--per_device_train_batch_size=4"]).returncode == 0
    alone = json.loads((tmp_path / "out" / "results.json").read_text())
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port=29617"]
    found = run([*launcher, *flags, "--per_device_train_batch_size=2"])
    assert found.returncode == 0, found.stderr
    assert "Nothing is left to train" in found.stdout
    together = json.loads((tmp_path / "out" / "results.json").read_text())
    assert together.pop("loss") == pytest.approx(alone.pop("loss"), rel=1e-6)
    assert together == alone


# ---- What it is judged by


def test_scores_by_hand_and_as_sums():
    truth = torch.tensor([0, 0, 0, 1, 1, 2, 255])
    told = torch.tensor([0, 0, 1, 1, 0, 1, 3])
    confusion = Confusion(4)
    confusion.add(truth, told)
    scores = confusion.scores()
    assert scores["iou"] == pytest.approx([50.0, 25.0, 0.0, None])
    assert scores["miou"] == pytest.approx(25.0)
    assert scores["mean_accuracy"] == pytest.approx(100 * (2 / 3 + 1 / 2 + 0) / 3)
    assert scores["pixel_accuracy"] == pytest.approx(50.0)
    parts = Confusion(4)
    parts.add(truth[:3], told[:3])
    parts.add(truth[3:], told[3:])
    assert torch.equal(parts.counts, confusion.counts)


def test_windows_cover_and_their_means_are_taken():
    assert window_starts(6, 6, 4) == [0] and window_starts(13, 6, 4) == [0, 4, 7]

    def predict(pixel_values):
        """The pixel's own value, and where it lies in the window."""
        row = torch.arange(6.0)[:, None].expand(6, 6)
        return torch.stack([pixel_values[0, 0], row])[None]

    pixel_values = torch.randn(1, 13, 8)
    maps = sliding_maps(predict, pixel_values, (6, 6))
    torch.testing.assert_close(maps[0], pixel_values[0])
    rows = [0, 1, 2, 3, (4 + 0) / 2, (5 + 1) / 2, 2, (3 + 0) / 2, (4 + 1) / 2, (5 + 2) / 2, 3, 4, 5]
    torch.testing.assert_close(maps[1], torch.tensor(rows)[:, None].expand(13, 8))


def test_one_pictures_maps_are_held_at_a_time(tmp_path, monkeypatch):
    held, most = [], []

    def watched(*args):
        most.append(sum(one() is not None for one in held))
        maps = sliding_maps(*args)
        held.append(weakref.ref(maps))
        return maps

    monkeypatch.setattr(dense_trainers, "sliding_maps", watched)
    flags = [*SMALL, "--max_steps=1", "--per_device_train_batch_size=4", f"--data_cache_dir={tmp_path}"]
    assert main([*flags, f"--output_dir={tmp_path / 'out'}"]) == 0
    assert most[:3] == [0, 0, 0]


# ---- What it is trained on


def test_augmentation_is_a_function_of_epoch_and_index_and_moves_both_alike():
    mask = torch.randint(0, 4, (20, 30), dtype=torch.uint8)
    item = {"image": (mask * 60).expand(3, -1, -1), "mask": mask}
    still = {"scale_jitter": (1, 1), "photometric_jitter": False}
    transform = DenseTransform("mask", 255, (20, 12), [0.0] * 3, [1.0] * 3, **still)
    found = [transform(item, 0, index) for index in range(8)]
    for one in found:
        assert one["pixel_values"].shape == (3, 20, 12) and one["labels"].shape == (20, 12)
        torch.testing.assert_close(one["pixel_values"][1] * 255 / 60, one["labels"].float())
    state = torch.random.get_rng_state()
    again = transform(item, 0, 3)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(again["labels"], found[3]["labels"])
    assert len({one["labels"].numpy().tobytes() for one in found}) > 4
    other = DenseTransform("mask", 255, (20, 12), [0.5] * 3, [1.0] * 3, scale_jitter=(0.4, 0.5))(item, 1, 0)
    assert (other["labels"] == 255).sum() > 100 and set(other["labels"].unique().tolist()) <= {0, 1, 2, 3, 255}


# ---- Masks


@pytest.fixture
def folders(tmp_path):
    """Four pictures and masks of two classes."""
    for name in ("images", "masks"):
        (tmp_path / name).mkdir()
    for number in range(4):
        mask = np.full((16, 20), number % 2, dtype=np.uint8)
        mask[:2] = 255
        Image.fromarray(np.stack([mask * 50] * 3, axis=2)).save(tmp_path / "images" / f"{number}.jpg")
        Image.fromarray(mask).save(tmp_path / "masks" / f"{number}.png")
    return tmp_path


def load(root, **fields):
    data = DataArguments(train_dir=str(root / "images"), num_channels=3, image_size=[16], validation_fraction=0.25)
    return load_masked(data, MaskArguments(train_mask_dir=str(root / "masks"), **fields), 0)


def test_masks_of_a_folder(folders):
    train, validation, names = load(folders)
    assert (len(train), len(validation), names) == (3, 1, ["0", "1"])
    for split in (train, validation):
        for index in range(len(split)):
            item = split.annotated(index, ["mask"])
            number = int(split.name(index)[-5])
            assert item["mask"][0, 0] == 255 and (item["mask"][2:] == number % 2).all()
    assert load(folders, class_names=["sea", "land"])[2] == ["sea", "land"]
    palette = Image.fromarray(np.full((16, 20), 1, dtype=np.uint8)).convert("P")
    palette.putpalette([0, 0, 0, 200, 30, 90])
    palette.save(folders / "masks" / "0.png")
    assert (MaskArguments().read(str(folders / "masks" / "0.png"), "0") == 1).all()


def test_reduced_labels():
    numbers = np.array([[0, 1, 7, 3]], dtype=np.uint8)
    assert MaskArguments(ignore_index=7, reduce_labels=True).read(numbers, "x").tolist() == [[255, 0, 255, 2]]


def _save(array, name="1.png"):
    return lambda root: Image.fromarray(array).save(root / "masks" / name)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda root: (root / "masks" / "1.png").unlink(), r"images/1\.jpg has no mask .*masks/1\.png \(1 of 4"),
        (lambda root: (root / "images" / "1.jpg").unlink(), r"masks/1\.png has no picture of its stem"),
        (_save(np.zeros((20, 16), np.uint8)), r"1\.png has 20 x 16 pixels.*1\.jpg, 16 x 20"),
        (_save(np.full((16, 20), 9, np.uint8)), r"1\.png has the class 9, and there are 2: 0 to 1"),
        (_save(np.zeros((16, 20, 3), np.uint8)), r"1\.png: a mask of colours \(RGB\)"),
        (_save(np.zeros((16, 20), np.uint16)), r"1\.png: a mask of 16 or 32 bits"),
        (lambda root: (root / "masks" / "1.png").write_bytes(b""), r"1\.png: the mask cannot be read"),
        (_save(np.zeros((16, 20), np.uint8), "1.tif"), r"masks/1\.png and .*masks/1\.tif are of one stem"),
    ],
)
def test_what_is_wrong_with_a_mask_is_told_by_its_name(folders, change, message):
    change(folders)
    with pytest.raises(ValueError, match=message):
        load(folders, class_names=["sea", "land"])


def test_classes_of_one_name_are_refused():
    with pytest.raises(ValueError, match="--class_names has 'sea' twice"):
        MaskArguments(class_names=["sea", "land", "sea"])


def test_other_masks_of_the_same_pictures_are_another_run(folders, tmp_path, capsys):
    flags = [*SMALL, f"--train_dir={folders / 'images'}", "--validation_fraction=0.25", "--class_names", "sea", "land"]
    flags += [f"--train_mask_dir={folders / 'masks'}", f"--output_dir={tmp_path / 'out'}", "--max_steps=1"]
    flags.append("--per_device_train_batch_size=2")
    assert main(flags) == 0
    weights = (tmp_path / "out" / "model.safetensors").read_bytes()
    for number in range(4):
        mask = np.full((16, 20), 1 - number % 2, dtype=np.uint8)
        Image.fromarray(mask).save(folders / "masks" / f"{number}.png")
    capsys.readouterr()
    assert main(flags) == 1
    assert "(3 pictures) here, with other contents" in capsys.readouterr().err
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == weights
    # What is to be done about a broken picture is no flag that is not taken here.
    (folders / "images" / "1.jpg").write_bytes(b"")
    assert main(flags) == 1
    assert "1.jpg" in (said := capsys.readouterr().err) and "Remove it and its mask" in said and "--skip" not in said


def test_masks_that_say_nothing_are_refused(folders):
    for number in range(4):
        Image.fromarray(np.full((16, 20), 255, np.uint8)).save(folders / "masks" / f"{number}.png")
    with pytest.raises(ValueError, match="No pixel of the masks of .*images has a class"):
        load(folders)
    with pytest.raises(ValueError, match="--train_dir and --train_mask_dir go together"):
        load_masked(DataArguments(train_dir=str(folders / "images")), MaskArguments(), 0)


def test_masks_of_a_column(tmp_path):
    import datasets

    masks = [np.full((16, 20), number % 2, dtype=np.uint8) for number in range(4)]
    columns = {
        "image": [Image.fromarray(np.stack([mask * 50] * 3, axis=2)) for mask in masks],
        "mask": [Image.fromarray(mask) for mask in masks],
    }
    features = datasets.Features(image=datasets.Image(), mask=datasets.Image())
    datasets.Dataset.from_dict(columns, features=features).save_to_disk(str(tmp_path / "data"))
    data = DataArguments(
        dataset_name=str(tmp_path / "data"), num_channels=3, image_size=[16], image_column_name="image",
        validation_fraction=0.25,
    )  # fmt: skip
    train, validation, names = load_masked(data, MaskArguments(), 0)
    assert (len(train), len(validation), names) == (3, 1, ["0", "1"])
    item = train.annotated(1, ["mask"])
    assert torch.equal(item["mask"] * 50, item["image"][0])
    with pytest.raises(ValueError, match="no column parts; it has image, mask. Name it by --mask_column_name"):
        load_masked(data, MaskArguments(mask_column_name="parts"), 0)


# ---- The layouts of public sets, and their recipes


RECIPES = sorted((REPOSITORY / "examples" / "recipes").glob("segment_*"))
# The others differ from them in numbers alone.
FIRST = ("segment_ocl_base_ade20k", "segment_tec_mae_base_imagenet_s")


def ade20k(root):
    """images/ and annotations/ with training/ and validation/; grey masks, 0 for none of the 150 classes."""
    for split, number in (("training", 4), ("validation", 2)):
        for index in range(number):
            mask = np.random.default_rng(index).integers(0, 4, (40, 48), dtype=np.uint8)
            name = f"ADE_{split[:5]}_{index:08d}"
            for folder in ("images", "annotations"):
                (root / "ADEChallengeData2016" / folder / split).mkdir(parents=True, exist_ok=True)
            picture = Image.fromarray(np.stack([mask * 50] * 3, axis=2))
            picture.save(root / "ADEChallengeData2016" / "images" / split / f"{name}.jpg")
            Image.fromarray(mask).save(root / "ADEChallengeData2016" / "annotations" / split / f"{name}.png")


def imagenet_s(root):
    """Folders of pictures and of masks, a sub-folder a class; red + 256 x green, 1000 for what is not known."""
    for split, number in (("train-semi", 4), ("validation", 2)):
        for index in range(number):
            numbers = np.array([0, 300, 1000, 919])[np.random.default_rng(index).integers(0, 4, (40, 48))]
            mask = np.stack([numbers % 256, numbers // 256, np.zeros_like(numbers)], axis=2).astype(np.uint8)
            for folder, picture, ending in ((split, mask, "JPEG"), (f"{split}-segmentation", mask, "png")):
                path = root / "ImageNetS919" / folder / f"n0{index % 2}" / f"n0{index % 2}_{index}.{ending}"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(picture).save(path)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipes_can_be_read(path, tmp_path):
    model, data, masks, args = parse_arguments(
        CLASSES, [str(path), f"--output_dir={tmp_path}", "--use_cpu"], SEGMENTATION_PRESETS
    )
    assert data.train_dir and masks.train_mask_dir and masks.reduce_labels != masks.rgb_masks
    assert f"--model_name_or_path runs/{model.model_type}" in path.read_text() and path.name in path.read_text()
    assert (args.max_steps, args.warmup_steps) == (160000, 1500) or args.num_train_epochs == 100


@pytest.mark.parametrize(
    "path",
    [pytest.param(path, marks=[] if path.stem in FIRST else pytest.mark.slow, id=path.stem) for path in RECIPES],
)
def test_first_step_of_a_recipe(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (imagenet_s if "imagenet_s" in path.stem else ade20k)(tmp_path)
    method = path.stem.split("_")[1]
    tiny_model(method, "ForPreTraining", image_size=32, patch_size=8, num_channels=3).save_pretrained("weights")
    flags = [
        "--model_name_or_path=weights",
        "--image_size=40",
        "--segmentation_head_size=8",
        "--max_steps=1",
        "--warmup_steps=0",
        "--per_device_train_batch_size=2",
        "--dataloader_num_workers=0",
        "--eval_strategy=no",
        "--bf16=false",
    ]
    assert main([str(path), *flags, "--use_cpu", "--disable_tqdm=true", "--output_dir=out"]) == 0
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    # 1000 is the mask's, 919 the highest class; of 0 to 3, 0 is none.
    assert list(results["iou"]) == [str(number) for number in range(920 if "imagenet_s" in path.stem else 3)]
    assert results["num_train"] == 4 and results["num_test"] == 2 and results["loss"] > 0


def test_masks_in_colours():
    colours = np.array([[[44, 1, 0], [232, 3, 0], [0, 0, 9]]], dtype=np.uint8)
    args = MaskArguments(rgb_masks=True)
    assert args.read(Image.fromarray(colours), "x").tolist() == [[300, 65535, 0]]
    assert MaskArguments(rgb_masks=True, reduce_labels=True).read(colours, "x").tolist() == [[299, 65535, 65535]]
    with pytest.raises(ValueError, match="x: a mask of mode L; --rgb_masks expects colours"):
        args.read(Image.new("L", (4, 4)), "x")
    with pytest.raises(ValueError, match="--ignore_index is 1000; expected a number from 0 to 255"):
        MaskArguments(ignore_index=1000)
