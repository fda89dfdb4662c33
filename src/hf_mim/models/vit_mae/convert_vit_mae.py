"""The MAE release's weights as transformers' ViTMAE."""

from transformers.utils import logging

from ..vit.convert_vit import State, convert_layers, copy_affine, count_layers

logger = logging.get_logger(__name__)

# Files of the encoder alone have no decoder, which then starts anew.
PARTIAL = True


def original_config(state: State, teacher: State | None = None) -> dict:
    """
    The fields of `ViTMAEConfig` that the release's weights tell.

    Head counts cannot be read off weights: 64 channels a head in the encoder (80 in ViT-H), 32 in the decoder, as in
    the release, which normalises the pixels of its targets. Give `config` to `from_original` where that is wrong.
    """
    width, channels, patch_size, _ = state["patch_embed.proj.weight"].shape
    side = round((state["pos_embed"].shape[1] - 1) ** 0.5)
    fields = {
        "hidden_size": width,
        "num_hidden_layers": count_layers(state, "blocks"),
        "num_attention_heads": max(1, width // (80 if width == 1280 else 64)),
        "intermediate_size": state["blocks.0.mlp.fc1.weight"].shape[0],
        "image_size": side * patch_size,
        "patch_size": patch_size,
        "num_channels": channels,
        "qkv_bias": "blocks.0.attn.qkv.bias" in state,
        "norm_pix_loss": True,
    }
    if "decoder_embed.weight" in state:
        decoder_width = state["mask_token"].shape[-1]
        fields |= {
            "decoder_hidden_size": decoder_width,
            "decoder_num_hidden_layers": count_layers(state, "decoder_blocks"),
            "decoder_num_attention_heads": max(1, decoder_width // 32),
            "decoder_intermediate_size": state["decoder_blocks.0.mlp.fc1.weight"].shape[0],
        }
    return fields


def convert_original(state: State, config, teacher: State | None = None) -> State:
    """The release's weights under the names of `ViTMAEForPreTraining`, positions among them."""
    embeddings = "vit.embeddings"
    weights = {
        f"{embeddings}.cls_token": state["cls_token"],
        f"{embeddings}.position_embeddings": state["pos_embed"],
        **copy_affine(state, "patch_embed.proj", f"{embeddings}.patch_embeddings.projection"),
        **convert_layers(state, "blocks", "vit.layers"),
        **copy_affine(state, "norm", "vit.layernorm"),
    }
    if "decoder_embed.weight" not in state:
        logger.warning("The checkpoint has no decoder: the model has an untrained one. Its encoder is the release's.")
        return weights
    return weights | {
        "decoder.mask_token": state["mask_token"],
        "decoder.decoder_pos_embed": state["decoder_pos_embed"],
        **copy_affine(state, "decoder_embed", "decoder.decoder_embed"),
        **convert_layers(state, "decoder_blocks", "decoder.decoder_layers"),
        **copy_affine(state, "decoder_norm", "decoder.decoder_norm"),
        **copy_affine(state, "decoder_pred", "decoder.decoder_pred"),
    }
