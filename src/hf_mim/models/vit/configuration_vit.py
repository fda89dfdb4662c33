"""Configuration fields that all methods' encoders share."""

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig
from transformers.backbone_utils import BackboneConfigMixin

from ..presets import FromPreset
from .sizes import as_pair

# How position tables are interpolated: ViT's way, that of DINOv2 with registers and timm, and SigLIP 2's.
INTERPOLATIONS = {
    "bicubic": {"mode": "bicubic"},
    "bicubic_antialias": {"mode": "bicubic", "antialias": True},
    "bilinear_antialias": {"mode": "bilinear", "antialias": True},
}


@strict
class MaskedViTConfig(FromPreset, BackboneConfigMixin, PreTrainedConfig):
    r"""
    The Vision Transformer that every method of hf_mim pretrains. Each method's config adds its own fields.

    Args:
        hidden_size (`int`, defaults to 768): Width D of the encoder.
        num_hidden_layers (`int`, defaults to 12): Number of blocks.
        num_attention_heads (`int`, defaults to 12): Heads per block; must divide `hidden_size`.
        intermediate_size (`int`, *optional*): Hidden width of the MLPs; `4 * hidden_size` if None.
        hidden_act (`str`, defaults to `"gelu"`): Activation of the MLPs (erf GELU).
        attention_probs_dropout_prob (`float`, defaults to 0.0): Dropout on the attention weights.
        drop_path_rate (`float`, defaults to 0.0): Stochastic depth of the last block; rises linearly from 0.
        initializer_range (`float`, defaults to 0.02): Standard deviation of tokens and learned positions at the start.
        layer_norm_eps (`float`, defaults to 1e-6): Epsilon of every LayerNorm.
        image_size (`int` or pair (height, width), defaults to 224): Pixels of the input.
        patch_size (`int` or pair (height, width), defaults to 16): Pixels of a patch; must divide `image_size`.
        num_channels (`int`, defaults to 3): Channels of the input, any number.
        qkv_bias (`bool`, defaults to True): Whether queries, keys and values have a bias.
        key_bias (`bool`, defaults to True): Whether, with `qkv_bias`, keys have one too; DINOv3's have none.
        use_gated_mlp (`bool`, defaults to False): Whether the encoder's MLPs are gated (SwiGLU where `hidden_act` is
            "silu"), as those of the largest DINOv2 and DINOv3.
        embedding_layernorm (`bool`, defaults to False): Whether a LayerNorm precedes the first block, as in CLIP.
        num_register_tokens (`int`, defaults to 0): Trained tokens between [CLS] and the patches, without positions.
            Decoders and losses do not see them.
        position_embedding (`str`, defaults to `"sincos"`): `"sincos"`, the fixed table in MAE's layout; `"learned"`,
            a trained table; or `"rotary"`, DINOv3's rotary positions of the patches in every block of the encoder
            (its decoders have the fixed table).
        rope_theta (`float`, defaults to 100.0): Base of the frequencies of rotary positions.
        position_interpolation (`str`, defaults to `"bicubic"`): How a table is interpolated to another patch grid:
            `"bicubic"`, `"bicubic_antialias"` or `"bilinear_antialias"`.
        sincos_grid (pair (rows, columns), *optional*): The patch grid that the fixed table is made for, from which it
            is interpolated to the image's own, as in an encoder that goes on at another image size. The image's own
            grid if None.
        use_cls_token (`bool`, defaults to True): Whether a [CLS] token precedes the patches.
        pooling (`str`, defaults to `"cls"`): What `pooler_output` is: `"cls"`, the [CLS] token, or `"mean"`, the mean
            of the patch tokens, both after the final LayerNorm.
        apply_layernorm (`bool`, defaults to True): Whether a backbone's feature maps are those after the final
            LayerNorm.
        reshape_hidden_states (`bool`, defaults to True): Whether they are maps (batch_size, hidden_size, rows,
            columns); False for all tokens.
        segmentation_head (`str`, defaults to `"linear"`): Of `ForSemanticSegmentation`: `"linear"`, BatchNorm and one
            1 x 1 convolution on the patches, or `"upernet"`, transformers' UperNet on a feature pyramid, with an
            auxiliary head.
        segmentation_head_size (`int`, defaults to 512): Channels of UperNet and its pyramid.
        auxiliary_loss_weight (`float`, defaults to 0.4): Of the auxiliary head's loss.
        semantic_loss_ignore_index (`int`, defaults to 255): The class of pixels that do not count.
        depth_head (`str`, defaults to `"linear"`): Of `ForDepthEstimation`: `"linear"`, BatchNorm and one 1 x 1
            convolution on the patches, or `"dpt"`, which fuses those of four blocks at four sizes.
        depth_head_size (`int`, defaults to 256): Channels of `"dpt"`.
        log_depth_mean (`float`, defaults to 0.0): Natural logarithm of the depth that the head starts from: that of a
            usual one, in the unit of the depths.
        scale_invariance (`float`, defaults to 0.5): Of the loss of depths, 0 to 1: how little a factor that all of a
            picture's are wrong by counts.
        detection_masks (`bool`, defaults to True): Whether a detector tells the masks of objects too: Mask R-CNN, and
            not Faster R-CNN.
        detection_head_size (`int`, defaults to 256): Channels of a detector's pyramid and heads.
        detection_anchor_size (`float`, defaults to 8): Side of a detector's square anchors, in pixels of the pyramid's
            maps: with patches of 16 pixels 32 to 512.
        detection_regions (`int`, defaults to 512): Regions of each picture that a detector's box head learns from, of
            at most four times as many proposals.

    Raises:
        ValueError: If sizes do not fit each other, naming the values.
    """

    model_type = "masked_vit"
    # Whether the method's loss is about [CLS].
    needs_cls_token = False

    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int | None = None
    hidden_act: str = "gelu"
    attention_probs_dropout_prob: float | int = 0.0
    drop_path_rate: float | int = 0.0
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-6
    image_size: int | list[int] | tuple[int, int] = 224
    patch_size: int | list[int] | tuple[int, int] = 16
    num_channels: int = 3
    qkv_bias: bool = True
    key_bias: bool = True
    use_gated_mlp: bool = False
    embedding_layernorm: bool = False
    num_register_tokens: int = 0
    position_embedding: str = "sincos"
    rope_theta: float | int = 100.0
    position_interpolation: str = "bicubic"
    sincos_grid: list[int] | tuple[int, int] | None = None
    use_cls_token: bool = True
    pooling: str = "cls"
    apply_layernorm: bool = True
    reshape_hidden_states: bool = True
    segmentation_head: str = "linear"
    segmentation_head_size: int = 512
    auxiliary_loss_weight: float | int = 0.4
    semantic_loss_ignore_index: int = 255
    depth_head: str = "linear"
    depth_head_size: int = 256
    log_depth_mean: float | int = 0.0
    scale_invariance: float | int = 0.5
    detection_masks: bool = True
    detection_head_size: int = 256
    detection_anchor_size: float | int = 8.0
    detection_regions: int = 512
    _out_features: list[str] | None = None
    _out_indices: list[int] | None = None

    def __post_init__(self, **kwargs):
        if self.intermediate_size is None:
            self.intermediate_size = 4 * self.hidden_size
        self.stage_names = ["stem"] + [f"stage{i}" for i in range(1, self.num_hidden_layers + 1)]
        self.set_output_features_output_indices(
            out_indices=kwargs.pop("out_indices", None), out_features=kwargs.pop("out_features", None)
        )
        super().__post_init__(**kwargs)
        self.check_sizes()

    @classmethod
    def from_dict(cls, config_dict, **kwargs):
        """
        As `PreTrainedConfig.from_dict`. With a `drop_path_rate` of the caller's own it is no longer the config of the
        run that `architectures` names, whose rate a classifier would leave behind; with another depth its stages are
        those of that depth.
        """
        saved_depth = config_dict.get("num_hidden_layers", cls.num_hidden_layers)
        depth = kwargs.get("num_hidden_layers", saved_depth)
        if depth != saved_depth:
            stages = {name: config_dict.get(name) for name in ("out_features", "out_indices")}
            config_dict = {name: value for name, value in config_dict.items() if name not in ("stage_names", *stages)}
            # Fields that have to fit the depth come with it.
            config_dict |= {name: kwargs[name] for name in kwargs if name in cls.__dataclass_fields__}
            # The last one is what a backbone gives by default, and what no one may have asked for.
            if stages["out_features"] not in (None, [f"stage{saved_depth}"]) and not stages.keys() & kwargs.keys():
                config_dict |= stages
        loaded = super().from_dict(config_dict, **kwargs)
        if "drop_path_rate" in kwargs:
            (loaded[0] if isinstance(loaded, tuple) else loaded).architectures = None
        return loaded

    @property
    def grid_size(self) -> tuple[int, int]:
        """Patches per column and per row: (rows, columns)."""
        (height, width), (patch_height, patch_width) = as_pair(self.image_size), as_pair(self.patch_size)
        return height // patch_height, width // patch_width

    @property
    def num_patches(self) -> int:
        """L, the number of patches of a picture."""
        rows, columns = self.grid_size
        return rows * columns

    @property
    def num_prefix(self) -> int:
        """Tokens of the encoder before the patches: [CLS], where there is one, and registers."""
        return int(self.use_cls_token) + self.num_register_tokens

    def for_next_stage(self) -> "MaskedViTConfig":
        """
        The config of the model that learns from this one's, in training of several stages.

        Raises:
            ValueError: If the method is not trained in stages.
        """
        raise ValueError(f"{self.model_type} is not trained in stages. Leave num_stages out.")

    def check_sizes(self) -> None:
        """Raises ValueError where sizes do not fit. Models call it again: fields can be set after construction."""
        for name in ("image_size", "patch_size"):
            size = getattr(self, name)
            if not isinstance(size, int) and len(size) != 2:
                raise ValueError(f"{name} is {size}; expected one number, or two: (height, width).")
        image_size, patch_size = as_pair(self.image_size), as_pair(self.patch_size)
        for name in ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_channels"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1.")
        for side, pixels, patch in zip(("height", "width"), image_size, patch_size, strict=True):
            if patch < 1 or pixels < patch or pixels % patch:
                nearest = max(1, round(pixels / patch)) * patch if patch > 0 else None
                raise ValueError(
                    f"The image {side}, {pixels} pixels (image_size={self.image_size}), is not divisible by the patch "
                    f"{side}, {patch} (patch_size={self.patch_size}). Choose an image_size that is a multiple of the "
                    f"patch size, for example {nearest}, or another patch_size."
                )
        check_heads("hidden_size", self.hidden_size, "num_attention_heads", self.num_attention_heads)
        if self.num_register_tokens < 0:
            raise ValueError(f"num_register_tokens is {self.num_register_tokens}; expected 0 or more.")
        if self.position_embedding not in ("sincos", "learned", "rotary"):
            raise ValueError(
                f'position_embedding is {self.position_embedding!r}; expected "sincos", "learned" or "rotary".'
            )
        if self.position_embedding == "rotary" and (self.hidden_size // self.num_attention_heads) % 4:
            raise ValueError(
                f"A head has {self.hidden_size // self.num_attention_heads} channels (hidden_size {self.hidden_size}, "
                f"num_attention_heads {self.num_attention_heads}); rotary positions need a multiple of 4."
            )
        if not self.rope_theta > 0:
            raise ValueError(f"rope_theta is {self.rope_theta}; expected a number above 0, for example 100.")
        if self.position_interpolation not in INTERPOLATIONS:
            expected = ", ".join(f'"{name}"' for name in INTERPOLATIONS)
            raise ValueError(f"position_interpolation is {self.position_interpolation!r}; expected one of {expected}.")
        if self.position_embedding == "sincos" and self.hidden_size % 4:
            raise ValueError(
                f"hidden_size is {self.hidden_size}; fixed sin-cos positions need a multiple of 4. Choose one, or set "
                'position_embedding="learned".'
            )
        if self.segmentation_head not in ("linear", "upernet"):
            raise ValueError(f'segmentation_head is {self.segmentation_head!r}; expected "linear" or "upernet".')
        if self.depth_head not in ("linear", "dpt"):
            raise ValueError(f'depth_head is {self.depth_head!r}; expected "linear" or "dpt".')
        if not 0 <= self.scale_invariance <= 1:
            raise ValueError(f"scale_invariance is {self.scale_invariance}; expected a number in [0, 1].")
        if self.pooling not in ("cls", "mean"):
            raise ValueError(f'pooling is {self.pooling!r}; expected "cls" or "mean".')
        if self.needs_cls_token and not self.use_cls_token:
            raise ValueError(
                f"use_cls_token is False, and {self.model_type} learns with its [CLS] token. Leave it True."
            )
        if self.pooling == "cls" and not self.use_cls_token:
            raise ValueError('pooling is "cls", and use_cls_token is False. Set pooling="mean".')
        if not 0.0 <= self.drop_path_rate < 1.0:
            raise ValueError(f"drop_path_rate is {self.drop_path_rate}; expected a number in [0, 1).")


@strict
class MaskedAutoencoderConfig(MaskedViTConfig):
    r"""
    An encoder's fields and those of a decoder that predicts what is hidden.

    Args:
        mask_ratio (`float`, defaults to 0.75): Share of the patches hidden from the encoder, in (0, 1); the encoder
            keeps `int(num_patches * (1 - mask_ratio))` of them.
        decoder_hidden_size (`int`, defaults to 512): Width of the decoder.
        decoder_num_hidden_layers (`int`, defaults to 8): Blocks of the decoder.
        decoder_num_attention_heads (`int`, defaults to 16): Heads of the decoder; must divide its width.
        decoder_intermediate_size (`int`, *optional*): Hidden width of its MLPs; `4 * decoder_hidden_size` if None.
        decoder_final_norm (`bool`, defaults to True): Whether a LayerNorm precedes the decoder's output map.

    Raises:
        ValueError: If sizes do not fit each other, or the ratio leaves nothing to see or nothing to predict.
    """

    mask_ratio: float | int = 0.75
    decoder_hidden_size: int = 512
    decoder_num_hidden_layers: int = 8
    decoder_num_attention_heads: int = 16
    decoder_intermediate_size: int | None = None
    decoder_final_norm: bool = True

    def __post_init__(self, **kwargs):
        if self.decoder_intermediate_size is None:
            self.decoder_intermediate_size = 4 * self.decoder_hidden_size
        super().__post_init__(**kwargs)

    @property
    def num_keep(self) -> int:
        """Number of patches that the encoder sees."""
        return int(self.num_patches * (1 - self.mask_ratio))

    def check_sizes(self) -> None:
        super().check_sizes()
        check_mask_ratio(self)
        check_heads(
            "decoder_hidden_size",
            self.decoder_hidden_size,
            "decoder_num_attention_heads",
            self.decoder_num_attention_heads,
        )
        if self.position_embedding != "learned" and self.decoder_hidden_size % 4:
            raise ValueError(
                f"decoder_hidden_size is {self.decoder_hidden_size}; fixed sin-cos positions need a multiple of 4."
            )


def check_heads(size_name: str, size: int, heads_name: str, heads: int) -> None:
    """Raises ValueError if `heads` does not divide `size`."""
    if heads < 1 or size % heads:
        raise ValueError(
            f"{heads_name} is {heads}, which does not divide {size_name}, {size}. Choose a divisor, for example "
            f"{max(h for h in range(1, max(2, heads + 1)) if size % h == 0)}."
        )


def check_mask_ratio(config) -> None:
    """Raises ValueError if `mask_ratio` is outside (0, 1) or leaves nothing to see or nothing to predict."""
    if not 0.0 < config.mask_ratio < 1.0:
        raise ValueError(f"mask_ratio is {config.mask_ratio}; expected a number in (0, 1), for example 0.75.")
    num_keep, num_patches = config.num_keep, config.num_patches
    if num_keep < 1 or num_keep >= num_patches:
        left = "nothing for the encoder to see" if num_keep < 1 else "nothing to predict"
        raise ValueError(
            f"mask_ratio {config.mask_ratio} keeps {num_keep} of {num_patches} patches, which leaves {left}. Choose a "
            "ratio nearer to 0.5, a larger image_size or a smaller patch_size."
        )
