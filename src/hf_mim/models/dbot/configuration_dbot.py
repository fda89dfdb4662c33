"""Configuration of dBOT."""

import copy

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

from ..vit.configuration_vit import MaskedAutoencoderConfig


@strict
class DBOTConfig(MaskedAutoencoderConfig):
    r"""
    dBOT ("Exploring Target Representations for Masked Autoencoders", Liu et al., ICLR 2024). See
    `MaskedAutoencoderConfig` for the fields that are not here.

    Args:
        smooth_l1_beta (`float`, defaults to 2.0): Where the loss turns from squared to absolute differences.
        drop_path_rate (`float`, defaults to 0.2): Stochastic depth of the student's last block and of the decoder's
            last block; rises linearly from 0. The paper has 0.2 for ViT-B and ViT-L, 0.3 for ViT-H.
        teacher_config (config or `dict`, *optional*): The frozen teacher, any ViT with a [CLS] token and a
            patch grid of the same proportions: a config of ours or of transformers, or a dict; kept as a dict. Without
            `model_type` it is a plain masked ViT. None: the student's own sizes.
        teacher_channels (`list[int]`, *optional*): Which of the student's channels the teacher sees, in its own order,
            from 0; a channel may be there twice. All if None.
        image_mean, image_std (`list[float]`, *optional*): How the student's pictures are normalised, by channel, for
            pixel values from 0 to 1.
        teacher_image_mean, teacher_image_std (`list[float]`, *optional*): How the teacher wants them. Where one of the
            four is None, the teacher gets the pictures as they are.

    Raises:
        ValueError: If sizes do not fit, or `smooth_l1_beta` is not above 0.

    Example:

    ```python
    >>> from hf_mim import DBOTConfig, DBOTForPreTraining

    >>> config = DBOTConfig(image_size=32, patch_size=4, hidden_size=192, num_attention_heads=3)
    >>> model = DBOTForPreTraining(config)  # its teacher is as untrained as its student
    >>> # ... and, after training, a new student whose teacher is the first student:
    >>> model = model.next_stage()
    ```"""

    model_type = "dbot"
    needs_cls_token = True

    drop_path_rate: float | int = 0.2
    smooth_l1_beta: float | int = 2.0
    teacher_config: dict | PreTrainedConfig | None = None
    teacher_channels: list[int] | tuple[int, ...] | None = None
    image_mean: list[float] | tuple[float, ...] | None = None
    image_std: list[float] | tuple[float, ...] | None = None
    teacher_image_mean: list[float] | tuple[float, ...] | None = None
    teacher_image_std: list[float] | tuple[float, ...] | None = None

    def __post_init__(self, **kwargs):
        # Importing the reader of frozen networks takes seconds; a config alone does not need it.
        if isinstance(self.teacher_config, PreTrainedConfig):
            from ..vit.frozen_layouts import describe_config

            self.teacher_config = describe_config(self.teacher_config)
        super().__post_init__(**kwargs)

    def for_next_stage(self) -> "DBOTConfig":
        """This config with a teacher of the student's own sizes, which sees the student's pictures."""
        config = copy.deepcopy(self)
        config.teacher_config = config.teacher_image_mean = config.teacher_image_std = config.teacher_channels = None
        return config

    def check_sizes(self) -> None:
        super().check_sizes()
        if not self.smooth_l1_beta > 0.0:
            raise ValueError(f"smooth_l1_beta is {self.smooth_l1_beta}; expected a number above 0, for example 2.0.")


__all__ = ["DBOTConfig"]
