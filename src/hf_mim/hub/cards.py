"""The model card that goes with every trained model: what it is, how to use it, how it was made, how good it is."""

from pathlib import Path

import transformers

from ..evaluation.report import described_tables, markdown_table
from ..evaluation.verdict import Verdict
from ..files import write_text
from ..models.vit.sizes import as_pair
from ..registry import BASELINES, MODEL_TYPES, RECORDS, method_name

_USE = """import hf_mim  # registers the model with the Auto classes
from transformers import AutoImageProcessor, AutoModel

model = AutoModel.from_pretrained("{name}")"""
_USE_OF_BASELINE = """import hf_mim
from transformers import AutoImageProcessor, AutoModel

# The stock ViTMAEModel hides three quarters of a picture; the same encoder as a ViTModel sees all of it.
model = hf_mim.to_vit(AutoModel.from_pretrained("{name}"))"""
_USE_OF_STOCK = """from transformers import AutoImageProcessor, AutoModel

model = AutoModel.from_pretrained("{name}")"""
_REST = """
The folder holds the whole pretraining model: `AutoModelForPreTraining` goes on from it, and
`AutoModelForImageClassification` takes its encoder for fine-tuning. `hf_mim.to_vit(model)` gives a stock `ViTModel`.
"""
_REST_OF_BASELINE = """
The folder holds the whole pretraining model, which plain transformers reads as `{stock}`.
"""

_TEMPLATE = """---
library_name: transformers
pipeline_tag: image-feature-extraction
tags:
- hf_mim
- masked-image-modeling
- {model_type}
---

# {method}, {width} wide, {depth} blocks, {height} x {width_pixels} pixels

A Vision Transformer pretrained without labels by {method} with hf_mim.
Paper: {paper}.

## Use

```python
{use}
processor = AutoImageProcessor.from_pretrained("{name}")
features = model(**processor(image, return_tensors="pt")).{pooled}  # (1, {width})
```
{rest}
## Training

{training}

## How good the features are

{results}

## Citation

```bibtex
{citation}
```
"""


def write_card(
    folder: str | Path,
    name: str,
    config,
    training: dict[str, str],
    results: dict | None,
    verdict: Verdict | None = None,
) -> Path:
    """
    Writes `README.md`.

    Args:
        folder: Where the model was saved.
        name (`str`): What to load it by: its repository on the Hub, or its folder.
        config: The model's.
        training (`dict[str, str]`): Settings worth telling, by name.
        results (`dict`, *optional*): As `evaluate_features` gives; None where features could not be evaluated.
        verdict ([`Verdict`], *optional*): Whether the run learns.

    Returns:
        `Path`: the card.
    """
    height, width_pixels = as_pair(config.image_size)
    use, rest = _USE, _REST
    if config.model_type in BASELINES:
        prefix = MODEL_TYPES[config.model_type]
        whole = hasattr(transformers, f"{prefix}ForPreTraining")
        use = _USE_OF_BASELINE if RECORDS[config.model_type].stock_hides else _USE_OF_STOCK
        rest = _REST_OF_BASELINE.format(stock=prefix + ("ForPreTraining" if whole else "Model"))
    return write_text(
        Path(folder) / "README.md",
        _TEMPLATE.format(
            model_type=config.model_type,
            method=method_name(config.model_type),
            use=use.format(name=name),
            pooled="pooler_output" if getattr(config, "use_cls_token", True) else "last_hidden_state.mean(dim=1)",
            rest=rest,
            citation=RECORDS[config.model_type].citation,
            paper=RECORDS[config.model_type].paper,
            name=name,
            width=config.hidden_size,
            depth=config.num_hidden_layers,
            height=height,
            width_pixels=width_pixels,
            training="\n".join(f"- {name}: {value}" for name, value in training.items()),
            results=_results(results) + ("" if verdict is None else f"\n\n{verdict}"),
        ),
    )


def _results(results: dict | None) -> str:
    if results is None:
        return "Not evaluated: the training data was a stream."
    (what, first), *others = described_tables(results)
    parts = [f"{what}; RankMe of the held-out features.\n\n{markdown_table(first)}"]
    return "\n\n".join(parts + [f"{what}.\n\n{markdown_table(rows)}" for what, rows in others])


_CLASSIFIER_TEMPLATE = """---
library_name: transformers
pipeline_tag: image-classification
tags:
- hf_mim
- {model_type}
---

# A classifier of {num_labels} classes, {width} wide, {depth} blocks

A Vision Transformer fine-tuned with hf_mim.

```python
import hf_mim  # registers the model with the Auto classes
from transformers import pipeline

pipeline("image-classification", "{name}")(image)
```

## Training

{training}

## {score} in %

| held out ({num_test} pictures) | {names} |
|---{rules}|
| {accuracies} |
"""


def main_score(results: dict) -> float:
    """Of a classifier's results in percent: accuracy, or of several labels a picture mean average precision."""
    return results["mean_average_precision"] if "mean_average_precision" in results else results["accuracy"]


def write_classifier_card(folder: str | Path, name: str, config, training: dict[str, str], results: dict) -> Path:
    """
    As `write_card`, of a classifier; `results` has `accuracy` or `mean_average_precision`, `num_test`, and
    `robustness` by test set.
    """
    robustness = results["robustness"]
    accuracies = [main_score(metrics) for metrics in (results, *robustness.values())]
    return write_text(
        Path(folder) / "README.md",
        _CLASSIFIER_TEMPLATE.format(
            model_type=config.model_type,
            num_labels=config.num_labels,
            width=config.hidden_size,
            depth=config.num_hidden_layers,
            name=name,
            training="\n".join(f"- {name}: {value}" for name, value in training.items()),
            score="Mean average precision" if "mean_average_precision" in results else "Accuracy",
            num_test=results["num_test"],
            names=" | ".join(robustness),
            rules="|---" * len(robustness),
            accuracies=" | ".join(f"{accuracy:.2f}" for accuracy in accuracies),
        ).replace(" |  |\n", " |\n"),
    )


_DENSE_TEMPLATE = """---
library_name: transformers
pipeline_tag: {pipeline}
tags:
- hf_mim
- {model_type}
---

# {title}, {width} wide, {depth} blocks

A Vision Transformer fine-tuned with hf_mim.

```python
import hf_mim  # registers the model with the Auto classes
from transformers import pipeline

pipeline("{pipeline}", "{name}")(image)
```

## Training

{training}

## Of {num_test} held-out pictures

{tables}
"""


def _write_dense_card(folder, name: str, config, training, results, **fields) -> Path:
    return write_text(
        Path(folder) / "README.md",
        _DENSE_TEMPLATE.format(
            model_type=config.model_type,
            width=config.hidden_size,
            depth=config.num_hidden_layers,
            name=name,
            training="\n".join(f"- {name}: {value}" for name, value in training.items()),
            num_test=results["num_test"],
            **fields,
        ),
    )


def write_segmenter_card(folder: str | Path, name: str, config, training: dict[str, str], results: dict) -> Path:
    """As `write_card`, of a segmenter; `results` has its scores, `iou` by class, and `num_test`."""
    iou = {one: "" if value is None else f"{value:.2f}" for one, value in results["iou"].items()}
    scores = " | ".join(f"{results[one]:.2f}" for one in ("miou", "mean_accuracy", "pixel_accuracy"))
    classes = "\n".join(f"| {one} | {value} |" for one, value in iou.items())
    tables = (
        f"In %:\n\n| mIoU | mean accuracy | pixel accuracy |\n|---|---|---|\n| {scores} |\n\n"
        f"| class | IoU |\n|---|---|\n{classes}"
    )
    title = f"A segmenter of {config.num_labels} classes"
    return _write_dense_card(
        folder, name, config, training, results, pipeline="image-segmentation", title=title, tables=tables
    )


def write_depth_card(folder: str | Path, name: str, config, training: dict[str, str], results: dict) -> Path:
    """As `write_card`, of an estimator of depth; `results` has `rmse`, `abs_rel`, `delta1` and `num_test`."""
    tables = (
        "RMSE in the unit of the depths, the others in %:\n\n| RMSE | relative error | within a factor of 1.25 |\n"
        f"|---|---|---|\n| {results['rmse']:.4g} | {results['abs_rel']:.2f} | {results['delta1']:.2f} |"
    )
    title = "An estimator of depth"
    return _write_dense_card(
        folder, name, config, training, results, pipeline="depth-estimation", title=title, tables=tables
    )
