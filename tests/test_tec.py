"""TEC against the released implementation's numbers, and what these cannot show."""

import json
import shutil

import pytest
import torch
import transformers
from PIL import Image

import hf_mim
from golden import Golden, block_grad_norms
from hf_mim import TECConfig, TECForImageClassification, TECForPreTraining, TECModel
from hf_mim.evaluation.pictures import draw_shares
from hf_mim.jobs.pretraining import main
from hf_mim.models.presets import PRESETS, preset_config
from hf_mim.models.vit.frozen import FrozenViT
from hf_mim.models.vit.frozen_sources import read_source
from hf_mim.training.building import build_config, build_model, describe_frozen
from hf_mim.training.command import ModelArguments
from test_frozen import TYPES, own_model
from tiny import scrambled, tiny_batch, tiny_config, tiny_model
from tiny_training import FLAGS, write_pictures


def golden_model():
    golden = Golden("tec")
    return golden, hf_mim.from_original(golden.state, "tec", config=golden.config, teacher=golden.base)


def affine_norms(module, name):
    return {f"{name}.{kind}": getattr(module, kind).grad.norm() for kind in ("weight", "bias")}


def grad_norms(model) -> dict[str, float]:
    encoder, adapter, decoder = model.encoder, model.encoder_adapter, model.decoder
    norms = {"cls_token": encoder.embeddings.cls_token.grad.norm()}
    norms |= affine_norms(encoder.embeddings.patch_embeddings.projection, "patch_embed.proj")
    norms |= block_grad_norms(encoder.layers, "blocks") | affine_norms(encoder.layernorm, "norm")
    for fc in ("fc1", "fc2"):
        norms |= affine_norms(getattr(encoder.embeddings.cls_adapter, fc), f"cls_token_mlp.{fc}")
        for i, mlp in enumerate(adapter.mlps):
            norms |= affine_norms(getattr(mlp, fc), f"encoder_adaptor.adap_mlps.{i}.{fc}")
    for i, fuse in enumerate(adapter.fuse):
        norms |= affine_norms(fuse, f"encoder_adaptor.fuse_fcs.{i}")
    norms |= affine_norms(adapter.layernorm_before, "encoder_adaptor.adap_before")
    norms |= affine_norms(adapter.layernorm_after, "encoder_adaptor.adap_after")
    norms |= block_grad_norms(decoder.layers, "decoder_blocks")
    for target, name, head in (
        (decoder.feature, "forward_fea_decoder", "decoder_pred"),
        (decoder.attention, "forward_att_decoder", "decoder_qk"),
    ):
        norms[f"{name}.mask_token"] = target.mask_token.grad.norm()
        norms |= affine_norms(target.embed, f"{name}.decoder_embed")
        norms |= affine_norms(target.layernorm, f"{name}.decoder_norm")
        norms |= affine_norms(target.head, f"{name}.{head}")
    return {name: float(norm) for name, norm in norms.items()}


def test_golden():
    golden, model = golden_model()
    outputs = model.train()(golden.input["pixel_values"], noise=golden.input["noise"])
    golden.assert_numbers(outputs)
    assert torch.equal(outputs.attention_rows[:, 1:] - 1, golden.expected["top_k_indices"])
    golden.assert_tensor("adapted", outputs.adapted_states)
    golden.assert_tensor("mask", outputs.mask)
    golden.assert_tensor("prediction", outputs.predicted_features)
    golden.assert_tensor("target_features_normalized", outputs.target_features)
    golden.assert_tensor("attention_logits", outputs.predicted_attention_logits.transpose(1, 2))
    golden.assert_tensor("base_attention_logits", outputs.target_attention_logits.transpose(1, 2))
    features = model.base(golden.input["pixel_values"], num_last_layers=2).last_hidden_states
    golden.assert_tensor("base_features", (features[0] + features[1])[:, 1:] / 2)
    outputs.loss.backward()
    golden.assert_grad_norms(grad_norms(model))


def test_original_config_is_read_off_the_weights():
    golden = Golden("tec")
    heads = {name: golden.config[name] for name in ("num_attention_heads", "decoder_num_attention_heads")}
    model = hf_mim.from_original(golden.state, "tec", config=heads | {"attention_top_k": 5}, teacher=golden.base)
    given = dict(golden.config)
    base, read = given.pop("base_config"), model.config.base_config
    # Neither heads nor what is not a weight.
    for name in ("attention_top_k", "attention_temperature", "feature_layers", "mask_ratio", "layer_norm_eps"):
        del given[name]
    for name, value in given.items():
        assert getattr(model.config, name) == (
            [32, 32] if name == "image_size" else [8, 8] if "patch" in name else value
        )
    assert {name: read[name] for name in ("hidden_size", "num_hidden_layers", "intermediate_size")} == {
        name: base[name] for name in ("hidden_size", "num_hidden_layers", "intermediate_size")
    }
    assert torch.isfinite(model(golden.input["pixel_values"]).loss)


def test_original_needs_the_base():
    golden = Golden("tec")
    with pytest.raises(ValueError, match="keeps the base model apart.*teacher="):
        hf_mim.from_original(golden.state, "tec", config=golden.config)


def test_final_norm_of_an_original_base_is_read_but_changes_no_target():
    golden, model = golden_model()
    norm = {"norm.weight": torch.full((64,), 3.0), "norm.bias": torch.ones(64)}
    other = hf_mim.from_original(golden.state, "tec", config=golden.config, teacher=golden.base | norm)
    assert torch.equal(other.base.network.layernorm.weight, norm["norm.weight"])
    with torch.no_grad():
        assert torch.equal(other(**golden.input).loss, model(**golden.input).loss)


# ---- Targets and losses, number by number


def tiny_pretraining(**fields):
    return tiny_model("tec", "ForPreTraining", **fields)


BASE = {"hidden_size": 24, "num_hidden_layers": 4, "num_attention_heads": 3}


def base_outputs(model, pixel_values):
    """Outputs of the base's last two blocks, and its last attention before softmax, by its own forward pass."""
    base = model.base.network
    caught = {}
    attention = base.layers[-1].attention
    hooks = [
        getattr(attention, f"{name}_proj").register_forward_hook(
            lambda _, __, out, name=name: caught.update({name: out})
        )
        for name in "qk"
    ]
    with torch.no_grad():
        outputs = base(pixel_values, output_hidden_states=True)
    for hook in hooks:
        hook.remove()
    heads = base.config.num_attention_heads
    query, key = (caught[name].unflatten(2, (heads, -1)).transpose(1, 2) for name in "qk")
    return outputs.hidden_states[-2:], query @ key.transpose(2, 3) / query.shape[-1] ** 0.5


@pytest.mark.parametrize("attention_target", ["selected", "all", "cls", "none"])
@pytest.mark.parametrize("normalization", ["patch", "channel", "none"])
def test_losses_by_hand(normalization, attention_target):
    fields = {"feature_normalization": normalization, "attention_target": attention_target, "attention_top_k": 6}
    model = tiny_pretraining(base_config=BASE, attention_temperature=0.7, **fields)
    batch = tiny_batch(model.config, batch_size=2)
    with torch.no_grad():
        outputs = model(**batch)
    (first, second), attention = base_outputs(model, batch["pixel_values"])

    feature_errors, cross_entropies = [], []
    for sample in range(2):
        features = ((first + second) / 2)[sample, 1:]
        dim = {"patch": 0, "channel": 1}.get(normalization)
        if dim is not None:
            centred = features - features.mean(dim=dim, keepdim=True)
            variance = centred.square().sum(dim=dim, keepdim=True) / (features.shape[dim] - 1)
            features = centred / (variance + 1e-6).sqrt()
        order = batch["noise"][sample].argsort().tolist()
        for patch in order[12:]:
            feature_errors += (outputs.predicted_features[sample, patch] - features[patch]).square().tolist()

        by_cls = attention[sample, :, 0, 1:].mean(dim=0)
        best = sorted(range(48), key=lambda patch, by_cls=by_cls: -by_cls[patch].item())[:6]
        rows = {"selected": [0, *[1 + p for p in best]], "all": list(range(49)), "cls": [0], "none": []}
        if attention_target != "none":
            assert outputs.attention_rows[sample].tolist() == rows[attention_target]
        for place, row in enumerate(rows[attention_target]):
            for head in range(3):
                shares = (attention[sample, head, row, 1:] / 0.7).softmax(dim=0)
                predicted = outputs.predicted_attention_logits[sample, head, place].log_softmax(dim=0)
                cross_entropies.append(-(shares * predicted).sum().item())
    assert len(feature_errors) == 2 * 36 * 24
    loss_feature = sum(feature_errors) / len(feature_errors)
    assert outputs.loss_feature.item() == pytest.approx(loss_feature, rel=1e-4)
    if attention_target == "none":
        assert outputs.loss_attention is None and not hasattr(model.decoder, "attention")
        assert outputs.loss.item() == pytest.approx(loss_feature, rel=1e-4)
    else:
        loss_attention = sum(cross_entropies) / len(cross_entropies)
        assert outputs.loss_attention.item() == pytest.approx(loss_attention, rel=1e-4)
        assert outputs.loss.item() == pytest.approx(loss_feature + loss_attention, rel=1e-4)


def test_scale_of_the_students_logits():
    """The release's base_width ** -0.5 by default; both sides' heads are the base's."""
    batch = tiny_batch(tiny_config("tec"))
    with torch.no_grad():
        default, other = (
            tiny_pretraining(base_config=BASE, attention_logit_scale=scale)(**batch).predicted_attention_logits
            for scale in (None, 8**-0.5)
        )
    assert default.shape == (3, 3, 16, 48)
    torch.testing.assert_close(default * 24**0.5, other * 8**0.5)


def test_number_of_the_bases_blocks_that_are_averaged():
    batch = tiny_batch(tiny_config("tec"))
    for layers in (1, 2, 4):
        model = tiny_pretraining(base_config=BASE, feature_layers=layers, feature_normalization="none")
        with torch.no_grad():
            states = model.base.network(batch["pixel_values"], output_hidden_states=True).hidden_states[-layers:]
            targets = model(**batch).target_features
        torch.testing.assert_close(targets, sum(states)[:, 1:] / layers, rtol=0, atol=1e-5)


def test_base_sees_the_whole_picture_once_and_the_student_a_quarter():
    model = tiny_pretraining()
    batch = tiny_batch(model.config, batch_size=1)
    calls = []
    model.base.network.layers[0].register_forward_hook(lambda _, inputs, output: calls.append(inputs[0].shape[1]))
    with torch.no_grad():
        before = model(**batch)
        hidden = int(before.mask[0].nonzero()[0])
        row, column = divmod(hidden, 12)
        batch["pixel_values"][:, :, 8 * row : 8 * row + 8, 4 * column : 4 * column + 4] += 1.0
        after = model(**batch)
    assert calls == [49, 49]
    assert torch.equal(after.predicted_features, before.predicted_features)
    assert not torch.equal(after.target_features, before.target_features)
    assert not torch.equal(after.target_attention_logits, before.target_attention_logits)


def test_what_the_decoder_reads_by_hand():
    model = tiny_pretraining(num_hidden_layers=4, adapter_group_size=2)
    batch = tiny_batch(model.config)
    with torch.no_grad():
        outputs = model(**batch, output_hidden_states=True)
        adapter, states = model.encoder_adapter, list(outputs.hidden_states[1:])
        states[-1] = model.encoder.layernorm(states[-1])
        together = torch.nn.functional.layer_norm(
            torch.cat(states, dim=-1),
            (4 * 32,),
            adapter.layernorm_before.weight,
            adapter.layernorm_before.bias,
            model.config.layer_norm_eps,
        )
        summed = 0
        for i, group in enumerate((together[..., :64], together[..., 64:])):
            fused = group @ adapter.fuse[i].weight.T + adapter.fuse[i].bias
            mlp = adapter.mlps[i]
            assert mlp.fc1.weight.shape == (4 * 48, 32)
            summed = summed + fused + mlp.fc2(torch.nn.functional.gelu(mlp.fc1(fused)))
        torch.testing.assert_close(outputs.adapted_states, adapter.layernorm_after(summed), rtol=0, atol=1e-5)
    plain = tiny_pretraining(adapters="input")
    with torch.no_grad():
        outputs = plain(**batch, output_hidden_states=True)
        expected = plain.encoder.layernorm(outputs.hidden_states[-1])
    torch.testing.assert_close(outputs.adapted_states, expected)


# ---- Ablations


@pytest.mark.parametrize("adapters", ["both", "input", "encoder", "none"])
def test_adapters_can_be_left_out(adapters, tmp_path):
    model = tiny_pretraining(adapters=adapters)
    names = {name for name, _ in model.named_parameters()}
    assert any("cls_adapter" in name for name in names) is (adapters in ("both", "input"))
    assert any("encoder_adapter" in name for name in names) is (adapters in ("both", "encoder"))
    batch = tiny_batch(model.config)
    model.save_pretrained(tmp_path)
    loaded = TECForPreTraining.from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(loaded(**batch).loss, model(**batch).loss)
        pixel_values = batch["pixel_values"]
        exported, expected = hf_mim.to_vit(model)(pixel_values), model.encoder(pixel_values)
    torch.testing.assert_close(exported.last_hidden_state, expected.last_hidden_state, rtol=0, atol=1e-5)


def test_input_adapter_is_folded_into_cls():
    model = tiny_pretraining()
    embeddings = model.encoder.embeddings
    exported = hf_mim.to_vit(model)
    with torch.no_grad():
        hidden = embeddings.cls_token @ embeddings.cls_adapter.fc1.weight.T + embeddings.cls_adapter.fc1.bias
        adapted = embeddings.cls_adapter.fc2(torch.nn.functional.gelu(hidden))
    torch.testing.assert_close(exported.embeddings.cls_token, adapted, rtol=0, atol=1e-6)
    assert not torch.allclose(adapted, embeddings.cls_token, atol=0.05)
    # Nothing of it is left.
    plain = hf_mim.to_vit(tiny_model("pilamim", "Model"))
    assert exported.state_dict().keys() == plain.state_dict().keys()


def test_starting_from_the_base():
    base = tiny_model("pilamim", "Model")
    for asked in (False, True):
        model = TECForPreTraining.from_base(base, tiny_config("tec", initialize_from_base=asked))
        same = torch.equal(model.encoder.layers[1].mlp.fc1.weight, base.layers[1].mlp.fc1.weight)
        assert same is asked
        assert torch.equal(model.encoder.embeddings.cls_token, base.embeddings.cls_token) is asked
    with pytest.raises(ValueError, match="base \\(initialize_from_base\\).*hidden_size is 32 there and 64 here"):
        TECForPreTraining.from_base(base, tiny_config("tec", initialize_from_base=True, hidden_size=64))


# ---- Any base


@pytest.mark.parametrize("kind", TYPES)
def test_any_base(kind, tmp_path):
    base = own_model(kind)
    sizes = {"num_channels": base.config.num_channels, "num_attention_heads": 4, "attention_top_k": 4}
    rows, columns = FrozenViT(read_source(base).config).grid
    config = tiny_config("tec", **sizes, image_size=[4 * rows, 8 * columns], patch_size=[4, 8])
    before = config.to_dict()
    model = TECForPreTraining.from_base(base, config)
    assert config.to_dict() == before
    batch = tiny_batch(model.config)
    with torch.no_grad():
        outputs = model(**batch)
    assert outputs.predicted_features.shape == (3, rows * columns, base.config.hidden_size)
    assert outputs.predicted_attention_logits.shape == (3, base.config.num_attention_heads, 5, rows * columns)
    model.save_pretrained(tmp_path)
    loaded = TECForPreTraining.from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(loaded(**batch).loss, outputs.loss)
    assert loaded.config.base_config == model.config.base_config
    assert not any(parameter.requires_grad for parameter in loaded.base.parameters())


@pytest.mark.slow
@pytest.mark.parametrize("kind", TYPES)
def test_no_graph_breaks_with_any_base(kind):
    base = own_model(kind)
    rows, columns = FrozenViT(read_source(base).config).grid
    fields = {"num_channels": base.config.num_channels, "num_attention_heads": 4, "attention_top_k": 4}
    config = tiny_config("tec", **fields, image_size=[4 * rows, 8 * columns], patch_size=[4, 8])
    model, batch = TECForPreTraining.from_base(base, config).train(), tiny_batch(config)
    torch._dynamo.reset()
    # Before any other call: nothing may be put off until the first one.
    loss = torch.compile(model, fullgraph=True, backend="eager")(**batch).loss
    loss.backward()
    assert loss.item() == pytest.approx(model(**batch).loss.item(), rel=1e-5)


def test_learned_positions_of_a_base_are_not_lost():
    base = tiny_model("pilamim", "Model", position_embedding="learned")
    with pytest.raises(ValueError, match='position_embedding="learned"'):
        TECForPreTraining.from_base(base, tiny_config("tec", initialize_from_base=True))
    config = tiny_config("tec", initialize_from_base=True, position_embedding="learned")
    model = TECForPreTraining.from_base(base, config)
    assert torch.equal(model.encoder.embeddings.position_embeddings, base.embeddings.position_embeddings)


def test_an_untrained_base_is_said_once_and_a_trained_one_not(caplog, tmp_path):
    text = "The base is as it was initialised"
    untrained = TECForPreTraining(tiny_config("tec"))
    batch = tiny_batch(untrained.config)
    untrained.eval()(**batch)
    assert text not in caplog.text
    for _ in range(2):
        untrained.train()(**batch)
    assert caplog.text.count(text) == 1 and not untrained.base.is_trained
    caplog.clear()
    trained = TECForPreTraining.from_base(tiny_model("pilamim", "Model"), tiny_config("tec")).train()
    trained(**batch)
    trained.save_pretrained(tmp_path)
    TECForPreTraining.from_pretrained(tmp_path).train()(**batch)
    # As `from_original`, another image size and the plain Trainer's going on fill a model.
    resumed = TECForPreTraining(tiny_config("tec"))
    resumed.load_state_dict(trained.state_dict())
    resumed.train()(**batch)
    assert text not in caplog.text
    # What holds the student alone fills no base.
    resumed = TECForPreTraining(tiny_config("tec"))
    student = {name: value for name, value in trained.state_dict().items() if not name.startswith("base.")}
    resumed.load_state_dict(student, strict=False)
    resumed.train()(**batch)
    assert caplog.text.count(text) == 1


@pytest.mark.parametrize(
    ("known", "unknown"),
    [
        (("base_image_mean", "base_image_std"), "image_mean, image_std"),
        (("image_mean", "image_std"), "base_image_mean, base_image_std"),
        # A mean without its standard deviation is of no use either.
        (("image_mean", "base_image_mean", "base_image_std"), "image_std"),
        (("image_mean", "image_std", "base_image_mean"), "base_image_std"),
        ((), None),
        (("image_mean", "image_std", "base_image_mean", "base_image_std"), None),
    ],
)
def test_half_known_normalisation_is_said(known, unknown, caplog):
    model = TECForPreTraining(tiny_config("tec", **dict.fromkeys(known, [0.5] * 5)))
    for _ in range(2):
        model(**tiny_batch(model.config))
    assert caplog.text.count("are normalised") == (unknown is not None)
    if unknown:
        assert f"not {unknown}:" in caplog.text


def test_second_round(tmp_path):
    first = TECForPreTraining.from_base(tiny_model("pilamim", "Model"), tiny_config("tec"))
    scrambled(first).save_pretrained(tmp_path)
    second = TECForPreTraining.from_base(tmp_path, tiny_config("tec"))
    # The encoder only, with its input adapter; neither its base nor its decoder.
    assert type(second.base.network) is TECModel
    assert "base_config" not in second.config.base_config
    pixel_values = tiny_batch(first.config)["pixel_values"]
    with torch.no_grad():
        expected = first.encoder(pixel_values, output_hidden_states=True).hidden_states[-1]
    torch.testing.assert_close(second.base(pixel_values).last_hidden_states[0], expected)


def test_without_a_config_the_student_is_of_the_bases_sizes():
    model = TECForPreTraining.from_base(tiny_model("pilamim", "Model"))
    assert (model.config.hidden_size, model.config.num_hidden_layers, model.config.grid_size) == (32, 3, (4, 12))


def test_base_of_the_config_is_untrained_and_of_the_students_sizes():
    model = tiny_pretraining()
    assert (model.base.hidden_size, model.base.num_heads, model.base.num_layers) == (32, 2, 3)
    assert model.config.base_config is None


def test_base_gets_pixels_as_it_wants_them(tmp_path):
    base = tiny_model("pilamim", "Model")
    base.save_pretrained(tmp_path)
    numbers = {"image_mean": [0.1, 0.2, 0.3, 0.4, 0.5], "image_std": [0.5, 0.4, 0.3, 0.2, 0.1]}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(numbers))
    config = tiny_config("tec", image_mean=[0.5] * 5, image_std=[0.25] * 5)
    model = TECForPreTraining.from_base(tmp_path, config)
    pixel_values = tiny_batch(config)["pixel_values"]
    mean, std = (torch.tensor(numbers[name]).view(5, 1, 1) for name in ("image_mean", "image_std"))
    wanted = (pixel_values * 0.25 + 0.5 - mean) / std
    with torch.no_grad():
        expected = base(wanted, output_hidden_states=True).hidden_states[-1]
    model.save_pretrained(tmp_path / "tec")
    for candidate in (model, TECForPreTraining.from_pretrained(tmp_path / "tec")):
        torch.testing.assert_close(candidate.base(pixel_values).last_hidden_states[0], expected, rtol=0, atol=1e-4)


def test_bases_that_do_not_fit_are_refused():
    base = tiny_model("pilamim", "Model")
    with pytest.raises(ValueError, match="4 x 12 patches.*student into 4 x 6"):
        TECForPreTraining.from_base(base, tiny_config("tec", patch_size=8))
    with pytest.raises(ValueError, match="feature_layers is 4, and the base has 3 blocks"):
        TECForPreTraining.from_base(base, tiny_config("tec", feature_layers=4))
    with pytest.raises(ValueError, match="attention_top_k is 49, and there are 48 patches"):
        tiny_pretraining(attention_top_k=49)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_hidden_layers": 4}, "adapter_group_size is 3.*num_hidden_layers, 4. Choose one of 1, 2, 4"),
        ({"adapter_group_size": 0}, "adapter_group_size is 0"),
        ({"feature_normalization": "layer"}, 'feature_normalization is .layer.*"patch", "channel", "none"'),
        ({"attention_target": "some"}, "attention_target is 'some'"),
        ({"adapters": "all"}, "adapters is 'all'"),
        ({"tuning_mode": "lora"}, "tuning_mode is 'lora'"),
        ({"attention_temperature": 0.0}, "attention_temperature is 0.0.*above 0"),
        ({"feature_layers": 0}, "feature_layers is 0.*at least 1"),
        ({"attention_top_k": 0}, "attention_top_k is 0.*at least 1"),
        ({"tuning_mode": "encoder_adapters", "adapters": "input"}, 'tuning_mode.*adapters="input"'),
    ],
)
def test_config_refuses_what_cannot_work(fields, message):
    with pytest.raises(ValueError, match=f"(?s){message}"):
        tiny_config("tec", **fields)


def test_group_size_matters_only_to_encoder_adapters():
    assert tiny_config("tec", num_hidden_layers=4, adapters="input").num_hidden_layers == 4


def test_default_sizes_are_the_papers():
    config = TECConfig()
    assert (config.decoder_hidden_size, config.decoder_num_hidden_layers, config.decoder_num_attention_heads) == (
        512,
        2,
        16,
    )
    assert (config.attention_temperature, config.attention_top_k, config.adapter_group_size) == (1.8, 15, 3)
    assert (config.mask_ratio, config.feature_layers) == (0.75, 2)
    large = TECConfig(**preset_config("tec", "large", None))
    assert (large.decoder_hidden_size, large.attention_temperature, large.attention_top_k) == (768, 1.4, 15)
    for preset in PRESETS:
        with torch.device("meta"):
            TECForPreTraining(TECConfig(**preset_config("tec", preset, None)))


# ---- Parameter-efficient fine-tuning

INPUT_ADAPTER = 2 * 4 * 32 * 32 + 4 * 32 + 32
ENCODER_ADAPTERS = 2 * 96 + (96 * 32 + 32) + (2 * 32 * 192 + 192 + 32) + 2 * 32
TRAINED = {
    "linear": {"classifier": 4 * 32 + 4},
    "input_adapter": {"classifier": 4 * 32 + 4, "input_adapter": INPUT_ADAPTER},
    "encoder_adapters": {
        "classifier": 4 * 32 + 4,
        "input_adapter": INPUT_ADAPTER,
        "encoder_adapters": ENCODER_ADAPTERS,
    },
}


@pytest.fixture
def pretrained(tmp_path):
    model = tiny_pretraining()
    model.save_pretrained(tmp_path / "pretrained")
    return model, tmp_path / "pretrained"


@pytest.mark.parametrize("mode", TRAINED)
def test_what_is_tuned(mode, pretrained, tmp_path):
    pretraining, folder = pretrained
    model = TECForImageClassification.from_pretrained(folder, tuning_mode=mode, num_labels=4)
    counts = model.trained_parameters()
    assert {name: number for name, number in counts.items() if number and name != "total"} == TRAINED[mode]
    assert counts["total"] == sum(TRAINED[mode].values())
    pixel_values = tiny_batch(model.config)["pixel_values"]
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    # As a trainer does: also after train().
    model.train()(pixel_values, labels=torch.tensor([0, 3, 1])).loss.backward()
    torch.optim.SGD(model.parameters(), lr=1.0).step()
    moved = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    parts = {
        "classifier.": "classifier",
        "encoder.embeddings.cls_ad": "input_adapter",
        "encoder_ad": "encoder_adapters",
    }
    expected = {
        name for name in before for prefix, part in parts.items() if name.startswith(prefix) and part in TRAINED[mode]
    }
    assert moved == expected
    model.eval().save_pretrained(tmp_path / "tuned")
    loaded = TECForImageClassification.from_pretrained(tmp_path / "tuned")
    assert loaded.trained_parameters() == counts
    with torch.no_grad():
        assert torch.equal(loaded(pixel_values).logits, model(pixel_values).logits)


def test_classifier_reads_the_encoder_adapters(pretrained):
    pretraining, folder = pretrained
    for pooling in ("cls", "mean"):
        model = TECForImageClassification.from_pretrained(folder, tuning_mode="encoder_adapters", pooling=pooling)
        pixel_values = tiny_batch(model.config)["pixel_values"]
        with torch.no_grad():
            outputs = pretraining.encoder(pixel_values, output_hidden_states=True)
            adapted = pretraining.encoder_adapter((*outputs.hidden_states[1:-1], outputs.last_hidden_state))
            pooled = adapted[:, 0] if pooling == "cls" else adapted[:, 1:].mean(dim=1)
            torch.testing.assert_close(model(pixel_values).logits, model.classifier(pooled))
            assert model(pixel_values).hidden_states is None
            assert isinstance(model(pixel_values, return_dict=False), tuple)


def test_encoder_adapters_must_be_there_to_be_tuned(pretrained, tmp_path):
    pretraining, _ = pretrained
    pretraining.encoder.save_pretrained(tmp_path / "encoder")
    with pytest.raises(ValueError, match="no encoder adapters to tune.*input_adapter"):
        TECForImageClassification.from_pretrained(tmp_path / "encoder", tuning_mode="encoder_adapters")
    TECForImageClassification.from_pretrained(tmp_path / "encoder", tuning_mode="input_adapter")


def test_mode_can_be_set_later(pretrained):
    _, folder = pretrained
    model = TECForImageClassification.from_pretrained(folder, num_labels=4)
    for mode in ("linear", "input_adapter"):
        assert mode in model.trainable_modes()
        model.set_trainable(mode)
        counts = model.trained_parameters()
        assert {name: number for name, number in counts.items() if number and name != "total"} == TRAINED[mode]
    with pytest.raises(ValueError, match='without encoder adapters.*tuning_mode="encoder_adapters"'):
        model.set_trainable("encoder_adapters")


def test_tuned_classifiers_as_stock_vits(pretrained):
    _, folder = pretrained
    for mode in ("linear", "input_adapter"):
        model = TECForImageClassification.from_pretrained(folder, tuning_mode=mode)
        pixel_values = tiny_batch(model.config)["pixel_values"]
        with torch.no_grad():
            exported = hf_mim.to_vit(model)(pixel_values).logits
            torch.testing.assert_close(exported, model(pixel_values).logits, rtol=0, atol=1e-5)
    model = TECForImageClassification.from_pretrained(folder, tuning_mode="encoder_adapters")
    with pytest.raises(ValueError, match="encoder adapters.*to_vit\\(model.encoder\\)"):
        hf_mim.to_vit(model)


def test_lora(pretrained, tmp_path):
    peft = pytest.importorskip("peft")
    _, folder = pretrained
    model = TECForImageClassification.from_pretrained(folder, num_labels=4)
    pixel_values = tiny_batch(model.config)["pixel_values"]
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], modules_to_save=["classifier"])
    tuned = peft.get_peft_model(model, config).train()
    # 3 blocks, queries and values, (32 -> 2 -> 32).
    assert tuned.get_nb_trainable_parameters()[0] == 3 * 2 * 2 * 32 * 2 + 4 * 32 + 4
    optimizer = torch.optim.SGD([p for p in tuned.parameters() if p.requires_grad], lr=0.01)
    before = tuned(pixel_values, labels=torch.tensor([0, 3, 1])).loss
    before.backward()
    optimizer.step()
    tuned.eval().save_pretrained(tmp_path / "lora")
    again = TECForImageClassification.from_pretrained(folder, num_labels=4)
    again = peft.PeftModel.from_pretrained(again, tmp_path / "lora").eval()
    with torch.no_grad():
        after = tuned(pixel_values, labels=torch.tensor([0, 3, 1]))
        assert after.loss < before
        torch.testing.assert_close(again(pixel_values).logits, after.logits)


# ---- The adapters' share


def test_shares_of_the_adapters(tmp_path):
    model = tiny_pretraining(adapter_group_size=1)
    batch = tiny_batch(model.config)
    shares = model.adapter_shares(**batch)
    assert len(shares) == 3 and sum(shares) == pytest.approx(1.0) and min(shares) > 0
    assert model.adapter_shares(**batch) == shares
    with torch.no_grad():
        for i in (0, 2):
            for parameter in (
                *model.encoder_adapter.fuse[i].parameters(),
                *model.encoder_adapter.mlps[i].parameters(),
            ):
                parameter.zero_()
    assert model.adapter_shares(**batch) == pytest.approx([0.0, 1.0, 0.0])
    assert tiny_pretraining(adapters="input").adapter_shares(**batch) is None
    path = draw_shares(shares, tmp_path / "shares.png")
    assert Image.open(path).size[0] > 100


# ---- By flags


def arguments(**flags):
    return ModelArguments(model_type="tec", **flags)


def built(args, image_size=(32, 48)):
    config = build_config(args, image_size, 5)
    describe_frozen(args, config, 3)
    return build_model(args, config)


SIZES = (
    "hidden_size=32,num_hidden_layers=3,num_attention_heads=2,intermediate_size=128,decoder_hidden_size=48,"
    "decoder_num_attention_heads=3,adapter_group_size=3"
)


@pytest.fixture
def base_folder(tmp_path):
    tiny_model("pilamim", "ForPreTraining").save_pretrained(tmp_path / "base")
    return str(tmp_path / "base")


def test_base_by_flag(base_folder, tmp_path):
    flags = {"config_overrides": SIZES, "patch_size": [8, 4]}
    with pytest.raises(ValueError, match="give --base_model_name_or_path"):
        built(arguments(**flags))
    with pytest.raises(ValueError, match="--base_model_name_or_path nowhere"):
        built(arguments(base_model_name_or_path="nowhere", **flags))
    model = built(arguments(base_model_name_or_path=base_folder, **flags))
    base = hf_mim.PiLaMIMModel.from_pretrained(base_folder)
    assert torch.equal(model.base.network.layers[2].mlp.fc1.weight, base.layers[2].mlp.fc1.weight)

    # Goes on from its own checkpoint, which holds the base; from its encoder only with a base; from another's encoder.
    scrambled(model).save_pretrained(tmp_path / "tec")
    model.encoder.save_pretrained(tmp_path / "encoder")
    batch = tiny_batch(model.config)
    goes_on = built(arguments(model_name_or_path=str(tmp_path / "tec")))
    with torch.no_grad():
        assert torch.equal(goes_on(**batch).loss, model(**batch).loss)
    with pytest.raises(ValueError, match="does not hold the network that TEC learns from.*--base_model_name_or_path"):
        built(arguments(model_name_or_path=str(tmp_path / "encoder")))
    for folder in (str(tmp_path / "encoder"), base_folder):
        overrides = "decoder_hidden_size=48,decoder_num_attention_heads=3,adapter_group_size=3"
        goes_on = built(
            arguments(model_name_or_path=folder, base_model_name_or_path=base_folder, config_overrides=overrides)
        )
        own = transformers.AutoModel.from_pretrained(folder)
        assert torch.equal(goes_on.encoder.layers[1].mlp.fc1.weight, own.layers[1].mlp.fc1.weight)
        assert torch.equal(goes_on.base.network.layers[1].mlp.fc1.weight, base.layers[1].mlp.fc1.weight)


def test_base_of_another_method_is_refused(base_folder):
    with pytest.raises(ValueError, match="--base_model_name_or_path is of TEC; --model_type is pilamim"):
        args = ModelArguments(base_model_name_or_path=base_folder)
        describe_frozen(args, build_config(args, None, 3), 3)


def test_another_method_goes_on_from_tecs_encoder(base_folder, tmp_path):
    tec = tiny_model("tec", "Model")
    tec.save_pretrained(tmp_path / "tec")
    args = ModelArguments(model_name_or_path=str(tmp_path / "tec"))
    model = built(args)
    pixel_values = tiny_batch(tec.config)["pixel_values"]
    with torch.no_grad():
        torch.testing.assert_close(
            model.encoder(pixel_values).last_hidden_state, tec(pixel_values).last_hidden_state, rtol=0, atol=1e-5
        )


def test_run_by_flags_and_resume(tmp_path):
    pictures = str(write_pictures(tmp_path / "pictures"))
    flags = [*FLAGS, f"--train_dir={pictures}", "--report_to=none", "--dataloader_num_workers=0"]
    assert main([*flags, "--max_steps=1", f"--output_dir={tmp_path / 'base'}"]) == 0
    (tec,) = (flag + ",adapter_group_size=1" for flag in flags if flag.startswith("--config_overrides"))
    flags += [tec, "--model_type=tec", f"--base_model_name_or_path={tmp_path / 'base'}", "--save_steps=2"]
    assert main([*flags, "--max_steps=4", f"--output_dir={tmp_path / 'tec'}"]) == 0
    for name in ("adapter_shares.png", "loss_curves.png"):
        assert (tmp_path / "tec" / name).is_file()
    assert "Towards Sustainable Self-supervised Learning" in (tmp_path / "tec" / "README.md").read_text()
    config = transformers.AutoConfig.from_pretrained(tmp_path / "tec")
    processor = json.loads((tmp_path / "base" / "preprocessor_config.json").read_text())
    assert config.base_image_mean == config.image_mean == processor["image_mean"]
    state = TECForPreTraining.from_pretrained(tmp_path / "tec").state_dict()
    # From step 2 on, once more.
    (tmp_path / "tec" / "model.safetensors").unlink()
    shutil.rmtree(tmp_path / "tec" / "checkpoint-4")
    assert main([*flags, "--max_steps=4", f"--output_dir={tmp_path / 'tec'}"]) == 0
    again = TECForPreTraining.from_pretrained(tmp_path / "tec").state_dict()
    assert all(torch.equal(value, state[name]) for name, value in again.items())
