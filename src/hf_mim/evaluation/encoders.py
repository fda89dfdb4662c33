"""Any Vision Transformer, seen alike: pooled features and attention of pictures."""

import hashlib
import inspect
import json
import re

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, AutoModel, PreTrainedModel

from ..models.vit.encoders import why_not_loaded
from ..models.vit.frozen import FrozenViT
from ..models.vit.repository import locate
from ..models.vit.sizes import as_pair
from ..registry import BASELINES, method_class

# Names of the norm after the last block: ours, ViT, ViTMAE and DINOv2; DINOv3; CLIP.
_FINAL_NORMS = ("layernorm", "norm", "post_layernorm")
# Fields of a config that say nothing about what the network computes.
_BESIDES = ("_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version", "id2label", "label2id")
# Raw pixels of larger pictures are averaged down to this, so that 10,000 of them fit into memory.
_MAX_PIXELS = 32

PIXELS = "pixels"
PATCHES = "patches"


def blocks_read(pooling: str) -> int:
    """
    How many of the last blocks a pooling reads.

    Args:
        pooling (`str`): `"cls"`, the [CLS] token; `"mean"`, the mean of the patch tokens; `"last_N"`, the [CLS] tokens
            of the last N blocks, concatenated, the last block's last. All after the final norm, as DINO does.

    Raises:
        ValueError: If it is none of these.
    """
    if pooling in ("cls", "mean"):
        return 1
    match = re.fullmatch(r"last_([1-9]\d*)", pooling)
    if match is None:
        raise ValueError(
            f"pooling is {pooling!r}; expected cls ([CLS]), mean (of the patches), or last_N ([CLS] of the last N "
            "blocks), for example last_4."
        )
    return int(match[1])


class FeatureEncoder:
    """
    A Vision Transformer with the patches last, and before them [CLS], registers and the like, or nothing: hf_mim's
    (its ViTMAE too, which hides nothing unless asked), and transformers' ViT, DeiT, DINOv2 and DINOv3 with or without
    registers, I-JEPA, and the vision towers of CLIP and SigLIP.

    Args:
        model (`PreTrainedModel`): In eval mode, if its features are to be those of an evaluation.

    Raises:
        ValueError: If it is not such a model.
    """

    def __init__(self, model: PreTrainedModel):
        config = model.config
        if model.main_input_name != "pixel_values" or getattr(config, "patch_size", None) is None:
            raise ValueError(
                f"{type(model).__name__} ({config.model_type}) is not a Vision Transformer: its config has no "
                "patch_size. Expected a model of hf_mim, ViT, ViTMAE, DINOv2, DINOv3, CLIP or the like."
            )
        self.model = model
        # [CLS], DeiT's distillation token, registers.
        self._most_prefix = 2 + (getattr(config, "num_register_tokens", None) or 0)
        self._norm = next((getattr(model, name) for name in _FINAL_NORMS if hasattr(model, name)), None)
        # CLIP gives its patches without the norm that its [CLS] goes through; SigLIP gives them with it.
        self._ends_with_norm = not hasattr(model, "post_layernorm") or config.model_type.startswith("siglip")
        self._parameters = inspect.signature(model.forward).parameters

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def poolings(self) -> tuple[str, ...]:
        """What its features are pooled by where nobody asks: [CLS], where there is one, and the mean of patches."""
        names = {name.rpartition(".")[2] for name, _ in self.model.named_parameters()}
        return ("cls", "mean") if names & {"cls_token", "class_embedding"} else ("mean",)

    def to(self, device) -> "FeatureEncoder":
        self.model.to(device)
        return self

    def grid(self, pixel_values: torch.Tensor) -> tuple[int, int]:
        """Rows and columns of patches of these pictures (batch_size, channels, height, width)."""
        patch_height, patch_width = as_pair(self.model.config.patch_size)
        return pixel_values.shape[2] // patch_height, pixel_values.shape[3] // patch_width

    def _run(self, pixel_values: torch.Tensor, **kwargs):
        config = self.model.config
        rows, columns = self.grid(pixel_values)
        if "interpolate_pos_encoding" in self._parameters:
            kwargs["interpolate_pos_encoding"] = tuple(pixel_values.shape[2:]) != as_pair(config.image_size)
        outputs = self.model(pixel_values, return_dict=True, **kwargs)
        shape, patches = tuple(outputs.last_hidden_state.shape), rows * columns
        if len(shape) != 3 or not patches <= shape[1] <= patches + self._most_prefix:
            raise ValueError(
                f"{type(self.model).__name__} ({config.model_type}) gives an output of shape {shape} for {rows} x "
                f"{columns} patches; expected {patches} tokens and at most {self._most_prefix} before them. It is not "
                "a Vision Transformer that sees the whole picture."
            )
        return outputs

    def num_prefix(self, tokens: torch.Tensor, pixel_values: torch.Tensor) -> int:
        """How many tokens stand before the patches."""
        rows, columns = self.grid(pixel_values)
        return tokens.shape[1] - rows * columns

    def tokens(self, pixel_values: torch.Tensor, num_blocks: int = 1) -> list[torch.Tensor]:
        """
        Outputs of the last `num_blocks` blocks after the final norm, the last block's last.

        Args:
            pixel_values (`torch.Tensor` of shape `(batch_size, num_channels, height, width)`): Normalised.

        Returns:
            `list[torch.Tensor]`: each (batch_size, prefix + num_patches, hidden_size).

        Raises:
            ValueError: If there are fewer blocks, or the output is not a Vision Transformer's.
        """
        depth = self.model.config.num_hidden_layers
        if num_blocks > depth:
            raise ValueError(f"pooling last_{num_blocks} needs {num_blocks} blocks; the model has {depth}.")
        if num_blocks == 1 and self._ends_with_norm:
            return [self._run(pixel_values).last_hidden_state]
        if num_blocks == 1:
            return [self._norm(self._run(pixel_values).last_hidden_state)]
        if self._norm is None:
            raise ValueError(f"{type(self.model).__name__} has no final norm that is known: use pooling cls or mean.")
        hidden_states = self._run(pixel_values, output_hidden_states=True).hidden_states
        return [self._norm(states) for states in hidden_states[-num_blocks:]]

    @torch.no_grad()
    def features(self, pixel_values: torch.Tensor, poolings) -> dict[str, torch.Tensor]:
        """
        One vector a picture, for every pooling, in one pass.

        Args:
            pixel_values (`torch.Tensor` of shape `(batch_size, num_channels, height, width)`): Normalised.
            poolings: As [`blocks_read`] explains, and `"patches"` for all patch tokens.

        Returns:
            By pooling, float32 `torch.Tensor` of shape `(batch_size, dim)`, on the model's device; of `"patches"`
            float16 of shape `(batch_size, num_patches, dim)`.

        Raises:
            ValueError: If a pooling wants [CLS] of a model that has none, or more blocks than there are.
        """
        tokens = self.tokens(
            pixel_values.to(self.device),
            max(1 if pooling == PATCHES else blocks_read(pooling) for pooling in poolings),
        )
        num_prefix = self.num_prefix(tokens[-1], pixel_values)
        features = {}
        for pooling in poolings:
            if pooling == PATCHES:
                features[pooling] = tokens[-1][:, num_prefix:].half()
            elif pooling == "mean":
                features[pooling] = tokens[-1][:, num_prefix:].float().mean(dim=1)
            elif num_prefix == 0:
                raise ValueError(f"{type(self.model).__name__} has no [CLS], which pooling {pooling} reads: use mean.")
            else:
                features[pooling] = torch.cat([t[:, 0].float() for t in tokens[-blocks_read(pooling) :]], dim=1)
        return features

    @torch.no_grad()
    def patches(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Patch features (batch_size, rows, columns, hidden_size), float32, after the final norm."""
        tokens = self.tokens(pixel_values.to(self.device))[-1]
        tokens = tokens[:, self.num_prefix(tokens, pixel_values) :]
        return tokens.float().unflatten(1, self.grid(pixel_values))

    @torch.no_grad()
    def cls_attention(self, pixel_values: torch.Tensor) -> torch.Tensor | None:
        """
        Attention of the last block from [CLS] to the patches: (batch_size, heads, rows, columns), in [0, 1]; None of a
        model without [CLS].
        """
        implementation = self.model.config._attn_implementation
        self.model.set_attn_implementation("eager")  # the others never form the weights
        try:
            outputs = self._run(pixel_values.to(self.device), output_attentions=True)
        finally:
            self.model.set_attn_implementation(implementation)
        num_prefix = self.num_prefix(outputs.last_hidden_state, pixel_values)
        if num_prefix == 0:
            return None
        attention = outputs.attentions[-1][:, :, 0, num_prefix:]
        return attention.float().unflatten(2, self.grid(pixel_values))

    def digest(self) -> str:
        """A hash of the config and of all weights: equal for networks that compute the same."""
        config = {name: value for name, value in self.model.config.to_dict().items() if name not in _BESIDES}
        digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
        for name, value in sorted(self.model.state_dict().items()):
            digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
            digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
        return digest.hexdigest()


class FrozenEncoder(FeatureEncoder):
    """The network that a method learns from, of pictures that are normalised for the one that learns.

    Args:
        frozen (`FrozenViT`): With its weights.
    """

    def __init__(self, frozen: FrozenViT):
        super().__init__(frozen.network)
        self.frozen = frozen

    def to(self, device) -> "FrozenEncoder":
        self.frozen.to(device)
        return self

    def tokens(self, pixel_values: torch.Tensor, num_blocks: int = 1) -> list[torch.Tensor]:
        return super().tokens(self.frozen.as_it_sees(pixel_values), num_blocks)

    def num_prefix(self, tokens: torch.Tensor, pixel_values: torch.Tensor) -> int:
        rows, columns = self.frozen.own_grid
        return tokens.shape[1] - rows * columns


class RawPixels:
    """The pixels themselves as features: what any encoder has to beat. Averaged down to 32 x 32 at most."""

    device = torch.device("cpu")

    def features(self, pixel_values: torch.Tensor, poolings=()) -> dict[str, torch.Tensor]:
        """`{"pixels": float32 tensor (batch_size, channels * height * width)}`, whatever the poolings."""
        size = [min(side, _MAX_PIXELS) for side in pixel_values.shape[2:]]
        return {PIXELS: nn.functional.adaptive_avg_pool2d(pixel_values.float(), size).flatten(1)}

    def digest(self) -> str:
        return f"raw pixels, {_MAX_PIXELS}"


def load_encoder(path: str, use_safetensors: bool | None = None) -> FeatureEncoder:
    """
    The encoder in a folder or in a repository of the Hub: float32, eval mode, with nothing masked.

    Args:
        use_safetensors (`bool`, *optional*): True refuses weights in another kind of file.

    Raises:
        ValueError: If nothing is there, or no Vision Transformer.
    """
    path = locate(path)
    try:
        config = AutoConfig.from_pretrained(path)
        # The pooler of a stock ViT is not looked at, and most checkpoints have none.
        kwargs = {"add_pooling_layer": False} if config.model_type == "vit" else {}
        # The stock ViTMAE hides three quarters of a picture, and starts without positions; ours does neither.
        stock = config.model_type not in BASELINES
        model_class = AutoModel if stock else method_class(config.model_type, "Model")
        model = model_class.from_pretrained(path, dtype=torch.float32, use_safetensors=use_safetensors, **kwargs)
    except (OSError, ValueError, SafetensorError) as error:
        raise ValueError(f"The model {path} cannot be loaded: {why_not_loaded(path, error)}") from error
    if getattr(config, "vision_config", None) is not None:
        model = getattr(model, "vision_model", model)
    return FeatureEncoder(model.eval())


def untrained_encoder(encoder: FeatureEncoder, seed: int = 0) -> FeatureEncoder:
    """The same network as `encoder` before any training, on the same device."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = type(encoder.model)._from_config(encoder.model.config)
    return FeatureEncoder(model.eval()).to(encoder.device)
