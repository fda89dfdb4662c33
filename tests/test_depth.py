"""Estimators of depth: models of every method, what they are trained and judged by, and their data."""

import json
import math
import shutil

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file

import hf_mim
from hf_mim.data.arguments import DataArguments
from hf_mim.data.dense import DenseTransform
from hf_mim.data.depth import DepthMapArguments, load_depths
from hf_mim.data.image_processing import MIMImageProcessor
from hf_mim.evaluation.depth import DepthErrors
from hf_mim.jobs.depth import main
from hf_mim.models.vit.depth import DPTDepthHead, scale_invariant_log_loss
from hf_mim.registry import METHODS, method_class
from hf_mim.training.layer_decay import parameter_depth
from tiny import tiny_config, tiny_model


def pictures(height=32, width=32, channels=5, number=2):
    return torch.randn(number, channels, height, width, generator=torch.Generator().manual_seed(0))


# ---- Models


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("head", "scale"), [("linear", 1), ("dpt", 4)])
def test_of_a_pretraining_checkpoint(method, head, scale, tmp_path):
    pretrained = tiny_model(method, "ForPreTraining", drop_path_rate=0.1)
    pretrained.save_pretrained(tmp_path / "pretrained")
    torch.manual_seed(0)
    model = transformers.AutoModelForDepthEstimation.from_pretrained(
        tmp_path / "pretrained", depth_head=head, depth_head_size=8, log_depth_mean=1.0
    )
    assert type(model) is method_class(method, "ForDepthEstimation") and model.config.drop_path_rate == 0
    with torch.no_grad():
        usual = model(pictures(32, 48)).predicted_depth
        torch.testing.assert_close(usual, torch.full_like(usual, math.e))
    for name, value in model.encoder.state_dict().items():
        assert torch.equal(value, pretrained.encoder.state_dict()[name]), name
    batch = pictures(32, 48)
    labels = torch.full((2, 32, 48), 6.0)
    labels[0, :8], labels[1, 3] = 0, math.nan
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(6):
        loss = model.train()(batch, labels=labels).loss
        losses.append(loss.item())
        loss.backward()
        for name, parameter in model.named_parameters():
            assert parameter.grad is None or parameter.grad.isfinite().all(), name
            assert parameter.grad is not None or not parameter.requires_grad, name
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0]
    model.eval().save_pretrained(tmp_path / "trained")
    loaded = transformers.AutoModelForDepthEstimation.from_pretrained(tmp_path / "trained")
    with torch.no_grad():
        outputs = model(batch)
        assert outputs.predicted_depth.shape == (2, 4 * scale, 12 * scale) and outputs.hidden_states is None
        assert (outputs.predicted_depth > 0).all()
        assert torch.equal(loaded(batch).predicted_depth, outputs.predicted_depth)
        assert loaded(pictures(24, 20)).predicted_depth.shape == (2, 3 * scale, 5 * scale)
        with_states = model(batch, output_hidden_states=True)
        assert len([state for state in with_states.hidden_states if state is not None]) == 4
    # What was fine-tuned gives its encoder on, and says nothing of its head.
    encoder, info = method_class(method, "Model").from_pretrained(tmp_path / "trained", output_loading_info=True)
    assert not info["unexpected_keys"] and not info["missing_keys"]
    assert torch.equal(encoder.layernorm.weight, model.encoder.layernorm.weight)


def test_linear_head_reads_the_last_blocks_patches():
    model = tiny_model("pilamim", "ForDepthEstimation", log_depth_mean=0.5)
    batch = pictures(32, 48)
    with torch.no_grad():
        tokens = model.encoder(batch).last_hidden_state[:, 1:]
        head = model.depth_head
        relative = head.regressor(head.batch_norm(tokens.transpose(1, 2).unflatten(2, (4, 12))))[:, 0]
        torch.testing.assert_close(model(batch).predicted_depth, (relative + 0.5).exp())


def test_dpt_reads_blocks_a_quarter_of_the_depth_apart_and_all_of_them_count():
    assert DPTDepthHead(tiny_config("pilamim", num_hidden_layers=12)).stages == [3, 6, 9, 12]
    torch.manual_seed(0)
    head = DPTDepthHead(tiny_config("pilamim", num_hidden_layers=4, depth_head_size=8))
    maps = [torch.randn(1, 32, 3, 5) for _ in range(4)]
    with torch.no_grad():
        before = head(maps)
        assert before.shape == (1, 1, 12, 20)
        for number in range(4):
            changed = [one + 1.0 if place == number else one for place, one in enumerate(maps)]
            assert not torch.allclose(head(changed), before)


def test_learning_rates_take_heads_for_heads():
    model = tiny_model("pilamim", "ForDepthEstimation", depth_head="dpt", depth_head_size=8)
    depths = {name: parameter_depth(name, 3) for name, _ in model.named_parameters()}
    assert {depth for name, depth in depths.items() if name.startswith("depth_head.")} == {4}
    assert set(depths.values()) == {0, 1, 2, 3, 4}


def test_frozen_it_trains_its_head_alone():
    model = tiny_model("ocl", "ForDepthEstimation", depth_head="dpt", depth_head_size=8)
    model.set_trainable("head")
    assert all(
        parameter.requires_grad == name.startswith("depth_head.") for name, parameter in model.named_parameters()
    )


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"depth_head": "conv"}, "depth_head is 'conv'.*linear.*dpt"),
        ({"scale_invariance": 2.0}, "scale_invariance is 2"),
    ],
)
def test_wrong_fields_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        hf_mim.MaskedViTConfig(**fields)


def test_loss_by_hand():
    predicted = torch.tensor([[[2.0, 4.0]], [[3.0, 1.0]], [[5.0, 5.0]]])
    labels = torch.tensor([[[1.0, 8.0]], [[6.0, 0.0]], [[math.nan, math.inf]]])
    # Differences of the logarithms: log 2 and -log 2; -log 2; none.
    log2 = math.log(2)
    for invariance, expected in ((0.0, log2**2), (0.5, (log2**2 + 0.5 * log2**2) / 2), (1.0, log2**2 / 2)):
        assert scale_invariant_log_loss(predicted, labels, invariance).item() == pytest.approx(expected, rel=1e-5)
    assert scale_invariant_log_loss(predicted[2:], labels[2:], 0.5) == 0
    # Twice the size: the depths are interpolated, which leaves those that are all the same.
    assert scale_invariant_log_loss(torch.ones(1, 1, 2), torch.full((1, 2, 4), 2.0), 0.0) == pytest.approx(log2**2)
    with pytest.raises(ValueError, match=r"\(3, height, width\)"):
        scale_invariant_log_loss(predicted, labels[0], 0.5)


@pytest.mark.parametrize("method", METHODS)
def test_pipeline_tells_the_depth_of_each_pixel_of_the_picture(method, tmp_path):
    model = tiny_model(method, "ForDepthEstimation", num_channels=3)
    model.save_pretrained(tmp_path)
    processor = MIMImageProcessor(
        num_channels=3, size={"height": 32, "width": 48}, image_mean=[0.5] * 3, image_std=[0.5] * 3
    )
    processor.save_pretrained(tmp_path)
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (30, 50, 3), dtype=np.uint8))
    found = transformers.pipeline("depth-estimation", str(tmp_path))(picture)
    assert found["depth"].size == (50, 30)
    with torch.no_grad():
        depth = model(**processor(picture, return_tensors="pt")).predicted_depth
    expected = torch.nn.functional.interpolate(depth[None], size=(30, 50), mode="bilinear")[0, 0]
    torch.testing.assert_close(found["predicted_depth"], expected)
    (plain,) = processor.post_process_depth_estimation({"predicted_depth": depth})
    assert torch.equal(plain["predicted_depth"], depth[0])
    with pytest.raises(ValueError, match="2 target_sizes for 1"):
        processor.post_process_depth_estimation({"predicted_depth": depth}, target_sizes=[(4, 5)] * 2)


def test_a_step_of_transformers_own_dpt_on_our_backbone(tmp_path):
    torch.manual_seed(0)
    backbone = tiny_config(
        "pilamim", image_size=32, patch_size=8, num_channels=3, num_hidden_layers=4, out_indices=[1, 2, 3, 4],
        reshape_hidden_states=False,
    )  # fmt: skip
    config = transformers.DPTConfig(
        backbone_config=backbone, neck_hidden_sizes=[8, 8, 8, 8], fusion_hidden_size=8, readout_type="ignore"
    )
    model = transformers.DPTForDepthEstimation(config).train()
    (encoder,) = (module for module in model.modules() if type(module) is hf_mim.PiLaMIMModel)
    before = encoder.layers[0].mlp.fc1.weight.detach().clone()
    depth = model(pictures(64, 32, channels=3)).predicted_depth
    assert depth.shape == (2, 128, 64)
    scale_invariant_log_loss(depth + 1e-3, torch.rand(2, 64, 32) + 1, 0.5).backward()
    torch.optim.AdamW(model.parameters(), lr=1e-3).step()
    assert not torch.equal(encoder.layers[0].mlp.fc1.weight, before)
    model.eval().save_pretrained(tmp_path)
    loaded = transformers.DPTForDepthEstimation.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        batch = pictures(32, 64, channels=3)
        assert torch.equal(loaded(batch).predicted_depth, model(batch).predicted_depth)


# ---- The job


def test_scenes_from_end_to_end_and_resumed_to_the_bit(tmp_path, capsys):
    flags = [
        "--model_type=dbot",
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
        "--per_device_train_batch_size=4",
        "--depth_head=dpt",
        "--depth_head_size=8",
        f"--data_cache_dir={tmp_path}",
    ]
    out, again = tmp_path / "out", tmp_path / "again"
    assert main([*flags, f"--output_dir={out}"]) == 0
    results = json.loads((out / "results.json").read_text())
    assert results["num_test"] == 3 and 0 < results["rmse"] < 20 and 0 < results["delta1"] <= 100
    assert f"RMSE: {results['rmse']:.4g};" in capsys.readouterr().out
    assert Image.open(out / "depth.png").size[1] > 300
    assert "pipeline_tag: depth-estimation" in (out / "README.md").read_text()
    # It starts from the scenes' usual depth, which a camera some ten units away sees.
    assert 5 < math.exp(json.loads((out / "config.json").read_text())["log_depth_mean"]) < 20
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8))
    assert transformers.pipeline("depth-estimation", str(out))(picture)["depth"].size == (30, 20)

    again.mkdir()
    shutil.copytree(out / "checkpoint-2", again / "checkpoint-2")
    assert main([*flags, f"--output_dir={again}"]) == 0
    first, second = (load_file(folder / "model.safetensors") for folder in (out, again))
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_errors_by_hand_and_as_sums():
    truth = torch.tensor([2.0, 4.0, 0.0, math.nan, 10.0])
    told = torch.tensor([2.4, 2.0, 7.0, 7.0, 12.0])
    errors = DepthErrors()
    errors.add(truth, told)
    scores = errors.scores()
    assert scores["rmse"] == pytest.approx(math.sqrt((0.4**2 + 2**2 + 2**2) / 3))
    assert scores["abs_rel"] == pytest.approx(100 * (0.2 + 0.5 + 0.2) / 3)
    assert scores["delta1"] == pytest.approx(200 / 3)
    parts = DepthErrors()
    parts.add(truth[:2], told[:2])
    parts.add(truth[2:], told[2:])
    torch.testing.assert_close(parts.counts, errors.counts)
    assert DepthErrors().scores() == {"rmse": 0.0, "abs_rel": 0.0, "delta1": 0.0}


def test_augmentation_moves_depths_with_the_picture():
    depth = torch.rand(20, 30) + 1
    item = {"image": depth.expand(3, -1, -1), "depth": depth}
    transform = DenseTransform("depth", 0.0, (20, 12), [0.0] * 3, [1.0] * 3, scale_jitter=(1, 1))
    found = [transform(item, 0, index) for index in range(4)]
    assert all(torch.equal(one["pixel_values"][0], one["labels"]) for one in found)
    assert len({one["labels"].numpy().tobytes() for one in found}) > 1
    smaller = DenseTransform("depth", 0.0, (20, 12), [0.0] * 3, [1.0] * 3, scale_jitter=(0.5, 0.5))(item, 0, 0)
    assert (smaller["labels"] == 0).sum() >= 20 * 12 - 10 * 15 and smaller["labels"].dtype == torch.float32


# ---- Depth maps


@pytest.fixture
def folders(tmp_path):
    """Four pictures, and depths of 1 to 4 metres in millimetres."""
    for name in ("images", "depths"):
        (tmp_path / name).mkdir()
    for number in range(4):
        depth = np.full((16, 20), 1000 * (number + 1), dtype=np.uint16)
        depth[:2] = 0
        Image.fromarray(np.zeros((16, 20, 3), np.uint8)).save(tmp_path / "images" / f"{number}.jpg")
        Image.fromarray(depth).save(tmp_path / "depths" / f"{number}.png")
    return tmp_path


def load(root, **fields):
    data = DataArguments(train_dir=str(root / "images"), num_channels=3, image_size=[16], validation_fraction=0.25)
    return load_depths(data, DepthMapArguments(train_depth_dir=str(root / "depths"), **fields), 0)


def test_depths_of_a_folder(folders):
    stored = np.full((16, 20), np.nan, dtype=np.float64)
    stored[5] = 1000.0
    (folders / "depths" / "0.png").unlink()
    np.save(folders / "depths" / "0.npy", stored)
    train, validation, mean = load(folders, depth_scale=0.001)
    assert (len(train), len(validation)) == (3, 1)
    logarithms = []
    for split in (train, validation):
        for index in range(len(split)):
            depths = split.annotated(index, ["depth"])["depth"]
            number = int(split.name(index)[-5])
            known = depths[5:6] if number == 0 else depths[2:]
            assert (depths > 0).sum() == known.numel() and depths.dtype == torch.float32
            torch.testing.assert_close(known, torch.full_like(known, number + 1.0))
            logarithms += [math.log(number + 1)] * known.numel() * (split is train)
    assert mean == pytest.approx(np.mean(logarithms))


def _save(array, name="1.png"):
    return lambda root: Image.fromarray(array).save(root / "depths" / name)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda root: (root / "depths" / "1.png").unlink(), r"images/1\.jpg has no depth .*depths/1\.png \(1 of 4"),
        (lambda root: (root / "images" / "1.jpg").unlink(), r"depths/1\.png has no picture of its stem"),
        (_save(np.ones((20, 16), np.uint16)), r"1\.png has 20 x 16 pixels.*1\.jpg, 16 x 20"),
        (_save(np.zeros((16, 20, 3), np.uint8)), r"1\.png: a depth map of colours \(RGB\)"),
        (_save(np.zeros((16, 20), np.uint8)), r"1\.png: a depth map of 8 bits"),
        (_save(np.full((16, 20), -1.0, np.float32), "1.tiff"), r"1\.tiff: a depth of -1; expected numbers above 0"),
        (lambda root: (root / "depths" / "1.png").write_bytes(b""), r"1\.png: the depth map cannot be read"),
    ],
)
def test_what_is_wrong_with_a_depth_map_is_told_by_its_name(folders, change, message):
    if "tiff" in message:
        (folders / "depths" / "1.png").unlink()
    change(folders)
    with pytest.raises(ValueError, match=message):
        load(folders)


def test_depths_that_say_nothing_are_refused(folders):
    for number in range(4):
        Image.fromarray(np.zeros((16, 20), np.uint16)).save(folders / "depths" / f"{number}.png")
    with pytest.raises(ValueError, match="No pixel of the depth maps of .*images has a depth"):
        load(folders)
    with pytest.raises(ValueError, match="--train_dir and --train_depth_dir go together"):
        load_depths(DataArguments(train_dir=str(folders / "images")), DepthMapArguments(), 0)
    with pytest.raises(ValueError, match="--depth_scale is 0"):
        DepthMapArguments(depth_scale=0.0)


def test_depths_of_a_column(tmp_path):
    import datasets

    depths = [np.full((16, 20), number + 1.0, dtype=np.float32) for number in range(4)]
    columns = {"image": [Image.new("RGB", (20, 16)) for _ in depths], "depth_map": depths}
    features = datasets.Features(image=datasets.Image(), depth_map=datasets.Array2D((16, 20), "float32"))
    datasets.Dataset.from_dict(columns, features=features).save_to_disk(str(tmp_path / "data"))
    data = DataArguments(
        dataset_name=str(tmp_path / "data"), num_channels=3, image_size=[16], image_column_name="image",
        validation_fraction=0.25,
    )  # fmt: skip
    train, validation, _ = load_depths(data, DepthMapArguments(depth_scale=2.0), 0)
    items = [split.annotated(index, ["depth"]) for split in (train, validation) for index in range(len(split))]
    found = [int(item["depth"][3, 4]) for item in items]
    assert sorted(found) == [2, 4, 6, 8] and len(validation) == 1
