"""Export to transformers' own Vision Transformers: ViT, DINOv2, DINOv3 and EoMT."""

import torch
from transformers import (
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    DINOv3ViTConfig,
    DINOv3ViTModel,
    EomtConfig,
    EomtForUniversalSegmentation,
    PreTrainedModel,
    ViTConfig,
    ViTForImageClassification,
    ViTModel,
)

from ..models.vit.encoders import encoder_from
from ..models.vit.layouts import EOMT, Layout, read_layout
from ..models.vit.modeling_vit import (
    MaskedViTForImageClassification,
    MaskedViTModel,
    MaskedViTPreTrainedModel,
)
from ..models.vit.pretraining import MaskedViTForPreTraining
from ..models.vit.sizes import as_pair
from ..models.vit.transfer import at_image_size, load_at_another_size
from ..registry import BASELINES, MODEL_TYPES

_SHARED_FIELDS = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "hidden_act",
    "attention_probs_dropout_prob",
    "initializer_range",
    "layer_norm_eps",
    "image_size",
    "patch_size",
    "num_channels",
    "qkv_bias",
)


@torch.no_grad()
def to_vit(model: MaskedViTModel | MaskedViTForPreTraining | MaskedViTForImageClassification):
    """
    The same encoder as transformers' own `ViTModel`, or classifier as `ViTForImageClassification`.

    What it saves loads with plain `AutoModel.from_pretrained(directory)`, without hf_mim.

    Args:
        model: One of hf_mim's models, or transformers' ViTMAE: encoder, pretraining model (its encoder is taken) or
            classifier.

    Returns:
        `ViTModel`, in eval mode, whose outputs equal the encoder's. With [CLS] pooling its `pooler_output` equals too,
        by a pooler that is the identity; with mean pooling it has no pooler (load it with `add_pooling_layer=False`).

    Raises:
        ValueError: If the model has no [CLS], or registers, rotary positions, gated MLPs or a first LayerNorm, which
            ViT has not; if a classifier pools by the mean or reads TEC's encoder adapters, which
            `ViTForImageClassification` cannot, or the model is not one of hf_mim's.
    """
    if model.config.model_type not in BASELINES and not isinstance(model, MaskedViTPreTrainedModel):
        raise ValueError(f"to_vit exports models of {', '.join(MODEL_TYPES)}; this one is {type(model).__name__}.")
    config = model.config
    if not getattr(config, "use_cls_token", True):
        raise ValueError("The model has no [CLS] token (use_cls_token=False), which transformers' ViT always has.")
    classifier = isinstance(model, MaskedViTForImageClassification)
    if classifier and config.pooling != "cls":
        raise ValueError(
            f"The classifier pools by the {config.pooling} of the patch tokens; ViTForImageClassification reads [CLS] "
            "only, so the export would give other logits. Export its encoder, to_vit(model.encoder), or fine-tune "
            'with pooling="cls".'
        )
    if classifier and getattr(model, "encoder_adapter", None) is not None:
        raise ValueError(
            "The classifier reads TEC's encoder adapters, which ViTForImageClassification has not. Export its "
            "encoder, to_vit(model.encoder), or tune in another tuning_mode."
        )
    _refuse(config, "ViT", "to_dinov2 or to_dinov3", "registers", "rotary", "gated", "layernorm")
    encoder = model.base_model
    fields = {name: getattr(config, name) for name in _SHARED_FIELDS}
    for name in ("image_size", "patch_size"):
        height, width = as_pair(fields[name])
        # The stock ViT divides by the patch size as a number when positions are interpolated.
        fields[name] = height if height == width else [height, width]
    vit_config = ViTConfig(**fields, pooler_act="linear")
    weights = encoder.vit_state_dict() if isinstance(encoder, MaskedViTModel) else dict(encoder.state_dict())
    weights |= missing_key_biases(weights, config)
    if classifier:
        vit_config.update({name: getattr(config, name) for name in ("id2label", "label2id", "problem_type")})
        exported = ViTForImageClassification(vit_config)
        exported.vit.load_state_dict(weights)
        exported.classifier.load_state_dict(model.classifier.state_dict())
    else:
        exported = ViTModel(vit_config, add_pooling_layer=getattr(config, "pooling", "cls") == "cls")
        if exported.pooler is not None:
            weights["pooler.dense.weight"] = torch.eye(config.hidden_size)
            weights["pooler.dense.bias"] = torch.zeros(config.hidden_size)
        exported.load_state_dict(weights)
    return exported.to(device=encoder.device, dtype=encoder.dtype).eval()


def _refuse(config, kind: str, other: str, *parts: str) -> None:
    """Raises ValueError if an encoder has a part that networks of a kind have not; `other` names what to do."""
    has = {
        "registers": getattr(config, "num_register_tokens", 0) > 0,
        "rotary": getattr(config, "position_embedding", "learned") == "rotary",
        "gated": getattr(config, "use_gated_mlp", False),
        "layernorm": getattr(config, "embedding_layernorm", False),
    }
    names = {
        "registers": "register tokens (num_register_tokens)",
        "rotary": 'rotary positions (position_embedding="rotary")',
        "gated": "gated MLPs (use_gated_mlp)",
        "layernorm": "a LayerNorm before its first block (embedding_layernorm)",
    }
    found = [names[part] for part in parts if has[part]]
    if found:
        raise ValueError(f"The model has {' and '.join(found)}, which {kind} of transformers has not: use {other}.")


def missing_key_biases(weights: dict[str, torch.Tensor], config) -> dict[str, torch.Tensor]:
    """Zeros, where queries have a bias and keys none."""
    if getattr(config, "key_bias", True) or not config.qkv_bias:
        return {}
    names = [name for name in weights if name.endswith("q_proj.bias")]
    return {name.replace("q_proj", "k_proj"): torch.zeros_like(weights[name]) for name in names}


@torch.no_grad()
def to_dinov2(model: PreTrainedModel) -> Dinov2Model | Dinov2WithRegistersModel:
    """
    The same encoder as transformers' own `Dinov2Model`, or `Dinov2WithRegistersModel` where it has registers.

    What it saves loads with plain `AutoModel.from_pretrained(directory)` and as `Dinov2Backbone`, without hf_mim, and
    wherever a DINOv2 did. Layer scale, which ours has in its maps, is 1. At other image sizes DINOv2 with registers
    interpolates positions by "bicubic_antialias" and DINOv2 by "bicubic", whatever `position_interpolation` is.

    Args:
        model: One of hf_mim's models, whose encoder is taken, or anything that [`encoder_from`] takes.

    Returns:
        The network in eval mode, with the encoder's `last_hidden_state`.

    Raises:
        ValueError: If the encoder has no [CLS], another grid than a square, rotary positions, a LayerNorm before its
            first block, or MLPs of a width that DINOv2's config cannot tell.
    """
    encoder = encoder_from(model)
    config = encoder.config
    _check_for_dino(config, "DINOv2")
    _refuse(config, "DINOv2", "to_dinov3, or the model as one of hf_mim", "rotary", "layernorm")
    if config.grid_size[0] != config.grid_size[1]:
        raise ValueError(
            f"The patch grid is {config.grid_size[0]} x {config.grid_size[1]} (rows x columns); transformers' DINOv2 "
            "interpolates positions of squares only. Export by to_vit, or load the model at a square image_size."
        )
    registers = {"num_register_tokens": config.num_register_tokens} if config.num_register_tokens else {}
    config_class = Dinov2WithRegistersConfig if registers else Dinov2Config
    exported = (Dinov2WithRegistersModel if registers else Dinov2Model)(
        config_class(
            **_dino_fields(config),
            **registers,
            qkv_bias=config.qkv_bias,
            attention_probs_dropout_prob=config.attention_probs_dropout_prob,
            mlp_ratio=_mlp_ratio(config),
            use_swiglu_ffn=config.use_gated_mlp,
        )
    )
    return _filled(exported, encoder, read_layout(exported.config), encoder.vit_state_dict())


@torch.no_grad()
def to_dinov3(model: PreTrainedModel) -> DINOv3ViTModel:
    """
    The same encoder as transformers' own `DINOv3ViTModel`. As [`to_dinov2`], for encoders with rotary positions.

    The places of patches are not rescaled in training (`pos_embed_rescale` is None), as here.

    Raises:
        ValueError: If the encoder has no [CLS], a table of positions, or a LayerNorm before its first block.
    """
    encoder = encoder_from(model)
    config = encoder.config
    _check_for_dino(config, "DINOv3")
    if config.position_embedding != "rotary":
        raise ValueError(
            f'The encoder has a table of positions (position_embedding="{config.position_embedding}"), and DINOv3 '
            "rotary positions. Export by to_dinov2 or to_vit."
        )
    _refuse(config, "DINOv3", "it as a model of hf_mim", "layernorm")
    exported = DINOv3ViTModel(
        DINOv3ViTConfig(
            **_dino_fields(config),
            intermediate_size=config.intermediate_size,
            num_register_tokens=config.num_register_tokens,
            query_bias=config.qkv_bias,
            key_bias=config.qkv_bias and config.key_bias,
            value_bias=config.qkv_bias,
            attention_dropout=config.attention_probs_dropout_prob,
            use_gated_mlp=config.use_gated_mlp,
            rope_theta=float(config.rope_theta),
            pos_embed_rescale=None,
        )
    )
    return _filled(exported, encoder, read_layout(exported.config), encoder.vit_state_dict())


@torch.no_grad()
def to_eomt(
    model: PreTrainedModel, *, num_labels: int, image_size: int | None = None, num_blocks: int | None = None, **fields
) -> EomtForUniversalSegmentation:
    """
    The same encoder in transformers' own `EomtForUniversalSegmentation` (Kerssies et al., *Your ViT is Secretly an
    Image Segmentation Model*, CVPR 2025), which segments by queries that join the patches in its last blocks. What is
    not the encoder's (queries, mask head, classes) is new, and wants training.

    Before the queries join, and in all blocks without them, its tokens are the encoder's: [CLS], registers, patches.

    Args:
        model: One of hf_mim's models, whose encoder is taken, or anything that [`encoder_from`] takes.
        num_labels (`int`): Classes.
        image_size (`int`, *optional*): Side of the square pictures that it is to take, to which positions are
            interpolated; the model's own if None.
        num_blocks (`int`, *optional*): How many of the last blocks see the queries; 4, or all where there are fewer.
        fields: Further fields of `EomtConfig`, as `num_queries` or `id2label`.

    Raises:
        ValueError: If the encoder has no [CLS], pictures or patches that are no squares, rotary positions, a LayerNorm
            before its first block, or MLPs of a width that the config cannot tell.
    """
    encoder = encoder_from(model)
    if image_size is not None and as_pair(image_size) != as_pair(encoder.config.image_size):
        resized = type(encoder)(at_image_size(encoder.config, as_pair(image_size)))
        load_at_another_size(resized, encoder)
        encoder = resized.to(device=encoder.device, dtype=encoder.dtype)
    config = encoder.config
    _check_for_dino(config, "EoMT")
    _refuse(config, "EoMT", "the method's own ForSemanticSegmentation", "rotary", "layernorm")
    for name in ("image_size", "patch_size"):
        height, width = as_pair(getattr(config, name))
        if height != width:
            raise ValueError(f"{name} is {height} x {width} (height x width); transformers' EoMT takes squares only.")
    exported = EomtForUniversalSegmentation(
        EomtConfig(
            **_dino_fields(config),
            num_register_tokens=config.num_register_tokens,
            attention_dropout=config.attention_probs_dropout_prob,
            mlp_ratio=_mlp_ratio(config),
            use_swiglu_ffn=config.use_gated_mlp,
            num_labels=num_labels,
            num_blocks=min(4, config.num_hidden_layers) if num_blocks is None else num_blocks,
            **fields,
        )
    )
    weights = encoder.vit_state_dict()
    table = weights["embeddings.position_embeddings"]
    # Positions are of the patches alone there.
    weights["embeddings.cls_token"] = weights["embeddings.cls_token"] + table[:, :1]
    weights["embeddings.position_embeddings"] = table[:, 1:]
    return _filled(exported, encoder, EOMT, weights)


def _check_for_dino(config, kind: str) -> None:
    if not config.use_cls_token:
        raise ValueError(f"The model has no [CLS] token (use_cls_token=False), which {kind} always has.")


def _dino_fields(config) -> dict:
    fields = {
        name: getattr(config, name)
        for name in (
            "hidden_size",
            "num_hidden_layers",
            "num_attention_heads",
            "hidden_act",
            "initializer_range",
            "layer_norm_eps",
            "num_channels",
        )
    }
    for name in ("image_size", "patch_size"):
        height, width = as_pair(getattr(config, name))
        fields[name] = height if height == width else [height, width]
    return fields | {"layerscale_value": 1.0}


def _mlp_ratio(config) -> int:
    """The `mlp_ratio` from which DINOv2 makes MLPs of this width."""
    width, wanted = config.hidden_size, config.intermediate_size
    for ratio in range(1, 33):
        # Of a gated one two thirds, rounded up to a multiple of 8.
        hidden = (int(width * ratio * 2 / 3) + 7) // 8 * 8 if config.use_gated_mlp else width * ratio
        if hidden == wanted and (not config.use_gated_mlp or config.hidden_act == "silu"):
            return ratio
    raise ValueError(
        f"intermediate_size is {wanted}, hidden_size {width}, use_gated_mlp {config.use_gated_mlp}, hidden_act "
        f"{config.hidden_act!r}: DINOv2 has MLPs of a whole multiple of the width, of which gated ones, with silu, "
        "have two thirds. Export by to_vit, or keep the model as one of hf_mim."
    )


def _filled(
    exported: PreTrainedModel, encoder: MaskedViTModel, layout: Layout, weights: dict[str, torch.Tensor]
) -> PreTrainedModel:
    """`exported` with the encoder's weights under its own names; what it has besides is as it starts: scales of 1."""
    state = exported.state_dict()
    for name in state:
        ours = layout.ours(name)
        if ours in weights:
            weight = weights.pop(ours)
            if len(state[name]) == 2 * len(weight):
                # Older DINOv2s of transformers have the gate and what it gates as one map.
                weight = torch.cat((weights.pop(ours.replace("mlp.fc1", "mlp.gate")), weight))
            state[name] = weight.reshape(state[name].shape)
        elif ours is not None and name.endswith(".bias"):
            # A map without a bias is one with zeros.
            state[name] = torch.zeros_like(state[name])
    if weights:
        raise ValueError(f"{type(exported).__name__} has no place for {', '.join(sorted(weights)[:3])}.")
    exported.load_state_dict(state)
    return exported.to(device=encoder.device, dtype=encoder.dtype).eval()
