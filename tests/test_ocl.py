"""OCL against the released implementation's numbers, and what these cannot show."""

import pytest

import hf_mim
from golden import Golden, block_grad_norms


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
