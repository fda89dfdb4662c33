"""Backbones at any size, the feature pyramid, and segmenters of every method."""

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from torch import nn

import hf_mim
from hf_mim.data.image_processing import MIMImageProcessor
from hf_mim.models.vit.pyramid import SimpleFeaturePyramid
from hf_mim.models.vit.segmentation import segmentation_loss
from hf_mim.registry import METHODS, method_class
from tiny import scrambled, tiny_config, tiny_model

RGB = {"image_size": 32, "patch_size": 8, "num_channels": 3, "num_labels": 4, "segmentation_head_size": 16}


def pictures(height=32, width=32, channels=3, number=2):
    return torch.randn(number, channels, height, width, generator=torch.Generator().manual_seed(0))


def small_vit(**fields):
    settings = {"image_size": 32, "patch_size": 8, "hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2}
    return hf_mim.MaskedViTConfig(**(settings | fields))


# ---- Backbones


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("size", [(32, 48), (48, 32), (8, 4)])
def test_every_map_is_the_encoders_tokens_at_any_size(method, size):
    backbone = tiny_model(method, "Backbone", out_indices=[0, 1, 3])
    batch = pictures(*size, channels=5)
    rows, columns = size[0] // 8, size[1] // 4
    with torch.no_grad():
        maps = backbone(batch).feature_maps
        states = backbone.encoder(batch, interpolate_pos_encoding=True, output_hidden_states=True).hidden_states
        for feature_map, stage in zip(maps, (0, 1, 3), strict=True):
            assert feature_map.shape == (2, 32, rows, columns) and feature_map.is_contiguous()
            tokens = backbone.encoder.layernorm(states[stage])[:, 1:]
            assert torch.equal(feature_map.flatten(2).transpose(1, 2), tokens)
    with pytest.raises(ValueError, match="36 x 50 pixels are not divisible by the patch size 8 x 4"):
        backbone(pictures(36, 50, channels=5))


def test_maps_before_the_norm_and_all_tokens_as_dinov2_has_them():
    torch.manual_seed(0)
    ours = scrambled(hf_mim.MaskedViTBackbone(small_vit(out_indices=[2, 4], num_register_tokens=1))).eval()
    with torch.no_grad():
        states = ours.encoder(pictures(), output_hidden_states=True).hidden_states
        ours.config.apply_layernorm = False
        first, _ = ours(pictures()).feature_maps
        assert torch.equal(first.flatten(2).transpose(1, 2), states[2][:, 2:])
        ours.config.reshape_hidden_states = False
        first, last = ours(pictures()).feature_maps
        assert torch.equal(first, states[2]) and torch.equal(last, states[4])


def test_blocks_after_the_last_wanted_stage_are_not_run():
    backbone = hf_mim.MaskedViTBackbone(small_vit(out_features=["stem", "stage2"])).eval()
    run = []
    for number, layer in enumerate(backbone.encoder.layers):
        layer.register_forward_hook(lambda *_, number=number: run.append(number))
    outputs = backbone(pictures(), output_hidden_states=True)
    assert run == [0, 1] and len(outputs.hidden_states) == 3


@pytest.mark.parametrize("method", METHODS)
def test_another_depth_is_loaded(method, tmp_path):
    model = tiny_model(method, "ForPreTraining")
    model.save_pretrained(tmp_path)
    # TEC's groups of blocks, which a backbone has no use for, have to divide the depth.
    groups = {"adapter_group_size": 1} if method == "tec" else {}
    backbone = method_class(method, "Backbone").from_pretrained(tmp_path, num_hidden_layers=2, **groups)
    assert backbone.out_features == ["stage2"] and len(backbone.encoder.layers) == 2
    batch = pictures(32, 48, channels=5)
    with torch.no_grad():
        expected = model.encoder(batch, output_hidden_states=True).hidden_states[2]
        (found,) = backbone(batch).feature_maps
        assert torch.equal(found.flatten(2).transpose(1, 2), model.encoder.layernorm(expected)[:, 1:])
    chosen = method_class(method, "Backbone").from_pretrained(
        tmp_path, num_hidden_layers=2, out_indices=[1, 2], **groups
    )
    assert chosen.out_features == ["stage1", "stage2"]
    chosen.save_pretrained(tmp_path / "chosen")
    again = method_class(method, "Config").from_pretrained(tmp_path / "chosen", num_hidden_layers=3)
    assert again.out_features == ["stage1", "stage2"] and again.stage_names[-1] == "stage3"
    with pytest.raises(ValueError, match="(?s)stage2|adapter_group"):
        method_class(method, "Config").from_pretrained(tmp_path / "chosen", num_hidden_layers=1)


# ---- The pyramid


@pytest.mark.parametrize(
    ("grid", "sizes"),
    [
        ((14, 14), [(56, 56), (28, 28), (14, 14), (7, 7)]),
        ((4, 6), [(16, 24), (8, 12), (4, 6), (2, 3)]),
        ((5, 1), [(20, 4), (10, 2), (5, 1), (3, 1)]),
    ],
)
def test_pyramid_sizes(grid, sizes):
    levels = SimpleFeaturePyramid(8, 12)(torch.randn(2, 8, *grid))
    assert [tuple(level.shape) for level in levels] == [(2, 12, *size) for size in sizes]


def test_pyramid_keeps_places():
    """What changes at one patch changes each level there, and as far as its 3 x 3 convolution reaches."""
    torch.manual_seed(0)
    pyramid, features = SimpleFeaturePyramid(8, 12), torch.randn(1, 8, 8, 12)
    other = features.clone()
    other[0, :, 2, 9] += 1
    for scale, before, after in zip(pyramid.scales, pyramid(features), pyramid(other), strict=True):
        changed = (before != after).any(dim=1)[0].nonzero()
        low, high = changed.min(dim=0).values.tolist(), changed.max(dim=0).values.tolist()
        first = [int(2 * scale), int(9 * scale)]
        last = [first[0] + max(1, int(scale)) - 1, first[1] + max(1, int(scale)) - 1]
        assert low == [place - 1 for place in first] and high == [place + 1 for place in last]
    with pytest.raises(ValueError, match="6"):
        SimpleFeaturePyramid(6)


# ---- Segmenters


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("head", "scale"), [("linear", 1), ("upernet", 4)])
def test_segmenter_of_a_pretraining_checkpoint(method, head, scale, tmp_path):
    pretrained = tiny_model(method, "ForPreTraining", drop_path_rate=0.1)
    pretrained.save_pretrained(tmp_path / "pretrained")
    torch.manual_seed(0)
    model = transformers.AutoModelForSemanticSegmentation.from_pretrained(
        tmp_path / "pretrained", num_labels=4, segmentation_head=head, segmentation_head_size=16
    )
    assert type(model) is method_class(method, "ForSemanticSegmentation") and model.config.drop_path_rate == 0
    for name, value in model.encoder.state_dict().items():
        assert torch.equal(value, pretrained.encoder.state_dict()[name]), name
    batch = pictures(32, 48, channels=5)
    labels = torch.randint(0, 4, (2, 32, 48), generator=torch.Generator().manual_seed(1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(6):
        loss = model.train()(batch, labels=labels).loss
        losses.append(loss.item())
        loss.backward()
        assert all(parameter.grad is not None for parameter in model.parameters() if parameter.requires_grad)
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0]
    model.eval().save_pretrained(tmp_path / "trained")
    loaded = transformers.AutoModelForSemanticSegmentation.from_pretrained(tmp_path / "trained")
    with torch.no_grad():
        outputs = model(batch, labels=labels)
        assert outputs.logits.shape == (2, 4, 4 * scale, 12 * scale)
        assert torch.equal(loaded(batch).logits, outputs.logits)
        assert loaded(pictures(64, 40, channels=5)).logits.shape == (2, 4, 8 * scale, 10 * scale)
    # What was fine-tuned gives its encoder on, and says nothing of its head.
    encoder, info = method_class(method, "Model").from_pretrained(tmp_path / "trained", output_loading_info=True)
    assert not info["unexpected_keys"] and not info["missing_keys"]
    assert torch.equal(encoder.layernorm.weight, model.encoder.layernorm.weight)


def test_frozen_segmenter_trains_its_head_alone():
    model = hf_mim.MaskedViTForSemanticSegmentation(small_vit(num_labels=3))
    model.set_trainable("head")
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {
        f"segmentation_head.{name}"
        for name in ("batch_norm.weight", "batch_norm.bias", "classifier.weight", "classifier.bias")
    }


def test_auxiliary_loss_counts_for_its_weight_in_training():
    torch.manual_seed(0)
    model = hf_mim.MaskedViTForSemanticSegmentation(
        small_vit(segmentation_head="upernet", **{"segmentation_head_size": 8})
    )
    labels = torch.randint(0, 2, (2, 32, 32))
    found = {}
    for weight in (0.0, 0.4, 1.0):
        model.config.auxiliary_loss_weight = weight
        found[weight] = model.train()(pictures(), labels=labels).loss.item()
    assert found[0.4] == pytest.approx(found[0.0] + 0.4 * (found[1.0] - found[0.0]), rel=1e-4)
    assert found[1.0] > found[0.0] + 0.1


def test_loss_is_the_mean_over_the_pixels_that_have_a_class():
    logits = torch.tensor([[[[2.0, -1.0]], [[0.0, 3.0]]]])
    labels = torch.tensor([[[1, 255]]])
    expected = -torch.tensor([2.0, 0.0]).log_softmax(dim=0)[1]
    torch.testing.assert_close(segmentation_loss(logits, labels, 255), expected)
    assert segmentation_loss(logits, torch.full_like(labels, 255), 255) == 0
    with pytest.raises(ValueError, match=r"\(1, height, width\)"):
        segmentation_loss(logits, labels[0], 255)


def test_unknown_head_is_refused():
    with pytest.raises(ValueError, match="segmentation_head is 'fcn'.*linear.*upernet"):
        small_vit(segmentation_head="fcn")


@pytest.mark.parametrize("method", METHODS)
def test_pipeline_tells_the_class_of_each_pixel_of_the_picture(method, tmp_path):
    labels = {0: "ground", 1: "sky", 2: "sea", 3: "tree"}
    torch.manual_seed(0)
    fields = RGB | {"id2label": labels, "label2id": {name: number for number, name in labels.items()}}
    del fields["num_labels"]
    model = tiny_model(method, "ForSemanticSegmentation", **fields)
    model.save_pretrained(tmp_path)
    processor = MIMImageProcessor(
        num_channels=3, size={"height": 32, "width": 32}, image_mean=[0.5] * 3, image_std=[0.5] * 3
    )
    processor.save_pretrained(tmp_path)
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (30, 50, 3), dtype=np.uint8))
    found = transformers.pipeline("image-segmentation", str(tmp_path))(picture)
    told = np.stack([np.array(one["mask"]) for one in found])
    assert told.shape[1:] == (30, 50) and (told.astype(bool).sum(axis=0) == 1).all()
    with torch.no_grad():
        logits = model(**processor(picture, return_tensors="pt")).logits
    classes = nn.functional.interpolate(logits, size=(30, 50), mode="bilinear").argmax(dim=1)[0].numpy()
    for one, mask in zip(found, told, strict=True):
        assert np.array_equal(mask > 0, classes == model.config.label2id[one["label"]])


def test_maps_without_sizes_are_those_of_the_logits():
    processor, logits = MIMImageProcessor(), torch.randn(2, 3, 4, 5)
    first, _ = processor.post_process_semantic_segmentation({"logits": logits})
    assert torch.equal(first, logits[0].argmax(dim=0))
    with pytest.raises(ValueError, match="1 target_sizes for 2"):
        processor.post_process_semantic_segmentation({"logits": logits}, target_sizes=[(4, 5)])


# ---- transformers' own heads on our backbones


def _upernet(backbone_config):
    config = transformers.UperNetConfig(
        backbone_config=backbone_config, hidden_size=8, auxiliary_channels=8, num_labels=4
    )
    return transformers.UperNetForSemanticSegmentation(config)


def _mask2former(backbone_config):
    config = transformers.Mask2FormerConfig(
        backbone_config=backbone_config,
        feature_size=32,
        mask_feature_size=32,
        hidden_dim=32,
        encoder_feedforward_dim=32,
        encoder_layers=1,
        decoder_layers=2,
        dim_feedforward=32,
        num_queries=5,
        train_num_points=32,
        num_attention_heads=2,
        num_labels=4,
    )
    return transformers.Mask2FormerForUniversalSegmentation(config)


def _maskformer(backbone_config):
    decoder = transformers.DetrConfig(
        d_model=32,
        decoder_layers=1,
        encoder_layers=1,
        decoder_ffn_dim=32,
        encoder_ffn_dim=32,
        decoder_attention_heads=2,
        encoder_attention_heads=2,
        num_queries=5,
    )
    config = transformers.MaskFormerConfig(
        backbone_config=backbone_config,
        decoder_config=decoder,
        fpn_feature_size=32,
        mask_feature_size=32,
        num_labels=4,
    )
    return transformers.MaskFormerForInstanceSegmentation(config)


def _deformable_detr(backbone_config):
    config = transformers.DeformableDetrConfig(
        backbone_config=backbone_config,
        d_model=32,
        encoder_layers=1,
        decoder_layers=2,
        encoder_ffn_dim=32,
        decoder_ffn_dim=32,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        num_queries=5,
        num_labels=4,
    )
    return transformers.DeformableDetrForObjectDetection(config)


@pytest.mark.parametrize("build", [_upernet, _mask2former, _maskformer, _deformable_detr])
def test_a_step_of_transformers_own_heads_at_another_size(build, tmp_path):
    torch.manual_seed(0)
    model = build(tiny_config("pilamim", **RGB, num_hidden_layers=4, out_indices=[1, 2, 3, 4])).train()
    pixel_values = pictures(64, 32)
    labels = torch.randint(0, 4, (2, 64, 32), generator=torch.Generator().manual_seed(1))
    output, targets = "logits", {"labels": labels}
    if build in (_mask2former, _maskformer):
        output = "masks_queries_logits"
        classes = torch.arange(4)
        targets = {
            "mask_labels": [(one == classes[:, None, None]).float() for one in labels],
            "class_labels": [classes for _ in labels],
        }
    if build is _deformable_detr:
        output = "pred_boxes"
        boxes = torch.tensor([[0.5, 0.5, 0.4, 0.2], [0.3, 0.6, 0.2, 0.2]])
        targets = {"labels": [{"class_labels": torch.tensor([1, 3]), "boxes": boxes} for _ in labels]}
    (encoder,) = (module for module in model.modules() if type(module) is hf_mim.PiLaMIMModel)
    before = encoder.layers[0].mlp.fc1.weight.detach().clone()
    loss = model(pixel_values=pixel_values, **targets).loss
    assert loss.isfinite().all()
    loss.sum().backward()
    torch.optim.AdamW(model.parameters(), lr=1e-3).step()
    assert not torch.equal(encoder.layers[0].mlp.fc1.weight, before)
    model.eval().save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path).eval()
    with torch.no_grad():
        torch.testing.assert_close(
            getattr(loaded(pixel_values=pixel_values), output), getattr(model(pixel_values=pixel_values), output)
        )


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "fields", [{}, {"position_embedding": "learned", "num_register_tokens": 2, "qkv_bias": False}]
)
def test_eomt_takes_our_weights(method, fields, tmp_path):
    model = tiny_model(method, "Model", image_size=32, patch_size=8, **fields)
    batch, untouched = pictures(channels=5), {name: value.clone() for name, value in model.state_dict().items()}
    exported = hf_mim.to_eomt(model, num_labels=4, num_queries=5, num_blocks=2, train_num_points=32)
    assert type(exported) is transformers.EomtForUniversalSegmentation and not exported.training
    with torch.no_grad():
        tokens = exported.embeddings(batch)
        for layer in exported.layers:
            tokens = layer(tokens)
        expected = model(batch).last_hidden_state
        torch.testing.assert_close(exported.layernorm(tokens), expected, rtol=0, atol=1e-5)
    assert all(torch.equal(value, untouched[name]) for name, value in model.state_dict().items())
    labels = torch.randint(0, 4, (2, 32, 32), generator=torch.Generator().manual_seed(1))
    classes = torch.arange(4)
    masks = [(one == classes[:, None, None]).float() for one in labels]
    loss = exported.train()(batch, mask_labels=masks, class_labels=[classes, classes]).loss
    loss.backward()
    assert loss.isfinite() and exported.layers[0].mlp.fc1.weight.grad.abs().sum() > 0
    torch.optim.AdamW(exported.parameters(), lr=1e-3).step()
    exported.eval().save_pretrained(tmp_path)
    loaded = transformers.EomtForUniversalSegmentation.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(loaded(batch).masks_queries_logits, exported(batch).masks_queries_logits)


def test_eomt_at_another_size_and_what_it_cannot_be():
    model = tiny_model("ocl", "Model", image_size=32, patch_size=8, num_channels=3)
    larger = hf_mim.to_eomt(model, num_labels=2, image_size=48, num_queries=3)
    batch = pictures(48, 48)
    with torch.no_grad():
        tokens = larger.embeddings(batch)
        for layer in larger.layers:
            tokens = layer(tokens)
        expected = model(batch, interpolate_pos_encoding=True).last_hidden_state
        torch.testing.assert_close(larger.layernorm(tokens), expected, rtol=0, atol=1e-5)
        assert larger(batch).masks_queries_logits.shape == (2, 3, 24, 24)
    for fields, message in (
        ({"image_size": (32, 48), "patch_size": 8}, "image_size is 32 x 48"),
        ({"image_size": 32, "patch_size": 8, "position_embedding": "rotary"}, "rotary"),
        ({"image_size": 32, "patch_size": 8, "use_cls_token": False, "pooling": "mean"}, r"no \[CLS\]"),
    ):
        with pytest.raises(ValueError, match=message):
            hf_mim.to_eomt(hf_mim.MaskedViTModel(small_vit(**fields)), num_labels=2)
