"""OCL: contrastive learning of two halves of a masked picture, with one encoder and nothing else."""

import math
from dataclasses import dataclass

import torch
from torch import distributed, nn
from torch.utils.checkpoint import checkpoint
from transformers import initialization as init
from transformers.utils import ModelOutput, logging
from transformers.utils.generic import can_return_tuple

from ..vit.autocast import without_autocast
from ..vit.modeling_vit import (
    HEADS,
    MaskedViTBackbone,
    MaskedViTForDepthEstimation,
    MaskedViTForImageClassification,
    MaskedViTForObjectDetection,
    MaskedViTForSemanticSegmentation,
    MaskedViTModel,
    refuse_unknown,
    with_encoder,
)
from ..vit.pretraining import MaskedViTForPreTraining
from .configuration_ocl import MIN_TEMPERATURE, OCLConfig

logger = logging.get_logger(__name__)

# Similarities in memory at a time: 4 MiB in float32. More pictures than the root of it are compared block by block.
_BLOCK_ELEMENTS = 2**20
# On a GPU 128 MiB: three blocks for 9,600 pictures.
_BLOCK_ELEMENTS_OF_DEVICE = 2**25


@dataclass
class OCLForPreTrainingOutput(ModelOutput):
    """
    Args:
        loss (`torch.FloatTensor` of shape `()`): What is minimised: `loss_contrastive`.
        loss_contrastive (`torch.FloatTensor` of shape `()`): Mean of the cross-entropies of finding a picture's second
            half by its first, and its first by its second, among those of all pictures of all processes.
        features (`torch.FloatTensor` of shape `(batch_size, 2, hidden_size)`): [CLS] after the final LayerNorm of both
            halves, before the head (where there is one) and before normalisation to length 1.
        mask (`torch.FloatTensor` of shape `(batch_size, num_patches)`): 1 where hidden from both halves.
        ids_restore (`torch.LongTensor` of shape `(batch_size, num_patches)`): Place of patch i in shuffled order,
            of which the first half of the kept places is the first half of the picture.
        hidden_states, attentions: Of the encoder, when asked for, for 2 * batch_size halves: both of the first
            picture, both of the second, ... None where the encoder works in chunks.
    """

    loss: torch.FloatTensor | None = None
    loss_contrastive: torch.FloatTensor | None = None
    features: torch.FloatTensor | None = None
    mask: torch.FloatTensor | None = None
    ids_restore: torch.LongTensor | None = None
    hidden_states: tuple[torch.FloatTensor, ...] | None = None
    attentions: tuple[torch.FloatTensor, ...] | None = None


class OCLModel(MaskedViTModel):
    """The encoder that OCL pretrains."""

    config: OCLConfig
    # What a checkpoint may hold besides; not worth a warning when only the encoder is loaded.
    _keys_to_ignore_on_load_unexpected = [r"^temperature\.", r"^head\.", *HEADS]


class OCLTemperature(nn.Module):
    """The trained temperature, by its log, clamped as CLIP's."""

    def __init__(self):
        super().__init__()
        # Of one element rather than none, which FSDP could not shard.
        self.log_temperature = nn.Parameter(torch.empty(1))

    def forward(self) -> torch.Tensor:
        """The temperature, float32 of shape (1,), at least 0.01."""
        log = self.log_temperature.float()
        # Its gradient passes the limit, from which it could not come back otherwise.
        return (log + (log.clamp(min=math.log(MIN_TEMPERATURE)) - log).detach()).exp()


class OCLHead(nn.Sequential):
    """
    The MLP of the ablation in section 3.2.3: BatchNorm after every linear map, GELU between them.

    As MoCo v3's, which the paper follows: no biases, which BatchNorm would cancel, and no affine map at the end.
    """

    def __init__(self, config: OCLConfig):
        hidden = [config.head_hidden_size] * (config.head_num_layers - 1)
        sizes = [config.hidden_size, *hidden, config.head_output_size]
        layers: list[nn.Module] = []
        for inputs, outputs in zip(sizes[:-2], sizes[1:-1], strict=True):
            layers += [nn.Linear(inputs, outputs, bias=False), nn.BatchNorm1d(outputs), nn.GELU()]
        layers += [nn.Linear(sizes[-2], sizes[-1], bias=False), nn.BatchNorm1d(sizes[-1], affine=False)]
        super().__init__(*layers)


class OCLForPreTraining(MaskedViTForPreTraining):
    """Encoder, temperature, and the head of the ablation where the config has one."""

    config: OCLConfig
    # The loss compares the pictures of a batch with each other.
    pairwise_loss = True
    # Pictures encoded at a time, without keeping what their gradients need; all, with it, if None.
    chunk_size: int | None = None

    def __init__(self, config: OCLConfig):
        super().__init__(config)
        self.encoder = OCLModel(config)
        self.temperature = OCLTemperature()
        self.head = OCLHead(config) if config.head_num_layers else None
        frozen = {
            "encoder.embeddings.patch_embeddings.projection": config.freeze_patch_projection,
            "temperature": not config.trainable_temperature,
        }
        self.frozen_modules = tuple(name for name, is_frozen in frozen.items() if is_frozen)
        self.post_init()
        self.freeze()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, OCLTemperature):
            init.constant_(module.log_temperature, math.log(self.config.temperature))

    @torch.no_grad()
    def after_optimizer_step(self, step: int, num_steps: int) -> None:
        """Keeps the temperature's parameter within its limit."""
        if self.config.trainable_temperature:
            self.temperature.log_temperature.clamp_(min=math.log(MIN_TEMPERATURE))
        super().after_optimizer_step(step, num_steps)

    def watched_features(self, outputs: OCLForPreTrainingOutput) -> torch.Tensor:
        """Features of both halves (batch_size, 2, hidden_size), which could collapse."""
        return outputs["features"]

    def fill_missing(self, missing: set[str]) -> set[str]:
        if "temperature.log_temperature" in missing:
            logger.warning(f"The checkpoint has no temperature: it starts at {self.config.temperature}.")
        return missing - {"temperature.log_temperature"}

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor,
        noise: torch.Tensor | None = None,
        return_loss: bool = True,
        **kwargs,
    ) -> OCLForPreTrainingOutput:
        """
        Args:
            pixel_values (`torch.Tensor` of shape `(batch_size, num_channels, height, width)`): Normalised pictures,
                as many on every process.
            noise (`torch.Tensor` of shape `(batch_size, num_patches)`, *optional*): Uniform in [0, 1); the patches
                with the smallest are kept, of which the smaller half is the first half. Drawn if None.
            return_loss (`bool`, defaults to True): Whether the output has `loss`. (By this argument the Trainer knows
                that there is a loss without labels.)

        Raises:
            ValueError: If the shapes are not those of the config, or there is nothing to tell a picture from.
            TypeError: If there is no such argument.
        """
        refuse_unknown(self, kwargs)
        masking = self.masking(pixel_values, noise)
        # (2 * batch_size, num_keep / 2): both halves of the first picture, both of the second, ...
        halves = masking.ids_keep.unflatten(1, (2, -1)).flatten(0, 1)
        if self.chunk_size is None or self.chunk_size >= len(pixel_values):
            recorded = self.encoder(
                pixel_values, ids_keep=halves, return_dict=True, cls_only=not self._is_recording(kwargs), **kwargs
            )
            features = recorded.last_hidden_state[:, 0]
        else:
            features, recorded = self.encode_chunks(pixel_values, halves), {}
        features = features.float().unflatten(0, (-1, 2))
        loss = self.contrastive_loss(features)
        return OCLForPreTrainingOutput(
            loss=loss if return_loss else None,
            loss_contrastive=loss,
            features=features,
            mask=masking.mask,
            ids_restore=masking.ids_restore,
            hidden_states=recorded.get("hidden_states"),
            attentions=recorded.get("attentions"),
        )

    def _is_recording(self, keywords: dict) -> bool:
        """Whether more than [CLS] is asked for: outputs of blocks, by index too, or attention."""
        asked = [keywords.get(name) for name in ("output_hidden_states", "output_attentions")]
        of_config = [self.config.output_hidden_states, self.config.output_attentions]
        return any(
            (default if value is None else value) is not False for value, default in zip(asked, of_config, strict=True)
        )

    def encode_chunks(self, pixel_values: torch.Tensor, halves: torch.Tensor) -> torch.Tensor:
        """
        [CLS] of all halves, `chunk_size` pictures at a time, as gradient caching ("Scaling Deep Contrastive Learning
        Batch Size under Memory Limited Setup", Gao et al., 2021) has it: no chunk keeps what its gradient needs. When
        the loss has given the features' gradient, each chunk is encoded again, with the same dropped paths, and takes
        its share back to the weights.
        """
        features = []
        for pictures, ids_keep in zip(
            pixel_values.split(self.chunk_size), halves.split(2 * self.chunk_size), strict=True
        ):
            # Weights that autocast has cast for one chunk are not used for the next: gradients of chunks would be
            # summed in half precision.
            torch.clear_autocast_cache()
            features.append(checkpoint(self._encode_chunk, pictures, ids_keep, use_reentrant=False))
        return torch.cat(features)

    def _encode_chunk(self, pixel_values: torch.Tensor, ids_keep: torch.Tensor) -> torch.Tensor:
        encoded = self.encoder(pixel_values, ids_keep=ids_keep, return_dict=True, cls_only=True)
        return encoded.last_hidden_state[:, 0]

    def contrastive_loss(self, features: torch.Tensor) -> torch.Tensor:
        """
        The symmetric cross-entropy (section 2.3), in float32, of features (batch_size, 2, hidden_size). In training
        with several processes the value is that of all their pictures, on each of them; in evaluation that of this
        process's, so that it does not depend on how many there are.
        """
        if (
            self.training
            and self.config.gather_negatives
            and distributed.is_available()
            and distributed.is_initialized()
        ):
            features = _Gather.apply(features)
        if len(features) < 2:
            raise ValueError(
                "A batch of 1 picture has no other to tell it from. Choose a per-device batch of at least 2 (or "
                "several processes with gather_negatives)."
            )
        if self.head is not None:
            # Over the pictures of all chunks and processes, so that BatchNorm's statistics are those of the batch.
            features = self.head(features.flatten(0, 1)).unflatten(0, (-1, 2))
        with without_autocast(features):
            u, v = nn.functional.normalize(features.float(), dim=-1).unbind(dim=1)
            temperature = self.temperature()
            log_sum, _ = log_sums(u, v, temperature, self.config.kappa)
            positives = t_sp_similarity((u * v).sum(dim=-1), self.config.kappa) / temperature
            return (log_sum.mean(dim=0) - positives).mean()


# Products and sums of many blocks, which the compiler would unroll: one operation each to it.
@torch.library.custom_op("hf_mim::log_sums", mutates_args=())
def log_sums(
    u: torch.Tensor, v: torch.Tensor, temperature: torch.Tensor, kappa: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Log-sum-exp of the rows and of the columns of the logits of `u` with `v`, (2, num_pictures), a block of rows at a
    time: the matrix of all logits, 369 MB for 9,600 pictures, is never held. The gradient computes the blocks again.
    The second result, of the same shape, is what the gradient needs.
    """
    sums = u.new_zeros(2, len(u))
    shift = 0.5 / temperature
    for rows in _block_slices(u):
        exponentials = _shifted_exponentials(t_sp_similarity(u[rows] @ v.T, kappa) / temperature, shift)
        sums[0, rows] = exponentials.sum(dim=1)
        sums[1] += exponentials.sum(dim=0)
    return sums.log() + shift, sums


@log_sums.register_fake
def _(u, v, temperature, kappa):
    return u.new_empty(2, len(u)), u.new_empty(2, len(u))


@torch.library.custom_op("hf_mim::log_sums_backward", mutates_args=())
def log_sums_backward(
    grad: torch.Tensor, sums: torch.Tensor, u: torch.Tensor, v: torch.Tensor, temperature: torch.Tensor, kappa: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The gradients of `u`, `v` and `temperature` by that of `log_sums`, (2, num_pictures), in float32."""
    # Called inside of autocast or not.
    with without_autocast(grad):
        shift = 0.5 / temperature
        of_rows, of_columns = grad / sums
        grad_u, grad_v, grad_temperature = torch.empty_like(u), torch.zeros_like(v), torch.zeros_like(temperature)
        for rows in _block_slices(u):
            cosine = u[rows] @ v.T
            logits = t_sp_similarity(cosine, kappa) / temperature
            grad_logits = of_rows[rows].unsqueeze(1) + of_columns
            grad_logits *= _shifted_exponentials(logits, shift)
            grad_temperature -= (grad_logits * logits).sum() / temperature
            # The derivative of T-SP.
            grad_cosine = grad_logits.mul_(0.5 * (1 + 2 / kappa) / temperature)
            grad_cosine /= (1 + (1 - cosine) / kappa).square_()
            grad_u[rows] = grad_cosine @ v
            grad_v += grad_cosine.T @ u[rows]
        return grad_u, grad_v, grad_temperature


@log_sums_backward.register_fake
def _(grad, sums, u, v, temperature, kappa):
    return torch.empty_like(u), torch.empty_like(v), torch.empty_like(temperature)


def _keep_for_gradient(ctx, inputs, output) -> None:
    u, v, temperature, ctx.kappa = inputs
    ctx.save_for_backward(output[1], u, v, temperature)


def _log_sums_gradient(ctx, grad: torch.Tensor, _):
    return *log_sums_backward(grad, *ctx.saved_tensors, ctx.kappa), None


log_sums.register_autograd(_log_sums_gradient, setup_context=_keep_for_gradient)


def t_sp_similarity(cosine: torch.Tensor, kappa: float) -> torch.Tensor:
    """The T-distributed spherical similarity of cosines (section 2.3 of the paper): 0 for -1, 1 for 1."""
    return 0.5 * (1 + cosine) / (1 + (1 - cosine) / kappa)


def _shifted_exponentials(logits: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
    # Logits are between 0 and 1 / temperature <= 100: less half of that, exp has no overflow and no underflow, and
    # serves rows and columns alike.
    return (logits - shift).exp_()


def _block_slices(u: torch.Tensor) -> list[slice]:
    """Of the rows of `u`, so many at a time as the device takes."""
    elements = _BLOCK_ELEMENTS if u.device.type == "cpu" else _BLOCK_ELEMENTS_OF_DEVICE
    size = max(1, elements // len(u))
    return [slice(start, start + size) for start in range(0, len(u), size)]


class _Gather(torch.autograd.Function):
    """
    The tensors of all processes, one after the other in the first dimension.

    Every process goes on to compute the same loss from them, and gradients of weights are averaged over processes: so
    a process takes its own part of the gradient, times the number of processes.
    """

    @staticmethod
    def forward(ctx, tensor: torch.Tensor) -> torch.Tensor:
        ctx.local_size = len(tensor)
        gathered = [torch.empty_like(tensor) for _ in range(distributed.get_world_size())]
        distributed.all_gather(gathered, tensor.contiguous())
        return torch.cat(gathered)

    @staticmethod
    def backward(ctx, grad: torch.Tensor) -> torch.Tensor:
        start = distributed.get_rank() * ctx.local_size
        return distributed.get_world_size() * grad[start : start + ctx.local_size]


OCLForImageClassification = with_encoder(MaskedViTForImageClassification, OCLModel)
OCLForDepthEstimation = with_encoder(MaskedViTForDepthEstimation, OCLModel)
OCLForObjectDetection = with_encoder(MaskedViTForObjectDetection, OCLModel)
OCLForSemanticSegmentation = with_encoder(MaskedViTForSemanticSegmentation, OCLModel)
OCLBackbone = with_encoder(MaskedViTBackbone, OCLModel)

__all__ = [
    "OCLBackbone",
    "OCLForDepthEstimation",
    "OCLForImageClassification",
    "OCLForPreTraining",
    "OCLForObjectDetection",
    "OCLForSemanticSegmentation",
    "OCLModel",
]
