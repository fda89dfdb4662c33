"""The forms in which an encoder or classifier leaves: how each is written, and read and run again."""

import copy
import inspect
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModel, AutoModelForImageClassification, Dinov2ForImageClassification, PreTrainedModel

from ..evaluation.encoders import FeatureEncoder
from ..models.vit.configuration_vit import MaskedViTConfig
from ..models.vit.modeling_vit import MaskedViTForImageClassification, MaskedViTModel
from ..models.vit.sizes import as_pair
from .vit import missing_key_biases, to_dinov2, to_vit

# Of the ONNX files: the one that torch's exporter writes by itself, which most runtimes know.
OPSET = 18

Plain = MaskedViTModel | MaskedViTForImageClassification
Outputs = dict[str, torch.Tensor]
Runner = Callable[[torch.Tensor], Outputs]


class Format:
    """
    One form. `plain` is a network of `plain_model`: without a method, in eval mode, float32, on the CPU.

    What is run gives `logits`, or of an encoder `cls` (batch_size, hidden_size) where it has [CLS], `mean`, of the
    patches, and `patches` (batch_size, num_patches, hidden_size).
    """

    # What has to be installed; the ending of a file's name, empty for a folder.
    packages: tuple[str, ...] = ()
    ending = ""

    def write(self, plain: Plain, path: Path, dtype: torch.dtype) -> None:
        """Writes the network, with weights of this type, to `path`, where there is nothing."""
        raise NotImplementedError

    def read(self, plain: Plain, path: Path) -> Runner:
        """What was written, ready to run on `pixel_values` (batch_size, num_channels, height, width)."""
        raise NotImplementedError

    def sizes(self, plain: Plain) -> list[tuple[int, int, int]]:
        """Batches and sizes in pixels (batch_size, height, width) that it takes: the model's own size, and others."""
        return three_sizes(plain)

    def usage(self, plain: Plain, name: str) -> tuple[list[str], str]:
        """Imports, and the line of Python that runs the file or folder `name` on an array `pixel_values`."""
        raise NotImplementedError


def three_sizes(plain: Plain) -> list[tuple[int, int, int]]:
    """Batches and sizes in pixels (batch_size, height, width): the model's own, a larger and a smaller one."""
    (height, width), (patch_height, patch_width) = as_pair(plain.config.image_size), as_pair(plain.config.patch_size)
    larger = (1, height + patch_height, width + 2 * patch_width)
    return [(2, height, width), larger, (3, max(2 * patch_height, height - patch_height), width)]


def is_classifier(model: PreTrainedModel) -> bool:
    return hasattr(model, "classifier")


def output_names(plain: Plain) -> list[str]:
    """Names of what is run, in order."""
    return ["logits"] if is_classifier(plain) else ["cls"] * plain.config.use_cls_token + ["mean", "patches"]


@torch.no_grad()
def run_model(model: PreTrainedModel, pixel_values: torch.Tensor) -> Outputs:
    """The outputs of a model of transformers or hf_mim, float32 and on the CPU."""
    pixel_values = pixel_values.to(model.device)
    if is_classifier(model):
        other_size = tuple(pixel_values.shape[2:]) != as_pair(model.config.image_size)
        # DINOv2 takes any size unasked.
        asked = "interpolate_pos_encoding" in inspect.signature(model.forward).parameters
        kwargs = {"interpolate_pos_encoding": other_size} if asked else {}
        return {"logits": model(pixel_values, **kwargs).logits.float().cpu()}
    encoder = FeatureEncoder(model)
    tokens = encoder.tokens(pixel_values)[0].float().cpu()
    rows, columns = encoder.grid(pixel_values)
    return split_tokens(tokens, tokens.shape[1] - rows * columns)


def split_tokens(tokens: torch.Tensor, num_prefix: int) -> Outputs:
    """
    [CLS], which is the first of `num_prefix` tokens where there are any, the mean of the patches, and the patches, of
    tokens (batch_size, num_prefix + num_patches, D).
    """
    parts = {"cls": tokens[:, 0]} if num_prefix else {}
    patches = tokens[:, num_prefix:]
    return parts | {"mean": patches.mean(dim=1), "patches": patches}


def refuse_parts(config: MaskedViTConfig, what: str, *, registers: bool = False) -> None:
    """
    Raises ValueError if the network has rotary positions, or with `registers` what timm's plain ViT has not: register
    tokens, gated MLPs, or a LayerNorm before the first block.
    """
    found = ["rotary positions"] * (config.position_embedding == "rotary")
    if registers:
        found += ["register tokens"] * (config.num_register_tokens > 0)
        found += ["gated MLPs"] * config.use_gated_mlp + ["a first LayerNorm"] * config.embedding_layernorm
    if found:
        raise ValueError(f"{what} has no {' and no '.join(found)}, which this model has: export it in another format.")


class StockFormat(Format):
    """A folder that plain transformers loads."""

    def build(self, plain: Plain) -> PreTrainedModel:
        """The network of transformers with these weights."""
        raise NotImplementedError

    def write(self, plain, path, dtype):
        self.build(plain).to(dtype).save_pretrained(path)

    def read(self, plain, path):
        auto_class, kwargs = self._loading(plain)
        return partial(run_model, auto_class.from_pretrained(path, dtype=torch.float32, **kwargs).eval())

    def sizes(self, plain):
        # The stock networks interpolate grids that are square, of patches that are.
        (patch_height, patch_width), (rows, columns) = as_pair(plain.config.patch_size), plain.config.grid_size
        return three_sizes(plain)[: 3 if patch_height == patch_width and rows == columns else 1]

    def usage(self, plain, name):
        auto_class, kwargs = self._loading(plain)
        loading = ", ".join(['"."', *(f"{key}={value}" for key, value in kwargs.items())])
        target, result = ("logits", "logits") if is_classifier(plain) else ("tokens", "last_hidden_state")
        line = f"{target} = {auto_class.__name__}.from_pretrained({loading})(torch.from_numpy(pixel_values)).{result}"
        return ["import torch", f"from transformers import {auto_class.__name__}"], line

    def _loading(self, plain: Plain) -> tuple[type, dict]:
        return (AutoModelForImageClassification if is_classifier(plain) else AutoModel), {}


class ViTFormat(StockFormat):
    """`ViTModel` or `ViTForImageClassification`."""

    def build(self, plain):
        return to_vit(plain)

    def _loading(self, plain):
        auto_class, kwargs = super()._loading(plain)
        has_pooler = is_classifier(plain) or plain.config.pooling == "cls"
        return auto_class, kwargs if has_pooler else {"add_pooling_layer": False}


class DINOv2Format(StockFormat):
    """`Dinov2Model`, also with registers, which is a backbone too; or `Dinov2ForImageClassification`."""

    def build(self, plain):
        encoder = to_dinov2(plain)
        if not is_classifier(plain):
            return encoder
        if plain.config.num_register_tokens:
            raise ValueError("Classifiers with registers are not exported as dinov2: export the encoder.")
        encoder.config.update({name: getattr(plain.config, name) for name in ("id2label", "label2id", "problem_type")})
        exported = Dinov2ForImageClassification(encoder.config)
        exported.dinov2.load_state_dict(encoder.state_dict())
        # It reads [CLS] and the mean of the patches, one after the other; ours one of them.
        weight = plain.classifier.weight.detach()
        parts = [weight, torch.zeros_like(weight)]
        weight = torch.cat(parts if plain.config.pooling == "cls" else parts[::-1], dim=1)
        exported.classifier.load_state_dict({"weight": weight, "bias": plain.classifier.bias.detach()})
        return exported.eval()


# timm's plain Vision Transformers: width, blocks and heads by name.
_TIMM_SIZES = {"tiny": (192, 12, 3), "small": (384, 12, 6), "base": (768, 12, 12), "large": (1024, 24, 16)}
_TIMM_NAMES = {
    "embeddings.cls_token": "cls_token",
    "embeddings.position_embeddings": "pos_embed",
    "embeddings.patch_embeddings.projection": "patch_embed.proj",
    "layernorm": "norm",
    "layernorm_before": "norm1",
    "layernorm_after": "norm2",
    "attention.o_proj": "attn.proj",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}


class TimmFormat(Format):
    """The weights of timm's `VisionTransformer`."""

    packages = ("timm",)
    ending = ".safetensors"

    def write(self, plain, path, dtype):
        self.arguments(plain)
        weights = {name: value.to(dtype).contiguous() for name, value in self.state_dict(plain).items()}
        save_file(weights, path, metadata={"format": "pt"})

    def read(self, plain, path):
        import timm

        network = timm.create_model(**self.arguments(plain)).eval()
        network.load_state_dict(load_file(path), strict=True)

        def run(pixel_values: torch.Tensor) -> Outputs:
            with torch.no_grad():
                tokens = network.forward_features(pixel_values)
                if is_classifier(plain):
                    return {"logits": network.forward_head(tokens)}
            return split_tokens(tokens, plain.config.num_prefix)

        return run

    def sizes(self, plain):
        # At others timm interpolates positions in a way of its own.
        return three_sizes(plain)[:1]

    def usage(self, plain, name):
        arguments, imports = self.arguments(plain), ["import timm", "import torch"]
        words = [repr(arguments.pop("model_name"))]
        if arguments.pop("norm_layer", None) is not None:
            imports.append("from functools import partial")
            words.append(f"norm_layer=partial(torch.nn.LayerNorm, eps={plain.config.layer_norm_eps!r})")
        words += [f"{key}={value!r}" for key, value in arguments.items()]
        network = f"timm.create_model({', '.join(words)}, checkpoint_path={name!r}).eval()"
        target, method = ("logits", "") if is_classifier(plain) else ("tokens", ".forward_features")
        return imports, f"{target} = {network}{method}(torch.from_numpy(pixel_values))"

    def arguments(self, plain: Plain) -> dict:
        """
        What `timm.create_model` has to be called with, `model_name` among it.

        Raises:
            ValueError: If the activation is not GELU, or the network more than a plain ViT with learned positions.
        """
        config = plain.config
        refuse_parts(config, "timm's plain ViT", registers=True)
        if config.hidden_act != "gelu":
            raise ValueError(f"The activation is {config.hidden_act!r}; timm's Vision Transformers have gelu.")
        sizes = (config.hidden_size, config.num_hidden_layers, config.num_attention_heads)
        name = next((name for name, known in _TIMM_SIZES.items() if known == sizes), "base")
        arguments = {
            "model_name": f"vit_{name}_patch16_224",
            "img_size": as_pair(config.image_size),
            "patch_size": as_pair(config.patch_size),
            "in_chans": config.num_channels,
            "num_classes": config.num_labels if is_classifier(plain) else 0,
            "dynamic_img_size": True,
        }
        if _TIMM_SIZES[name] != sizes:
            arguments |= dict(zip(("embed_dim", "depth", "num_heads"), sizes, strict=True))
        if config.intermediate_size != 4 * config.hidden_size:
            arguments["mlp_ratio"] = config.intermediate_size / config.hidden_size
        if not config.qkv_bias:
            arguments["qkv_bias"] = False
        if config.pooling == "mean":
            # Its norm would otherwise come after the mean.
            arguments |= {"global_pool": "avg", "fc_norm": False}
        if not config.use_cls_token:
            arguments["class_token"] = False
        if config.layer_norm_eps != 1e-6:
            arguments["norm_layer"] = partial(nn.LayerNorm, eps=config.layer_norm_eps)
        return arguments

    def state_dict(self, plain: Plain) -> dict[str, torch.Tensor]:
        """The weights under timm's names; queries, keys and values as one matrix with rows [q; k; v]."""
        weights, found = plain.base_model.state_dict(), {}
        weights |= missing_key_biases(weights, plain.config)
        for name, value in weights.items():
            stem, _, kind = name.rpartition(".")
            if name in _TIMM_NAMES:
                found[_TIMM_NAMES[name]] = value
            elif not name.startswith("layers."):
                found[f"{_TIMM_NAMES[stem]}.{kind}"] = value
            else:
                _, layer, part = stem.split(".", 2)
                if part == "attention.q_proj":
                    fused = [weights[f"layers.{layer}.attention.{letter}_proj.{kind}"] for letter in "qkv"]
                    found[f"blocks.{layer}.attn.qkv.{kind}"] = torch.cat(fused)
                elif part not in ("attention.k_proj", "attention.v_proj"):
                    found[f"blocks.{layer}.{_TIMM_NAMES[part]}.{kind}"] = value
        if is_classifier(plain):
            found |= {f"head.{kind}": value for kind, value in plain.classifier.state_dict().items()}
        return found


class _Traceable(nn.Module):
    """
    The network as exporters can follow it, of images of any size: no branch on sizes, positions always interpolated.
    """

    def __init__(self, plain: Plain, dtype: torch.dtype):
        super().__init__()
        encoder, config = copy.deepcopy(plain.base_model), plain.config
        embeddings, num_cls = encoder.embeddings, int(config.use_cls_token)
        table = embeddings.position_embeddings.detach()
        self.dtype, self.num_prefix, self.pooling = dtype, config.num_prefix, config.pooling
        grid = table[:, num_cls:].unflatten(1, config.grid_size).permute(0, 3, 1, 2)
        # Stays float32: in half precision nothing interpolates on the CPU.
        self.positions = nn.Buffer(grid.contiguous())
        prefix = [embeddings.class_token().detach() + table[:, :1]] if num_cls else []
        prefix += [embeddings.register_tokens.detach()] if config.num_register_tokens else []
        # [CLS] and registers; of neither, no tokens.
        self.prefix = nn.Buffer(torch.cat([*prefix, table[:, :0]], dim=1).to(dtype))
        self.embedding_layernorm = embeddings.layernorm.to(dtype)
        projection = encoder.embeddings.patch_embeddings.projection
        # By its weights and not its call, which takes patches for tokens.
        self.projection = nn.Conv2d(config.num_channels, config.hidden_size, projection.stride, projection.stride)
        self.projection.load_state_dict(projection.state_dict())
        self.projection.to(dtype)
        self.layers = encoder.layers.to(dtype)
        self.layernorm = encoder.layernorm.to(dtype)
        self.classifier = copy.deepcopy(plain.classifier).to(dtype) if is_classifier(plain) else None

    def forward(self, pixel_values: torch.Tensor) -> Outputs:
        tokens = self.projection(pixel_values.to(self.dtype))
        positions = nn.functional.interpolate(self.positions, size=tokens.shape[2:], mode="bicubic")
        tokens = (tokens + positions.to(self.dtype)).flatten(2).transpose(1, 2)
        if self.num_prefix:
            tokens = torch.cat((self.prefix.expand(tokens.shape[0], -1, -1), tokens), dim=1)
        tokens = self.embedding_layernorm(tokens)
        for layer in self.layers:
            tokens = layer(tokens)
        parts = split_tokens(self.layernorm(tokens).float(), self.num_prefix)
        if self.classifier is None:
            return parts
        return {"logits": self.classifier(parts[self.pooling].to(self.dtype)).float()}


def _trace_arguments(plain: Plain) -> tuple[tuple[torch.Tensor], dict]:
    """An input, of a batch and a size that are nothing special, and which of its axes may be of any length."""
    refuse_parts(plain.config, "A program of any image size")
    if plain.config.position_interpolation != "bicubic":
        raise ValueError(
            f"A program of any image size interpolates positions by bicubic, this model by "
            f"{plain.config.position_interpolation}: export it in another format."
        )
    _, height, width = three_sizes(plain)[1]
    patch_height, patch_width = as_pair(plain.config.patch_size)
    # Programs of torch tell one patch from several.
    axes = {
        0: torch.export.Dim("batch"),
        2: torch.export.Dim("height", min=2 * patch_height),
        3: torch.export.Dim("width", min=2 * patch_width),
    }
    return (torch.zeros(2, plain.config.num_channels, height, width),), {"pixel_values": axes}


class ONNXFormat(Format):
    """An ONNX file, by torch's exporter."""

    packages = ("onnx", "onnxscript", "onnxruntime")
    ending = ".onnx"

    @torch.no_grad()
    def write(self, plain, path, dtype):
        inputs, dynamic_shapes = _trace_arguments(plain)
        network = _Traceable(plain, dtype).eval()
        num_bytes = sum(value.numel() * value.element_size() for value in network.state_dict().values())
        torch.onnx.export(
            network,
            inputs,
            path,
            dynamo=True,
            opset_version=OPSET,
            input_names=["pixel_values"],
            output_names=output_names(plain),
            dynamic_shapes=dynamic_shapes,
            # A file of this format holds 2 GB; larger ones keep their weights beside them.
            external_data=num_bytes > 1.9e9,
            verbose=False,
        )

    def read(self, plain, path):
        import onnxruntime

        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        names = [output.name for output in session.get_outputs()]

        def run(pixel_values: torch.Tensor) -> Outputs:
            found = session.run(None, {"pixel_values": pixel_values.numpy()})
            return {name: torch.from_numpy(value) for name, value in zip(names, found, strict=True)}

        return run

    def usage(self, plain, name):
        names = output_names(plain)
        # The comma takes the one entry out of a list.
        target = ", ".join(names) if len(names) > 1 else f"{names[0]},"
        line = f'{target} = onnxruntime.InferenceSession({name!r}).run(None, {{"pixel_values": pixel_values}})'
        return ["import onnxruntime"], line


class TorchExportFormat(Format):
    """A program of `torch.export`."""

    ending = ".pt2"

    @torch.no_grad()
    def write(self, plain, path, dtype):
        inputs, dynamic_shapes = _trace_arguments(plain)
        program = torch.export.export(_Traceable(plain, dtype).eval(), inputs, dynamic_shapes=dynamic_shapes)
        torch.export.save(program, path)

    def read(self, plain, path):
        return torch.export.load(path).module()

    def usage(self, plain, name):
        line = f"outputs = torch.export.load({name!r}).module()(torch.from_numpy(pixel_values))"
        return ["import torch"], f"{line}  # a dict: {', '.join(output_names(plain))}"


class SafetensorsFormat(Format):
    """The weights by the names of transformers' ViT, positions among them, with the config as metadata."""

    ending = ".safetensors"

    def write(self, plain, path, dtype):
        weights = {name: value.to(dtype).contiguous() for name, value in plain.state_dict().items()}
        save_file(weights, path, metadata={"format": "pt", "config": json.dumps(plain.config.to_diff_dict())})

    def read(self, plain, path):
        with safe_open(path, "pt") as file:
            config = MaskedViTConfig.from_dict(json.loads(file.metadata()["config"]))
        network = type(plain)(config)
        network.load_state_dict(load_file(path))
        return partial(run_model, network.eval())

    def usage(self, plain, name):
        line = f"weights = load_file({name!r})  # the network's config is in the file's metadata"
        return ["from safetensors.torch import load_file"], line


FORMATS = {
    "vit": ViTFormat(),
    "dinov2": DINOv2Format(),
    "timm": TimmFormat(),
    "onnx": ONNXFormat(),
    "torch-export": TorchExportFormat(),
    "safetensors": SafetensorsFormat(),
}
