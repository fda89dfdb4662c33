"""
The masked Vision Transformer that every method shares: encoder, backbone, and the models with a head. What they are
made of: `embeddings.py`, `layers.py`, `attention.py`; what decodes them: `decoder.py`.

Parameter names are those of transformers' `ViTModel`, so that encoders go to and from the stock classes by name. What
is added: masking before the patch projection, fixed positions, rectangular grids, any number of channels, and
stochastic depth.

What stays in float32 under autocast: `autocast.py`.
"""

import inspect
from typing import TypeVar

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.backbone_utils import BackboneMixin, filter_output_hidden_states
from transformers.modeling_outputs import (
    BackboneOutput,
    BaseModelOutputWithPooling,
    DepthEstimatorOutput,
    ImageClassifierOutput,
    SemanticSegmenterOutput,
)
from transformers.utils import TransformersKwargs, logging
from transformers.utils.generic import can_return_tuple

from .alignment import AlignedLoading
from .configuration_vit import MaskedViTConfig
from .depth import build_depth_head, scale_invariant_log_loss
from .detection import DetectionHead, ObjectDetectionOutput, detection_targets, picture_sizes
from .embeddings import MaskedViTEmbeddings
from .layers import build_layers
from .pixels import PixelRenormalization
from .position import fixed_position_table
from .repository import HUB_ARGUMENTS, with_subfolder
from .segmentation import build_segmentation_head, segmentation_loss
from .sizes import as_pair
from .transfer import refuse_other_positions

logger = logging.get_logger(__name__)

_Model = TypeVar("_Model", bound=PreTrainedModel)

# The heads that a checkpoint may hold besides an encoder; not worth a warning when that alone is loaded.
HEADS = [r"^classifier\.", r"^segmentation_head\.", r"^depth_head\.", r"^detection_head\."]


@torch.no_grad()
def init_linear(module: nn.Linear | nn.Conv2d, fused_maps: int = 1) -> None:
    """
    Xavier uniform, a convolution being taken for the linear map from patches that it is; the bias 0.

    Args:
        fused_maps (`int`, defaults to 1): Of how many maps of this shape, one below the other, the module is one: the
            bound is that of all, `sqrt(6 / (inputs + fused_maps * outputs))`.
    """
    # The flag is looked at here because a flattened view of a loaded weight no longer carries it.
    if not getattr(module.weight, "_is_hf_initialized", False):
        weight = module.weight.flatten(1)
        outputs, inputs = weight.shape
        init.xavier_uniform_(weight, gain=((inputs + outputs) / (inputs + fused_maps * outputs)) ** 0.5)
    if module.bias is not None:
        init.zeros_(module.bias)


# What transformers hands through all layers, and what every ViT takes.
_KNOWN_KEYWORDS = {*TransformersKwargs.__annotations__, "interpolate_pos_encoding", "return_dict"}


def refuse_unknown(model: PreTrainedModel, keywords: dict) -> None:
    """Raises TypeError if `forward`'s further keywords have one that nothing reads, such as a misspelt argument."""
    for name in keywords:
        if name not in _KNOWN_KEYWORDS:
            known = [parameter for parameter in inspect.signature(model.forward).parameters if parameter != "kwargs"]
            hint = f"It takes {', '.join(known)}."
            if hasattr(model.config, name):
                hint = f"It is a field of the config: set it there, before the model is built. {hint}"
            raise TypeError(f"forward of {type(model).__name__} has no argument {name!r}. {hint}")


class MaskedViTPreTrainedModel(AlignedLoading, PreTrainedModel):
    """Conventions of transformers for all models of hf_mim: names, initialisation, loading."""

    config: MaskedViTConfig
    base_model_prefix = "encoder"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    supports_gradient_checkpointing = True
    _no_split_modules = ["MaskedViTEmbeddings", "MaskedViTLayer"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, **kwargs):
        """As `PreTrainedModel.from_pretrained`; in a repository with a stock export at its root looks below it."""
        kwargs = with_subfolder(cls.config_class.model_type, pretrained_model_name_or_path, kwargs)
        return super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            init_linear(module, getattr(module, "fused_maps", 1))
            if getattr(module, "starts_at_zero", False):
                init.zeros_(module.weight)
        else:
            super()._init_weights(module)
        if isinstance(module, MaskedViTEmbeddings) and module.cls_token is not None:
            init.normal_(module.cls_token, std=self.config.initializer_range)
        if isinstance(module, MaskedViTEmbeddings) and module.register_tokens is not None:
            init.normal_(module.register_tokens, std=self.config.initializer_range)
        if hasattr(module, "mask_token"):
            init.normal_(module.mask_token, std=self.config.initializer_range)
        if isinstance(module, PixelRenormalization):
            module.reset()
        positions = getattr(module, "position_embeddings", None)
        if isinstance(positions, nn.Parameter):
            init.trunc_normal_(positions, std=self.config.initializer_range)
        elif positions is not None:
            init.copy_(positions, fixed_position_table(self.config, positions.shape[-1]))


class MaskedViTModel(MaskedViTPreTrainedModel):
    """The encoder. Methods subclass it with their own config."""

    embeddings_class = MaskedViTEmbeddings
    _keys_to_ignore_on_load_unexpected = HEADS

    def __init__(self, config: MaskedViTConfig):
        config.check_sizes()
        super().__init__(config)
        self.embeddings = self.embeddings_class(config)
        self.layers = build_layers(config, config.drop_path_rate)
        self.layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.embeddings.patch_embeddings

    def vit_state_dict(self) -> dict[str, torch.Tensor]:
        """
        The weights of the same encoder under the names of transformers' `ViTModel`, position table included where
        there is one.
        """
        table = self.embeddings.position_embeddings
        return self.state_dict() | ({} if table is None else {"embeddings.position_embeddings": table})

    @torch.no_grad()
    def load_vit_state_dict(self, weights: dict[str, torch.Tensor]) -> None:
        """
        Takes the weights of another encoder, as `vit_state_dict` gives them; what a ViT has not stays as it is. Number
        of heads, activation and epsilon cannot be told from weights: whoever has the other's config asks
        `refuse_other_network` first, as `load_encoder` of the pretraining models does.

        Raises:
            RuntimeError: If names or shapes differ.
            ValueError: If it has learned positions and this one the fixed table, or only one of both has a table.
        """
        own, table = self.state_dict(), self.embeddings.position_embeddings
        if (table is None) == ("embeddings.position_embeddings" in weights):
            raise ValueError(
                f"One encoder has a table of positions and the other rotary positions: position_embedding is "
                f'"{self.config.position_embedding}" here. Build both with the same.'
            )
        fixed = {"embeddings.position_embeddings"} - set(own)
        for name in fixed & set(weights):
            refuse_other_positions(table, weights[name], "the other encoder")
        plain = set(self.vit_state_dict())
        kept = {name: value for name, value in own.items() if name not in plain}
        self.load_state_dict({name: value for name, value in weights.items() if name not in fixed} | kept)

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor,
        interpolate_pos_encoding: bool = False,
        ids_keep: torch.Tensor | None = None,
        output_hidden_states: bool | int | list[int] | None = None,
        output_attentions: bool | None = None,
        cls_only: bool = False,
        num_layers: int | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPooling:
        """
        Args:
            pixel_values (`torch.Tensor` of shape `(batch_size, num_channels, height, width)`): Normalised pictures.
            interpolate_pos_encoding (`bool`, defaults to False): Accept pictures of another size than
                `config.image_size`, with interpolated positions.
            ids_keep (`torch.LongTensor` of shape `(batch_size * views, num_keep)`, *optional*): The patches to look
                at, row-major indices, in the order wanted; all of them if None. Several views of a picture follow
                each other, and so do they in the outputs.
            output_hidden_states (`bool`, `int` or `list[int]`, *optional*): Whether, or which of the, `1 +
                num_hidden_layers` inputs and outputs of blocks are wanted; the others are None.
            output_attentions (`bool`, *optional*): Whether the attention weights are wanted.
            cls_only (`bool`, defaults to False): Whether [CLS] alone is wanted, which the last block then computes
                alone: `last_hidden_state` is (batch_size, 1, hidden_size), and there is no mean to pool.
            num_layers (`int`, *optional*): How many of the blocks are run; all if None.

        Returns:
            `BaseModelOutputWithPooling`: `last_hidden_state` (batch_size, num_prefix + L, hidden_size) after the final
            LayerNorm, [CLS] first where there is one, then registers, then the patches; `pooler_output` (batch_size,
            hidden_size) by `config.pooling`; and, when asked for, `hidden_states` and `attentions` (the latter with
            `attn_implementation="eager"`).

        Raises:
            ValueError: If the channels or the picture's size are not those of the config.
            TypeError: If there is no such argument.
        """
        refuse_unknown(self, kwargs)
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        if output_attentions is None:
            output_attentions = self.config.output_attentions
        hidden_states = self.embeddings(pixel_values, ids_keep, interpolate_pos_encoding)
        rotary = self.embeddings.rotary(pixel_values, ids_keep)
        # Collected here and not by transformers' hooks, which are installed at the first call that asks: torch.compile
        # cannot trace that.
        states, weights = [hidden_states], []
        layers = list(self.layers)[:num_layers]
        for i, layer in enumerate(layers, start=1):
            alone = cls_only and i == len(layers)
            hidden_states = layer(hidden_states, weights if output_attentions else None, rotary, alone, **kwargs)
            states.append(hidden_states)
        hidden_states = self.layernorm(hidden_states)
        return BaseModelOutputWithPooling(
            last_hidden_state=hidden_states,
            pooler_output=None if cls_only and self.config.pooling == "mean" else pool(hidden_states, self.config),
            hidden_states=_selected(states, output_hidden_states),
            attentions=tuple(weights) or None,
        )


def pool(tokens: torch.Tensor, config: MaskedViTConfig) -> torch.Tensor:
    """[CLS] or the mean of the patches (batch_size, hidden_size), by `config.pooling`, of an encoder's tokens."""
    return tokens[:, 0] if config.pooling == "cls" else tokens[:, config.num_prefix :].mean(dim=1)


def without_registers(tokens: torch.Tensor, config: MaskedViTConfig) -> torch.Tensor:
    """An encoder's tokens (batch_size, num_prefix + length, hidden_size) as decoders read them: [CLS], patches."""
    if config.num_register_tokens == 0:
        return tokens
    return torch.cat((tokens[:, : int(config.use_cls_token)], tokens[:, config.num_prefix :]), dim=1)


def _selected(states: list[torch.Tensor], wanted: bool | int | list[int]) -> tuple[torch.Tensor | None, ...] | None:
    if isinstance(wanted, bool):
        return tuple(states) if wanted else None
    indices = {index % len(states) for index in ([wanted] if isinstance(wanted, int) else wanted)}
    return tuple(state if index in indices else None for index, state in enumerate(states))


def classification_loss(logits: torch.Tensor, labels: torch.Tensor, config) -> torch.Tensor:
    """
    The loss of `config.problem_type`, in float32.

    Args:
        logits (`torch.Tensor` of shape `(batch_size, num_labels)`).
        labels (`torch.Tensor`): "single_label_classification", and None with several labels: class indices
            (batch_size,), or probabilities (batch_size, num_labels) as mixup and label smoothing give, with
            cross-entropy. "multi_label_classification": 0 or 1, or what lies between, (batch_size, num_labels), with
            binary cross-entropy. "regression", and None with one label: numbers (batch_size,) or (batch_size,
            num_labels), with the mean squared error.

    Raises:
        ValueError: If the labels' shape is not that of the problem.
    """
    problem = config.problem_type or ("regression" if config.num_labels == 1 else "single_label_classification")
    logits = logits.float()
    if problem == "single_label_classification" and labels.ndim == 1:
        return nn.functional.cross_entropy(logits, labels)
    if problem == "regression" and config.num_labels == 1:
        labels = labels.reshape(-1, 1)
    if labels.shape != logits.shape:
        raise ValueError(
            f"labels has the shape {tuple(labels.shape)}; {problem} with num_labels={config.num_labels} takes "
            f"{tuple(logits.shape)}{' or (batch_size,)' if problem != 'multi_label_classification' else ''}."
        )
    if problem == "single_label_classification":
        return nn.functional.cross_entropy(logits, labels.float())
    if problem == "multi_label_classification":
        return nn.functional.binary_cross_entropy_with_logits(logits, labels.float())
    return nn.functional.mse_loss(logits, labels.float())


def _is_pretraining(architectures: list[str] | None) -> bool:
    return any(name.endswith("ForPreTraining") for name in architectures or ())


class MaskedViTWithHead(MaskedViTPreTrainedModel):
    """
    An encoder that is to learn a task. Methods set `encoder_class`.

    Loaded from a pretraining checkpoint it starts without that run's stochastic depth: `config.drop_path_rate` is 0
    unless another is asked for.
    """

    accepts_loss_kwargs = False
    encoder_class: type[MaskedViTModel] = MaskedViTModel

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, config=None, **kwargs):
        """As `PreTrainedModel.from_pretrained`."""
        kwargs = with_subfolder(cls.config_class.model_type, pretrained_model_name_or_path, kwargs)
        if pretrained_model_name_or_path is not None and "drop_path_rate" not in kwargs:
            hub = {name: kwargs[name] for name in HUB_ARGUMENTS if name in kwargs}
            saved, _ = PreTrainedConfig.get_config_dict(pretrained_model_name_or_path, **hub)
            if _is_pretraining(saved.get("architectures")):
                if config is None:
                    kwargs["drop_path_rate"] = 0.0
                elif _is_pretraining(config.architectures) and config.drop_path_rate == saved.get(
                    "drop_path_rate", type(config).drop_path_rate
                ):
                    # As the Auto classes hand it over; with a rate that is asked for it names no architecture.
                    config.drop_path_rate = 0.0
        return super().from_pretrained(pretrained_model_name_or_path, *args, config=config, **kwargs)


class MaskedViTForImageClassification(MaskedViTWithHead):
    """
    An encoder and a linear classifier on its `pooler_output`.

    Loaded from a pretraining checkpoint it starts without that run's stochastic depth: `config.drop_path_rate` is 0
    unless another is asked for.
    """

    def __init__(self, config: MaskedViTConfig):
        super().__init__(config)
        self.encoder = self.encoder_class(config)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor,
        labels: torch.Tensor | None = None,
        interpolate_pos_encoding: bool = False,
        **kwargs,
    ) -> ImageClassifierOutput:
        """
        Args:
            pixel_values (`torch.Tensor` of shape `(batch_size, num_channels, height, width)`): Normalised pictures.
            labels (`torch.Tensor`, *optional*): By `config.problem_type`, as [`classification_loss`] takes them.
            interpolate_pos_encoding (`bool`, defaults to False): Accept other sizes than `config.image_size`.

        Returns:
            `ImageClassifierOutput`: `loss` (if `labels`), `logits` (batch_size, num_labels), and `hidden_states`,
            `attentions` when asked for.
        """
        refuse_unknown(self, kwargs)
        outputs = self.encoder(
            pixel_values, interpolate_pos_encoding=interpolate_pos_encoding, return_dict=True, **kwargs
        )
        return self.classify(outputs.pooler_output, labels, outputs)

    def classify(self, pooled: torch.Tensor, labels: torch.Tensor | None, outputs) -> ImageClassifierOutput:
        """Logits and loss from `pooled` (batch_size, hidden_size), with what `outputs` of the encoder has recorded."""
        logits = self.classifier(pooled)
        return ImageClassifierOutput(
            loss=None if labels is None else classification_loss(logits, labels, self.config),
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


class MaskedViTForDensePrediction(MaskedViTWithHead):
    """An encoder and a head that tells what is where."""

    def trainable_modes(self) -> tuple[str, ...]:
        """What may be trained besides everything."""
        return ("head",)

    def set_trainable(self, mode: str) -> None:
        """Leaves one of `trainable_modes()` to be trained, and freezes the rest."""
        for part in self.children():
            part.requires_grad_(part is not self.encoder)


class MaskedViTForSemanticSegmentation(MaskedViTForDensePrediction):
    """
    An encoder, and a head on the patches of its last block after the final LayerNorm that tells the class of each
    pixel: `config.segmentation_head`.

    Loaded from a pretraining checkpoint it starts without that run's stochastic depth: `config.drop_path_rate` is 0
    unless another is asked for.
    """

    def __init__(self, config: MaskedViTConfig):
        super().__init__(config)
        self.encoder = self.encoder_class(config)
        self.segmentation_head = build_segmentation_head(config)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor,
        labels: torch.Tensor | None = None,
        interpolate_pos_encoding: bool = True,
        **kwargs,
    ) -> SemanticSegmenterOutput:
        """
        Args:
            pixel_values (`torch.Tensor` of shape `(batch_size, num_channels, height, width)`): Normalised pictures,
                of any size that the patches divide.
            labels (`torch.LongTensor` of shape `(batch_size, label_height, label_width)`, *optional*): The class of
                each pixel, `config.semantic_loss_ignore_index` where there is none. The logits are interpolated to
                this size.
            interpolate_pos_encoding (`bool`, defaults to True): False refuses other sizes than `config.image_size`.

        Returns:
            `SemanticSegmenterOutput`: `loss` (if `labels`); `logits` (batch_size, num_labels, rows, columns), one a
            patch with the head "linear", four times as many rows and columns with "upernet"; and `hidden_states`,
            `attentions` when asked for.

        Raises:
            ValueError: If the sizes do not fit.
            TypeError: If there is no such argument.
        """
        refuse_unknown(self, kwargs)
        outputs = self.encoder(
            pixel_values, interpolate_pos_encoding=interpolate_pos_encoding, return_dict=True, **kwargs
        )
        logits, auxiliary_logits = self.segmentation_head(
            _as_map(outputs.last_hidden_state, pixel_values, self.config)
        )
        loss = None
        if labels is not None:
            ignored = self.config.semantic_loss_ignore_index
            loss = segmentation_loss(logits, labels, ignored)
            if auxiliary_logits is not None:
                loss = loss + self.config.auxiliary_loss_weight * segmentation_loss(auxiliary_logits, labels, ignored)
        return SemanticSegmenterOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )


class MaskedViTForDepthEstimation(MaskedViTForDensePrediction):
    """
    An encoder, and a head on the patches of its blocks after the final LayerNorm that tells how far away each pixel
    is: `config.depth_head`.

    Loaded from a pretraining checkpoint it starts without that run's stochastic depth: `config.drop_path_rate` is 0
    unless another is asked for.
    """

    def __init__(self, config: MaskedViTConfig):
        super().__init__(config)
        self.encoder = self.encoder_class(config)
        self.depth_head = build_depth_head(config)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor,
        labels: torch.Tensor | None = None,
        interpolate_pos_encoding: bool = True,
        output_hidden_states: bool | None = None,
        **kwargs,
    ) -> DepthEstimatorOutput:
        """
        Args:
            pixel_values (`torch.Tensor` of shape `(batch_size, num_channels, height, width)`): Normalised pictures,
                of any size that the patches divide.
            labels (`torch.Tensor` of shape `(batch_size, label_height, label_width)`, *optional*): The depth of each
                pixel, in any unit; 0 or not finite where it is not known. The predicted ones are interpolated to this
                size.
            interpolate_pos_encoding (`bool`, defaults to True): False refuses other sizes than `config.image_size`.
            output_hidden_states (`bool`, *optional*): Whether the inputs and outputs of blocks are wanted.

        Returns:
            `DepthEstimatorOutput`: `loss` (if `labels`), the scale-invariant one of `config.scale_invariance`;
            `predicted_depth` (batch_size, rows, columns), above 0, in the unit of the labels, one a patch with the
            head "linear", four times as many rows and columns with "dpt"; and `hidden_states`, `attentions` when
            asked for.

        Raises:
            ValueError: If the sizes do not fit.
            TypeError: If there is no such argument.
        """
        refuse_unknown(self, kwargs)
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        stages = self.depth_head.stages
        outputs = self.encoder(
            pixel_values,
            interpolate_pos_encoding=interpolate_pos_encoding,
            output_hidden_states=output_hidden_states or stages,
            return_dict=True,
            **kwargs,
        )
        tokens = [self.encoder.layernorm(outputs.hidden_states[stage]) for stage in stages]
        relative = self.depth_head([_as_map(one, pixel_values, self.config) for one in tokens]).squeeze(1)
        predicted_depth = (relative.float() + self.config.log_depth_mean).exp()
        loss = None
        if labels is not None:
            loss = scale_invariant_log_loss(predicted_depth, labels, self.config.scale_invariance)
        return DepthEstimatorOutput(
            loss=loss,
            predicted_depth=predicted_depth,
            hidden_states=outputs.hidden_states if output_hidden_states else None,
            attentions=outputs.attentions,
        )


class MaskedViTForObjectDetection(MaskedViTForDensePrediction):
    """
    An encoder, and on the patches of its last block after the final LayerNorm torchvision's Mask R-CNN with ViTDet's
    simple feature pyramid; without `config.detection_masks` Faster R-CNN.

    Loaded from a pretraining checkpoint it starts without that run's stochastic depth: `config.drop_path_rate` is 0
    unless another is asked for.
    """

    # How many regions there are: operations cannot be counted on shapes alone.
    work_depends_on_data = True

    def __init__(self, config: MaskedViTConfig):
        super().__init__(config)
        self.encoder = self.encoder_class(config)
        self.detection_head = DetectionHead(config)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if hasattr(module, "initial_std"):
            init.normal_(module.weight, std=module.initial_std)

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor,
        pixel_mask: torch.Tensor | None = None,
        labels: list[dict[str, torch.Tensor]] | None = None,
        interpolate_pos_encoding: bool = True,
        **kwargs,
    ) -> ObjectDetectionOutput:
        """
        Args:
            pixel_values (`torch.Tensor` of shape `(batch_size, num_channels, height, width)`): Normalised pictures,
                of any size that the patches divide.
            pixel_mask (`torch.LongTensor` of shape `(batch_size, height, width)`, *optional*): 1 where the picture
                is, from the upper left corner, 0 where it was padded; no padding if None.
            labels (`list[dict]`): The objects of each picture, as transformers' detectors take them: `class_labels`
                (n,), from 0; `boxes` (n, 4), centre x, centre y, width and height as shares of the picture's; with
                `config.detection_masks` also `masks` (n, height, width), 1 where the object is. In training mode they
                are needed, and in evaluation mode nothing is computed of them: proposals are then not drawn by chance.
            interpolate_pos_encoding (`bool`, defaults to True): False refuses other sizes than `config.image_size`.

        Returns:
            `ObjectDetectionOutput`: in training mode `loss` and its parts; in evaluation mode `detections`, which the
            image processor's `post_process_object_detection` and `post_process_object_masks` read.

        Raises:
            ValueError: If the sizes do not fit, or labels are missing in training mode.
            TypeError: If there is no such argument.
        """
        refuse_unknown(self, kwargs)
        if self.training and labels is None:
            raise ValueError("In training mode a detector needs labels; for what it finds, call model.eval() first.")
        outputs = self.encoder(
            pixel_values, interpolate_pos_encoding=interpolate_pos_encoding, return_dict=True, **kwargs
        )
        sizes = picture_sizes(pixel_values, pixel_mask)
        targets = detection_targets(labels, sizes, self.config.detection_masks) if self.training else None
        features = _as_map(outputs.last_hidden_state, pixel_values, self.config)
        return self.detection_head(features, pixel_values, sizes, targets)


def _as_map(tokens: torch.Tensor, pixel_values: torch.Tensor, config: MaskedViTConfig) -> torch.Tensor:
    """The patches among an encoder's tokens as (batch_size, hidden_size, rows, columns)."""
    patch_height, patch_width = as_pair(config.patch_size)
    grid = (pixel_values.shape[2] // patch_height, pixel_values.shape[3] // patch_width)
    return tokens[:, config.num_prefix :].transpose(1, 2).unflatten(2, grid).contiguous()


class MaskedViTBackbone(BackboneMixin, MaskedViTPreTrainedModel):
    """
    Feature maps of chosen blocks, for detection and segmentation. Methods set `encoder_class`.

    With `from_pretrained(folder, num_hidden_layers=n)` it has the first n blocks alone. Blocks after the last stage
    that is wanted are never run.
    """

    encoder_class: type[MaskedViTModel] = MaskedViTModel

    def __init__(self, config: MaskedViTConfig):
        super().__init__(config)
        self.num_features = [config.hidden_size] * (config.num_hidden_layers + 1)
        self.encoder = self.encoder_class(config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.encoder.get_input_embeddings()

    @can_return_tuple
    @filter_output_hidden_states
    def forward(self, pixel_values: torch.Tensor, interpolate_pos_encoding: bool = True, **kwargs) -> BackboneOutput:
        """
        Args:
            pixel_values (`torch.Tensor` of shape `(batch_size, num_channels, height, width)`): Normalised pictures,
                of any size that the patches divide.
            interpolate_pos_encoding (`bool`, defaults to True): False refuses other sizes than `config.image_size`.

        Returns:
            `BackboneOutput`: `feature_maps`, one a stage of `config.out_features` ("stem", "stage1", ...), each
            (batch_size, hidden_size, rows, columns): the patch tokens after the final LayerNorm, or as the block gives
            them without `config.apply_layernorm`. Without `config.reshape_hidden_states` they are all the tokens,
            (batch_size, num_prefix + rows * columns, hidden_size).

        Raises:
            ValueError: If the patches do not divide the picture.
            TypeError: If there is no such argument.
        """
        refuse_unknown(self, kwargs)
        kwargs["output_hidden_states"] = True
        stages = [self.stage_names.index(name) for name in self.out_features]
        outputs = self.encoder(
            pixel_values,
            interpolate_pos_encoding=interpolate_pos_encoding,
            num_layers=stages[-1],
            return_dict=True,
            **kwargs,
        )
        maps = [outputs.hidden_states[stage] for stage in stages]
        if self.config.apply_layernorm:
            maps = [self.encoder.layernorm(tokens) for tokens in maps]
        if self.config.reshape_hidden_states:
            maps = [_as_map(tokens, pixel_values, self.config) for tokens in maps]
        return BackboneOutput(
            feature_maps=tuple(maps), hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )


def with_encoder(base: type[_Model], encoder_class: type[MaskedViTModel]) -> type[_Model]:
    """
    A method's class that differs from `base` in its encoder alone: `MaskedViTBackbone` and `XModel` give `XBackbone`,
    in the module of `XModel`, which assigns it to that name.
    """
    method = encoder_class.__name__.removesuffix("Model")
    attributes = {
        "__module__": encoder_class.__module__,
        "__doc__": f"{method}'s encoder in a [`{base.__name__}`]. {inspect.getdoc(base)}",
        "config_class": encoder_class.config_class,
        "encoder_class": encoder_class,
        "_no_split_modules": encoder_class._no_split_modules,
        "_keys_to_ignore_on_load_unexpected": encoder_class._keys_to_ignore_on_load_unexpected,
    }
    return type(base.__name__.replace("MaskedViT", method), (base,), attributes)
