"""A trained encoder or classifier for other software: written, run beside the model it was made of, then kept."""

import contextlib
import importlib
import os
import tempfile
from pathlib import Path

import torch
from PIL import Image
from safetensors import SafetensorError
from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoModelForImageClassification, PreTrainedModel
from transformers.utils import logging

from ..data.image_processing import MIMImageProcessor
from ..models.vit.configuration_vit import MaskedViTConfig
from ..models.vit.encoders import encoder_from, tower_of
from ..models.vit.modeling_vit import MaskedViTForImageClassification, MaskedViTModel
from ..models.vit.sizes import as_pair
from ..registry import BASELINES, ENCODER, METHODS, RECORDS, method_class
from .formats import FORMATS, Format, Plain, Runner, is_classifier, run_model

logger = logging.get_logger(__name__)

# Largest difference from the model's own outputs, relative to the largest of them where that is above 1.
_TOLERANCE = {"float32": 1e-4, "float16": 2e-2}
# In a folder; a file has one beside it, of its name and this ending.
_USE, _ENDING = "use.py", ".py"


def export(
    model: PreTrainedModel | str | os.PathLike,
    output: str | os.PathLike,
    format: str = "vit",
    *,
    dtype: str = "float32",
    image_processor=None,
) -> float:
    """
    Writes an encoder, or a classifier, for software that has no hf_mim; then runs what was written beside the model.

    | format | `output` | is read by |
    |---|---|---|
    | `"vit"` | folder | transformers, as `ViTModel` or `ViTForImageClassification` |
    | `"dinov2"` | folder | transformers, as `Dinov2Model`, also a backbone, or `Dinov2ForImageClassification` |
    | `"timm"` | file | `timm.create_model("vit_...")`, strictly |
    | `"onnx"` | file | onnxruntime and the like; opset 18; any batch, height and width |
    | `"torch-export"` | file | `torch.export.load`; any batch, height and width |
    | `"safetensors"` | file | code of one's own: names of `ViTModel`, the config as metadata |

    A file has the ending .safetensors, .onnx or .pt2. Beside it lies one of its name and `.py`, in a folder `use.py`:
    how to make its input of an image, and run it.
    "onnx" and "torch-export" give `cls` (B, D), `mean` (B, D), of the patches, and `patches` (B, L, D), or `logits`
    (B, classes). They read whole patches, and leave out what is over at the right and at the bottom.

    Args:
        model: An encoder, a pretraining model, whose encoder is taken, or a classifier: of hf_mim, or any that
            `encoder_from` takes. Or its folder or repository.
        output: Where there is nothing yet.
        dtype (`str`, defaults to `"float32"`): Of the weights, or `"float16"`; "onnx" and "torch-export" then compute
            in it, from float32 to float32.
        image_processor (*optional*): What makes `pixel_values` of images, for the file beside it. Default: the one
            that lies beside the weights, where `model` is a path.

    Returns:
        `float`: the largest difference between what was written and the model, relative to the largest output where
        that is above 1, at three sizes and batches; at the model's own size where the format takes no other.

    Raises:
        ValueError: If the format is unknown or has no room for the model, weights are not finite or not merged, or
            what was written gives other outputs; nothing is left then.
        FileExistsError: If there is something at `output`, or beside it.
        ImportError: If a package is missing, which it names.
    """
    if format not in FORMATS:
        raise ValueError(f"The format is {format!r}; expected one of {', '.join(FORMATS)}.")
    if dtype not in _TOLERANCE:
        raise ValueError(f"The dtype is {dtype!r}; expected one of {', '.join(_TOLERANCE)}.")
    output, form = Path(output), FORMATS[format]
    if output.suffix != form.ending and form.ending:
        raise ValueError(f"An export as {format} is a file: its name ends in {form.ending}, got {output}.")
    # The last: where ONNX keeps weights of more than 2 GB.
    for path in [output, *(output.with_name(output.name + ending) for ending in (_ENDING, ".data") if form.ending)]:
        if os.path.lexists(path):
            raise FileExistsError(f"{path} exists, and is not overwritten: name another, or remove it.")
    for package in form.packages:
        importlib.import_module(package)
    if not isinstance(model, PreTrainedModel):
        image_processor = image_processor or _saved_processor(model)
        model = load_model(model)
    model = _unmasked(model).eval()
    _refuse_unfit(model)
    plain = plain_model(model)
    output.parent.mkdir(parents=True, exist_ok=True)
    # By its own name, which an ONNX file's weights beside it follow, in a folder that is gone if anything fails.
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}.") as folder:
        written = Path(folder) / output.name
        form.write(plain, written, getattr(torch, dtype))
        difference = _largest_difference(form.read(plain, written), model, form.sizes(plain))
        if not difference <= _TOLERANCE[dtype]:
            raise ValueError(
                f"What was written as {format} gives outputs that differ from the model's by {difference:.2g}; "
                f"expected at most {_TOLERANCE[dtype]:g}. It is deleted."
            )
        if not form.ending and image_processor is not None:
            image_processor.save_pretrained(written)
        use = written.with_name(output.name + _ENDING) if form.ending else written / _USE
        use.write_text(describe_use(plain, form, output.name, image_processor), encoding="utf-8")
        # The file itself last: where it is, all is.
        for path in sorted(Path(folder).iterdir(), key=lambda path: path == written):
            os.rename(path, output.parent / path.name)
    return difference


def load_model(path: str | os.PathLike) -> PreTrainedModel:
    """
    The classifier in a folder or repository, or else the encoder: float32, eval mode, with nothing masked.

    Raises:
        ValueError: If nothing is there, or what is there is no Vision Transformer.
    """
    try:
        config = AutoConfig.from_pretrained(path)
        model_class = AutoModel
        heads = {name.partition("For")[2] for name in config.architectures or ()} - {"", "PreTraining"}
        if "ImageClassification" in heads:
            model_class = AutoModelForImageClassification
        elif heads:
            logger.warning(f"{path}: of a model for {min(heads)} the encoder alone is exported, without the head.")
        elif config.model_type in BASELINES:
            # Under its model_type transformers knows only its own.
            model_class = method_class(config.model_type, "Model")
        # The pooler of a stock ViT is not looked at, and most checkpoints have none.
        kwargs = {"add_pooling_layer": False} if config.model_type == "vit" and model_class is AutoModel else {}
        return tower_of(model_class.from_pretrained(path, dtype=torch.float32, **kwargs).eval())
    except (OSError, ValueError, SafetensorError) as error:
        raise ValueError(f"The model {path} cannot be loaded: {error}") from error


@torch.no_grad()
def plain_model(model: PreTrainedModel) -> Plain:
    """
    The same encoder or classifier without a method: positions as a trained table, adapters folded; a copy, in eval
    mode, float32, on the CPU.

    Raises:
        ValueError: If it is a model of another kind, or reads more than a Vision Transformer gives.
    """
    if is_classifier(model) and getattr(model, "encoder_adapter", None) is not None:
        raise ValueError(
            "The classifier reads TEC's encoder adapters, which no other software has. Export its encoder, "
            "model.encoder, or tune in another tuning_mode."
        )
    source = encoder_from(model)
    names = [name for name in MaskedViTConfig.__annotations__ if not name.startswith("_") and name != "sincos_grid"]
    config = MaskedViTConfig(**{name: getattr(source.config, name) for name in names})
    if config.position_embedding == "sincos":
        config.position_embedding = "learned"
    if is_classifier(model):
        # The number of classes is that of their names.
        config.update({name: getattr(model.config, name) for name in ("id2label", "label2id", "problem_type")})
    plain = (MaskedViTForImageClassification if is_classifier(model) else MaskedViTModel)(config)
    plain.base_model.load_state_dict(source.vit_state_dict())
    if is_classifier(model):
        plain.classifier.load_state_dict(model.classifier.state_dict())
    return plain.eval()


def stock_format(path: str | os.PathLike) -> str | None:
    """
    The format of `export` in which plain transformers loads the encoder, or the classifier, of a run: "vit" or
    "dinov2". None where the run's own model is a stock one, tells something of each pixel, or has what stock networks
    have not: no [CLS], rotary positions, TEC's adapters in a classifier.
    """
    config = AutoConfig.from_pretrained(path)
    is_stock = config.model_type not in METHODS | ENCODER
    hides = config.model_type in BASELINES and RECORDS[config.model_type].stock_hides
    is_dense = any("Segmentation" in name or "Depth" in name for name in config.architectures or ())
    if (is_stock and not hides) or is_dense:
        return None
    model = load_model(path)
    # A stock ViTModel would draw a pooler at random, of which an encoder that pools by the mean has none.
    order = ("vit", "dinov2") if getattr(model.config, "pooling", "cls") == "cls" else ("dinov2", "vit")
    for name in order:
        with contextlib.suppress(ValueError):
            FORMATS[name].build(plain_model(model))
            return name
    return None


def _unmasked(model: PreTrainedModel) -> PreTrainedModel:
    """The model; of a stock ViTMAE, which hides three quarters of an image, the same encoder that hides nothing."""
    if model.config.model_type not in BASELINES:
        return model
    config = method_class(model.config.model_type, "Config").from_dict(model.config.to_dict())
    encoder = method_class(model.config.model_type, "Model")(config)
    encoder.load_state_dict(model.base_model.state_dict())
    return encoder


def _refuse_unfit(model: PreTrainedModel) -> None:
    for name, value in model.state_dict().items():
        if "lora_" in name:
            raise ValueError(
                f"The model has low-rank updates that are not merged ({name}): fold them into the weights first, with "
                "merge_and_unload() of PEFT's model."
            )
        if value.is_floating_point() and not value.isfinite().all():
            raise ValueError(f"{name} holds NaN or infinity: weights that are not finite are not exported.")


def _largest_difference(run: Runner, model: PreTrainedModel, sizes: list[tuple[int, int, int]]) -> float:
    generator = torch.Generator().manual_seed(0)
    subject = model if is_classifier(model) else tower_of(model).base_model
    differences = []
    for batch_size, height, width in sizes:
        pixel_values = torch.randn(batch_size, model.config.num_channels, height, width, generator=generator)
        expected, found = run_model(subject, pixel_values), run(pixel_values)
        differences += [
            (found[name].float() - value).abs().max() / value.abs().max().clamp(min=1.0)
            for name, value in expected.items()
        ]
    # NaN where there is one.
    return torch.stack(differences).max().item()


def _saved_processor(path: str | os.PathLike):
    try:
        return AutoImageProcessor.from_pretrained(path)
    except (OSError, ValueError):
        return None


def describe_use(plain: Plain, form: Format, name: str, image_processor) -> str:
    """
    The file beside an export: size, order of channels, normalisation, and how it is run, as Python of four lines.

    Args:
        image_processor: None where it is not known what the model was trained with.
    """
    height, width = as_pair(plain.config.image_size)
    channels = plain.config.num_channels
    imports, run = form.usage(plain, name)
    imports = ["import numpy as np", *imports]
    if channels == 3 and not isinstance(image_processor, MIMImageProcessor):
        about = f"{height} x {width} (height x width), red, green, blue"
        imports.append("from PIL import Image, ImageOps")
        read, values = f"image = {_resized(height, width, image_processor)}", "np.asarray(image) / 255"
    else:
        about = f"{height} x {width} (height x width), {channels} channels, integers divided by their largest value"
        read, values = f'image = np.load("image.npy")  # ({height}, {width}, {channels})', "image"
    mean, std = _normalization(image_processor, channels)
    lines = [
        f"# What {name} takes and gives. Images: {about}.",
        *sorted(imports, key=lambda line: line.split()[1].lower()),
        "",
        read,
        f"pixels = ({values} - {mean}) / {std}",
        "pixel_values = pixels.transpose(2, 0, 1)[None].astype(np.float32)  # (batch, channel, height, width)",
        run,
    ]
    if image_processor is None:
        lines.insert(1, "# Mean and std were not saved with the model: put in those that it was trained with.")
    return "\n".join(lines) + "\n"


def _resized(height: int, width: int, image_processor) -> str:
    """What the image processor does before it normalises, with Pillow."""
    opened = 'Image.open("image.jpg").convert("RGB")'
    how = f"Image.Resampling.{Image.Resampling(getattr(image_processor, 'resample', Image.Resampling.BICUBIC)).name}"
    border = 0.0
    if getattr(image_processor, "do_center_crop", False):
        # As much of each side as is cut off after the shorter edge was resized.
        edge = image_processor.size.shortest_edge or min(image_processor.size.height, image_processor.size.width)
        border = (1 - image_processor.crop_size.height / edge) / 2
    elif image_processor is not None:
        return f"{opened}.resize(({width}, {height}), {how})"
    return f"ImageOps.fit({opened}, ({width}, {height}), {how}, {border:g})"


def _normalization(image_processor, channels: int) -> tuple[list[float], list[float]]:
    if image_processor is None or not getattr(image_processor, "do_normalize", True):
        return [0.0] * channels, [1.0] * channels
    return list(image_processor.image_mean), list(image_processor.image_std)
