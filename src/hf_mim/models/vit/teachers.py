"""What a method learns from, where that is another network: a frozen one, or a running average of its own encoder."""

from collections.abc import Sequence

import torch
from transformers.utils import logging

from .averaging import average_weights
from .configuration_vit import MaskedViTConfig

logger = logging.get_logger(__name__)


class FrozenTeacherMixin:
    """
    For a pretraining model whose sub-module `teacher_name` is a `FrozenViT` made by `build_frozen`. The config's
    fields `NAME_config`, `NAME_image_mean` and `NAME_image_std` describe it.
    """

    teacher_name: str

    @property
    def frozen_modules(self) -> tuple[str, ...]:
        return (self.teacher_name,)

    @classmethod
    def from_teacher(cls, teacher, config: MaskedViTConfig | None = None, **kwargs):
        """
        A new model that learns from a trained network.

        Args:
            teacher (`PreTrainedModel`, or a path or name on the Hub): Any ViT with a [CLS] token: of hf_mim, ViT,
                ViTMAE, DINOv2 and DINOv3 with or without registers, CLIP's vision tower. A path's
                `preprocessor_config.json` tells how it wants pixels normalised.
            config (the method's, *optional*): Of the new model; what describes the teacher is filled in. None: the
                teacher's width, depth, heads and grid.
            kwargs: As of `_from_config`, e.g. `attn_implementation`.

        Raises:
            ValueError: If the network cannot be a teacher, or the patch grids have other proportions.
            OSError: If there is no such model.
        """
        # Here, because importing other networks takes seconds, which a method without a teacher does not need.
        from .frozen_sources import read_source, student_config

        source = read_source(teacher)
        model = cls._from_config(student_config(source, cls.teacher_name, config or cls.config_class), **kwargs)
        model.take_source(source)
        return model.eval()

    def take_source(self, source, new_encoder: bool = True) -> None:
        """
        Fills the teacher with a trained network.

        Args:
            source (`FrozenSource`): As `read_source` gives.
            new_encoder (`bool`, defaults to True): Whether the encoder is untrained.
        """
        from .frozen_sources import load_source

        load_source(self.get_submodule(self.teacher_name), source)

    def set_image_normalization(self, mean: Sequence[float], std: Sequence[float]) -> None:
        """
        Tells the teacher how the images are normalised, where the config does not say. It then sees them as it was
        trained.
        """
        if self.config.image_mean is not None:
            return
        self.config.image_mean, self.config.image_std = list(map(float, mean)), list(map(float, std))
        self.get_submodule(self.teacher_name).set_source_normalization(mean, std)


class AveragedTeacherMixin:
    """
    For a pretraining model whose `target_encoder` follows its `encoder`, with the momentum of the config's fields
    `ema_momentum` and `ema_momentum_end`.
    """

    frozen_modules = ("target_encoder",)
    # In 16 bits it would stand still: what a step moves it by is rounded to nothing.
    _keep_in_fp32_modules_strict = ["target_encoder"]

    @torch.no_grad()
    def copy_encoder_to_target(self) -> None:
        """Makes the target encoder equal to the encoder."""
        self.target_encoder.load_state_dict(self.encoder.state_dict())

    @torch.no_grad()
    def after_optimizer_step(self, step: int, num_steps: int) -> None:
        """`target = m * target + (1 - m) * encoder`, `m` linear from `ema_momentum` towards `ema_momentum_end`."""
        start, end = self.config.ema_momentum, self.config.ema_momentum_end
        momentum = start + (end - start) * step / num_steps
        average_weights(self.target_encoder, self.encoder, momentum)
        super().after_optimizer_step(step, num_steps)

    def fill_missing(self, missing: set[str]) -> set[str]:
        """A target encoder that a checkpoint lacks is a copy of the encoder; returns the names still missing."""
        target = {f"target_encoder.{name}" for name in self.target_encoder.state_dict()}
        if not target <= missing:
            return missing
        logger.warning("The checkpoint has no target encoder: it starts as a copy of the encoder.")
        self.copy_encoder_to_target()
        return missing - target
