"""I-JEPA: the release's numbers, blocks by noise, and transformers' own model once it is saved."""

import json
import subprocess
import sys

import pytest
import torch
import transformers

import hf_mim
from golden import Golden, block_grad_norms
from hf_mim.models.ijepa.blocks import Blocks, draw_blocks
from hf_mim.models.ijepa.configuration_ijepa import IJepaConfig
from hf_mim.models.ijepa.modeling_ijepa import IJepaForPreTraining, IJepaModel
from tiny import scrambled, slow_position_table, tiny_batch, tiny_config, tiny_model

SQUARE = {"image_size": (32, 32), "patch_size": (8, 8), "num_channels": 3}


@pytest.fixture(scope="module")
def golden():
    return Golden("ijepa")


def original(golden):
    return hf_mim.from_original(golden.state, "ijepa", config=golden.config)


class TestGolden:
    def test_loss_predictions_and_gradients(self, golden):
        model = original(golden).train()
        outputs = model(**golden.input)
        golden.assert_numbers(outputs)
        assert outputs.loss.item() == outputs.loss_latent.item()
        golden.assert_tensor("prediction", outputs.predicted_latents.permute(1, 2, 0, 3, 4).flatten(0, 2))
        golden.assert_tensor("target", outputs.target_latents.transpose(0, 1).flatten(0, 1))
        outputs.loss.backward()
        norms = block_grad_norms(model.encoder.layers, "encoder.blocks")
        norms |= block_grad_norms(model.predictor.layers, "predictor.predictor_blocks")
        projection = model.encoder.embeddings.patch_embeddings.projection
        modules = {
            "encoder.patch_embed.proj": projection,
            "encoder.norm": model.encoder.layernorm,
            "predictor.predictor_embed": model.predictor.embed,
            "predictor.predictor_norm": model.predictor.layernorm,
            "predictor.predictor_proj": model.predictor.head,
        }
        norms |= {f"{n}.{k}": getattr(m, k).grad.norm().item() for n, m in modules.items() for k in ("weight", "bias")}
        norms["predictor.mask_token"] = model.predictor.mask_token.grad.norm().item()
        golden.assert_grad_norms(norms)

    @torch.no_grad()
    def test_encoders(self, golden):
        model = original(golden)
        pixel_values = golden.input["pixel_values"]
        ids_context = golden.input["ids_context"].transpose(0, 1).flatten(0, 1)
        golden.assert_tensor("context", model.encoder(pixel_values, ids_keep=ids_context).last_hidden_state)
        golden.assert_tensor("target_encoder_output", model.target_encoder(pixel_values).last_hidden_state)

    def test_names_of_wrappers_and_sizes_off_the_weights(self, golden):
        wrapped = {name.replace(".", ".module.", 1): value for name, value in golden.state.items()}
        heads = {name: golden.config[name] for name in ("num_attention_heads", "predictor_num_attention_heads")}
        model = hf_mim.from_original(wrapped, "ijepa", config=heads)
        golden.assert_numbers(model(**golden.input))


def test_several_context_blocks_each_predict_each_target(golden):
    model = original(golden)
    ids_context, ids_target = golden.input["ids_context"], golden.input["ids_target"]
    other = ids_context.flip(0) if len(ids_context) > 1 else ids_context
    pixel_values = golden.input["pixel_values"]
    with torch.no_grad():
        both = model(pixel_values, ids_context=torch.cat((ids_context, other), dim=1), ids_target=ids_target)
        alone = [model(pixel_values, ids_context=ids, ids_target=ids_target) for ids in (ids_context, other)]
    for i, outputs in enumerate(alone):
        torch.testing.assert_close(both.predicted_latents[:, :, [i]], outputs.predicted_latents, rtol=0, atol=1e-5)
    assert both.loss.item() == pytest.approx(sum(outputs.loss.item() for outputs in alone) / 2, rel=1e-5)


if __name__ == "__main__":
    raise SystemExit(json, subprocess, sys, transformers)
