"""Exports for other software: they run as the model does, and nothing is left of those that do not."""

import os
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import (
    AutoModel,
    AutoModelForImageClassification,
    Dinov2Config,
    Dinov2Model,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
    ViTMAEModel,
)

import hf_mim
from hf_mim.__main__ import main
from hf_mim.data.image_processing import build_image_processor
from hf_mim.hub.formats import FORMATS, TimmFormat, three_sizes
from tiny import scrambled, tiny_model

SQUARE = {"image_size": (32, 32), "patch_size": (8, 8), "num_channels": 3}
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
LABELS = {0: "cat", 1: "dog", 2: "fish"}
TRACED = ("onnx", "torch-export")
# Tracing takes seconds a block.
ONE_BLOCK = {"num_hidden_layers": 1}
# Beside them dinov2, of which the grid has to be a square.
WEIGHTS = ("vit", "timm", "safetensors")


def named(path, format):
    """`path` with the format's ending."""
    return path.with_name(path.name + FORMATS[format].ending)


def tokens(model, pixel_values):
    with torch.no_grad():
        return model(pixel_values, interpolate_pos_encoding=True).last_hidden_state


@pytest.mark.parametrize("format", [*WEIGHTS, "dinov2"])
def test_weights_of_an_encoder(format, tmp_path):
    settings = [SQUARE | {"qkv_bias": False, "layer_norm_eps": 1e-3, "pooling": "mean"}, {"intermediate_size": 80}]
    for number, fields in enumerate(settings[: 1 if format == "dinov2" else 2]):
        model = tiny_model("tec", "ForPreTraining", **fields)
        assert hf_mim.export(model, named(tmp_path / str(number), format), format) < 1e-5


@pytest.mark.parametrize("format", [*WEIGHTS, "dinov2"])
@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_weights_of_a_classifier(format, pooling, tmp_path):
    model = tiny_model("ocl", "ForImageClassification", pooling=pooling, id2label=LABELS, **SQUARE)
    if (format, pooling) == ("vit", "mean"):
        with pytest.raises(ValueError, match=r"reads \[CLS\] only"):
            hf_mim.export(model, tmp_path / "out", format)
        assert not any(tmp_path.iterdir())
    else:
        assert hf_mim.export(model, named(tmp_path / "out", format), format) < 1e-5
    if format == "dinov2":
        exported = AutoModelForImageClassification.from_pretrained(tmp_path / "out")
        assert type(exported).__name__ == "Dinov2ForImageClassification" and exported.config.id2label == LABELS


@pytest.mark.parametrize("format", ["timm", "safetensors"])
def test_no_cls(format, tmp_path):
    config = hf_mim.MaskedViTConfig(**SIZES, image_size=32, patch_size=8, use_cls_token=False, pooling="mean")
    model = scrambled(hf_mim.MaskedViTModel(config))
    assert hf_mim.export(model, tmp_path / "out.safetensors", format) < 1e-5


MODERN = {"num_register_tokens": 2, "embedding_layernorm": True, "use_gated_mlp": True, "key_bias": False}


def test_what_only_some_formats_have_room_for(tmp_path):
    sizes = SIZES | ONE_BLOCK | MODERN
    config = hf_mim.MaskedViTConfig(**sizes, image_size=32, patch_size=8, position_embedding="learned")
    model = scrambled(hf_mim.MaskedViTModel(config)).eval()
    assert hf_mim.export(model, tmp_path / "out.pt2", "torch-export") < 1e-5
    assert hf_mim.export(model, tmp_path / "out.safetensors", "safetensors") < 1e-5
    with pytest.raises(ValueError, match="no register tokens and no gated MLPs and no a first LayerNorm"):
        hf_mim.export(model, tmp_path / "timm.safetensors", "timm")
    rotary = hf_mim.MaskedViTModel(hf_mim.MaskedViTConfig(**SIZES, image_size=32, position_embedding="rotary"))
    with pytest.raises(ValueError, match="no rotary positions"):
        hf_mim.export(rotary, tmp_path / "rotary.onnx", "onnx")
    assert hf_mim.export(rotary, tmp_path / "rotary.safetensors", "safetensors") < 1e-5
    assert not list(tmp_path.glob("timm*")) and not list(tmp_path.glob("*.onnx*"))


def test_timm_loads_strictly_by_its_own_names(tmp_path):
    """Of a size that timm knows, without any setting but that of the image."""
    import timm

    config = hf_mim.PiLaMIMConfig(
        hidden_size=192, num_hidden_layers=12, num_attention_heads=3, image_size=64, position_embedding="learned"
    )
    model = scrambled(hf_mim.PiLaMIMModel(config)).eval()
    hf_mim.export(model, tmp_path / "vit.safetensors", "timm")
    network = timm.create_model("vit_tiny_patch16_224", img_size=64, num_classes=0, dynamic_img_size=True).eval()
    network.load_state_dict(load_file(tmp_path / "vit.safetensors"), strict=True)
    pixel_values = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(network(pixel_values), model(pixel_values).pooler_output, rtol=0, atol=1e-4)


def test_traced_encoders_take_any_size(tmp_path):
    """Both traced forms; another batch and size than any that the export itself tries."""
    import onnxruntime

    model = tiny_model("tec", "Model", **ONE_BLOCK, adapter_group_size=1, image_size=(32, 48), patch_size=(8, 4))
    for format in TRACED:
        assert hf_mim.export(model, named(tmp_path / "out", format), format) < 1e-5
    session = onnxruntime.InferenceSession(tmp_path / "out.onnx")
    program = torch.export.load(tmp_path / "out.pt2").module()
    pixel_values = torch.randn(4, 5, 64, 20)
    assert (4, 64, 20) not in three_sizes(model)
    expected = tokens(model, pixel_values)
    cls, mean, patches = (torch.from_numpy(part) for part in session.run(None, {"pixel_values": pixel_values.numpy()}))
    traced = program(pixel_values)
    for found in ({"cls": cls, "mean": mean, "patches": patches}, traced):
        torch.testing.assert_close(found["cls"], expected[:, 0], rtol=0, atol=1e-4)
        torch.testing.assert_close(found["mean"], expected[:, 1:].mean(dim=1), rtol=0, atol=1e-4)
        torch.testing.assert_close(found["patches"], expected[:, 1:], rtol=0, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("format", TRACED)
@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_traced_classifiers(format, pooling, tmp_path):
    model = tiny_model("dbot", "ForImageClassification", pooling=pooling, id2label=LABELS, num_hidden_layers=1)
    assert hf_mim.export(model, named(tmp_path / "out", format), format) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("format", FORMATS)
def test_half_precision(format, tmp_path):
    model = tiny_model("pilamim", "Model", num_hidden_layers=1, **(SQUARE | {"hidden_size": 128}))
    half, whole = (named(tmp_path / name, format) for name in ("half", "whole"))
    assert 1e-5 < hf_mim.export(model, half, format, dtype="float16") < 2e-2
    assert hf_mim.export(model, whole, format) < 1e-5
    if format in ("vit", "dinov2"):
        half, whole = half / "model.safetensors", whole / "model.safetensors"
    assert half.stat().st_size < 0.8 * whole.stat().st_size


def test_stock_models(tmp_path):
    """ViT, its classifier, DINOv2, and a ViTMAE that would hide three quarters of the image."""
    torch.manual_seed(0)
    vit = scrambled(ViTForImageClassification(ViTConfig(**SIZES, image_size=32, patch_size=8, num_labels=3)))
    assert hf_mim.export(vit, tmp_path / "classifier.safetensors", "timm") < 1e-5
    assert hf_mim.export(vit.vit, tmp_path / "vit", "vit") < 1e-5
    sizes = {name: value for name, value in (SIZES | ONE_BLOCK).items() if name != "intermediate_size"}
    dino = Dinov2Model(Dinov2Config(**sizes, image_size=32, patch_size=8))
    assert hf_mim.export(scrambled(dino), tmp_path / "dino.pt2", "torch-export") < 1e-5
    mae = hf_mim.ViTMAEForPreTraining(hf_mim.ViTMAEConfig(**SIZES, image_size=32, patch_size=8))
    scrambled(mae).save_pretrained(tmp_path / "mae")
    assert hf_mim.export(tmp_path / "mae", tmp_path / "of_path.safetensors", "safetensors") < 1e-5
    assert (
        hf_mim.export(ViTMAEModel.from_pretrained(tmp_path / "mae"), tmp_path / "of_stock.safetensors", "safetensors")
        < 1e-5
    )
    of_path, of_stock = load_file(tmp_path / "of_path.safetensors"), load_file(tmp_path / "of_stock.safetensors")
    assert all(torch.equal(of_path[name], of_stock[name]) for name in of_path | of_stock)


def test_an_export_is_a_copy(tmp_path):
    model = tiny_model("ocl", "ForImageClassification", **ONE_BLOCK)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    hf_mim.export(model, tmp_path / "out.pt2", "torch-export", dtype="float16")
    after = model.state_dict()
    assert all(torch.equal(value, after[name]) and value.dtype == after[name].dtype for name, value in before.items())


def save_run(folder, processor=None, **fields):
    tiny_model("pilamim", "ForPreTraining", **fields).save_pretrained(folder)
    if processor is not None:
        processor.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("format", ["vit", "timm", "safetensors"])
@pytest.mark.parametrize("size", [(32, 32), (32, 48), (128, 128)])
def test_the_file_beside_it_runs(format, size, tmp_path, monkeypatch):
    """Four lines that give what image processor and model give."""
    processor = build_image_processor(size, 3, [0.4, 0.5, 0.6], [0.2, 0.3, 0.25])
    run = save_run(tmp_path / "run", processor, image_size=size, patch_size=(16, 16), num_channels=3)
    assert main(["export", str(run), str(named(tmp_path / "out", format)), "--format", format]) == 0
    folder = tmp_path / "out" if format == "vit" else tmp_path
    code = (folder / ("use.py" if format == "vit" else "out.safetensors.py")).read_text()
    assert (
        code.startswith(f"# What {named(tmp_path / 'out', format).name} takes and gives. Images: ")
        and "red, green, blue" in code.splitlines()[0]
    )
    assert len(code.split("\n\n")[1].splitlines()) == 4
    rows = np.linspace(0, 255, 150)[:, None, None]
    image = Image.fromarray(np.broadcast_to(rows * [1.0, 0.5, 0.2], (150, 200, 3)).astype(np.uint8))
    image.save(folder / "image.jpg")
    monkeypatch.chdir(folder)
    names = {}
    exec(code, names)
    pixel_values = processor(Image.open("image.jpg"), return_tensors="pt")["pixel_values"]
    assert names["pixel_values"].shape == tuple(pixel_values.shape)
    # Resized in another order of steps: a few of 255 levels.
    assert np.abs(names["pixel_values"] - pixel_values.numpy()).max() < 0.15
    if format == "safetensors":
        assert names["weights"]["embeddings.cls_token"].shape == (1, 1, 32)
    else:
        model = AutoModel.from_pretrained(run)
        expected = tokens(model, torch.from_numpy(names["pixel_values"]))
        torch.testing.assert_close(names["tokens"], expected, rtol=0, atol=1e-4)


def test_the_file_beside_it_of_other_channels(tmp_path, monkeypatch):
    """Nothing saved with the model: the file says so."""
    run = save_run(tmp_path / "run")
    hf_mim.export(run, tmp_path / "out.safetensors", "timm")
    code = (tmp_path / "out.safetensors.py").read_text()
    assert "5 channels" in code and "Mean and std were not saved" in code
    np.save(tmp_path / "image.npy", np.random.default_rng(0).random((32, 48, 5)))
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(code, names)
    expected = tokens(AutoModel.from_pretrained(run), torch.from_numpy(names["pixel_values"]))
    torch.testing.assert_close(names["tokens"], expected, rtol=0, atol=1e-4)


def test_the_folder_loads_with_plain_transformers(tmp_path):
    processor = ViTImageProcessor(size={"height": 32, "width": 32})
    run = save_run(tmp_path / "run", processor, **SQUARE)
    hf_mim.export(run, tmp_path / "out")
    assert type(AutoModel.from_pretrained(tmp_path / "out")).__name__ == "ViTModel"
    assert ViTImageProcessor.from_pretrained(tmp_path / "out").size == processor.size


# Bad input: a line each, nothing written over and nothing left.


@pytest.fixture
def run_folder(tmp_path):
    return save_run(tmp_path / "run")


def refused(capsys, *words) -> str:
    # What saving the model has said.
    capsys.readouterr()
    assert main(["export", *map(str, words)]) == 1
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("Error: ")
    return lines[0]


@pytest.mark.parametrize("package", ["onnx", "onnxscript", "onnxruntime", "timm"])
def test_missing_packages_are_named(package, run_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, package, None)
    format = "timm" if package == "timm" else "onnx"
    output = named(tmp_path / "out", format)
    assert f"pip install {package}" in refused(capsys, run_folder, output, "--format", format)
    assert os.listdir(tmp_path) == ["run"]


@pytest.mark.parametrize("taken", ["out.safetensors", "out.safetensors.py"])
def test_nothing_is_written_over(taken, run_folder, tmp_path, capsys):
    (tmp_path / taken).write_text("mine")
    message = refused(capsys, run_folder, tmp_path / "out.safetensors", "--format", "timm")
    assert f"{tmp_path / taken} exists" in message
    assert (tmp_path / taken).read_text() == "mine" and sorted(os.listdir(tmp_path)) == [taken, "run"]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(value, tmp_path, capsys):
    model = tiny_model("pilamim", "Model")
    model.layers[1].mlp.fc1.bias.data[3] = value
    model.save_pretrained(tmp_path / "run")
    assert "layers.1.mlp.fc1.bias holds NaN" in refused(capsys, tmp_path / "run", tmp_path / "out")
    assert os.listdir(tmp_path) == ["run"]


def test_updates_that_are_not_merged(tmp_path):
    from peft import LoraConfig
    from peft.tuners.lora import LoraModel

    model = tiny_model("pilamim", "ForImageClassification")
    tuner = LoraModel(model, LoraConfig(r=2, target_modules=["q_proj"]), "default")
    with pytest.raises(ValueError, match="not merged.*lora_.*merge_and_unload"):
        hf_mim.export(model, tmp_path / "out.safetensors", "timm")
    assert hf_mim.export(tuner.merge_and_unload(), tmp_path / "out.safetensors", "timm") < 1e-5


def test_what_differs_is_deleted(run_folder, tmp_path, monkeypatch, capsys):
    right = TimmFormat.state_dict
    swapped = {"blocks.0.norm1.weight": "blocks.0.norm2.weight", "blocks.0.norm2.weight": "blocks.0.norm1.weight"}
    monkeypatch.setattr(
        TimmFormat,
        "state_dict",
        lambda self, plain: {swapped.get(name, name): value for name, value in right(self, plain).items()},
    )
    message = refused(capsys, run_folder, tmp_path / "new" / "out.safetensors", "--format", "timm")
    assert "differ from the model's by" in message and "deleted" in message
    assert os.listdir(tmp_path / "new") == []


def test_of_a_segmenter_it_is_said_that_the_encoder_goes_alone(tmp_path, caplog):
    tiny_model("ocl", "ForSemanticSegmentation", num_labels=3, **SQUARE).save_pretrained(tmp_path / "run")
    assert hf_mim.export(tmp_path / "run", tmp_path / "out") < 1e-5
    assert "of a model for SemanticSegmentation the encoder alone is exported" in caplog.text


def test_other_bad_words(run_folder, tmp_path, capsys):
    assert "expected one of vit, dinov2, timm, onnx" in refused(
        capsys, run_folder, tmp_path / "out", "--format=tflite"
    )
    assert "float32, float16" in refused(capsys, run_folder, tmp_path / "out", "--dtype=int8")
    assert "ends in .onnx" in refused(capsys, run_folder, tmp_path / "out", "--format=onnx")
    assert "--output is missing" in refused(capsys, run_folder)
    assert "cannot be loaded" in refused(capsys, tmp_path / "nowhere", tmp_path / "out")
    weights = run_folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    assert "cannot be loaded: Error while deserializing" in refused(capsys, run_folder, tmp_path / "out")
    assert os.listdir(tmp_path) == ["run"]
