"""Configuration of OCL."""

from huggingface_hub.dataclasses import strict

from ..vit.configuration_vit import MaskedViTConfig, check_mask_ratio

# CLIP's limit: logits are scaled by at most 100.
MIN_TEMPERATURE = 0.01


@strict
class OCLConfig(MaskedViTConfig):
    r"""
    Occluded image contrastive learning: two halves of what is left of a picture are told from those of all others.
    Defaults are those of the paper for ViT-B (section 3); for ViT-L `mask_ratio` is 0.4. See `MaskedViTConfig` for
    the fields that are not here.

    Args:
        mask_ratio (`float`, defaults to 0.3): Share of the patches that neither half has, in (0, 1). The others, less
            one where their number is odd, are split into halves.
        kappa (`float`, defaults to 64.0): Concentration of the T-SP similarity; greater than 0.
        temperature (`float`, defaults to 0.07): What similarities are divided by, at the start; at least 0.01.
        trainable_temperature (`bool`, defaults to True): Whether the temperature is trained; it stays at least 0.01.
        freeze_patch_projection (`bool`, defaults to True): Whether the patch projection keeps its initial values.
        gather_negatives (`bool`, defaults to True): Whether a picture is told from those of all processes, or (False)
            from those of its own process only. Micro-batches of accumulated gradients never meet either way.
        head_num_layers (`int`, defaults to 0): Layers of an MLP between features and similarity: 0 (none), 2 or 3,
            the paper's ablation (section 3.2.3).
        head_hidden_size (`int`, defaults to 1024): Width of its hidden layers.
        head_output_size (`int`, defaults to 512): Width of its output.

    Raises:
        ValueError: If sizes do not fit, if fewer than two patches would be left to split, or if `kappa` or
            `temperature` is too small.

    Example:

    ```python
    >>> from hf_mim import OCLConfig, OCLForPreTraining

    >>> config = OCLConfig(image_size=32, patch_size=4, hidden_size=192, num_attention_heads=3)
    >>> model = OCLForPreTraining(config)
    ```"""

    model_type = "ocl"
    needs_cls_token = True

    mask_ratio: float | int = 0.3
    kappa: float | int = 64.0
    temperature: float | int = 0.07
    trainable_temperature: bool = True
    freeze_patch_projection: bool = True
    gather_negatives: bool = True
    head_num_layers: int = 0
    head_hidden_size: int = 1024
    head_output_size: int = 512

    @property
    def num_keep(self) -> int:
        """Number of patches in both halves together, even."""
        return int(self.num_patches * (1 - self.mask_ratio)) // 2 * 2

    def check_sizes(self) -> None:
        super().check_sizes()
        if 0.0 < self.mask_ratio < 1.0 and self.num_keep == 0:
            raise ValueError(
                f"mask_ratio {self.mask_ratio} keeps 0 of {self.num_patches} patches (an even number is kept, for two "
                "halves), which leaves nothing for the encoder to see. Choose a smaller ratio, a larger image_size or "
                "a smaller patch_size, so that at least 2 patches are kept."
            )
        check_mask_ratio(self)
        if not self.kappa > 0.0:
            raise ValueError(f"kappa is {self.kappa}; expected a number greater than 0, for example 64.")
        if not self.temperature >= MIN_TEMPERATURE:
            raise ValueError(
                f"temperature is {self.temperature}; expected at least {MIN_TEMPERATURE}, which scales logits by 100, "
                "for example 0.07."
            )
        if self.head_num_layers not in (0, 2, 3):
            raise ValueError(f"head_num_layers is {self.head_num_layers}; expected 0 (no head), 2 or 3.")
        for name in ("head_hidden_size", "head_output_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1.")


__all__ = ["OCLConfig"]
