"""The PiLaMIM release's weights as ours."""

import torch

from ..vit.convert_vit import State, convert_layers, copy_affine, count_layers


def original_config(state: State, teacher: State | None = None) -> dict:
    """
    The fields of `PiLaMIMConfig` that the release's weights tell, and those that the release fixes.

    Head counts cannot be read off weights: 64 channels a head in the encoder, 32 in the decoders, as in ViT-B's
    release. Square pictures are assumed. Give `config` to `from_original` where that is wrong.
    """
    width, channels, *patch_size = state["encoder.patchify.weight"].shape
    decoder_width = state["decoder.mask_token"].shape[-1]
    side = round(state["encoder.pos_embedding"].shape[0] ** 0.5)
    return {
        "hidden_size": width,
        "num_hidden_layers": count_layers(state, "encoder.transformer"),
        "num_attention_heads": max(1, width // 64),
        "intermediate_size": state["encoder.transformer.0.mlp.fc1.weight"].shape[0],
        "image_size": [side * patch for patch in patch_size],
        "patch_size": list(patch_size),
        "num_channels": channels,
        "qkv_bias": "encoder.transformer.0.attn.qkv.bias" in state,
        "layer_norm_eps": 1e-5,
        "position_embedding": "learned",
        "decoder_hidden_size": decoder_width,
        "decoder_num_hidden_layers": count_layers(state, "decoder.transformer"),
        "decoder_num_attention_heads": max(1, decoder_width // 32),
        "decoder_intermediate_size": state["decoder.transformer.0.mlp.fc1.weight"].shape[0],
        "decoder_final_norm": False,
    }


def convert_original(state: State, config, teacher: State | None = None) -> State:
    """The release's weights under the names of `PiLaMIMForPreTraining`; they include the target encoder."""
    return (
        _encoder(state, "encoder")
        | _encoder(state, "target_encoder")
        | _decoder(state, "decoder", "decoder_embed", "head", "pixel_decoder", config.num_channels)
        | _decoder(state, "target_decoder", "decoder_latent_embed", "head_latent", "latent_decoder", None)
    )


def _encoder(state: State, name: str) -> State:
    positions = state[f"{name}.pos_embedding"].transpose(0, 1)
    return {
        f"{name}.embeddings.cls_token": state[f"{name}.cls_token"],
        # The release gives [CLS] no position in the encoder.
        f"{name}.embeddings.position_embeddings": torch.cat((torch.zeros_like(positions[:, :1]), positions), dim=1),
        **copy_affine(state, f"{name}.patchify", f"{name}.embeddings.patch_embeddings.projection"),
        **convert_layers(state, f"{name}.transformer", f"{name}.layers"),
        **copy_affine(state, f"{name}.layer_norm", f"{name}.layernorm"),
    }


def _decoder(state: State, source: str, embed: str, head: str, target: str, num_channels: int | None) -> State:
    head_weights = copy_affine(state, f"{source}.{head}", f"{target}.head")
    if num_channels is not None:
        # A patch's pixels: (channel, row, column) there, (row, column, channel) here.
        head_weights = {
            name: weight.unflatten(0, (num_channels, -1)).transpose(0, 1).flatten(0, 1)
            for name, weight in head_weights.items()
        }
    return {
        f"{target}.mask_token": state[f"{source}.mask_token"],
        f"{target}.position_embeddings": state[f"{source}.pos_embedding"].transpose(0, 1),
        **copy_affine(state, embed, f"{target}.embed"),
        **convert_layers(state, f"{source}.transformer", f"{target}.layers"),
        **head_weights,
    }
