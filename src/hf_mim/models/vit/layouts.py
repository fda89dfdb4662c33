"""Where each type of Vision Transformer keeps its parts, and what they are called here: one table for every reader."""

from collections.abc import Mapping
from typing import NamedTuple

from transformers import PreTrainedConfig


class Layout(NamedTuple):
    """
    Args:
        blocks (`str`): Where the blocks are.
        block_parts (`dict`): Names of a block's parts there and here; those `TAKEN_APART` are no modules here.
        parts (`dict`): The same of what is outside the blocks.
        interpolation (`str`): How it interpolates its positions to other grids.
        rotary (`bool`): Whether it has rotary positions in place of a table.
        frozen (`bool`): Whether a `FrozenViT` runs it as it is, and not as ours.
        any_grid (`bool`): Whether positions can be had for every grid, without leaving what it was made for.
        construction, block (`dict`): Arguments of the constructor, and of every block, for `FrozenViT`.
    """

    blocks: str
    block_parts: Mapping[str, str]
    parts: Mapping[str, str]
    interpolation: str = "bicubic"
    rotary: bool = False
    frozen: bool = False
    any_grid: bool = False
    construction: dict = {}  # noqa: RUF012
    block: dict = {}  # noqa: RUF012

    @property
    def has_cls(self) -> bool:
        """Whether there is a [CLS] token."""
        return "embeddings.cls_token" in self.parts.values()

    @property
    def norm(self) -> str:
        """A block's LayerNorm before attention."""
        return self._theirs("layernorm_before")

    @property
    def attention(self) -> str:
        """A block's attention."""
        return self._theirs("attention.q_proj").split(".")[0]

    def _theirs(self, ours: str) -> str:
        return next(name for name, here in self.block_parts.items() if here == ours)

    def ours(self, name: str) -> str | None:
        """What a weight of this name is called here; None if it has no place."""
        if name in self.parts:
            return self.parts[name]
        part, _, kind = name.rpartition(".")
        if not name.startswith(f"{self.blocks}."):
            return f"{self.parts[part]}.{kind}" if part in self.parts else None
        number, _, part = part.removeprefix(f"{self.blocks}.").partition(".")
        return f"layers.{number}.{self.block_parts[part]}.{kind}" if part in self.block_parts else None


# What is taken apart while it is read: the map of queries, keys and values in one; layer scale.
TAKEN_APART = ("attention.qkv", "attention.scale", "mlp.scale")

_ATTENTION = {f"attention.{name}_proj": f"attention.{name}_proj" for name in "qkvo"}
_PLAIN_MLP = {"mlp.fc1": "mlp.fc1", "mlp.fc2": "mlp.fc2"}
_NORMS = ("layernorm_before", "layernorm_after")
_VIT_BLOCK = {name: name for name in _NORMS} | _ATTENTION | _PLAIN_MLP
_DINO_BLOCK = {
    "norm1": "layernorm_before",
    "norm2": "layernorm_after",
    **_ATTENTION,
    **_PLAIN_MLP,
    "mlp.gate_proj": "mlp.gate",
    "mlp.up_proj": "mlp.fc1",
    "mlp.down_proj": "mlp.fc2",
    "layer_scale1": "attention.scale",
    "layer_scale2": "mlp.scale",
    # DINOv2 of transformers before 5.20.
    "attention.attention.query": "attention.q_proj",
    "attention.attention.key": "attention.k_proj",
    "attention.attention.value": "attention.v_proj",
    "attention.output.dense": "attention.o_proj",
    "mlp.weights_in": "mlp.fc1",
    "mlp.weights_out": "mlp.fc2",
}
_CLIP_BLOCK = {
    "layer_norm1": "layernorm_before",
    "layer_norm2": "layernorm_after",
    "self_attn.q_proj": "attention.q_proj",
    "self_attn.k_proj": "attention.k_proj",
    "self_attn.v_proj": "attention.v_proj",
    "self_attn.out_proj": "attention.o_proj",
    **_PLAIN_MLP,
}
TIMM_BLOCK = {
    "norm1": "layernorm_before",
    "norm2": "layernorm_after",
    "attn.qkv": "attention.qkv",
    "attn.proj": "attention.o_proj",
    **_PLAIN_MLP,
    "ls1": "attention.scale",
    "ls2": "mlp.scale",
}

_VIT_PARTS = {
    name: name
    for name in (
        "embeddings.cls_token",
        "embeddings.register_tokens",
        "embeddings.position_embeddings",
        "embeddings.patch_embeddings.projection",
        "layernorm",
    )
}
_DINOV3_PARTS = {
    "embeddings.cls_token": "embeddings.cls_token",
    "embeddings.register_tokens": "embeddings.register_tokens",
    "embeddings.patch_embeddings": "embeddings.patch_embeddings.projection",
    "norm": "layernorm",
}
_SIGLIP_PARTS = {
    "embeddings.position_embedding.weight": "embeddings.position_embeddings",
    "embeddings.patch_embedding": "embeddings.patch_embeddings.projection",
    "post_layernorm": "layernorm",
}
_CLIP_PARTS = _SIGLIP_PARTS | {
    "embeddings.class_embedding": "embeddings.cls_token",
    # Spelt so there.
    "pre_layrnorm": "embeddings.layernorm",
}
_TIMM_PARTS = {
    "cls_token": "embeddings.cls_token",
    "reg_token": "embeddings.register_tokens",
    "pos_embed": "embeddings.position_embeddings",
    "patch_embed.proj": "embeddings.patch_embeddings.projection",
    "norm_pre": "embeddings.layernorm",
    "norm": "layernorm",
}

OURS = Layout("layers", _VIT_BLOCK, _VIT_PARTS)
LAYOUTS = {
    "vit": OURS._replace(frozen=True, construction={"add_pooling_layer": False}),
    "vit_mae": OURS._replace(frozen=True),
    # The token of distillation is a register that a second head reads.
    "deit": OURS._replace(parts=_VIT_PARTS | {"embeddings.distillation_token": "embeddings.register_tokens"}),
    "ijepa": OURS._replace(parts={name: name for name in _VIT_PARTS if name != "embeddings.cls_token"}),
    "dinov2": Layout("encoder.layer", _DINO_BLOCK, _VIT_PARTS, frozen=True, any_grid=True),
    "dinov2_with_registers": Layout(
        "encoder.layer", _DINO_BLOCK, _VIT_PARTS, interpolation="bicubic_antialias", frozen=True, any_grid=True
    ),
    "dinov3_vit": Layout("model.layer", _DINO_BLOCK, _DINOV3_PARTS, rotary=True, frozen=True, any_grid=True),
    "clip_vision_model": Layout(
        "encoder.layers", _CLIP_BLOCK, _CLIP_PARTS, frozen=True, block={"attention_mask": None}
    ),
    "siglip_vision_model": Layout("encoder.layers", _CLIP_BLOCK, _SIGLIP_PARTS),
    "siglip2_vision_model": Layout("encoder.layers", _CLIP_BLOCK, _SIGLIP_PARTS, interpolation="bilinear_antialias"),
}
# Not among those that are read: its last blocks see queries too.
EOMT = Layout(
    "layers",
    _DINO_BLOCK | {"attention.out_proj": "attention.o_proj"},
    {name: name for name in _VIT_PARTS if name != "embeddings.position_embeddings"}
    | {"embeddings.position_embeddings.weight": "embeddings.position_embeddings"},
)
TIMM = Layout("blocks", TIMM_BLOCK, _TIMM_PARTS, interpolation="bicubic_antialias")

_HIERARCHICAL = "is hierarchical: its last blocks see a coarser grid than the patches of a plain ViT"
_CONVOLUTIONAL = "is convolutional: it has no patch tokens and no attention to learn from"
_UNFIT = {
    name: reason
    for reason, names in {
        _HIERARCHICAL: "swin swinv2 swin2sr maskformer-swin donut-swin hiera pvt pvt_v2 segformer focalnet levit "
        "swiftformer mobilevit mobilevitv2 mvit sam2_hiera_det_model",
        _CONVOLUTIONAL: "resnet convnext convnextv2 dinov3_convnext regnet efficientnet mobilenet_v1 mobilenet_v2 "
        "hgnet_v2 poolformer textnet bit",
    }.items()
    for name in names.split()
}


def read_layout(config: PreTrainedConfig) -> Layout:
    """
    The layout of a network of transformers.

    Raises:
        ValueError: If it is no plain ViT, with the reason.
    """
    kind = config.model_type
    if kind in LAYOUTS:
        return LAYOUTS[kind]
    reason = _UNFIT.get(kind, "is not known: where its blocks and positions are cannot be told")
    raise ValueError(
        f"A network of type {kind!r} {reason}. Choose hf_mim's own models, or one of {', '.join(LAYOUTS)}."
    )
