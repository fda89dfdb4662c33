"""TEC against the released implementation's numbers, and what these cannot show."""

import pytest
import torch

import hf_mim
from golden import Golden, block_grad_norms
from hf_mim import TECConfig, TECForImageClassification, TECForPreTraining, TECModel
from tiny import scrambled, tiny_batch, tiny_config, tiny_model


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
