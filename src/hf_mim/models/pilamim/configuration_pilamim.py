"""Configuration of PiLaMIM."""

from huggingface_hub.dataclasses import strict

from ..vit.configuration_vit import MaskedAutoencoderConfig


@strict
class PiLaMIMConfig(MaskedAutoencoderConfig):
    r"""
    PiLaMIM ("Toward Richer Visual Representations by Integrating Pixel and Latent Masked Image Modeling", Lee et al.,
    2024): sizes by default those of its appendix A.4. See `MaskedAutoencoderConfig` for the fields that are not here.

    Args:
        use_cls_loss (`bool`, defaults to True): Whether the latent decoder also predicts the target's [CLS] (section
            2; False is the paper's ablation "w/o [CLS]").
        ema_momentum (`float`, defaults to 0.996): The target encoder's momentum at the first step.
        ema_momentum_end (`float`, defaults to 1.0): Its momentum at the end; linear in between.

    Raises:
        ValueError: If sizes or momenta do not fit.

    Example:

    ```python
    >>> from hf_mim import PiLaMIMConfig, PiLaMIMForPreTraining

    >>> config = PiLaMIMConfig(image_size=32, patch_size=4, hidden_size=192, num_attention_heads=3)
    >>> model = PiLaMIMForPreTraining(config)
    ```"""

    model_type = "pilamim"
    needs_cls_token = True

    decoder_hidden_size: int = 384
    decoder_num_hidden_layers: int = 6
    decoder_num_attention_heads: int = 12
    use_cls_loss: bool = True
    ema_momentum: float | int = 0.996
    ema_momentum_end: float | int = 1.0

    def check_sizes(self) -> None:
        super().check_sizes()
        if not 0.0 <= self.ema_momentum <= self.ema_momentum_end <= 1.0:
            raise ValueError(
                f"ema_momentum is {self.ema_momentum} and ema_momentum_end {self.ema_momentum_end}; expected "
                "0 <= ema_momentum <= ema_momentum_end <= 1."
            )


__all__ = ["PiLaMIMConfig"]
