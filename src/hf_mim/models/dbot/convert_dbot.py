"""The dBOT release's weights as ours."""

from transformers.utils import logging

from ..vit.convert_vit import State, check_fixed_positions, convert_layers, copy_affine, count_layers
from ..vit.frozen import FrozenViT
from ..vit.frozen_layouts import frozen_config

logger = logging.get_logger(__name__)


def original_config(state: State, teacher: State | None = None) -> dict:
    """
    The fields of `DBOTConfig` that the release's weights tell, those of the teacher among them.

    Head counts cannot be read off weights: 64 channels a head in the encoders (80 in ViT-H), 32 in the decoder, as in
    the release. Square pictures are assumed. Give `config` to `from_original` where that is wrong.
    """
    decoder_width = state["mask_token"].shape[-1]
    return _sizes(state) | {
        "num_channels": state["patch_embed.proj.weight"].shape[1],
        "decoder_hidden_size": decoder_width,
        "decoder_num_hidden_layers": count_layers(state, "decoder_blocks"),
        "decoder_num_attention_heads": max(1, decoder_width // 32),
        "decoder_intermediate_size": state["decoder_blocks.0.mlp.fc1.weight"].shape[0],
        "teacher_config": None if teacher is None else _sizes(teacher),
    }


def _sizes(state: State) -> dict:
    width, _, *patch_size = state["patch_embed.proj.weight"].shape
    side = round((state["pos_embed"].shape[1] - 1) ** 0.5)
    return {
        "hidden_size": width,
        "num_hidden_layers": count_layers(state, "blocks"),
        "num_attention_heads": max(1, width // (80 if width == 1280 else 64)),
        "intermediate_size": state["blocks.0.mlp.fc1.weight"].shape[0],
        "image_size": [side * patch for patch in patch_size],
        "patch_size": list(patch_size),
    }


def convert_original(state: State, config, teacher: State | None = None) -> State:
    """The release's weights under the names of `DBOTForPreTraining`. Positions are the fixed table's."""
    if teacher is None:
        logger.warning("No teacher is given: the model has an untrained one. Its student is the release's.")
        frozen = FrozenViT(frozen_config(config.teacher_config, config), grid=config.grid_size)
        teacher_weights = {f"teacher.{name}": value for name, value in frozen.state_dict().items()}
    else:
        teacher_config = frozen_config(config.teacher_config, config)
        check_fixed_positions(teacher, "pos_embed", teacher_config.grid_size, teacher_config.hidden_size)
        teacher_weights = _encoder(teacher, "teacher.network")
    check_fixed_positions(state, "pos_embed", config.grid_size, config.hidden_size)
    check_fixed_positions(state, "decoder_pos_embed", config.grid_size, config.decoder_hidden_size)
    return (
        _encoder(state, "encoder")
        | {"decoder.mask_token": state["mask_token"]}
        | copy_affine(state, "decoder_embed", "decoder.embed")
        | convert_layers(state, "decoder_blocks", "decoder.layers")
        | copy_affine(state, "decoder_norm", "decoder.layernorm")
        | copy_affine(state, "decoder_predp", "decoder.head")
        | teacher_weights
    )


def _encoder(state: State, target: str) -> State:
    return {
        f"{target}.embeddings.cls_token": state["cls_token"],
        **copy_affine(state, "patch_embed.proj", f"{target}.embeddings.patch_embeddings.projection"),
        **convert_layers(state, "blocks", f"{target}.layers"),
        **copy_affine(state, "norm", f"{target}.layernorm"),
    }
