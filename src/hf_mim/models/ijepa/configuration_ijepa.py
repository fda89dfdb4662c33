"""Configuration of I-JEPA: transformers' fields, and those of pretraining."""

from huggingface_hub.dataclasses import strict

from ..vit.configuration_vit import MaskedViTConfig, check_heads, check_mask_ratio
from .blocks import DRAWS_PER_BLOCK, Blocks

# What transformers' network of this model_type is.
_AS_STOCK = {
    "use_cls_token": False,
    "pooling": "mean",
    "position_embedding": "sincos",
    "key_bias": True,
    "use_gated_mlp": False,
    "embedding_layernorm": False,
    "num_register_tokens": 0,
}
# The largest number of each.
_RANGES = {"context_scale": 1.0, "target_scale": 1.0, "target_aspect_ratio": float("inf")}


@strict
class IJepaConfig(MaskedViTConfig):
    r"""
    I-JEPA ("Self-Supervised Learning from Images with a Joint-Embedding Predictive Architecture", Assran et al.,
    2023): what it saves is read as transformers' config of the same name and `model_type`. Sizes by default those of
    its ViT-B/16. See `MaskedViTConfig` for the fields that are not here.

    Args:
        use_cls_token (`bool`, defaults to False): Always False: transformers' `IJepaModel` has no [CLS].
        pooling (`str`, defaults to `"mean"`): Always `"mean"`.
        mask_ratio (`float`, defaults to 0.75): Share of the patches hidden from the encoder, in (0, 1): of the patches
            of a context block that are in no target, it sees `int(num_patches * (1 - mask_ratio))`.
        predictor_hidden_size (`int`, defaults to 384): Width of the predictor.
        predictor_num_hidden_layers (`int`, defaults to 6): Its blocks.
        predictor_num_attention_heads (`int`, *optional*): Its heads; the encoder's number if None.
        predictor_intermediate_size (`int`, *optional*): Hidden width of its MLPs; `4 * predictor_hidden_size` if None.
        num_context_blocks (`int`, defaults to 1): Blocks of a picture that the encoder sees, one at a time.
        num_target_blocks (`int`, defaults to 4): Blocks of a picture that are predicted from each of them.
        context_scale (pair, defaults to (0.85, 1.0)): Area of a context block, as a share of the patches.
        target_scale (pair, defaults to (0.15, 0.2)): Area of a target block.
        target_aspect_ratio (pair, defaults to (0.75, 1.5)): Rows of a target block over its columns. A context block
            is square.
        allow_overlap (`bool`, defaults to False): Whether the encoder may see patches of the targets.
        ema_momentum (`float`, defaults to 0.996): The target encoder's momentum at the first step.
        ema_momentum_end (`float`, defaults to 1.0): Its momentum at the end; linear in between.

    Raises:
        ValueError: If sizes, ranges or momenta do not fit.

    Example:

    ```python
    >>> from hf_mim import IJepaConfig, IJepaForPreTraining

    >>> config = IJepaConfig(image_size=32, patch_size=4, hidden_size=192, num_attention_heads=3)
    >>> model = IJepaForPreTraining(config)
    ```"""

    model_type = "ijepa"
    # The predictor is a decoder of the methods', whose LayerNorm it has.
    attribute_map = {
        "decoder_hidden_size": "predictor_hidden_size",
        "decoder_num_hidden_layers": "predictor_num_hidden_layers",
        "decoder_num_attention_heads": "predictor_num_attention_heads",
        "decoder_intermediate_size": "predictor_intermediate_size",
    }
    decoder_final_norm = True

    use_cls_token: bool = False
    pooling: str = "mean"
    mask_ratio: float | int = 0.75
    predictor_hidden_size: int = 384
    predictor_num_hidden_layers: int = 6
    predictor_num_attention_heads: int | None = None
    predictor_intermediate_size: int | None = None
    num_context_blocks: int = 1
    num_target_blocks: int = 4
    context_scale: list[float | int] | tuple[float | int, float | int] = (0.85, 1.0)
    target_scale: list[float | int] | tuple[float | int, float | int] = (0.15, 0.2)
    target_aspect_ratio: list[float | int] | tuple[float | int, float | int] = (0.75, 1.5)
    allow_overlap: bool = False
    ema_momentum: float | int = 0.996
    ema_momentum_end: float | int = 1.0

    def __post_init__(self, **kwargs):
        if self.predictor_num_attention_heads is None:
            self.predictor_num_attention_heads = self.num_attention_heads
        if self.predictor_intermediate_size is None:
            self.predictor_intermediate_size = 4 * self.predictor_hidden_size
        for name in _RANGES:
            # As they come back from the disk, so that a run equals itself.
            setattr(self, name, list(getattr(self, name)))
        super().__post_init__(**kwargs)

    @property
    def num_keep(self) -> int:
        """Number of patches that the encoder sees of a context block."""
        return int(self.num_patches * (1 - self.mask_ratio))

    @property
    def context_blocks(self) -> Blocks:
        """What context blocks may be."""
        return Blocks(self.grid_size, tuple(self.context_scale), (1.0, 1.0))

    @property
    def target_blocks(self) -> Blocks:
        """What target blocks may be."""
        return Blocks(self.grid_size, tuple(self.target_scale), tuple(self.target_aspect_ratio))

    def check_sizes(self) -> None:
        super().check_sizes()
        for name, value in _AS_STOCK.items():
            if getattr(self, name) != value:
                raise ValueError(
                    f"{name} is {getattr(self, name)!r}; I-JEPA has {value!r} only, as transformers' IJepaModel. "
                    "Leave it out, or choose weights of such a network."
                )

    def check_pretraining(self) -> None:
        """Raises ValueError where predictor, blocks or momenta do not fit, which an encoder alone does not need."""
        check_mask_ratio(self)
        size, heads = "predictor_hidden_size", "predictor_num_attention_heads"
        check_heads(size, self.predictor_hidden_size, heads, self.predictor_num_attention_heads)
        if self.predictor_hidden_size % 4:
            raise ValueError(
                f"predictor_hidden_size is {self.predictor_hidden_size}; fixed sin-cos positions need a multiple of 4."
            )
        if not 0.0 <= self.ema_momentum <= self.ema_momentum_end <= 1.0:
            raise ValueError(
                f"ema_momentum is {self.ema_momentum} and ema_momentum_end {self.ema_momentum_end}; expected "
                "0 <= ema_momentum <= ema_momentum_end <= 1."
            )
        for name, largest in _RANGES.items():
            low_and_high = getattr(self, name)
            if len(low_and_high) != 2 or not 0.0 < low_and_high[0] <= low_and_high[1] <= largest:
                raise ValueError(f"{name} is {low_and_high}; expected two numbers, 0 < low <= high <= {largest}.")
        for name in ("num_context_blocks", "num_target_blocks"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1.")
        needed = DRAWS_PER_BLOCK * (self.num_context_blocks + self.num_target_blocks)
        if self.num_patches < needed or min(self.grid_size) < 2:
            rows, columns = self.grid_size
            raise ValueError(
                f"A picture has {rows} x {columns} patches; {self.num_context_blocks} context and "
                f"{self.num_target_blocks} target blocks need {needed} and 2 a side. Choose a larger image_size, a "
                "smaller patch_size, or fewer blocks."
            )


__all__ = ["IJepaConfig"]
