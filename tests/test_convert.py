"""`hf_mim convert`: every weight of a release is used or told, and the encoder computes what timm's does."""

import os
import pickle

import pytest
import torch
from transformers import AutoImageProcessor, AutoModel, AutoModelForPreTraining

import hf_mim
from golden import Golden
from hf_mim.__main__ import main
from hf_mim.hub.origin import read_origin
from hf_mim.hub.original import convert_checkpoint
from hf_mim.models.vit.position import sincos_position_table
from tiny import scrambled

# 64 channels a head in encoders, 32 in decoders, as the converters assume.
WIDTH, DECODER = 64, 32


def convert(*words) -> int:
    return main(["convert", *map(str, words)])


def timm_network(width=WIDTH, depth=2, use_cls_token=True):
    import timm

    torch.manual_seed(0)
    without = {} if use_cls_token else {"class_token": False, "global_pool": "avg", "fc_norm": False}
    network = timm.create_model(
        "vit_tiny_patch16_224",
        img_size=32,
        patch_size=8,
        embed_dim=width,
        depth=depth,
        num_heads=1,
        num_classes=0,
        **without,
    )
    network = scrambled(network).eval()
    network.pos_embed.data.copy_(sincos_position_table(4, 4, width)[:, 0 if use_cls_token else 1 :])
    return network


def predictor() -> dict[str, torch.Tensor]:
    """A predictor's weights in the names of I-JEPA."""
    blocks = {
        f"predictor_{name}": value
        for name, value in timm_network(DECODER, 1).state_dict().items()
        if name.startswith("blocks.")
    }
    shapes = {"embed": (DECODER, WIDTH), "norm": (DECODER,), "proj": (WIDTH, DECODER)}
    for name, shape in shapes.items():
        blocks[f"predictor_{name}.weight"] = torch.randn(shape)
        blocks[f"predictor_{name}.bias"] = torch.randn(shape[0])
    positions = sincos_position_table(4, 4, DECODER)[:, 1:]
    return blocks | {"mask_token": torch.randn(1, 1, DECODER), "predictor_pos_embed": positions}


def decoder(output: int, head: str) -> dict[str, torch.Tensor]:
    """A decoder's weights in the names of MAE, and of dBOT with another head."""
    blocks = {
        name.replace("blocks.", "decoder_blocks."): value
        for name, value in timm_network(DECODER, 1).state_dict().items()
        if name.startswith("blocks.")
    }
    return blocks | {
        "mask_token": torch.randn(1, 1, DECODER),
        "decoder_pos_embed": sincos_position_table(4, 4, DECODER),
        "decoder_embed.weight": torch.randn(DECODER, WIDTH),
        "decoder_embed.bias": torch.randn(DECODER),
        "decoder_norm.weight": torch.randn(DECODER),
        "decoder_norm.bias": torch.randn(DECODER),
        f"{head}.weight": torch.randn(output, DECODER),
        f"{head}.bias": torch.randn(output),
    }


def release(model_type: str) -> dict:
    """A checkpoint as the release's training saves it, of a network of timm's."""
    state = timm_network().state_dict()
    if model_type == "vit_mae":
        return {"model": state | decoder(3 * 64, "decoder_pred")}
    if model_type == "ijepa":
        encoder = {f"module.{name}": value for name, value in timm_network(use_cls_token=False).state_dict().items()}
        # Not what the encoder is.
        target = {name: value if "pos_embed" in name else value + 1 for name, value in encoder.items()}
        networks = {"encoder": encoder, "target_encoder": target}
        return networks | {"predictor": {f"module.{name}": value for name, value in predictor().items()}, "epoch": 7}
    if model_type == "dbot":
        return {"model": state | decoder(WIDTH, "decoder_predp")}
    if model_type == "dino":
        heads = {"module.head.mlp.0.weight": torch.zeros(2, 2)}
        others = {f"module.backbone.{name}": value + 1 for name, value in state.items()}
        return {"student": others, "teacher": {f"backbone.{name}": value for name, value in state.items()} | heads}
    if model_type == "ibot":
        return {"state_dict": state | {"masked_embed": torch.zeros(1, WIDTH)}}
    return {"model": state}


LICENSES = {"vit_mae": "cc-by-nc-4.0", "ijepa": "cc-by-nc-4.0", "dino": "apache-2.0", "ibot": "apache-2.0"}
UNUSED = {"dino": ["head.mlp.0.weight"], "ibot": ["masked_embed"]}


@pytest.mark.parametrize("model_type", ["ocl", "dbot", "vit_mae", "ijepa", "dino", "ibot"])
def test_the_encoder_computes_what_timm_does(model_type, tmp_path, capsys):
    torch.save(release(model_type), tmp_path / "release.pth")
    words = [tmp_path / "release.pth", tmp_path / "out", "--model_type", model_type]
    assert convert(*words, "--config_overrides=num_attention_heads=1") == 0
    out = capsys.readouterr().out
    for name in UNUSED.get(model_type, []):
        assert f"{len(UNUSED[model_type])} weights of the checkpoint are not used: {name}." in out
    assert ("All weights of the checkpoint are used." in out) == (model_type not in UNUSED)
    # Whoever goes on from it is told of the release's terms.
    license = LICENSES.get(model_type, "unknown")
    origin = read_origin(str(tmp_path / "out"))
    assert origin.license == license and len(origin.restricted) == (license != "apache-2.0")
    assert ("forbids commercial use" in out) == (license == "cc-by-nc-4.0")
    if model_type in UNUSED:
        model = AutoModel.from_pretrained(tmp_path / "out")
        assert type(model) is hf_mim.MaskedViTModel
    else:
        # The baselines' own classes, as the stock one masks.
        own = {"vit_mae": hf_mim.ViTMAEForPreTraining, "ijepa": hf_mim.IJepaForPreTraining}
        method = own.get(model_type, AutoModelForPreTraining)
        model = method.from_pretrained(tmp_path / "out").encoder
    pixel_values = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected = timm_network(use_cls_token=model_type != "ijepa").forward_features(pixel_values)
        torch.testing.assert_close(model(pixel_values).last_hidden_state, expected, rtol=0, atol=1e-4)
    if model_type == "ijepa":
        # transformers reads the encoder as its own.
        assert type(AutoModel.from_pretrained(tmp_path / "out")).__module__.startswith("transformers.")
    assert tuple(AutoImageProcessor.from_pretrained(tmp_path / "out").image_mean) == (0.485, 0.456, 0.406)


def test_mae_without_its_decoder(tmp_path, caplog):
    state = release("ocl")["model"]
    model = hf_mim.from_original(state, "vit_mae", config={"num_attention_heads": 1})
    pixel_values = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected = timm_network().forward_features(pixel_values)
        torch.testing.assert_close(model.encoder(pixel_values).last_hidden_state, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("case", ["pilamim", "tec", "ocl_r0.3", "dbot"])
def test_all_weights_of_the_releases_are_used(case):
    golden, model_type = Golden(case), case.split("_")[0]
    frozen = golden.base if model_type == "tec" else golden.teacher or None
    _, unused = convert_checkpoint(golden.state, model_type, config=golden.config, teacher=frozen)
    assert unused == []
    extra = golden.state | {"head.weight": torch.zeros(2)}
    _, unused = convert_checkpoint(extra, model_type, config=golden.config, teacher=frozen)
    assert unused == ["head.weight"]
    if frozen:
        _, unused = convert_checkpoint(
            golden.state, model_type, config=golden.config, teacher=frozen | {"head.bias": torch.zeros(2)}
        )
        assert unused == ["teacher: head.bias"]


@pytest.mark.parametrize("case", ["pilamim", "tec", "ocl_r0.3", "dbot"])
def test_all_that_is_missing_is_told(case):
    golden, model_type = Golden(case), case.split("_")[0]
    frozen = golden.base if model_type == "tec" else golden.teacher or None
    left_out = [name for name in golden.state if "mlp.fc1.bias" in name or "qkv.bias" in name and model_type != "ocl"]
    # Biases of queries, keys and values tell whether there are any.
    left_out = [name for name in left_out if "qkv" not in name]
    state = {name: value for name, value in golden.state.items() if name not in left_out}
    with pytest.raises(ValueError, match=f"no weights named .* {model_type} release") as error:
        convert_checkpoint(state, model_type, config=golden.config, teacher=frozen)
    assert len(left_out) > 3 and all(repr(name) in str(error.value) for name in left_out[:20])


# Bad input: a line each, nothing written over, no code run.


def refused(capsys, *words) -> str:
    capsys.readouterr()
    assert convert(*words) == 1
    return capsys.readouterr().err.strip().removeprefix("Error: ")


class Harmful:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("model_type", ["vit_mae", "dino"])
@pytest.mark.parametrize("old", [False, True])
def test_code_in_a_pickle_is_not_run(model_type, old, tmp_path, capsys):
    contents = {"model": release("ocl")["model"], "epoch": Harmful(tmp_path / "harm")}
    if old:
        (tmp_path / "release.pth").write_bytes(pickle.dumps(contents))
    else:
        torch.save(contents, tmp_path / "release.pth")
    message = refused(capsys, tmp_path / "release.pth", tmp_path / "out", "--model_type", model_type)
    assert "could run code" in message
    assert os.listdir(tmp_path) == ["release.pth"]


@pytest.mark.parametrize("contents", [b"", b"hello", b"\x80\x02", b"PK\x03\x04 and so on"])
def test_what_is_no_checkpoint(contents, tmp_path, capsys):
    (tmp_path / "release.pth").write_bytes(contents)
    message = refused(capsys, tmp_path / "release.pth", tmp_path / "out", "--model_type=ocl")
    assert "release.pth is damaged" in message and os.listdir(tmp_path) == ["release.pth"]


@pytest.mark.parametrize("model_type", ["ocl", "dino"])
def test_folders_of_a_checkpoint_in_parts(model_type, tmp_path, capsys):
    folder = tmp_path / "parts"
    folder.mkdir()
    words = [folder, tmp_path / "out", f"--model_type={model_type}"]
    assert f"{folder} is a folder; expected one .pth" in refused(capsys, *words)
    for number in range(2):
        torch.save({}, folder / f"rank_{number}.pth")
    message = refused(capsys, *words)
    assert "rank_0.pth, rank_1.pth" in message and "put them together" in message
    # As torch.distributed writes it: the table is a pickle.
    (folder / "__0_0.distcp").write_bytes(b"")
    (folder / ".metadata").write_bytes(pickle.dumps(Harmful(tmp_path / "harm")))
    assert "dcp_to_torch" in refused(capsys, *words)
    # So is it where weights are named to train on.
    flags = [f"--model_name_or_path={folder}", f"--output_dir={tmp_path / 'run'}", "--use_cpu"]
    assert main(["pretrain", *flags]) == 1
    assert "dcp_to_torch" in capsys.readouterr().err
    assert os.listdir(tmp_path) == ["parts"]


def test_bad_input(tmp_path, capsys):
    path = tmp_path / "release.pth"
    state = release("ocl")["model"]
    torch.save(state, path)
    words = ["--config_overrides=num_attention_heads=1"]
    assert "--model_type is missing" in refused(capsys, path, tmp_path / "out")
    assert "'mim'; expected one of pilamim, ocl" in refused(capsys, path, tmp_path / "out", "--model_type=mim")
    assert "no weights named 'encoder.patchify.weight'" in refused(
        capsys, path, tmp_path / "out", "--model_type=pilamim"
    )
    assert "There is no checkpoint" in refused(capsys, tmp_path / "no.pth", tmp_path / "out", "--model_type=ocl")
    # Shapes that do not fit are told, both of them.
    message = refused(capsys, path, tmp_path / "out", "--model_type=ocl", "--config_overrides=intermediate_size=100")
    assert "do not fit the config" in message and "[256]" in message and "[100]" in message
    torch.save(state | {"pos_embed": state["pos_embed"] + 1} | decoder(WIDTH, "decoder_predp"), path)
    message = refused(capsys, path, tmp_path / "out", "--model_type=dbot", *words)
    assert "pos_embed of the checkpoint, of shape (1, 17, 64), is not the fixed sin-cos table" in message
    torch.save(state | {"norm.weight": torch.full((WIDTH,), float("nan"))}, path)
    assert "not finite" in refused(capsys, path, tmp_path / "out", "--model_type=ocl", *words)
    assert os.listdir(tmp_path) == ["release.pth"]
    (tmp_path / "out").mkdir()
    assert f"{tmp_path / 'out'} exists" in refused(capsys, path, tmp_path / "out", "--model_type=ocl")
    assert os.listdir(tmp_path / "out") == []
