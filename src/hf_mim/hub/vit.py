"""Export to, and import from, transformers' own Vision Transformers."""

import torch
from transformers import PreTrainedModel, ViTConfig, ViTForImageClassification, ViTModel

from ..models.vit.configuration_vit import MaskedViTConfig
from ..models.vit.modeling_vit import (
    MaskedViTForImageClassification,
    MaskedViTModel,
    MaskedViTPreTrainedModel,
)
from ..models.vit.position import sincos_position_table
from ..models.vit.pretraining import MaskedViTForPreTraining
from ..models.vit.sizes import as_pair
from ..registry import BASELINES, METHODS, MODEL_TYPES

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
        ValueError: If the model has no [CLS], a classifier pools by the mean or reads TEC's encoder adapters, which
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
    encoder = model.base_model
    fields = {name: getattr(config, name) for name in _SHARED_FIELDS}
    for name in ("image_size", "patch_size"):
        height, width = as_pair(fields[name])
        # The stock ViT divides by the patch size as a number when positions are interpolated.
        fields[name] = height if height == width else [height, width]
    vit_config = ViTConfig(**fields, pooler_act="linear")
    weights = encoder.vit_state_dict() if isinstance(encoder, MaskedViTModel) else dict(encoder.state_dict())
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


@torch.no_grad()
def encoder_from_vit(model: PreTrainedModel) -> MaskedViTModel:
    """
    The encoder of a stock `ViTModel` or `ViTMAEModel` as ours; its positions stay fixed if they are MAE's table.

    Args:
        model: What `AutoModel.from_pretrained` gives for a ViT or ViTMAE checkpoint, or a model with a head on that.

    Returns:
        `MaskedViTModel` with the same outputs for the whole image, in eval mode.

    Raises:
        ValueError: If the model is of another kind.
    """
    if model.config.model_type not in ("vit", "vit_mae"):
        raise ValueError(
            f"Pretraining continues from checkpoints of {', '.join(METHODS)}, vit and vit_mae; this one is "
            f"{model.config.model_type}."
        )
    left_out = ("pooler.", "embeddings.mask_token")
    weights = {name: value for name, value in model.base_model.state_dict().items() if not name.startswith(left_out)}
    fields = {name: getattr(model.config, name) for name in _SHARED_FIELDS}
    config = MaskedViTConfig(**fields)
    positions = weights["embeddings.position_embeddings"]
    table = sincos_position_table(*config.grid_size, config.hidden_size)
    if torch.allclose(positions.float().cpu(), table, atol=1e-5):
        del weights["embeddings.position_embeddings"]
    else:
        config.position_embedding = "learned"
    encoder = MaskedViTModel(config)
    encoder.load_state_dict(weights)
    return encoder.eval()
