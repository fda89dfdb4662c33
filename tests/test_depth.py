"""Estimators of depth: models of every method, what they are trained and judged by, and their data."""

import math

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

import hf_mim
from hf_mim.data.image_processing import MIMImageProcessor
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
    for name, value in model.encoder.state_dict().items():
        assert torch.equal(value, pretrained.encoder.state_dict()[name]), name
    batch = pictures(32, 48)
    labels = 1 + 9 * torch.rand(2, 32, 48, generator=torch.Generator().manual_seed(1))
    labels[0, :8], labels[1, 3] = 0, math.nan
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
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
