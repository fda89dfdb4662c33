"""What the methods' pretraining models share."""

import torch
from transformers.utils import logging

from .masking import Masking, random_masking
from .modeling_vit import MaskedViTModel, MaskedViTPreTrainedModel
from .repository import with_subfolder
from .sizes import as_pair
from .transfer import refuse_other_network

logger = logging.get_logger(__name__)


class PreTrainingMixin:
    """
    What pretraining models share: masks, frozen networks, and the hooks that the trainer calls.

    A method may have more, which is asked for where it is there: `pairwise_loss`, whether the loss compares the
    pictures of a batch with each other, in which case the model encodes `chunk_size` pictures at a time;
    `watched_features(outputs)`, features of two views (batch_size, 2, dim) that could collapse; `adapter_shares(
    pixel_values, noise)`, shares of groups of blocks in what a decoder reads; `next_stage()`, an untrained model that
    learns from this one; and what `FrozenTeacherMixin` gives it.

    Subclasses set `frozen_modules`, the names of sub-modules that no gradient reaches (a target, a base, a teacher):
    these are always in eval mode, and stay frozen through loading.
    """

    # The loss is a mean over the batch already; without this the Trainer would not divide it by the accumulation.
    accepts_loss_kwargs = False
    frozen_modules: tuple[str, ...] = ()
    # A few trained weights before the first step, by which it is noticed (fused optimisers count no versions); and
    # whether it is known that `after_optimizer_step` is called, or has been said that it is not.
    _first_weights: torch.Tensor | None = None
    _is_followed = False

    def freeze(self) -> None:
        """Stops gradients of the frozen networks, and puts them in eval mode."""
        for name in self.frozen_modules:
            self.get_submodule(name).requires_grad_(False).eval()

    def train(self, mode: bool = True):
        super().train(mode)
        for name in self.frozen_modules:
            self.get_submodule(name).eval()
        return self

    def masking(self, pixel_values: torch.Tensor, noise: torch.Tensor | None) -> Masking:
        """`random_masking` of a batch by `noise`, which is drawn where it is None.

        Raises:
            ValueError: If the pictures are not of `config.image_size`, or `noise` not of shape (batch_size,
                num_patches).
        """
        return random_masking(self.masking_noise(pixel_values, noise), self.config.num_keep)

    def masking_noise(self, pixel_values: torch.Tensor, noise: torch.Tensor | None) -> torch.Tensor:
        """`noise` if it fits, drawn where it is None; raises ValueError as `masking` does."""
        size = as_pair(self.config.image_size)
        if tuple(pixel_values.shape[2:]) != size:
            raise ValueError(
                f"pixel_values has the shape {tuple(pixel_values.shape)}; pretraining takes pictures of {size[0]} x "
                f"{size[1]} pixels (height x width). Resize them, or build the model with another image_size."
            )
        shape = (pixel_values.shape[0], self.config.num_patches)
        if noise is None:
            return torch.rand(shape, device=pixel_values.device)
        if noise.shape != shape:
            raise ValueError(
                f"noise has the shape {tuple(noise.shape)}; expected (batch_size, num_patches) = {tuple(shape)}."
            )
        return noise

    def load_encoder(self, encoder: "MaskedViTModel") -> None:
        """
        Takes the weights of an encoder of the same sizes, of any method.

        Raises:
            ValueError: If its heads, activation, epsilon, biases, sizes or positions are others.
        """
        self.encoder.load_vit_state_dict(self._weights_of(encoder))

    def _weights_of(self, encoder: "MaskedViTModel") -> dict[str, torch.Tensor]:
        """What `load_encoder` takes; with this model's [CLS] where the encoder has none."""
        refuse_other_network(self.config, encoder.config, f"that {type(encoder).__name__}")
        weights = encoder.vit_state_dict()
        if not encoder.config.use_cls_token and getattr(self.config, "use_cls_token", True):
            logger.warning(f"The encoder has no [CLS], with which {self.config.model_type} learns: it gets a new one.")
            weights["embeddings.cls_token"] = self.encoder.embeddings.cls_token
            table = weights.get("embeddings.position_embeddings")
            if table is not None:
                table = torch.cat((torch.zeros_like(table[:, :1]), table), dim=1)
                weights["embeddings.position_embeddings"] = table
        return weights

    def after_optimizer_step(self, step: int, num_steps: int) -> None:
        """
        What a method does after each optimiser step; `MIMTrainer` and `MIMCallback` call it.

        Args:
            step (`int`): From 0 to `num_steps - 1`.
            num_steps (`int`): Of the whole training.
        """
        self._first_weights, self._is_followed = None, True

    def __call__(self, *args, **kwargs):
        if not self._is_followed and self.training and torch.is_grad_enabled() and not torch.compiler.is_compiling():
            self._warn_if_forgotten()
        return super().__call__(*args, **kwargs)

    def _warn_if_forgotten(self) -> None:
        """Warns once if an optimiser has moved the weights, and nobody called `after_optimizer_step`."""
        if type(self).after_optimizer_step is PreTrainingMixin.after_optimizer_step:
            self._is_followed = True
            return
        weight = next(parameter for parameter in self.parameters() if parameter.requires_grad).detach()
        weight = getattr(weight, "_local_tensor", weight).flatten()[:16]
        if self._first_weights is None:
            self._first_weights = weight.clone()
        elif not torch.equal(weight, self._first_weights):
            self._first_weights, self._is_followed = None, True
            logger.warning(
                f"An optimiser step was made and {type(self).__name__}.after_optimizer_step was not called, so that "
                "averaged targets stand still and limits are not kept. Train with hf_mim.MIMTrainer, or give the "
                "Trainer callbacks=[hf_mim.MIMCallback()]; a loop of your own calls "
                "model.after_optimizer_step(step, num_steps)."
            )

    def reconstruct(
        self, pixel_values: torch.Tensor, noise: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor] | None:
        """
        What the model makes of masked pictures, where the method predicts pixels; None elsewhere.

        Returns:
            `mask` (batch_size, 1, height, width), 1 where hidden, and predicted pixels (batch_size, num_channels,
            height, width), normalised as the input is.
        """
        return None

    def fill_missing(self, missing: set[str]) -> set[str]:
        """Fills what a checkpoint lacks and can be had without training; returns the names still missing."""
        return missing

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path, *args, initialize_missing=False, output_loading_info=False, **kwargs
    ):
        """
        As `PreTrainedModel.from_pretrained`, and frozen networks stay frozen.

        Args:
            initialize_missing (`bool`, defaults to False): Whether what the checkpoint lacks (the decoders of a
                checkpoint that holds only an encoder) is initialised anew.

        Raises:
            ValueError: If the checkpoint lacks weights and `initialize_missing` is False; not where the caller is told
                which, by `output_loading_info`, or gives the weights and no checkpoint.
        """
        kwargs = with_subfolder(cls.config_class.model_type, pretrained_model_name_or_path, kwargs)
        model, info = super().from_pretrained(pretrained_model_name_or_path, *args, output_loading_info=True, **kwargs)
        missing = model.fill_missing(set(info["missing_keys"]))
        is_told = output_loading_info or pretrained_model_name_or_path is None
        if missing and not initialize_missing and not is_told:
            parts = sorted({name.split(".")[0] for name in missing})
            raise ValueError(
                f"{pretrained_model_name_or_path} is not a complete pretraining checkpoint of {cls.__name__}: it has "
                f"no weights for {', '.join(parts)} ({len(missing)} tensors). Pass initialize_missing=True to start "
                "these anew, or load the encoder alone with AutoModel.from_pretrained."
            )
        for name in model.frozen_modules:
            if hasattr(model.get_submodule(name), "is_trained"):
                model.get_submodule(name).is_trained = not any(key.startswith(f"{name}.") for key in missing)
        model.freeze()
        model.eval()
        return (model, info) if output_loading_info else model


class MaskedViTForPreTraining(PreTrainingMixin, MaskedViTPreTrainedModel):
    """The base of the methods' pretraining models."""

    def save_pretrained(self, *args, save_original_format: bool = False, **kwargs) -> None:
        """
        As `PreTrainedModel.save_pretrained`, under the names that the weights have here. By default it would write a
        frozen ViT's under those of older versions of transformers, which the Trainer could not resume from.
        """
        super().save_pretrained(*args, save_original_format=save_original_format, **kwargs)
