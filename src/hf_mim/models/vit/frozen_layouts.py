"""Which networks can be frozen to learn from, and how a method's config describes them."""

from collections.abc import Mapping

from transformers import AutoConfig, PreTrainedConfig

from .configuration_vit import MaskedViTConfig
from .layouts import LAYOUTS, OURS, Layout, read_layout

_NO_CLS = "has no [CLS] token, whose attention chooses patches and whose feature is a target"
_WITHOUT_CLS = {"vjepa2", "vitdet", "sam_vision_model", *(name for name in LAYOUTS if not LAYOUTS[name].has_cls)}


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
    "base_channels",
    "base_config",
    "dtype",
    "id2label",
    "label2id",
    "teacher_channels",
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
    """
    Where a frozen network of this config keeps its parts.

    Raises:
        ValueError: If the type cannot be a frozen network, with the reason.
    """
    if isinstance(config, MaskedViTConfig):
        if not config.use_cls_token:
            raise ValueError(f"A network with use_cls_token=False cannot give targets: it {_NO_CLS}.")
        return OURS
    supported = [name for name, layout in LAYOUTS.items() if layout.frozen]
    if config.model_type in _WITHOUT_CLS:
        raise ValueError(
            f"A network of type {config.model_type!r} cannot give targets: it {_NO_CLS}. Choose hf_mim's own models, "
            f"or one of {', '.join(supported)}."
        )
    layout = read_layout(config)
    if not layout.frozen:
        raise ValueError(
            f"A network of type {config.model_type!r} is not run as it is: freeze hf_mim.encoder_from(model)."
        )
    return layout
