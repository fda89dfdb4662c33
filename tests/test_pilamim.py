"""PiLaMIM against the released implementation's numbers, and what these cannot show."""

import torch
from golden import Golden, block_grad_norms

import hf_mim


def grad_norms(model) -> dict[str, float]:
    encoder = model.encoder
    norms = {
        "encoder.cls_token": encoder.embeddings.cls_token.grad.norm(),
        # The release's encoder has no position for [CLS]; ours has, and loads it as zero.
        "encoder.pos_embedding": encoder.embeddings.position_embeddings.grad[:, 1:].norm(),
        "encoder.patchify.weight": encoder.embeddings.patch_embeddings.projection.weight.grad.norm(),
        "encoder.patchify.bias": encoder.embeddings.patch_embeddings.projection.bias.grad.norm(),
        "encoder.layer_norm.weight": encoder.layernorm.weight.grad.norm(),
        "encoder.layer_norm.bias": encoder.layernorm.bias.grad.norm(),
    } | block_grad_norms(encoder.layers, "encoder.transformer")
    for decoder, name, embed, head in (
        (model.pixel_decoder, "decoder", "decoder_embed", "head"),
        (model.latent_decoder, "target_decoder", "decoder_latent_embed", "head_latent"),
    ):
        norms |= {
            f"{name}.mask_token": decoder.mask_token.grad.norm(),
            f"{name}.pos_embedding": decoder.position_embeddings.grad.norm(),
            f"{embed}.weight": decoder.embed.weight.grad.norm(),
            f"{embed}.bias": decoder.embed.bias.grad.norm(),
            f"{name}.{head}.weight": decoder.head.weight.grad.norm(),
            f"{name}.{head}.bias": decoder.head.bias.grad.norm(),
        } | block_grad_norms(decoder.layers, f"{name}.transformer")
    return {name: float(norm) for name, norm in norms.items()}


def test_golden():
    golden = Golden("pilamim")
    model = hf_mim.from_original(golden.state, "pilamim", config=golden.config).train()
    outputs = model(golden.input["pixel_values"], noise=golden.input["noise"])
    golden.assert_numbers(outputs)
    assert outputs.mask.mean().item() == golden.numbers["masked_fraction"]
    golden.assert_tensor("predicted_cls", outputs.predicted_latents[:, 0])
    golden.assert_tensor("predicted_latents", outputs.predicted_latents[:, 1:])
    golden.assert_tensor("target_cls", outputs.target_latents[:, 0])
    golden.assert_tensor("target_latents", outputs.target_latents[:, 1:])
    mask, pixels = model.reconstruct(golden.input["pixel_values"], golden.input["noise"])
    golden.assert_tensor("predicted_pixels_image", pixels)
    outputs.loss.backward()
    golden.assert_grad_norms(grad_norms(model))


def test_original_config_is_read_off_the_weights():
    golden = Golden("pilamim")
    heads = {name: golden.config[name] for name in ("num_attention_heads", "decoder_num_attention_heads")}
    model = hf_mim.from_original(golden.state, "pilamim", config=heads)
    for name, value in golden.config.items():
        expected = [value, value] if name in ("image_size", "patch_size") else value
        assert getattr(model.config, name) == expected, name
    outputs = model(golden.input["pixel_values"], noise=golden.input["noise"])
    golden.assert_numbers(outputs)
    assert not torch.isnan(outputs.loss)
