"""TEC: a new encoder, fed a quarter of the patches, predicts features and attention that a frozen base has of all."""

from dataclasses import dataclass

import torch
from torch import nn
from transformers.backbone_utils import filter_output_hidden_states
from transformers.modeling_outputs import ImageClassifierOutput
from transformers.utils import ModelOutput, logging
from transformers.utils.generic import can_return_tuple

from ..vit.attention import MaskedViTMLP
from ..vit.embeddings import MaskedViTEmbeddings
from ..vit.encoders import encoder_from
from ..vit.frozen import build_frozen
from ..vit.frozen_sources import FrozenSource
from ..vit.modeling_vit import (
    HEADS,
    MaskedViTBackbone,
    MaskedViTForDepthEstimation,
    MaskedViTForImageClassification,
    MaskedViTForObjectDetection,
    MaskedViTForSemanticSegmentation,
    MaskedViTModel,
    pool,
    refuse_unknown,
    with_encoder,
    without_registers,
)
from ..vit.pretraining import MaskedViTForPreTraining
from ..vit.teachers import FrozenTeacherMixin
from ..vit.transfer import refuse_other_network
from .adapters import TECEncoderAdapter, block_outputs
from .configuration_tec import TECConfig
from .decoder import TECDecoder

logger = logging.get_logger(__name__)

# What a checkpoint may hold besides the encoder; not worth a warning when only the encoder is loaded.
_BESIDES_ENCODER = [r"^base\.", r"^decoder\.", r"^encoder_adapter\.", *HEADS]


@dataclass
class TECForPreTrainingOutput(ModelOutput):
    """
    L patches, R = 1 + `attention_top_k` rows of attention ([CLS] first; 1 or 1 + L by `config.attention_target`), the
    base's width and heads.

    Args:
        loss (`torch.FloatTensor` of shape `()`): `loss_feature + loss_attention`, what is minimised.
        loss_feature (`torch.FloatTensor` of shape `()`): Mean squared error of the features of hidden patches.
        loss_attention (`torch.FloatTensor` of shape `()`, *optional*): Cross-entropy of the attention's rows.
        predicted_features (`torch.FloatTensor` of shape `(batch_size, L, base_width)`).
        target_features (`torch.FloatTensor` of shape `(batch_size, L, base_width)`): Normalised.
        predicted_attention_logits (`torch.FloatTensor` of shape `(batch_size, base_heads, R, L)`, *optional*): Scaled.
        target_attention_logits (`torch.FloatTensor` of shape `(batch_size, base_heads, R, L)`, *optional*): Scaled,
            not divided by the temperature.
        attention_rows (`torch.LongTensor` of shape `(batch_size, R)`, *optional*): 0 is [CLS], 1 to L the patches.
        adapted_states (`torch.FloatTensor` of shape `(batch_size, 1 + num_keep, hidden_size)`): What the decoder
            reads.
        mask (`torch.FloatTensor` of shape `(batch_size, L)`): 1 where hidden from the encoder.
        ids_restore (`torch.LongTensor` of shape `(batch_size, L)`): Place of patch i in shuffled order.
        hidden_states, attentions: Of the encoder, when asked for.
    """

    loss: torch.FloatTensor | None = None
    loss_feature: torch.FloatTensor | None = None
    loss_attention: torch.FloatTensor | None = None
    predicted_features: torch.FloatTensor | None = None
    target_features: torch.FloatTensor | None = None
    predicted_attention_logits: torch.FloatTensor | None = None
    target_attention_logits: torch.FloatTensor | None = None
    attention_rows: torch.LongTensor | None = None
    adapted_states: torch.FloatTensor | None = None
    mask: torch.FloatTensor | None = None
    ids_restore: torch.LongTensor | None = None
    hidden_states: tuple[torch.FloatTensor, ...] | None = None
    attentions: tuple[torch.FloatTensor, ...] | None = None


class TECEmbeddings(MaskedViTEmbeddings):
    """The masked ViT's embeddings with the input adapter on [CLS] (section 2.2)."""

    def __init__(self, config: TECConfig):
        super().__init__(config)
        width = config.hidden_size
        self.cls_adapter = (
            MaskedViTMLP(width, 4 * width, config.hidden_act) if config.has_input_adapter else nn.Identity()
        )

    def class_token(self) -> torch.Tensor:
        return self.cls_adapter(self.cls_token)


class TECModel(MaskedViTModel):
    """The encoder that TEC pretrains, with the input adapter; [`to_vit`] folds it into [CLS]."""

    config: TECConfig
    embeddings_class = TECEmbeddings
    _no_split_modules = ["TECEmbeddings", "MaskedViTLayer"]
    _keys_to_ignore_on_load_unexpected = _BESIDES_ENCODER

    @torch.no_grad()
    def vit_state_dict(self) -> dict[str, torch.Tensor]:
        folded = {"embeddings.cls_token": self.embeddings.class_token()}
        weights = super().vit_state_dict() | folded
        return {name: value for name, value in weights.items() if not name.startswith("embeddings.cls_adapter.")}


class TECForPreTraining(FrozenTeacherMixin, MaskedViTForPreTraining):
    """Encoder, adapters, multi-target decoder and frozen base (section 2 of the paper)."""

    config: TECConfig
    teacher_name = "base"
    _no_split_modules = ["TECEmbeddings", "MaskedViTLayer"]

    def __init__(self, config: TECConfig):
        super().__init__(config)
        self.encoder = TECModel(config)
        self.encoder_adapter = TECEncoderAdapter(config) if config.has_encoder_adapter else None
        self.base = build_frozen(config, "base")
        self._has_warned = False
        if config.feature_layers > self.base.num_layers:
            raise ValueError(
                f"feature_layers is {config.feature_layers}, and the base has {self.base.num_layers} blocks. Choose "
                "at most that many."
            )
        if config.attention_target == "selected" and config.attention_top_k > config.num_patches:
            raise ValueError(
                f"attention_top_k is {config.attention_top_k}, and there are {config.num_patches} patches. Choose "
                'fewer, or attention_target="all".'
            )
        self.decoder = TECDecoder(config, self.base.hidden_size, self.base.num_heads)
        self.post_init()
        self.freeze()

    @classmethod
    def from_base(cls, base, config: TECConfig | None = None, **kwargs) -> "TECForPreTraining":
        """
        A new model that learns from a trained one.

        Args:
            base (`PreTrainedModel`, or a path or name on the Hub): Any ViT with a [CLS] token: of hf_mim (a TEC model
                for a second round), ViT, ViTMAE, DINOv2 and DINOv3 with or without registers, CLIP's vision tower. A
                path's `preprocessor_config.json` tells how it wants pixels normalised.
            config (`TECConfig`, *optional*): Of the new model; `base_config` and, where the base tells it,
                `base_image_mean` and `base_image_std` are filled in. None: the base's width, depth, heads and grid.
            kwargs: As of `TECForPreTraining._from_config`, e.g. `attn_implementation`.

        Raises:
            ValueError: If the network cannot be a base, or the patch grids have other proportions.
            OSError: If there is no such model.
        """
        return cls.from_teacher(base, config, **kwargs)

    def take_source(self, source: FrozenSource, new_encoder: bool = True) -> None:
        super().take_source(source)
        if new_encoder and self.config.initialize_from_base:
            self._start_from_base()

    @torch.no_grad()
    def _start_from_base(self) -> None:
        base = encoder_from(self.base.network)
        refuse_other_network(self.config, base.config, "the base (initialize_from_base)")
        self.encoder.load_vit_state_dict(base.vit_state_dict())

    @can_return_tuple
    @filter_output_hidden_states
    def forward(
        self,
        pixel_values: torch.Tensor,
        noise: torch.Tensor | None = None,
        return_loss: bool = True,
        targets: dict[str, torch.Tensor] | None = None,
        **kwargs,
    ) -> TECForPreTrainingOutput:
        """
        Args:
            pixel_values (`torch.Tensor` of shape `(batch_size, num_channels, height, width)`): Normalised pictures.
            noise (`torch.Tensor` of shape `(batch_size, num_patches)`, *optional*): Uniform in [0, 1); the patches
                with the smallest are kept. Drawn if None.
            return_loss (`bool`, defaults to True): Whether the output has `loss`. (By this argument the Trainer knows
                that there is a loss without labels.)
            targets (`dict[str, torch.Tensor]`, *optional*): What [`~TECForPreTraining.frozen_targets`] gives of these
                pictures; computed if None.

        Raises:
            ValueError: If the shapes are not those of the config.
            TypeError: If there is no such argument.
        """
        refuse_unknown(self, kwargs)
        is_noise = self.training and not (self.base.is_trained or self._has_warned)
        if is_noise and not torch.compiler.is_compiling():
            self._has_warned = True
            logger.warning(
                "The base is as it was initialised: its features and attention are noise, and TEC learns them. Build "
                "the model by TECForPreTraining.from_base(...), or load a checkpoint that has its base."
            )
        masking = self.masking(pixel_values, noise)
        context = self.encoder(pixel_values, ids_keep=masking.ids_keep, return_dict=True, **kwargs)
        adapted = context.last_hidden_state
        if self.encoder_adapter is not None:
            adapted = self.encoder_adapter(block_outputs(context))
        adapted = without_registers(adapted, self.config)

        targets = self.frozen_targets(pixel_values) if targets is None else targets
        target_features = targets["features"].float()
        rows, target_logits = targets.get("rows"), targets.get("logits")
        if rows is not None:
            rows, target_logits = rows.long(), target_logits.float()
        features, logits = self.decoder(adapted, masking.ids_restore, rows)

        features = features.float()
        loss_feature = ((features - target_features).square().mean(dim=-1) * masking.mask).sum() / masking.mask.sum()
        loss, loss_attention = loss_feature, None
        if rows is not None:
            shares = (target_logits / self.config.attention_temperature).softmax(dim=-1)
            loss_attention = -(shares * logits.log_softmax(dim=-1)).sum(dim=-1).mean()
            loss = loss_feature + loss_attention
        return TECForPreTrainingOutput(
            loss=loss if return_loss else None,
            loss_feature=loss_feature,
            loss_attention=loss_attention,
            predicted_features=features,
            target_features=target_features,
            predicted_attention_logits=logits,
            target_attention_logits=target_logits,
            attention_rows=rows,
            adapted_states=adapted,
            mask=masking.mask,
            ids_restore=masking.ids_restore,
            hidden_states=context.hidden_states,
            attentions=context.attentions,
        )

    @torch.no_grad()
    def frozen_targets(self, pixel_values: torch.Tensor) -> dict[str, torch.Tensor]:
        """
        What the base has of pictures, whatever is hidden from the student: `features` as [`feature_targets`] gives,
        and, if attention is predicted, `rows` and `logits` as [`attention_targets`] gives.
        """
        base = self.base(pixel_values, num_last_layers=self.config.feature_layers)
        features = {"features": self.feature_targets(base.last_hidden_states)}
        rows, logits = self.attention_targets(base.attention)
        return features if rows is None else features | {"rows": rows, "logits": logits}

    @torch.no_grad()
    def feature_targets(self, last_hidden_states: tuple[torch.Tensor, ...]) -> torch.Tensor:
        """Mean of the base's last blocks' outputs, normalised; float32 (batch_size, num_patches, base_width)."""
        features = sum(tokens[:, 1:].float() for tokens in last_hidden_states) / len(last_hidden_states)
        if self.config.feature_normalization == "none":
            return features
        dim = 1 if self.config.feature_normalization == "patch" else 2
        variance, mean = torch.var_mean(features, dim=dim, keepdim=True)
        return (features - mean) / (variance + 1e-6).sqrt()

    @torch.no_grad()
    def attention_targets(self, attention) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Rows (batch_size, R) of the base's attention, and their logits (batch_size, base_heads, R, num_patches)."""
        kind = self.config.attention_target
        if kind == "none":
            return None, None
        batch_size, device = attention.hidden_states.shape[0], attention.hidden_states.device
        if kind == "all":
            rows = torch.arange(1 + self.config.num_patches, device=device).expand(batch_size, -1)
            return rows, attention.logits(rows)
        rows = torch.zeros(batch_size, 1, dtype=torch.long, device=device)
        logits = attention.logits(rows)
        if kind == "cls":
            return rows, logits
        selected = 1 + logits[:, :, 0].mean(dim=1).topk(self.config.attention_top_k, dim=1).indices
        return torch.cat((rows, selected), dim=1), torch.cat((logits, attention.logits(selected)), dim=2)

    @torch.no_grad()
    def adapter_shares(self, pixel_values: torch.Tensor, noise: torch.Tensor | None = None) -> list[float] | None:
        """Share of each group of blocks, the first blocks' first, in the magnitudes that the adapters add up."""
        if self.encoder_adapter is None:
            return None
        ids_keep = self.masking(pixel_values, noise).ids_keep
        context = self.encoder(pixel_values, ids_keep=ids_keep, return_dict=True, output_hidden_states=True)
        outputs = self.encoder_adapter.group_outputs(block_outputs(context))
        magnitudes = torch.stack([output.float().norm(dim=-1) for output in outputs], dim=-1)
        return (magnitudes / magnitudes.sum(dim=-1, keepdim=True)).mean(dim=(0, 1)).tolist()


class TECForImageClassification(MaskedViTForImageClassification):
    """
    TEC's encoder with a linear classifier.

    `config.tuning_mode` says what is trained besides the classifier. The encoder adapters come from a pretraining
    checkpoint, `TECForImageClassification.from_pretrained(folder, tuning_mode="encoder_adapters")`.
    """

    config: TECConfig
    encoder_class = TECModel
    _no_split_modules = ["TECEmbeddings", "MaskedViTLayer"]

    def __init__(self, config: TECConfig):
        super().__init__(config)
        tuned = config.tuning_mode == "encoder_adapters"
        self.encoder_adapter = TECEncoderAdapter(config) if tuned else None
        self._keys_to_ignore_on_load_unexpected = [
            name for name in _BESIDES_ENCODER if not (tuned and "adapt" in name)
        ]
        self.post_init()
        self.freeze()

    def freeze(self) -> None:
        """Leaves trainable what `config.tuning_mode` says."""
        mode = self.config.tuning_mode
        if mode != "full":
            self.encoder.requires_grad_(False)
        if mode in ("input_adapter", "encoder_adapters"):
            self.encoder.embeddings.cls_adapter.requires_grad_(True)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, output_loading_info=False, **kwargs):
        """
        As `PreTrainedModel.from_pretrained`, and what is not tuned stays frozen.

        Raises:
            ValueError: If the encoder adapters are to be tuned and the checkpoint has none.
        """
        model, info = super().from_pretrained(pretrained_model_name_or_path, *args, output_loading_info=True, **kwargs)
        if any(name.startswith("encoder_adapter.") for name in info["missing_keys"]):
            raise ValueError(
                f"{pretrained_model_name_or_path} has no encoder adapters to tune. Give a pretraining checkpoint of "
                'TEC, or choose another tuning_mode, for example "input_adapter".'
            )
        model.freeze()
        return (model, info) if output_loading_info else model

    def trainable_modes(self) -> tuple[str, ...]:
        """What can be trained besides all or the head."""
        return ("linear", "input_adapter", "encoder_adapters")

    def set_trainable(self, mode: str) -> None:
        """
        Leaves trainable what a mode says.

        Args:
            mode (`str`): One of `trainable_modes()`.

        Raises:
            ValueError: If the encoder adapters are not there: they are loaded by `tuning_mode="encoder_adapters"`.
        """
        if mode == "encoder_adapters" and self.encoder_adapter is None:
            raise ValueError(
                'The model was built without encoder adapters. Load it by from_pretrained(..., tuning_mode="'
                'encoder_adapters").'
            )
        self.config.tuning_mode = mode
        self.requires_grad_(True)
        self.freeze()

    def trained_parameters(self) -> dict[str, int]:
        """Number of parameters that are trained: of the classifier, the adapters, the encoder without them; total."""
        parts = {"classifier": 0, "input_adapter": 0, "encoder_adapters": 0, "encoder": 0}
        prefixes = {
            "classifier.": "classifier",
            "encoder.embeddings.cls_adapter.": "input_adapter",
            "encoder_adapter.": "encoder_adapters",
            "encoder.": "encoder",
        }
        for name, parameter in self.named_parameters():
            part = next(part for prefix, part in prefixes.items() if name.startswith(prefix))
            parts[part] += parameter.numel() if parameter.requires_grad else 0
        return parts | {"total": sum(parts.values())}

    @can_return_tuple
    @filter_output_hidden_states
    def forward(
        self,
        pixel_values: torch.Tensor,
        labels: torch.Tensor | None = None,
        interpolate_pos_encoding: bool = False,
        **kwargs,
    ) -> ImageClassifierOutput:
        """As of `MaskedViTForImageClassification`; with encoder adapters the classifier reads their output."""
        if self.encoder_adapter is None:
            return super().forward(pixel_values, labels, interpolate_pos_encoding, return_dict=True, **kwargs)
        refuse_unknown(self, kwargs)
        outputs = self.encoder(
            pixel_values, interpolate_pos_encoding=interpolate_pos_encoding, return_dict=True, **kwargs
        )
        adapted = self.encoder_adapter(block_outputs(outputs))
        return self.classify(pool(adapted, self.config), labels, outputs)


TECForDepthEstimation = with_encoder(MaskedViTForDepthEstimation, TECModel)
TECForObjectDetection = with_encoder(MaskedViTForObjectDetection, TECModel)
TECForSemanticSegmentation = with_encoder(MaskedViTForSemanticSegmentation, TECModel)
TECBackbone = with_encoder(MaskedViTBackbone, TECModel)

__all__ = [
    "TECBackbone",
    "TECForDepthEstimation",
    "TECForImageClassification",
    "TECForPreTraining",
    "TECForObjectDetection",
    "TECForSemanticSegmentation",
    "TECModel",
]
