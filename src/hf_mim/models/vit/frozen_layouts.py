"""Which networks can be frozen to learn from, and where each keeps its parts."""

from collections.abc import Mapping
from typing import NamedTuple

from transformers import AutoConfig, PreTrainedConfig

from .configuration_vit import MaskedViTConfig


class Layout(NamedTuple):
    """Where a type of network keeps its parts."""

    blocks: str
    norm: str
    attention: str
    # Positions can be had for every grid, without leaving what the network was made for.
    any_grid: bool = False
    # Arguments of the constructor, and of every block.
    construction: dict = {}  # noqa: RUF012
    block: dict = {}  # noqa: RUF012


_OURS = Layout("layers", "layernorm_before", "attention")
_LAYOUTS = {
    "vit": Layout("layers", "layernorm_before", "attention", construction={"add_pooling_layer": False}),
    "vit_mae": Layout("layers", "layernorm_before", "attention"),
    "dinov2": Layout("encoder.layer", "norm1", "attention", any_grid=True),
    "dinov2_with_registers": Layout("encoder.layer", "norm1", "attention", any_grid=True),
    "dinov3_vit": Layout("model.layer", "norm1", "attention", any_grid=True),
    "clip_vision_model": Layout("encoder.layers", "layer_norm1", "self_attn", block={"attention_mask": None}),
}

_NO_CLS = "has no [CLS] token, whose attention chooses patches and whose feature is a target"
_HIERARCHICAL = "is hierarchical: its last blocks see a coarser grid than the patches of a plain ViT"
_CONVOLUTIONAL = "is convolutional: it has no patch tokens and no attention to learn from"
_UNFIT = {
    name: reason
    for reason, names in {
        _NO_CLS: "siglip siglip_vision_model siglip2 siglip2_vision_model ijepa vjepa2 vitdet sam_vision_model",
        _HIERARCHICAL: "swin swinv2 swin2sr maskformer-swin donut-swin hiera pvt pvt_v2 segformer focalnet levit "
        "swiftformer mobilevit mobilevitv2 mvit sam2_hiera_det_model",
        _CONVOLUTIONAL: "resnet convnext convnextv2 dinov3_convnext regnet efficientnet mobilenet_v1 mobilenet_v2 "
        "hgnet_v2 poolformer textnet bit",
    }.items()
    for name in names.split()
}


def frozen_config(described, student: MaskedViTConfig) -> PreTrainedConfig:
    """
    The config of a frozen network from what a method's config says of it.

    Args:
        described (`PreTrainedConfig`, `dict` or None): Of any supported type. A dict without `model_type` describes
            our plain masked ViT, by default with fixed positions; `image_size`, `patch_size` and `num_channels` that
            it lacks are the student's. None: the student's own sizes.
        student: The config of the model that learns from it.

    Raises:
        ValueError: If the type cannot be a frozen network, with the reason.
    """
    if described is None:
        described = {
            name: getattr(student, name)
            for name in (
                "hidden_size",
                "num_hidden_layers",
                "num_attention_heads",
                "intermediate_size",
                "hidden_act",
                "layer_norm_eps",
                "qkv_bias",
                "key_bias",
                "use_gated_mlp",
                "embedding_layernorm",
                "num_register_tokens",
                "position_embedding",
                "rope_theta",
                "position_interpolation",
            )
        }
    if isinstance(described, Mapping):
        fields = dict(described)
        model_type = fields.pop("model_type", "")
        if model_type:
            config = AutoConfig.for_model(model_type, **fields)
        else:
            sizes = {name: getattr(student, name) for name in ("image_size", "patch_size", "num_channels")}
            config = MaskedViTConfig(**(sizes | fields))
    else:
        config = described
    config = getattr(config, "vision_config", config)
    layout_of(config)
    return config


# Of no use to a frozen encoder, or about the run that made it.
_NOT_DESCRIBED = {
    "_name_or_path",
    "architectures",
    "base_config",
    "dtype",
    "id2label",
    "label2id",
    "teacher_config",
    "transformers_version",
}


def describe_config(config: PreTrainedConfig | Mapping | None) -> dict | None:
    """A config as the dict that a method's config keeps and saves; [`frozen_config`] turns it back."""
    if config is None:
        return None
    if isinstance(config, PreTrainedConfig):
        config = getattr(config, "vision_config", config).to_diff_dict()
    fields = {name: value for name, value in config.items() if name not in _NOT_DESCRIBED}
    if not fields.get("model_type"):
        fields.pop("model_type", None)
    return fields


def layout_of(config: PreTrainedConfig) -> Layout:
    if isinstance(config, MaskedViTConfig):
        if not config.use_cls_token:
            raise ValueError(f"A network with use_cls_token=False cannot give targets: it {_NO_CLS}.")
        return _OURS
    if config.model_type not in _LAYOUTS:
        supported = f"Choose hf_mim's own models, or one of {', '.join(_LAYOUTS)}."
        reason = _UNFIT.get(config.model_type)
        if reason is None:
            raise ValueError(
                f"A network of type {config.model_type!r} cannot be read as a frozen ViT: where its blocks and "
                f"positions are is not known. {supported}"
            )
        raise ValueError(f"A network of type {config.model_type!r} cannot give targets: it {reason}. {supported}")
    return _LAYOUTS[config.model_type]
