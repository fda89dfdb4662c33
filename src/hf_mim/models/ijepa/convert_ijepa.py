"""The I-JEPA release's weights as ours."""

from ..vit.convert_vit import State, convert_layers, copy_affine, count_layers


def original_config(state: State, teacher: State | None = None) -> dict:
    """
    The fields of `IJepaConfig` that the release's weights tell.

    Head counts cannot be read off weights: 16 in the widths of ViT-L and more, else 64 channels a head. Square
    pictures are assumed. Give `config` to `from_original` where that is wrong.
    """
    width, channels, *patch_size = state["encoder.patch_embed.proj.weight"].shape
    side = round(state["encoder.pos_embed"].shape[1] ** 0.5)
    return {
        "hidden_size": width,
        "num_hidden_layers": count_layers(state, "encoder.blocks"),
        "num_attention_heads": 16 if width >= 1024 else max(1, width // 64),
        "intermediate_size": state["encoder.blocks.0.mlp.fc1.weight"].shape[0],
        "image_size": [side * patch for patch in patch_size],
        "patch_size": list(patch_size),
        "num_channels": channels,
        "qkv_bias": "encoder.blocks.0.attn.qkv.bias" in state,
        "predictor_hidden_size": state["predictor.mask_token"].shape[-1],
        "predictor_num_hidden_layers": count_layers(state, "predictor.predictor_blocks"),
        "predictor_intermediate_size": state["predictor.predictor_blocks.0.mlp.fc1.weight"].shape[0],
    }


def convert_original(state: State, config, teacher: State | None = None) -> State:
    """The release's weights under the names of `IJepaForPreTraining`; they include the target encoder."""
    return (
        _encoder(state, "encoder", "ijepa") | _encoder(state, "target_encoder", "target_encoder") | _predictor(state)
    )


def _encoder(state: State, source: str, target: str) -> State:
    return {
        f"{target}.embeddings.position_embeddings": state[f"{source}.pos_embed"],
        **copy_affine(state, f"{source}.patch_embed.proj", f"{target}.embeddings.patch_embeddings.projection"),
        **convert_layers(state, f"{source}.blocks", f"{target}.layers"),
        **copy_affine(state, f"{source}.norm", f"{target}.layernorm"),
    }


def _predictor(state: State) -> State:
    # Its fixed positions follow from the config.
    state.get("predictor.predictor_pos_embed")
    weights = convert_layers(state, "predictor.predictor_blocks", "predictor.layers")
    for theirs, ours in {"embed": "embed", "norm": "layernorm", "proj": "head"}.items():
        weights |= copy_affine(state, f"predictor.predictor_{theirs}", f"predictor.{ours}")
    return weights | {"predictor.mask_token": state["predictor.mask_token"]}
