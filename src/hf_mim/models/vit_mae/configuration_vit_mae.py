"""Configuration of the baseline: transformers' own, and what pretraining asks of a config."""

from huggingface_hub.dataclasses import strict
from transformers.models.vit_mae import configuration_vit_mae

from ..presets import FromPreset
from ..vit.configuration_vit import check_heads, check_mask_ratio
from ..vit.sizes import as_pair


@strict
class ViTMAEConfig(FromPreset, configuration_vit_mae.ViTMAEConfig):
    r"""
    MAE ("Masked Autoencoders Are Scalable Vision Learners", He et al., 2022): transformers' config of the same name,
    with the fields and the `model_type` that it has there. What differs are defaults: MAE's `layer_norm_eps` of 1e-6,
    and the MLPs' hidden widths, which follow the widths.

    Args:
        intermediate_size (`int`, *optional*): Hidden width of the encoder's MLPs; `4 * hidden_size` if None.
        decoder_intermediate_size (`int`, *optional*): The decoder's; `4 * decoder_hidden_size` if None.
        norm_pix_loss (`bool`, defaults to False): Whether a patch's pixels are normalised by their own mean and
            variance before they are targets.

    Raises:
        ValueError: If pictures or patches are not square, as transformers' ViTMAE has them, or sizes do not fit.
    """

    intermediate_size: int | None = None
    decoder_intermediate_size: int | None = None
    layer_norm_eps: float = 1e-6

    def __post_init__(self, **kwargs):
        if self.intermediate_size is None:
            self.intermediate_size = 4 * self.hidden_size
        if self.decoder_intermediate_size is None:
            self.decoder_intermediate_size = 4 * self.decoder_hidden_size
        for name in ("image_size", "patch_size"):
            height, width = as_pair(getattr(self, name))
            if height != width:
                raise ValueError(
                    f"{name} is {height} x {width}; transformers' ViTMAE takes squares only. Choose a square, or one "
                    "of the methods of hf_mim."
                )
            setattr(self, name, height)
        super().__post_init__(**kwargs)
        self.check_sizes()

    @property
    def grid_size(self) -> tuple[int, int]:
        """Patches per column and per row: (rows, columns)."""
        return (self.image_size // self.patch_size,) * 2

    @property
    def num_patches(self) -> int:
        """L, the number of patches of a picture."""
        return self.grid_size[0] ** 2

    @property
    def num_keep(self) -> int:
        """Number of patches that the encoder sees."""
        return int(self.num_patches * (1 - self.mask_ratio))

    def check_sizes(self) -> None:
        """Raises ValueError where sizes do not fit."""
        if self.patch_size < 1 or self.image_size < self.patch_size or self.image_size % self.patch_size:
            raise ValueError(
                f"image_size, {self.image_size}, is not divisible by patch_size, {self.patch_size}. Choose an "
                "image_size that is a multiple of the patch size, or another patch_size."
            )
        check_mask_ratio(self)
        for part in ("", "decoder_"):
            size, heads = f"{part}hidden_size", f"{part}num_attention_heads"
            check_heads(size, getattr(self, size), heads, getattr(self, heads))
            if getattr(self, size) % 4:
                raise ValueError(f"{size} is {getattr(self, size)}; fixed sin-cos positions need a multiple of 4.")


__all__ = ["ViTMAEConfig"]
