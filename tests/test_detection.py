"""Detectors of every method, what they are trained and judged on, and objects that are not as they should be."""

import json
import shutil
import sys

import numpy as np
import pytest
import torch
import transformers
from faster_coco_eval.core import mask as coco_mask
from PIL import Image
from safetensors.torch import load_file
from torchvision.models.detection.image_list import ImageList
from torchvision.ops import roi_align

import hf_mim
from hf_mim.data.arguments import DataArguments
from hf_mim.data.coco import decode_mask, load_objects
from hf_mim.data.detection import OBJECTS, DetectionTransform, ObjectArguments, as_shares, tight_boxes
from hf_mim.evaluation import detection as evaluation
from hf_mim.evaluation.detection import DetectionScores
from hf_mim.jobs.detection import CLASSES, detection_processor, main
from hf_mim.models.vit.detection import PatchAnchors, PatchRoIAlign
from hf_mim.registry import METHODS, method_class
from hf_mim.training.command import parse_arguments
from hf_mim.training.layer_decay import parameter_depth
from hf_mim.training.presets import DETECTION_PRESETS
from hf_mim.training.task_models import build_dense, build_dense_config
from tiny import tiny_model
from tiny_training import REPOSITORY, run

HEAD = {"detection_head_size": 8, "detection_regions": 16, "detection_anchor_size": 4.0}
RGB = {"image_size": 32, "patch_size": 8, "num_channels": 3, "num_labels": 2} | HEAD
SMALL_VIT = RGB | {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
SMALL = [
    "--model_type=tec",
    "--image_size=32",
    "--config_overrides=hidden_size=16,num_hidden_layers=4,num_attention_heads=2",
    "--max_train_samples=16",
    "--max_eval_samples=4",
    "--max_steps=4",
    "--warmup_epochs=0",
    "--save_steps=2",
    "--eval_strategy=no",
    "--logging_steps=1",
    "--detection_head_size=8",
    "--use_cpu",
    "--disable_tqdm=true",
    "--bf16=false",
]


def squares(height=32, width=32):
    """Two pictures, a bright square each, of the classes 0 and 1, and none in the third."""
    pixel_values, labels = torch.zeros(3, 3, height, width), []
    for number, (x0, y0, x1, y1) in enumerate([(4, 8, 20, 24), (10, 2, 22, 14)]):
        pixel_values[number, number, y0:y1, x0:x1] = 2.0
        labels.append(
            {
                "class_labels": torch.tensor([number]),
                "boxes": as_shares(torch.tensor([[x0, y0, x1, y1]]).float(), (height, width)),
                "masks": (pixel_values[number].amax(dim=0) > 1)[None],
            }
        )
    empty = {"class_labels": torch.zeros(0).long(), "boxes": torch.zeros(0, 4), "masks": torch.zeros(0, height, width)}
    return pixel_values, [*labels, empty]


# ---- The network


@pytest.mark.parametrize("method", METHODS)
def test_detector_of_a_pretraining_checkpoint(method, tmp_path):
    pretrained = tiny_model(method, "ForPreTraining", drop_path_rate=0.1, **RGB)
    pretrained.save_pretrained(tmp_path / "pretrained")
    torch.manual_seed(0)
    model = transformers.AutoModelForObjectDetection.from_pretrained(tmp_path / "pretrained")
    assert type(model) is method_class(method, "ForObjectDetection") and model.config.drop_path_rate == 0
    for name, value in model.encoder.state_dict().items():
        assert torch.equal(value, pretrained.encoder.state_dict()[name]), name
    # Loaded or built, the last maps of the head begin near zero.
    assert model.detection_head.rpn.head.cls_logits.weight.abs().max() < 0.06
    assert model.detection_head.roi_heads.box_predictor.bbox_pred.weight.std().item() == pytest.approx(0.001, rel=0.3)
    pixel_values, labels = squares()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(3):
        outputs = model.train()(pixel_values, labels=labels)
        parts = [value for name, value in outputs.items() if name.startswith("loss_")]
        assert len(parts) == 5 and torch.equal(outputs.loss, sum(parts))
        losses.append(outputs.loss.item())
        outputs.loss.backward()
        assert all(parameter.grad is not None for parameter in model.parameters() if parameter.requires_grad)
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0]
    model.eval().save_pretrained(tmp_path / "trained")
    loaded = transformers.AutoModelForObjectDetection.from_pretrained(tmp_path / "trained")
    with torch.no_grad():
        for size in ((32, 32), (40, 56)):
            expected = model(squares(*size)[0]).detections
            found = loaded(squares(*size)[0]).detections
            for one, other in zip(expected, found, strict=True):
                assert set(one) == {"scores", "labels", "boxes", "masks"}
                assert all(torch.equal(one[name], other[name]) for name in one)
    # What was fine-tuned gives its encoder on, and says nothing of its head.
    encoder, info = method_class(method, "Model").from_pretrained(tmp_path / "trained", output_loading_info=True)
    assert not info["unexpected_keys"] and not info["missing_keys"]
    assert torch.equal(encoder.layernorm.weight, model.encoder.layernorm.weight)


@pytest.mark.slow
def test_it_learns_where_squares_are_and_without_masks():
    torch.manual_seed(0)
    settings = {"hidden_size": 32, "detection_head_size": 16, "detection_regions": 64, "detection_masks": False}
    config = hf_mim.MaskedViTConfig(**(SMALL_VIT | settings))
    model = hf_mim.MaskedViTForObjectDetection(config).train()
    pixel_values, labels = squares()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(200):
        outputs = model(pixel_values, labels=[{k: v for k, v in one.items() if k != "masks"} for one in labels])
        assert outputs.loss_mask is None
        outputs.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    processor = detection_processor((32, 32), [0.5] * 3, [0.5] * 3)
    with torch.no_grad():
        outputs = model.eval()(pixel_values)
    found = processor.post_process_object_detection(outputs, 0.5, [(64, 96)] * 3)
    assert [set(one["labels"].tolist()) for one in found] == [{0}, {1}, set()]
    for one, box in zip(found, [(12, 16, 60, 48), (30, 4, 66, 28)], strict=False):
        torch.testing.assert_close(one["boxes"][0], torch.tensor(box).float(), rtol=0, atol=6)
    with pytest.raises(ValueError, match="tells no masks"):
        processor.post_process_object_masks(outputs, 0.5, [(64, 96)] * 3)
    with pytest.raises(ValueError, match="1 target_sizes for 3"):
        processor.post_process_object_detection(outputs, 0.5, [(64, 96)])


def test_what_is_missing_is_said():
    model = hf_mim.MaskedViTForObjectDetection(hf_mim.MaskedViTConfig(**SMALL_VIT))
    pixel_values, labels = squares()
    with pytest.raises(ValueError, match="needs labels"):
        model.train()(pixel_values)
    with pytest.raises(ValueError, match="labels are of 1 pictures, and pixel_values of 3"):
        model(pixel_values, labels=labels[:1])
    with pytest.raises(ValueError, match="labels have no masks"):
        model(pixel_values, labels=[{k: v for k, v in one.items() if k != "masks"} for one in labels])
    with pytest.raises(ValueError, match="square patches; patch_size is 8 x 4"):
        hf_mim.MaskedViTForObjectDetection(hf_mim.MaskedViTConfig(**SMALL_VIT | {"patch_size": (8, 4)}))
    depths = {parameter_depth(name, 2) for name, _ in model.detection_head.named_parameters(prefix="detection_head")}
    assert depths == {3}
    model.set_trainable("head")
    assert {name.split(".")[0] for name, one in model.named_parameters() if one.requires_grad} == {"detection_head"}


def test_what_was_padded_is_no_part_of_the_picture():
    torch.manual_seed(0)
    model = hf_mim.MaskedViTForObjectDetection(hf_mim.MaskedViTConfig(**SMALL_VIT))
    model.detection_head.roi_heads.score_thresh = 0.0
    model.eval()
    mask = torch.zeros(1, 32, 32, dtype=torch.long)
    mask[:, :20, :28] = 1
    with torch.no_grad():
        (padded,), (whole,) = (model(torch.randn(1, 3, 32, 32), one).detections for one in (mask, None))
    assert len(padded["boxes"]) > 10 and padded["boxes"].max() == pytest.approx(1) and padded["boxes"].min() >= 0
    assert len(whole["boxes"]) > 10 and whole["boxes"].max() == pytest.approx(1)


def test_anchors_and_regions_lie_where_the_patches_are():
    """Of patches of 12 pixels, and of 5 rows, which the level of half as many rounds up to 3."""
    anchors = PatchAnchors([3.0, 6.0, 12.0, 24.0, 48.0], 4.0)
    maps = [torch.zeros(1, 1, *size) for size in ((20, 12), (10, 6), (5, 3), (3, 2), (2, 1))]
    images = torch.zeros(1, 3, 60, 36)
    (boxes,) = anchors(ImageList(images, [(60, 36)]), maps)
    centres = (boxes[:, :2] + boxes[:, 2:]) / 2
    number = [3 * one.shape[2] * one.shape[3] for one in maps]
    for level, stride in zip(centres.split(number), anchors.strides, strict=True):
        assert level[-1].tolist() == [stride * (size - 1) for size in maps[anchors.strides.index(stride)].shape[:1:-1]]
    square = boxes[1]
    assert (square[2:] - square[:2]).tolist() == [12, 12]

    pool = PatchRoIAlign(2, 12)
    levels = {str(number): torch.randn(1, 2, *one.shape[2:]) for number, one in enumerate(maps[:4])}
    region = torch.tensor([[6.0, 12.0, 30.0, 48.0]])
    found = pool(levels, [region], [(60, 36)])
    rois = torch.cat([torch.zeros(1, 1), region], dim=1)
    # 29 pixels of 12 x 14 are an eighth to a quarter: the finest level.
    torch.testing.assert_close(found, roi_align(levels["0"], rois, 2, spatial_scale=1 / 3, sampling_ratio=2))


def test_pipeline_and_masks_at_the_pictures_size(tmp_path):
    torch.manual_seed(0)
    labels = {0: "cat", 1: "dog"}
    fields = {name: value for name, value in RGB.items() if name != "num_labels"}
    model = tiny_model("pilamim", "ForObjectDetection", **fields, id2label=labels)
    model.detection_head.roi_heads.score_thresh = 0.0
    processor = detection_processor((32, 32), [0.5] * 3, [0.5] * 3)
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (30, 60, 3), dtype=np.uint8))
    inputs = processor(picture, return_tensors="pt")
    assert inputs["pixel_values"].shape == (1, 3, 32, 32)
    assert inputs["pixel_mask"][0].sum(dim=0).tolist() == [16] * 32 and not inputs["pixel_values"][0, :, 16:].any()
    with torch.no_grad():
        outputs = model(**inputs)
    (found,) = processor.post_process_object_masks(outputs, 0.2, [(30, 60)])
    assert found["masks"].shape == (len(found["scores"]), 30, 60) and found["masks"].dtype == torch.bool
    outside = torch.ones(30, 60, dtype=torch.bool)
    x0, y0, x1, y1 = found["boxes"][0].tolist()
    outside[max(0, int(y0) - 2) : int(y1) + 3, max(0, int(x0) - 2) : int(x1) + 3] = False
    assert not found["masks"][0][outside].any()
    with pytest.raises(ValueError, match="give target_sizes"):
        processor.post_process_object_masks(outputs, 0.2)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    detector = transformers.pipeline("object-detection", str(tmp_path))
    detector.model.detection_head.roi_heads.score_thresh = 0.0
    told = detector(picture, threshold=0.2)
    (expected,) = processor.post_process_object_detection(outputs, 0.2, [(30, 60)])
    assert [one["score"] for one in told] == pytest.approx(expected["scores"].tolist())
    assert [one["label"] for one in told] == [labels[number] for number in expected["labels"].tolist()]
    assert told and list(told[0]["box"].values()) == expected["boxes"][0].int().tolist()


# ---- What it is judged by


def _found(boxes, scores, labels, size=(10, 12)):
    boxes = torch.tensor(boxes).reshape(-1, 4).float()
    return {"boxes": boxes, "scores": torch.tensor(scores), "labels": torch.tensor(labels).long()} | _masks(
        boxes, size
    )


def _truth(boxes, classes, size=(10, 12)):
    boxes = torch.tensor(boxes).reshape(-1, 4).float()
    number = len(boxes)
    return {
        "boxes": boxes,
        "classes": torch.tensor(classes).long(),
        "crowds": torch.zeros(number, dtype=torch.bool),
        "areas": torch.zeros(number),
    } | _masks(boxes, size)


def _masks(boxes, size):
    masks = torch.zeros(len(boxes), *size, dtype=torch.bool)
    for mask, (x0, y0, x1, y1) in zip(masks, boxes.int().tolist(), strict=True):
        mask[y0:y1, x0:x1] = True
    return {"masks": masks}


# Of class 0: found, wrong, found; the third picture's object of class 1 is not found.
CASES = [
    (_found([[0, 0, 4, 4]], [0.9], [0]), _truth([[0, 0, 4, 4]], [0])),
    (_found([[6, 6, 9, 9], [2, 2, 8, 7]], [0.8, 0.7], [0, 0]), _truth([[2, 2, 8, 7]], [0])),
    (_found([], [], []), _truth([[1, 1, 5, 5]], [1])),
]
# Precision 1 up to a recall of a half, then 2/3, at COCO's 101 recalls.
BY_HAND = 100 * (51 * 1 + 50 * 2 / 3) / 101


def test_precision_by_hand():
    scores = DetectionScores(with_masks=True)
    for index, case in enumerate(CASES):
        scores.add(index, *case)
    found = scores.compute(["a", "b", "c"])
    for kind in ("box", "mask"):
        assert found[f"{kind}_ap"] == {"a": pytest.approx(BY_HAND), "b": 0.0, "c": None}
        assert found[f"{kind}_map"] == found[f"{kind}_map_50"] == pytest.approx(BY_HAND / 2)
        assert found[f"{kind}_map_large"] is None
    boxes = DetectionScores(with_masks=False)
    for index, case in enumerate(CASES):
        boxes.add(index, *case)
    assert boxes.compute(["a", "b", "c"]) == {name: value for name, value in found.items() if "mask" not in name}


def test_crowds_count_neither_way():
    found, truth = CASES[1]
    truth = {name: values.clone() for name, values in truth.items()}
    scores = DetectionScores(with_masks=False)
    scores.add(0, *CASES[0])
    truth["crowds"][:] = True
    scores.add(1, _found([[2, 2, 8, 7], [2, 2, 5, 7]], [0.95, 0.93], [0, 0]), truth)
    assert scores.compute(["a"])["box_map"] == pytest.approx(100)
    assert found["scores"].numel() == 2


def test_several_processes_count_what_one_does(monkeypatch):
    alone = DetectionScores(with_masks=True)
    for index, case in enumerate(CASES):
        alone.add(index, *case)
    expected = alone.compute(["a", "b"])
    parts = [DetectionScores(with_masks=True) for _ in range(2)]
    gathered = []
    monkeypatch.setattr(evaluation, "gather_object", lambda mine: gathered.append(mine) or mine)
    for index, case in enumerate(CASES):
        parts[index % 2].add(index, *case)
    for part in parts:
        part._gather()
    for part in parts:
        # As `gather_object` gives it: one process after the other.
        monkeypatch.setattr(evaluation, "gather_object", lambda mine: gathered[0] + gathered[1])
        assert part.compute(["a", "b"]) == expected


def test_package_that_is_not_there_is_named(monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(sys.modules, "faster_coco_eval", None)
    assert main([*SMALL, f"--output_dir={tmp_path / 'out'}"]) == 1
    assert "faster-coco-eval is wanted" in capsys.readouterr().err
    assert not (tmp_path / "out" / "config.json").exists()


# ---- What it is trained on


def _item(boxes, size, **fields):
    image = torch.zeros(3, *size, dtype=torch.uint8)
    item = _truth(boxes, list(range(len(boxes))), size) | fields
    for channel, mask in enumerate(item["masks"]):
        image[channel, mask] = 255
    return item | {"image": image}


def transform(size, **fields):
    return DetectionTransform(size, [0.0] * 3, [1.0] * 3, **({"scale_jitter": (1, 1)} | fields))


def test_a_box_and_its_mirror_image():
    item = _item([[1, 2, 4, 6]], (8, 10))
    found = [transform((8, 10))(item, 0, index) for index in range(12)]
    shares = [0.25, 0.5, 0.3, 0.5], [0.75, 0.5, 0.3, 0.5]
    seen = [[round(one, 6) for one in labels["boxes"][0].tolist()] for labels in (f["labels"] for f in found)]
    assert {tuple(one) for one in seen} == {tuple(one) for one in shares}
    for one in found:
        assert torch.equal(one["labels"]["masks"][0].bool(), one["pixel_values"][0] > 0.5)
    never = [transform((8, 10), horizontal_flip=False)(item, 0, index)["labels"]["boxes"] for index in range(4)]
    torch.testing.assert_close(torch.cat(never), torch.tensor([shares[0]] * 4))


@pytest.mark.parametrize("with_masks", [True, False])
def test_jitter_moves_picture_box_and_mask_alike(with_masks):
    item = _item([[2, 4, 6, 8], [13, 1, 16, 3]], (12, 16))
    augment = transform((24, 20), scale_jitter=(0.7, 2.5), with_masks=with_masks)
    numbers = []
    for index in range(16):
        found = augment(item, 1, index)
        labels = found["labels"]
        numbers.append(len(labels["class_labels"]))
        if numbers[-1] != 1 or 1 in labels["class_labels"]:
            continue
        lit, _ = tight_boxes(found["pixel_values"][:1] > 0.5)
        boxes = as_shares(lit, (24, 20))
        # Half a pixel of the smallest picture is rounded one way or the other.
        torch.testing.assert_close(labels["boxes"], boxes, rtol=0, atol=0.08)
    assert min(numbers) < 2 and max(numbers) == 2
    state = torch.random.get_rng_state()
    again = augment(item, 1, 15)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(again["labels"]["boxes"], found["labels"]["boxes"])


def test_crowds_and_pictures_without_objects():
    item = _item([[2, 4, 6, 8], [9, 1, 12, 3]], (12, 16), crowds=torch.tensor([True, False]))
    labels = transform((12, 16))(item, 0, 0)["labels"]
    assert labels["class_labels"].tolist() == [1] and labels["masks"].shape == (1, 12, 16)
    labels = transform((24, 32))(_item([], (12, 16)), 0, 0)["labels"]
    assert labels["boxes"].shape == (0, 4) and labels["masks"].shape == (0, 24, 32)


# ---- COCO's files


def ring():
    """A polygon of a rectangle, and the mask that it stands for in a picture of 20 x 16 pixels (width x height)."""
    mask = np.zeros((16, 20), dtype=np.uint8)
    mask[3:9, 2:12] = 1
    return [[2, 3, 12, 3, 12, 9, 2, 9]], mask


def run_lengths(mask) -> dict:
    flat = mask.T.ravel()
    changes = np.flatnonzero(np.diff(flat)) + 1
    counts = np.diff([0, *changes, flat.size]).tolist()
    return {"size": list(mask.shape), "counts": counts if flat[0] == 0 else [0, *counts]}


@pytest.fixture
def coco(tmp_path):
    """Four pictures, the last one without objects, and their JSON; a function that writes it with changes."""
    (tmp_path / "images").mkdir()
    polygon, mask = ring()
    table = {
        "images": [{"id": 7 + number, "file_name": f"{number}.png", "width": 20, "height": 16} for number in range(4)],
        "categories": [{"id": 9, "name": "dog"}, {"id": 3, "name": "cat"}],
        "annotations": [
            {"id": 1, "image_id": 7, "category_id": 3, "bbox": [2, 3, 10, 6], "segmentation": polygon, "area": 60},
            {"id": 2, "image_id": 8, "category_id": 9, "bbox": [2, 3, 10, 6], "segmentation": run_lengths(mask)},
            {"id": 3, "image_id": 9, "category_id": 9, "bbox": [0, 0, 5, 5], "segmentation": [[0, 0, 5, 0, 5, 5]]},
            {"id": 4, "image_id": 9, "category_id": 3, "bbox": [2, 3, 10, 6], "segmentation": polygon, "iscrowd": 1},
        ],
    }
    for number in range(4):
        Image.fromarray(np.full((16, 20, 3), 60 * number, np.uint8)).save(tmp_path / "images" / f"{number}.png")

    def load(change=lambda table: None, **fields):
        changed = json.loads(json.dumps(table))
        text = change(changed)
        (tmp_path / "objects.json").write_text(text if isinstance(text, str) else json.dumps(changed))
        data = DataArguments(train_dir=str(tmp_path / "images"), num_channels=3, validation_fraction=0.34)
        return load_objects(data, ObjectArguments(train_annotations=str(tmp_path / "objects.json"), **fields), 0)

    return load


def test_objects_of_a_json(coco):
    found = coco()
    # Of the three pictures with objects one is held out.
    assert (len(found.train), len(found.validation), found.names, found.with_masks) == (2, 1, ["cat", "dog"], True)
    items = {}
    for split in (found.train, found.validation):
        for index in range(len(split)):
            items[split.name(index)[-5]] = split.annotated(index, OBJECTS)
    assert sorted(items) == ["0", "1", "2"]
    first, second, third = (items[name] for name in "012")
    assert first["boxes"].tolist() == second["boxes"].tolist() == [[2, 3, 12, 9]]
    assert first["classes"].tolist() == [0] and second["classes"].tolist() == [1]
    assert first["areas"].tolist() == [60] and second["areas"].tolist() == [0]
    mask = torch.from_numpy(ring()[1]).bool()
    assert torch.equal(first["masks"][0], mask) and torch.equal(second["masks"][0], mask)
    assert third["crowds"].tolist() == [False, True] and third["masks"].shape == (2, 16, 20)
    counts = coco_mask.encode(np.asfortranarray(ring()[1]))["counts"]
    counts = counts.decode() if isinstance(counts, bytes) else counts
    assert np.array_equal(decode_mask({"size": [16, 20], "counts": counts}, (16, 20)), ring()[1])

    def without_masks(table):
        for one in table["annotations"]:
            del one["segmentation"]

    assert not coco(masks=False).with_masks and not coco(without_masks).with_masks
    assert coco().fingerprint == found.fingerprint != coco(without_masks).fingerprint
    with pytest.raises(ValueError, match="--masks: not every object"):
        coco(without_masks, masks=True)


def _change(place, **fields):
    return lambda table: table["annotations"][place].update(fields)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_change(0, bbox=[2, 3, 0, 6]), r"annotation 1, of 0\.png: the box \[2, 3, 0, 6\] .* is empty.*--skip_broken"),
        (_change(1, bbox=[2, 3, 20, 6]), r"annotation 2, of 1\.png: the box .* reaches out of its picture of 20 x 16"),
        (_change(1, bbox=[2, 3, None, 6]), "annotation 2, of 1.png: the box is .*four numbers"),
        (_change(0, category_id=5), "annotation 1, of 0.png: there is no category 5; there are cat, dog"),
        (_change(2, image_id=99), r"objects\.json, annotation 3: there is no image of the id 99"),
        (_change(0, segmentation=[[1, 2, 3]]), "annotation 1, of 0.png: its segmentation is a polygon that is no"),
        (_change(1, segmentation={"size": [20, 16], "counts": [1]}), r"run lengths of \[20, 16\].*\[16, 20\]"),
        (_change(1, segmentation={"size": [16, 20], "counts": [7]}), "run lengths that add up to 7 pixels"),
        (lambda table: table["annotations"][0].pop("bbox"), "entry 0 of annotations has no bbox"),
        (lambda table: table.pop("categories") and None, "has no list of categories"),
        (lambda table: table["images"][1].update(file_name="x.png"), r"images/x\.png does not exist.*\(1 of 4"),
        (lambda table: table["images"][1].update(width=16, height=20), r"1\.png has 16 x 20 pixels.*says 20 x 16"),
        (lambda table: table["images"][1].update(id=7), "gives the same id to several images"),
        (lambda table: table["annotations"].clear(), "No picture of .*images has an object"),
        (lambda table: '{"images": [', r"objects\.json is no JSON: .*line 1"),
        (lambda table: "[]", r"objects\.json holds a list"),
    ],
)
def test_what_is_wrong_is_told_by_its_name(coco, change, message):
    with pytest.raises(ValueError, match=message):
        coco(change)


def test_broken_objects_may_be_left_out(coco, caplog):
    found = coco(_change(0, bbox=[2, 3, 0, 6]), skip_broken_objects=True)
    assert len(found.train) + len(found.validation) == 2
    with pytest.raises(ValueError, match="--train_dir and --train_annotations go together"):
        load_objects(DataArguments(train_dir="images"), ObjectArguments(), 0)
    with pytest.raises(ValueError, match="--validation_annotations goes with --train_annotations"):
        ObjectArguments(validation_annotations="x.json")


def test_nothing_is_lost_by_bad_objects(coco, tmp_path, capsys):
    with pytest.raises(ValueError):
        coco(_change(0, bbox=[2, 3, 0, 6]))
    out = tmp_path / "out"
    out.mkdir()
    (out / "model.safetensors").write_bytes(b"as it was")
    flags = [f"--train_dir={tmp_path / 'images'}", f"--train_annotations={tmp_path / 'objects.json'}"]
    assert main([*SMALL, *flags, f"--output_dir={out}"]) == 1
    assert "0.png: the box [2, 3, 0, 6]" in capsys.readouterr().err
    assert (out / "model.safetensors").read_bytes() == b"as it was"


@pytest.mark.parametrize("kind", ["list of dicts", "dict of lists"])
def test_objects_of_a_column(kind, tmp_path):
    import datasets

    names = ["cat", "dog"]
    objects = [[{"bbox": [2, 3, 10, 6], "category": number % 2}] for number in range(3)] + [[]]
    one = {"bbox": datasets.List(datasets.Value("float32"), 4), "category": datasets.ClassLabel(names=names)}
    feature = datasets.List(one)
    if kind == "dict of lists":
        objects = [{key: [each[key] for each in entries] for key in one} for entries in objects]
        feature = {key: datasets.List(value) for key, value in one.items()}
    images = [Image.fromarray(np.full((16, 20, 3), 60 * number, np.uint8)) for number in range(4)]
    features = datasets.Features(image=datasets.Image(), objects=feature)
    table = datasets.Dataset.from_dict({"image": images, "objects": objects}, features=features)
    datasets.DatasetDict({"train": table, "validation": table}).save_to_disk(str(tmp_path / "data"))
    data = DataArguments(dataset_name=str(tmp_path / "data"), num_channels=3, image_size=[16])
    found = load_objects(data, ObjectArguments(), 0)
    assert (len(found.train), len(found.validation), found.names, found.with_masks) == (3, 4, names, False)
    item = found.train.annotated(1, ["boxes", "classes"])
    assert item["boxes"].tolist() == [[2, 3, 12, 9]] and item["classes"].tolist() == [1] and item["image"].max() == 60
    with pytest.raises(ValueError, match="no column things; it has image, objects"):
        load_objects(data, ObjectArguments(objects_column_name="things"), 0)


# ---- The job


def test_scenes_from_end_to_end_and_resumed_to_the_bit(tmp_path, capsys):
    flags = [*SMALL, "--per_device_train_batch_size=4", f"--data_cache_dir={tmp_path}"]
    out, again = tmp_path / "out", tmp_path / "again"
    assert main([*flags, f"--output_dir={out}"]) == 0
    results = json.loads((out / "results.json").read_text())
    assert set(results["box_ap"]) == set(results["mask_ap"]) == {"sphere", "cube", "cylinder"}
    assert results["num_test"] == 4 and 0 <= results["mask_map"] <= 100
    assert f"mAP of boxes: {results['box_map']:.2f} %" in capsys.readouterr().out
    assert Image.open(out / "detections.png").size[1] > 300
    assert "pipeline_tag: object-detection" in (out / "README.md").read_text()
    assert transformers.AutoModelForObjectDetection.from_pretrained(out).config.id2label[2] == "cylinder"
    logs = json.loads((out / "trainer_state.json").read_text())["log_history"]
    assert {"loss_objectness", "loss_proposal_box", "loss_class", "loss_box", "loss_mask"} < set(logs[0])

    again.mkdir()
    shutil.copytree(out / "checkpoint-2", again / "checkpoint-2")
    assert main([*flags, f"--output_dir={again}"]) == 0
    first, second = (load_file(folder / "model.safetensors") for folder in (out, again))
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
    assert json.loads((again / "results.json").read_text()) == results
    capsys.readouterr()
    assert main([*flags, "--scale_jitter", "1", "1", f"--output_dir={out}"]) == 1
    assert "holds another run (scale_jitter" in capsys.readouterr().err


@pytest.mark.slow
def test_two_processes_count_what_one_does(tmp_path):
    flags = ["-m", "hf_mim", "detect", *SMALL, f"--data_cache_dir={tmp_path}", f"--output_dir={tmp_path / 'out'}"]
    assert run([*flags, "--per_device_train_batch_size=4"]).returncode == 0
    alone = json.loads((tmp_path / "out" / "results.json").read_text())
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port=29641"]
    found = run([*launcher, *flags, "--per_device_train_batch_size=2"])
    assert found.returncode == 0, found.stderr
    assert "Nothing is left to train" in found.stdout
    assert json.loads((tmp_path / "out" / "results.json").read_text()) == alone
    trained = run([*launcher, *flags[:-1], f"--output_dir={tmp_path / 'two'}", "--per_device_train_batch_size=2"])
    assert trained.returncode == 0, trained.stderr


# ---- Recipes

RECIPES = sorted((REPOSITORY / "examples" / "recipes").glob("detect_*"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipes_can_be_read(path, tmp_path):
    flags = [str(path), f"--output_dir={tmp_path / 'out'}", "--use_cpu"]
    model_args, data_args, object_args, args = parse_arguments(CLASSES, flags, DETECTION_PRESETS)
    assert data_args.image_size == [1024] and object_args.skip_broken_objects
    assert args.scale_jitter == [0.1, 2.0] and args.num_train_epochs == 100
    sizes = {"small": 12, "base": 12, "large": 24}
    config, encoder = build_dense_config(model_args, data_args.image_height_width, data_args.num_channels)
    assert config.num_hidden_layers == sizes[model_args.preset] and encoder is None
    with torch.device("meta"):
        build_dense(model_args, config, None, "ForObjectDetection")


@pytest.mark.slow
@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_the_first_step_of_a_recipe(path, tmp_path, coco):
    coco()
    objects = f"{tmp_path / 'objects.json'}"
    small = ["--image_size=32", "--config_overrides=hidden_size=16,num_hidden_layers=2,num_attention_heads=2"]
    small += ["--detection_head_size=8", "--detection_regions=8", "--per_device_train_batch_size=2", "--max_steps=1"]
    small += [f"--train_dir={tmp_path / 'images'}", f"--train_annotations={objects}"]
    small += [f"--validation_dir={tmp_path / 'images'}", f"--validation_annotations={objects}", "--bf16=false"]
    small += ["--gradient_accumulation_steps=1", "--warmup_epochs=0", "--save_strategy=no", "--eval_strategy=no"]
    flags = [str(path), f"--output_dir={tmp_path / 'out'}", "--use_cpu", "--dataloader_num_workers=0"]
    assert main([*flags, *small]) == 0
    assert json.loads((tmp_path / "out" / "results.json").read_text())["num_train"] == 3
