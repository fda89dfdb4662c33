"""Configuration of TEC."""

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

from ..vit.configuration_vit import MaskedAutoencoderConfig

_CHOICES = {
    "feature_normalization": ("patch", "channel", "none"),
    "attention_target": ("selected", "all", "cls", "none"),
    "adapters": ("both", "input", "encoder", "none"),
    "tuning_mode": ("full", "linear", "input_adapter", "encoder_adapters"),
}


@strict
class TECConfig(MaskedAutoencoderConfig):
    r"""
    TEC ("Towards Sustainable Self-supervised Learning", Gao et al., 2022): by default ViT-B/16 with MAE-B as base. See
    `MaskedAutoencoderConfig` for the fields that are not here.

    Args:
        base_config (config or `dict`, *optional*): The base model, any ViT with a [CLS] token: a config of ours or of
            transformers, or a dict; kept as a dict. Without `model_type` it is a plain masked ViT. None: the student's
            own sizes.
        base_channels (`list[int]`, *optional*): Which of the student's channels the base sees, in the base's order,
            from 0; a channel may be there twice. All if None.
        initialize_from_base (`bool`, defaults to False): Whether the encoder starts with the base's weights (section
            3.2: worse than starting anew).
        feature_layers (`int`, defaults to 2): Blocks of the base, the last ones, whose outputs are averaged for the
            feature target.
        feature_normalization (`str`, defaults to `"patch"`): Of the feature target: `"patch"`, over the patches of an
            image, for each channel; `"channel"`, over the channels of a patch; `"none"`.
        attention_target (`str`, defaults to `"selected"`): Rows of the base's last attention that are predicted:
            [CLS] and the patches it attends to most, `"selected"`; `"all"`; `"cls"`; or `"none"`.
        attention_top_k (`int`, defaults to 15): Patches selected.
        attention_temperature (`float`, defaults to 1.8): Divides the base's attention logits.
        attention_logit_scale (`float`, *optional*): Multiplies the student's; as the release, `base width ** -0.5`, if
            None.
        adapters (`str`, defaults to `"both"`): `"input"`, an MLP on [CLS]; `"encoder"`, MLPs on groups of blocks, that
            the decoder reads; `"both"`, or `"none"`.
        adapter_group_size (`int`, defaults to 3): Blocks of a group; must divide `num_hidden_layers`.
        image_mean, image_std (`list[float]`, *optional*): How the student's pictures are normalised, by channel, for
            pixel values from 0 to 1.
        base_image_mean, base_image_std (`list[float]`, *optional*): How the base wants them. Where one of the four is
            None, the base gets the pictures as they are.
        tuning_mode (`str`, defaults to `"full"`): What `TECForImageClassification` trains besides its classifier: the
            encoder, `"full"`; nothing, `"linear"`; the input adapter, `"input_adapter"`; or that and the encoder
            adapters, whose output then feeds the classifier, `"encoder_adapters"` (section 3.1).

    Raises:
        ValueError: If sizes do not fit, or a choice is not among those given.

    Example:

    ```python
    >>> from hf_mim import TECConfig, TECForPreTraining

    >>> model = TECForPreTraining.from_base("facebook/vit-mae-base", TECConfig())
    ```"""

    model_type = "tec"
    needs_cls_token = True

    decoder_num_hidden_layers: int = 2
    base_config: dict | PreTrainedConfig | None = None
    base_channels: list[int] | tuple[int, ...] | None = None
    initialize_from_base: bool = False
    feature_layers: int = 2
    feature_normalization: str = "patch"
    attention_target: str = "selected"
    attention_top_k: int = 15
    attention_temperature: float | int = 1.8
    attention_logit_scale: float | int | None = None
    adapters: str = "both"
    adapter_group_size: int = 3
    image_mean: list[float] | tuple[float, ...] | None = None
    image_std: list[float] | tuple[float, ...] | None = None
    base_image_mean: list[float] | tuple[float, ...] | None = None
    base_image_std: list[float] | tuple[float, ...] | None = None
    tuning_mode: str = "full"

    def __post_init__(self, **kwargs):
        # Importing the reader of frozen networks takes seconds; a config alone does not need it.
        if isinstance(self.base_config, PreTrainedConfig):
            from ..vit.frozen_layouts import describe_config

            self.base_config = describe_config(self.base_config)
        super().__post_init__(**kwargs)

    @property
    def has_input_adapter(self) -> bool:
        return self.adapters in ("input", "both")

    @property
    def has_encoder_adapter(self) -> bool:
        return self.adapters in ("encoder", "both")

    def check_sizes(self) -> None:
        super().check_sizes()
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                expected = ", ".join(f'"{choice}"' for choice in choices)
                raise ValueError(f"{name} is {getattr(self, name)!r}; expected one of {expected}.")
        size, depth = self.adapter_group_size, self.num_hidden_layers
        if self.has_encoder_adapter and (size < 1 or depth % size):
            divisors = [number for number in range(1, depth + 1) if depth % number == 0]
            raise ValueError(
                f"adapter_group_size is {size}, which does not divide num_hidden_layers, {depth}. Choose one of "
                f"{', '.join(map(str, divisors))}."
            )
        for name in ("feature_layers", "attention_top_k"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1.")
        if not self.attention_temperature > 0:
            raise ValueError(f"attention_temperature is {self.attention_temperature}; it must be above 0.")
        adapter = {"input_adapter": self.has_input_adapter, "encoder_adapters": self.adapters == "both"}
        if not adapter.get(self.tuning_mode, True):
            raise ValueError(
                f'tuning_mode is "{self.tuning_mode}", and the model was pretrained with adapters="{self.adapters}": '
                "what is to be tuned is not there. Choose another mode, or a model with both adapters."
            )


__all__ = ["TECConfig"]
