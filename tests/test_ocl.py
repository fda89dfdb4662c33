"""OCL against the released implementation's numbers, and what these cannot show."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import TrainerCallback, ViTConfig, ViTModel

import hf_mim
from golden import Golden, block_grad_norms
from hf_mim import OCLConfig, OCLForPreTraining
from hf_mim.evaluation.contrast import alignment, uniformity
from hf_mim.models.ocl import modeling_ocl
from hf_mim.training import collapse
from tiny import checkpoint_activations, scrambled, tiny_batch, tiny_model
from tiny_training import SIZES, losses, tiny_data, tiny_trainer

SMALL = {name: value for name, value in SIZES.items() if "decoder" not in name}


def pretraining_model(**fields):
    return tiny_model("ocl", "ForPreTraining", **fields).train()


def gradients(model, batch, *, chunk_size=None, seed=0) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Loss and gradients of one step."""
    model.chunk_size = chunk_size
    model.zero_grad()
    torch.manual_seed(seed)
    loss = model(**batch).loss
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same_step(first, second, atol=1e-5):
    assert first[1].keys() == second[1].keys() and len(first[1]) > 20
    torch.testing.assert_close(first[0], second[0], rtol=0, atol=atol)
    for name, grad in first[1].items():
        torch.testing.assert_close(
            grad, second[1][name], rtol=0, atol=atol, msg=lambda text, name=name: f"{name}: {text}"
        )


# ---- The release


def grad_norms(model) -> dict[str, float]:
    encoder = model.encoder
    projection = encoder.embeddings.patch_embeddings.projection
    norms = {
        "cls_token": encoder.embeddings.cls_token.grad.norm(),
        "patch_embed.proj.weight": projection.weight.grad.norm(),
        "patch_embed.proj.bias": projection.bias.grad.norm(),
        "norm.weight": encoder.layernorm.weight.grad.norm(),
        "norm.bias": encoder.layernorm.bias.grad.norm(),
    } | block_grad_norms(encoder.layers, "blocks")
    return {name: float(norm) for name, norm in norms.items()}


@pytest.mark.parametrize("name", ["ocl_r0.3", "ocl_r0.8"])
@pytest.mark.parametrize("chunk_size", [None, 1, 2], ids="chunk_{}".format)
def test_golden(name, chunk_size):
    golden = Golden(name)
    model = hf_mim.from_original(golden.state, "ocl", config=golden.config).train()
    model.chunk_size = chunk_size
    outputs = model(golden.input["pixel_values"], noise=golden.input["noise"])
    golden.assert_numbers(outputs)
    golden.assert_tensor("encoder_cls", outputs.features.flatten(0, 1))
    outputs.loss.backward()
    golden.assert_grad_norms(grad_norms(model))


def test_original_config_is_read_off_the_weights():
    golden = Golden("ocl_r0.3")
    model = hf_mim.from_original(golden.state, "ocl", config={"num_attention_heads": 4})
    for name, value in golden.config.items():
        expected = [value, value] if name in ("image_size", "patch_size") else value
        assert getattr(model.config, name) == expected, name
    assert model.config.position_embedding == "sincos"
    golden.assert_numbers(model(golden.input["pixel_values"], noise=golden.input["noise"]))


def test_original_positions_of_another_kind_are_kept_or_refused():
    golden = Golden("ocl_r0.3")
    moved = golden.state | {"pos_embed": golden.state["pos_embed"] + 0.1}
    model = hf_mim.from_original(moved, "ocl", config={"num_attention_heads": 4})
    assert model.config.position_embedding == "learned"
    assert torch.equal(model.encoder.embeddings.position_embeddings, moved["pos_embed"])
    with pytest.raises(ValueError, match="not the fixed sin-cos table.* 4 x 4.*learned"):
        hf_mim.from_original(moved, "ocl", config=golden.config | {"position_embedding": "sincos"})


def test_other_weights_are_not_taken_for_the_releases():
    with pytest.raises(ValueError, match="no weights named 'patch_embed.proj.weight'.*ocl release"):
        hf_mim.from_original({"patchify.weight": torch.zeros(1)}, "ocl")


# ---- The loss


def similarity_by_hand(cosine, kappa, temperature):
    return 0.5 * (1 + cosine) / (1 + (1 - cosine) / kappa) / temperature


@pytest.mark.parametrize(("kappa", "temperature"), [(64.0, 0.07), (4, 0.5)])
def test_loss_by_hand(kappa, temperature):
    model = tiny_model("ocl", "ForPreTraining", kappa=kappa, temperature=temperature, scramble=False)
    features = torch.randn(4, 2, 32, generator=torch.Generator().manual_seed(0))
    rows = features.tolist()
    logits = []
    for first, _ in rows:
        logits.append([])
        for _, second in rows:
            dot = sum(a * b for a, b in zip(first, second, strict=True))
            norms = math.sqrt(sum(a * a for a in first) * sum(b * b for b in second))
            logits[-1].append(similarity_by_hand(dot / norms, kappa, temperature))
    total = 0.0
    for i in range(4):
        total += math.log(sum(math.exp(logits[i][j]) for j in range(4))) - logits[i][i]
        total += math.log(sum(math.exp(logits[j][i]) for j in range(4))) - logits[i][i]
    assert model.contrastive_loss(features).item() == pytest.approx(total / 8, rel=1e-5)


def test_similarity_of_equal_orthogonal_and_opposite_directions():
    similarities = modeling_ocl.t_sp_similarity(torch.tensor([1.0, 0.0, -1.0]), 64.0)
    torch.testing.assert_close(similarities, torch.tensor([1.0, 0.5 / (1 + 1 / 64), 0.0]))


def test_halves_that_are_equal_and_far_from_all_others_cost_nothing():
    model = tiny_model("ocl", "ForPreTraining", temperature=0.01, scramble=False)
    directions = torch.eye(32)[:4].unsqueeze(1).expand(-1, 2, -1)
    assert model.contrastive_loss(directions).item() < 1e-6
    # All features at one point: one of 4 by chance.
    assert model.contrastive_loss(torch.ones(4, 2, 32)).item() == pytest.approx(math.log(4), rel=1e-5)


@pytest.mark.parametrize("elements", [2**20, 21, 1])
def test_gradient_of_the_comparison(elements, monkeypatch):
    monkeypatch.setattr(modeling_ocl, "_BLOCK_ELEMENTS", elements)
    u, v = (torch.nn.functional.normalize(torch.randn(7, 5, dtype=torch.float64)).requires_grad_() for _ in range(2))
    temperature = torch.tensor([0.2], dtype=torch.float64, requires_grad=True)
    logits = modeling_ocl.t_sp_similarity(u @ v.T, 16.0) / temperature
    expected = torch.stack((logits.logsumexp(dim=1), logits.logsumexp(dim=0)))
    torch.testing.assert_close(modeling_ocl.log_sums(u, v, temperature, 16.0)[0], expected)
    assert torch.autograd.gradcheck(lambda *inputs: modeling_ocl.log_sums(*inputs, 16.0)[0], (u, v, temperature))


def test_no_number_is_lost_at_the_smallest_temperature():
    """A row whose every logit is 0, beside one whose every logit is 100."""
    u, v = torch.tensor([[-1.0, 0.0], [1.0, 0.0]]), torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    rows, columns = modeling_ocl.log_sums(u, v, torch.tensor([0.01]), 64.0)[0]
    torch.testing.assert_close(rows, torch.tensor([0.0, 100.0]) + math.log(2))
    torch.testing.assert_close(columns, torch.full((2,), 100.0))


def test_comparing_in_blocks_changes_nothing(monkeypatch):
    model = pretraining_model(temperature=0.2)
    batch = tiny_batch(model.config, batch_size=7)
    whole = gradients(model, batch)
    for elements in (7, 21, 35, 1):
        monkeypatch.setattr(modeling_ocl, "_BLOCK_ELEMENTS", elements)
        assert_same_step(gradients(model, batch), whole, atol=2e-6)


def test_the_compiler_does_not_unroll_the_blocks(monkeypatch):
    model = pretraining_model(temperature=0.2)
    batch, sizes = tiny_batch(model.config, batch_size=7), []

    def count(graph, _):
        sizes.append(len(graph.graph.nodes))
        return graph

    for elements in (2**20, 1):
        monkeypatch.setattr(modeling_ocl, "_BLOCK_ELEMENTS", elements)
        torch._dynamo.reset()
        loss = torch.compile(model, fullgraph=True, backend=count)(**batch).loss
        assert loss.item() == pytest.approx(model(**batch).loss.item(), rel=1e-6)
    assert len(sizes) == 2 and sizes[0] == sizes[1]


# ---- The halves


@pytest.mark.parametrize("fields", [{}, {"position_embedding": "rotary"}, {"num_register_tokens": 2}])
def test_the_last_block_computes_cls_alone(fields):
    model = pretraining_model(**fields)
    batch = tiny_batch(model.config)
    shapes = []
    model.encoder.layers[-1].mlp.register_forward_hook(lambda _, inputs, output: shapes.append(tuple(output.shape)))
    alone, recorded = model(**batch), model(**batch, output_hidden_states=[0])
    assert shapes == [(6, 1, 32), (6, recorded.hidden_states[0].shape[1], 32)]
    torch.testing.assert_close(alone.features, recorded.features, rtol=0, atol=1e-6)
    (first, second) = (
        torch.autograd.grad(output.loss, model.encoder.embeddings.cls_token)[0] for output in (alone, recorded)
    )
    torch.testing.assert_close(first, second, rtol=1e-4, atol=1e-6)


def test_pooling_by_the_mean_is_no_matter():
    model = pretraining_model(pooling="mean")
    batch = tiny_batch(model.config)
    torch.testing.assert_close(model(**batch).loss, pretraining_model()(**batch).loss)


def seen_by_the_encoder(model, batch) -> list[list[int]]:
    seen = []
    hook = model.encoder.register_forward_pre_hook(
        lambda module, args, kwargs: seen.extend(kwargs["ids_keep"].tolist()), with_kwargs=True
    )
    with torch.no_grad():
        model(**batch)
    hook.remove()
    return seen


@settings(max_examples=40, deadline=None)
@given(rows=st.integers(1, 6), columns=st.integers(1, 6), ratio=st.floats(0.01, 0.95))
def test_halves_share_no_patch(rows, columns, ratio):
    fields = {
        "image_size": (2 * rows, 3 * columns),
        "patch_size": (2, 3),
        "hidden_size": 4,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "mask_ratio": ratio,
    }
    patches = rows * columns
    kept = int(patches * (1 - ratio))
    if kept < 2:
        with pytest.raises(ValueError, match=f"keeps 0 of {patches} patches.*at least 2"):
            OCLConfig(**fields)
        return
    if kept - kept % 2 == patches:
        with pytest.raises(ValueError, match="nothing to predict"):
            OCLConfig(**fields)
        return
    model = OCLForPreTraining(OCLConfig(**fields))
    noise = torch.rand(3, patches)
    batch = {"pixel_values": torch.randn(3, 3, 2 * rows, 3 * columns), "noise": noise}
    seen = seen_by_the_encoder(model, batch)
    mask = model(**batch).mask
    for sample in range(3):
        first, second = seen[2 * sample], seen[2 * sample + 1]
        order = sorted(range(patches), key=lambda patch, sample=sample: noise[sample, patch].item())
        assert first == order[: kept // 2] and second == order[kept // 2 : kept // 2 * 2]
        assert not set(first) & set(second)
        assert set((mask[sample] == 0).nonzero().flatten().tolist()) == set(first) | set(second)


def test_features_are_those_of_each_half_alone():
    model = pretraining_model()
    batch = tiny_batch(model.config)
    with torch.no_grad():
        features = model(**batch).features
        seen = torch.tensor(seen_by_the_encoder(model, batch))
        for view in range(2):
            alone = model.encoder(batch["pixel_values"], ids_keep=seen[view::2]).last_hidden_state[:, 0]
            torch.testing.assert_close(features[:, view], alone, rtol=0, atol=1e-5)
    assert features.shape == (3, 2, 32)


def test_a_half_does_not_see_the_other_nor_what_is_hidden():
    model = pretraining_model()
    batch = tiny_batch(model.config, batch_size=2)
    before = model(**batch)
    first, second = seen_by_the_encoder(model, batch)[:2]
    hidden = before.mask[0].nonzero().flatten().tolist()
    assert (len(first), len(second), len(hidden)) == (16, 16, 16)
    for patches, changed in ((first, (True, False)), (second, (False, True)), (hidden, (False, False))):
        pixel_values = batch["pixel_values"].clone()
        for patch in patches:
            row, column = divmod(patch, 12)
            pixel_values[0, :, 8 * row : 8 * row + 8, 4 * column : 4 * column + 4] += 1.0
        after = model(pixel_values, noise=batch["noise"]).features
        for view in range(2):
            assert torch.equal(after[0, view], before.features[0, view]) is not changed[view]


# ---- Temperature and patch projection


def test_gradient_of_the_temperature():
    model = pretraining_model(temperature=0.3)
    batch = tiny_batch(model.config)
    parameter = model.temperature.log_temperature
    model(**batch).loss.backward()
    with torch.no_grad():
        start, values = parameter.clone(), []
        for step in (0.01, -0.01):
            parameter.copy_(start + step)
            values.append(model(**batch).loss.item())
    assert parameter.grad.item() == pytest.approx((values[0] - values[1]) / 0.02, rel=1e-2)
    assert abs(parameter.grad.item()) > 1e-3


def test_temperature_is_stored_as_its_log_and_clamped():
    model = tiny_model("ocl", "ForPreTraining", scramble=False).train()
    parameter = model.temperature.log_temperature
    assert parameter.item() == pytest.approx(math.log(0.07)) and parameter.requires_grad
    with torch.no_grad():
        parameter.fill_(-20.0)
    assert model.temperature().item() == pytest.approx(0.01)
    model.after_optimizer_step(0, 10)
    assert parameter.item() == pytest.approx(math.log(0.01))
    # At the limit it can still come back.
    model(**tiny_batch(model.config)).loss.backward()
    assert parameter.grad.item() != 0.0


def test_what_is_fixed_stays_fixed(tmp_path):
    model = tiny_model("ocl", "ForPreTraining", trainable_temperature=False)
    model.save_pretrained(tmp_path)
    loaded = OCLForPreTraining.from_pretrained(tmp_path)
    projection = "encoder.embeddings.patch_embeddings.projection"
    for candidate in (model, loaded, loaded.train()):
        fixed = {name for name, p in candidate.named_parameters() if not p.requires_grad}
        assert fixed == {f"{projection}.weight", f"{projection}.bias", "temperature.log_temperature"}
    free = OCLForPreTraining.from_pretrained(tmp_path, freeze_patch_projection=False, trainable_temperature=True)
    assert all(parameter.requires_grad for parameter in free.parameters())


@pytest.mark.parametrize("frozen", [True, False])
def test_training_moves_the_projection_only_where_asked(frozen, tmp_path):
    trainer = ocl_trainer(tmp_path, config={"freeze_patch_projection": frozen}, max_steps=2, weight_decay=0.5)
    projection = trainer.model.encoder.embeddings.patch_embeddings.projection
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    for name, parameter in projection.named_parameters():
        full = f"encoder.embeddings.patch_embeddings.projection.{name}"
        assert torch.equal(parameter, before[full]) is frozen, name
    assert not torch.equal(trainer.model.temperature.log_temperature, before["temperature.log_temperature"])


def test_encoder_checkpoint_starts_at_the_configs_temperature(tmp_path):
    encoder = tiny_model("ocl", "Model")
    encoder.save_pretrained(tmp_path)
    model = OCLForPreTraining.from_pretrained(tmp_path, temperature=0.2)
    assert model.temperature().item() == pytest.approx(0.2)
    with pytest.raises(ValueError, match="no weights for head"):
        OCLForPreTraining.from_pretrained(tmp_path, head_num_layers=2)


def test_pretraining_goes_on_from_a_stock_vit(tmp_path):
    from hf_mim.training.building import build_config, build_model
    from hf_mim.training.command import ModelArguments

    vit = scrambled(ViTModel(ViTConfig(image_size=32, patch_size=8, hidden_size=32, num_attention_heads=2)))
    vit.save_pretrained(tmp_path)
    args = ModelArguments(model_type="ocl", model_name_or_path=str(tmp_path))
    model = build_model(args, build_config(args, None, 3))
    for name, value in hf_mim.to_vit(model).state_dict().items():
        if not name.startswith("pooler."):
            assert torch.equal(value, vit.state_dict()[name]), name


# ---- The head of the ablation


@pytest.mark.parametrize("layers", [2, 3])
def test_head(layers, tmp_path):
    model = pretraining_model(head_num_layers=layers, head_hidden_size=24, head_output_size=12)
    kinds = [type(module).__name__ for module in model.head]
    assert kinds == ["Linear", "BatchNorm1d", "GELU"] * (layers - 1) + ["Linear", "BatchNorm1d"]
    features = torch.randn(5, 2, 32)
    x = features.flatten(0, 1)
    for i in range(layers):
        x = x @ model.head[3 * i].weight.T
        x = (x - x.mean(dim=0)) / (x.var(dim=0, unbiased=False) + 1e-5).sqrt()
        if i < layers - 1:
            x = torch.nn.functional.gelu(x * model.head[3 * i + 1].weight + model.head[3 * i + 1].bias)
    assert x.shape == (10, 12)
    expected = tiny_model("ocl", "ForPreTraining").train()
    expected.temperature = model.temperature
    torch.testing.assert_close(
        model.contrastive_loss(features), expected.contrastive_loss(x.unflatten(0, (5, 2))), rtol=1e-5, atol=1e-5
    )
    model(**tiny_batch(model.config)).loss.backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in model.head.parameters())
    model.eval().save_pretrained(tmp_path)
    batch = tiny_batch(model.config)
    loaded, info = OCLForPreTraining.from_pretrained(tmp_path, output_loading_info=True)
    assert loaded(**batch).loss.item() == model(**batch).loss.item()
    _, info = hf_mim.OCLModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["unexpected_keys"] and not info["missing_keys"]


# ---- Gradient caching


@pytest.mark.parametrize(
    "fields", [{}, {"position_embedding": "learned"}, {"head_num_layers": 2}, {"mask_ratio": 0.8}]
)
def test_chunks_give_the_step_of_the_whole_batch(fields):
    model = pretraining_model(temperature=0.2, freeze_patch_projection=False, **fields)
    batch = tiny_batch(model.config, batch_size=6)
    whole = gradients(model, batch)
    assert "temperature.log_temperature" in whole[1]
    for chunk_size in (1, 2, 3, 6, 4):
        assert_same_step(gradients(model, batch, chunk_size=chunk_size), whole)


def test_chunks_of_checkpointed_blocks():
    model = pretraining_model(temperature=0.2)
    batch = tiny_batch(model.config, batch_size=6)
    whole = gradients(model, batch)
    checkpoint_activations(model)
    assert_same_step(gradients(model, batch, chunk_size=2), whole)


def test_chunks_draw_the_masks_of_the_whole_batch():
    model = pretraining_model(temperature=0.2)
    batch = {"pixel_values": tiny_batch(model.config, batch_size=6)["pixel_values"]}
    assert_same_step(gradients(model, batch, chunk_size=2), gradients(model, batch))


def test_dropped_paths_are_repeated(monkeypatch):
    """Drawn chunk by chunk, so that the reference is the same chunks with their graphs kept."""
    model = pretraining_model(temperature=0.2, drop_path_rate=0.6, attention_probs_dropout_prob=0.1)
    batch = tiny_batch(model.config, batch_size=8)
    cached = gradients(model, batch, chunk_size=2)
    assert not torch.equal(gradients(model, batch, chunk_size=2, seed=1)[0], cached[0])
    monkeypatch.setattr(modeling_ocl, "checkpoint", lambda function, *args, use_reentrant: function(*args))
    assert_same_step(cached, gradients(model, batch, chunk_size=2), atol=1e-6)


def test_random_numbers_after_a_cached_step_are_those_after_its_first_pass():
    model = pretraining_model(drop_path_rate=0.6)
    batch = tiny_batch(model.config, batch_size=4)
    gradients(model, batch, chunk_size=2)
    after = torch.rand(3)
    torch.manual_seed(0)
    with torch.no_grad():
        model(**batch)
    assert torch.equal(torch.rand(3), after)


def test_chunks_in_bfloat16():
    """The same loss; gradients within 5% (in the norm over all), and no further from float32's than without chunks."""
    model = pretraining_model(temperature=0.2)
    batch = tiny_batch(model.config, batch_size=64)
    _, exact = gradients(model, batch)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        (loss, whole), (cached_loss, cached) = gradients(model, batch), gradients(model, batch, chunk_size=2)

    def distance(first, second):
        return sum((first[name] - second[name]).square().sum() for name in exact).sqrt().item()

    size = sum(grad.square().sum() for grad in exact.values()).sqrt().item()
    assert cached_loss.item() == pytest.approx(loss.item(), rel=1e-3)
    assert 0.0 < distance(cached, whole) < 0.05 * size
    assert distance(cached, exact) < 1.1 * distance(whole, exact)


def test_chunks_are_the_two_passes_by_hand():
    """In bfloat16, where it matters that what the chunks give is summed in float32."""
    model = pretraining_model(temperature=0.2)
    batch = tiny_batch(model.config, batch_size=32)
    seen = torch.tensor(seen_by_the_encoder(model, batch)).split(2)
    pictures = batch["pixel_values"].split(1)

    def features_of(chunk):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            encoded = model.encoder(pictures[chunk], ids_keep=seen[chunk], cls_only=True)
            return encoded.last_hidden_state[:, 0].float()

    with torch.no_grad():
        features = torch.stack([features_of(chunk) for chunk in range(32)])
    features.requires_grad_()
    loss = model.contrastive_loss(features)
    loss.backward()
    for chunk in range(32):
        features_of(chunk).backward(features.grad[chunk])
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cached_loss, cached = gradients(model, batch, chunk_size=1)
    assert cached_loss.item() == pytest.approx(loss.item(), rel=1e-6)
    for name, grad in expected.items():
        torch.testing.assert_close(cached[name], grad, rtol=1e-4, atol=1e-6, msg=name)


def test_memory_is_that_of_a_chunk():
    model = pretraining_model()
    batch = tiny_batch(model.config, batch_size=64)

    def saved(chunk_size):
        sizes = {}
        inputs = {tensor.untyped_storage().data_ptr() for tensor in batch.values()}

        def pack(tensor):
            if tensor.untyped_storage().data_ptr() not in inputs:
                sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        model.chunk_size = chunk_size
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            model(**batch)
        return sum(sizes.values())

    assert saved(4) < 0.05 * saved(None)


def test_each_chunk_is_encoded_twice_and_alone():
    model = pretraining_model()
    sizes = []
    model.encoder.layers[0].register_forward_hook(lambda module, args, output: sizes.append(len(output)))
    model.chunk_size = 2
    loss = model(**tiny_batch(model.config, batch_size=6)).loss
    assert sizes == [4, 4, 4]
    loss.backward()
    assert sizes == [4] * 6
    # Without gradients once, and a batch that is no multiple too.
    sizes.clear()
    with torch.no_grad():
        model(**tiny_batch(model.config, batch_size=5))
    assert sizes == [4, 4, 2]


def ocl_trainer(folder, *, config=None, **changes):
    # In float32: what is compared agrees within 1e-5.
    changes = {"data": tiny_data(24), "per_device_train_batch_size": 6, "bf16": False} | changes
    return tiny_trainer(folder, model_class=OCLForPreTraining, config=OCLConfig(**(SMALL | (config or {}))), **changes)


def trained(folder, **changes):
    trainer = ocl_trainer(folder, num_train_epochs=1, **changes)
    trainer.train()
    trainer.save_state()
    return losses(folder, "loss", "loss_contrastive", "rank_me"), dict(trainer.model.named_parameters())


@pytest.mark.parametrize("accumulation", [1, 2])
def test_trainer_in_chunks(accumulation, tmp_path):
    # Little drift: Adam makes a step of the rounding of a gradient that is nearly zero.
    flags = {"gradient_accumulation_steps": accumulation, "base_learning_rate": 0.01, "max_grad_norm": 1.0}
    plain, weights = trained(tmp_path / "plain", **flags)
    cached, cached_weights = trained(tmp_path / "cached", contrastive_chunk_size=2, **flags)
    assert len(plain) == 4 // accumulation
    torch.testing.assert_close(torch.tensor(cached), torch.tensor(plain), rtol=0, atol=1e-4)
    for name, value in weights.items():
        if not name.endswith("k_proj.bias"):
            torch.testing.assert_close(cached_weights[name], value, rtol=0, atol=1e-5, msg=name)


def test_trainer_in_chunks_resumes_to_the_bit(tmp_path):
    """Dropped paths included."""
    flags = {"contrastive_chunk_size": 3, "config": {"drop_path_rate": 0.5}, "num_train_epochs": 2, "save_steps": 5}
    whole = ocl_trainer(tmp_path / "whole", save_strategy="steps", **flags)
    whole.train()
    resumed = ocl_trainer(tmp_path / "resumed", **flags)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-5"))
    for name, value in whole.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], value), name


# ---- Bad input


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"kappa": 0.0}, "kappa is 0.0; expected a number greater than 0"),
        ({"kappa": -4}, "kappa is -4"),
        ({"kappa": float("nan")}, "kappa is nan"),
        ({"temperature": 0.0}, "temperature is 0.0; expected at least 0.01"),
        ({"temperature": -1}, "temperature is -1"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"mask_ratio": 0.97}, r"0.97 keeps 0 of 48 patches \(an even number.*at least 2"),
        ({"image_size": (8, 4)}, "keeps 0 of 1 patches.*at least 2"),
        ({"head_num_layers": 1}, "head_num_layers is 1; expected 0.*2 or 3"),
        ({"head_num_layers": 2, "head_hidden_size": 0}, "head_hidden_size is 0"),
        ({"head_output_size": -1}, "head_output_size is -1"),
    ],
)
def test_config_refuses_what_cannot_work(fields, message):
    with pytest.raises(ValueError, match=message):
        tiny_model("ocl", "ForPreTraining", **fields)


def test_a_batch_of_one_is_refused():
    model = pretraining_model()
    for chunk_size in (None, 1):
        model.chunk_size = chunk_size
        with pytest.raises(ValueError, match="batch of 1 picture has no other.*at least 2"):
            model(**tiny_batch(model.config, batch_size=1))


@pytest.mark.parametrize(("chunk", "batch", "example"), [(4, 6, 3), (0, 6, 1), (-2, 6, 1), (12, 6, 6), (5, 7, 1)])
def test_a_chunk_that_does_not_divide_the_batch_is_refused(chunk, batch, example, tmp_path):
    with pytest.raises(ValueError, match=f"contrastive_chunk_size is {chunk}.*batch_size, {batch}.*example {example}"):
        ocl_trainer(tmp_path, contrastive_chunk_size=chunk, per_device_train_batch_size=batch)


def test_chunks_of_a_method_that_compares_nothing_are_refused(tmp_path):
    with pytest.raises(ValueError, match="contrastive_chunk_size is 2.*PiLaMIMForPreTraining compares no pictures"):
        tiny_trainer(tmp_path, contrastive_chunk_size=2)


def test_held_out_pictures_are_compared_in_whole_batches(tmp_path):
    trainer = ocl_trainer(tmp_path, per_device_eval_batch_size=4)

    def sizes(number):
        return [len(batch["noise"]) for batch in trainer.get_eval_dataloader(tiny_data(number))]

    assert sizes(9) == [4, 4] and sizes(8) == [4, 4] and sizes(3) == [3]
    metrics = trainer.evaluate(tiny_data(9))
    assert metrics["eval_loss"] == pytest.approx(metrics["eval_loss_contrastive"], rel=1e-6)


# ---- Collapse


def test_alignment_and_uniformity_by_hand():
    first = torch.tensor([[2.0, 0.0], [0.0, 3.0], [-1.0, 0.0]])
    second = torch.tensor([[1.0, 0.0], [5.0, 0.0], [1.0, 0.0]])
    assert alignment(first, second) == pytest.approx((0 + 2 + 4) / 3)
    pairs = [math.exp(-4), math.exp(-8), math.exp(-4)]
    assert uniformity(first) == pytest.approx(math.log(sum(pairs) / 3))
    assert uniformity(torch.ones(5, 2)) == pytest.approx(0.0, abs=1e-6)


class Collapse(TrainerCallback):
    """After step 3 all pictures have the same features."""

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step == 3:
            torch.nn.init.zeros_(model.encoder.layernorm.weight)
            torch.nn.init.ones_(model.encoder.layernorm.bias)


def test_collapse_is_noticed_and_its_step_named(tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr(collapse.logger, "warning", said.append)
    flags = {"per_device_train_batch_size": 24, "max_steps": 8, "learning_rate": 1e-6, "logging_steps": 2}
    trainer = ocl_trainer(tmp_path / "healthy", **flags)
    trainer.train()
    assert not said
    logs = [log for log in trainer.state.log_history if "loss" in log]
    assert [log["step"] for log in logs] == [2, 4, 6, 8]
    for log in logs:
        assert 10 < log["rank_me"] < 24 and log["uniformity"] < -0.01 and 0 < log["alignment"] < 2

    trainer = ocl_trainer(tmp_path / "collapsed", callbacks=[Collapse()], **flags)
    trainer.train()
    assert len(said) == 1
    assert said[0].startswith("Step 4: the features' RankMe is 1.0")
    assert f"under a tenth of the {trainer.collapse_watch.start:.2f}" in said[0]
    last = trainer.state.log_history[-2]
    assert last["alignment"] == pytest.approx(0, abs=1e-4) and last["uniformity"] == pytest.approx(0, abs=1e-4)


def test_features_are_measured_only_when_logging(tmp_path, monkeypatch):
    steps = []
    trainer = ocl_trainer(tmp_path, logging_steps=3, gradient_accumulation_steps=2, num_train_epochs=4)
    measure = trainer.collapse_watch.measure
    monkeypatch.setattr(
        trainer.collapse_watch, "measure", lambda features, step: (steps.append(step), measure(features, step))
    )
    trainer.train()
    assert steps == [1, 3, 6]


def test_a_resumed_training_remembers_its_start():
    watch = collapse.CollapseWatch()
    watch.begin([{"loss": 1.0}, {"rank_me": 40.0}, {"rank_me": 3.0}])
    assert watch.start == 40.0
    watch.begin([])
    assert watch.start is None


# ---- Several processes

TWO = """
import os, sys
sys.path.insert(0, "tests")
import torch
from torch import distributed
from torch.nn.parallel import DistributedDataParallel
from test_ocl import CASES, batch_of, ocl_trainer, pretraining_model

folder = sys.argv[1]
distributed.init_process_group("gloo")
rank = distributed.get_rank()
results = {}
for name, (fields, chunk_size) in CASES.items():
    model = pretraining_model(**fields)
    model.chunk_size = chunk_size
    wrapped = DistributedDataParallel(model, broadcast_buffers=False)
    batch = {key: value.chunk(2)[rank] for key, value in batch_of(model).items()}
    loss = wrapped(**batch).loss
    loss.backward()
    results[name] = (loss.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None})
torch.save(results, f"{folder}/rank{rank}.pt")

for chunk_size in (None, 1):
    trainer = ocl_trainer(
        f"{folder}/{chunk_size}", per_device_train_batch_size=3, contrastive_chunk_size=chunk_size, max_steps=4,
        base_learning_rate=0.01, gradient_accumulation_steps=2,
    )
    trainer.train()
    if rank == 0:
        torch.save((trainer.state.log_history, trainer.model.state_dict()), f"{folder}/{chunk_size}.pt")
sys.stdout.flush()
os._exit(0)
"""
CASES = {
    "plain": ({}, None),
    "chunks": ({}, 1),
    "head": ({"head_num_layers": 2}, None),
    "head in chunks": ({"head_num_layers": 2}, 3),
    "own negatives": ({"gather_negatives": False}, 1),
}


def batch_of(model):
    return tiny_batch(model.config, batch_size=6)


def test_two_processes_equal_one(tmp_path, processes):
    script = tmp_path / "two.py"
    script.write_text(TWO)
    result = processes([str(script), str(tmp_path)], 2)
    assert result.returncode == 0, result.stderr
    first, second = (torch.load(tmp_path / f"rank{rank}.pt") for rank in range(2))
    for name, (fields, _) in CASES.items():
        model = pretraining_model(**fields)
        batch = batch_of(model)
        if name == "own negatives":
            halves = [gradients(model, {key: value.chunk(2)[rank] for key, value in batch.items()}) for rank in (0, 1)]
            expected = [loss for loss, _ in halves], {n: (halves[0][1][n] + halves[1][1][n]) / 2 for n in halves[0][1]}
        else:
            loss, grads = gradients(model, batch)
            expected = [loss, loss], grads
        for rank, (loss, grads) in enumerate((first[name], second[name])):
            assert_same_step((loss, grads), (expected[0][rank], expected[1]))

    alone = ocl_trainer(tmp_path / "one", max_steps=4, base_learning_rate=0.01, gradient_accumulation_steps=2)
    alone.train()
    for name in ("None", "1"):
        history, weights = torch.load(tmp_path / f"{name}.pt", weights_only=False)
        for log, expected in zip(history[:4], alone.state.log_history[:4], strict=True):
            for key in ("loss", "loss_contrastive", "grad_norm"):
                assert log[key] == pytest.approx(expected[key], abs=1e-4), (name, key)
        for key, value in alone.model.state_dict().items():
            if not key.endswith("k_proj.bias"):
                torch.testing.assert_close(weights[key], value, rtol=0, atol=1e-5, msg=f"{name}: {key}")
