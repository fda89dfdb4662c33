"""Configuration of dBOT."""

import copy

from huggingface_hub.dataclasses import strict

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
        teacher_config (`dict` or config, *optional*): The frozen teacher: any Vision Transformer's config with the
            same patch grid. A dict without `model_type` changes fields of this config. None: as the student.

    Raises:
        ValueError: If sizes do not fit, or `smooth_l1_beta` is not above 0.

    Example:

    ```python
    >>> from hf_mim import DBOTConfig, DBOTForPreTraining

    >>> config = DBOTConfig(image_size=32, patch_size=4, hidden_size=192, num_attention_heads=3)
    >>> model = DBOTForPreTraining(config)  # with a teacher that is as untrained as the student
    >>> model = model.next_stage()  # a new student, whose teacher is the first one
    ```"""

    model_type = "dbot"

    drop_path_rate: float | int = 0.2
    smooth_l1_beta: float | int = 2.0
    teacher_config: dict | None = None

    def for_next_stage(self) -> "DBOTConfig":
        """This config with a teacher of the student's own sizes."""
        config = copy.deepcopy(self)
        config.teacher_config = None
        return config

    def check_sizes(self) -> None:
        super().check_sizes()
        if not self.smooth_l1_beta > 0.0:
            raise ValueError(f"smooth_l1_beta is {self.smooth_l1_beta}; expected a number above 0, for example 2.0.")


__all__ = ["DBOTConfig"]
