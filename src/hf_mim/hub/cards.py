"""The model card that goes with every trained model: what it is, how to use it, how it was made, how good it is."""

import json
from dataclasses import dataclass, field
from pathlib import Path

import transformers
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from ..evaluation.report import described_tables, markdown_table
from ..evaluation.verdict import Comparison, Verdict
from ..files import write_text
from ..models.vit.repository import PRETRAINING
from ..models.vit.sizes import as_pair
from ..registry import BASELINES, ENCODER, METHODS, MODEL_TYPES, RECORDS, method_name
from .origin import Origin, is_restricted, restriction

_REGISTERS = "import hf_mim  # registers the model with the Auto classes\n"
_USE = """import hf_mim  # registers the model with the Auto classes
from transformers import AutoImageProcessor, AutoModel

model = AutoModel.from_pretrained("{name}")
processor = AutoImageProcessor.from_pretrained("{name}")
features = model(**processor(image, return_tensors="pt")).{pooled}  # (1, {width})"""
_USE_OF_BASELINE = _USE.replace("  # registers the model with the Auto classes", "").replace(
    """model = AutoModel.from_pretrained("{name}")""",
    """# The stock ViTMAEModel hides three quarters of a picture; the same encoder as a ViTModel sees all of it.
model = hf_mim.to_vit(AutoModel.from_pretrained("{name}"))""",
)
_USE_OF_STOCK = _USE.removeprefix(_REGISTERS)
_REST = """
The folder holds the whole pretraining model: `AutoModelForPreTraining` goes on from it, and
`AutoModelForImageClassification` takes its encoder for fine-tuning. `hf_mim.to_vit(model)` gives a stock `ViTModel`.
"""
_REST_OF_BASELINE = """
The folder holds the whole pretraining model, which plain transformers reads as `{stock}`.
"""
# Of a repository with a stock export at its root.
_USE_ANYWHERE = """from transformers import AutoImageProcessor, AutoModel
model, processor = AutoModel.from_pretrained("{name}"), AutoImageProcessor.from_pretrained("{name}")
tokens = model(**processor(image, return_tensors="pt")).last_hidden_state
features = {pooled}  # (1, {width}), {what}"""
# Of images that no image processor of transformers reads.
_USE_ANYWHERE_OF_CHANNELS = """from transformers import AutoModel
model = AutoModel.from_pretrained("{name}")
tokens = model(pixel_values).last_hidden_state  # normalised as `use.py` shows
features = {pooled}  # (1, {width}), {what}"""
_REST_ANYWHERE = """
That is plain transformers ({kind}); `use.py` is the same without an image processor. With hf_mim the method's own
classes, and `--model_name_or_path {name}`, find the whole pretraining model, which is in `{pretraining}/`:

```python
import hf_mim
encoder = hf_mim.{prefix}Model.from_pretrained("{name}")
classifier = hf_mim.{prefix}ForImageClassification.from_pretrained("{name}", num_labels=10)
model = hf_mim.{prefix}ForPreTraining.from_pretrained("{name}")  # goes on training
```
"""
_REST_ANYWHERE_OF_BASELINE = """
That is plain transformers ({kind}); `use.py` is the same without an image processor. The whole pretraining model is in
`{pretraining}/`, for transformers' and for hf_mim's class, and for `--model_name_or_path {name}`:

```python
import hf_mim, transformers
stock = transformers.{prefix}ForPreTraining.from_pretrained("{name}", subfolder="{pretraining}")
model = hf_mim.{prefix}ForPreTraining.from_pretrained("{name}")  # goes on training
```
"""
_KINDS = {"vit": "ViT", "dinov2": "DINOv2, which computes the same"}

_TEMPLATE = """
# {method}, {width} wide, {depth} blocks, {height} x {width_pixels} pixels

A Vision Transformer pretrained without labels by {method} with hf_mim.
Paper: {paper}.

## Use

```python
{use}
```
{rest}
## Training

{training}

## How good the features are

{results}
{appendix}
## Citation

```bibtex
{citation}
```
"""


@dataclass
class CardContext:
    """
    What a card tells besides the model and its results.

    Args:
        origin ([`Origin`]): What it was made of.
        data (`str`): Name of the data that was trained and judged on.
        record (`dict`, *optional*): The run's.
        pictures (`list[str]`): Their paths, beside the card.
        form (`str`, *optional*): In which stock format the root of its repository is; see `stock_format`.
    """

    origin: Origin = field(default_factory=Origin)
    data: str = "the training data"
    record: dict | None = None
    pictures: list[str] = field(default_factory=list)
    form: str | None = None

    def result(self, task: str, metric: str, value: float, name: str, data: str | None = None) -> EvalResult:
        """A number in percent, of held-out pictures."""
        on_the_hub = data is None and self.origin.datasets
        return EvalResult(
            task_type=task,
            # Of what is not on the Hub a kind is asked for all the same.
            dataset_type=self.origin.datasets[0] if on_the_hub else "imagefolder",
            dataset_name=data or self.data,
            metric_type=metric,
            metric_name=name,
            metric_value=round(value, 2),
        )

    def appendix(self) -> str:
        """Pictures, the run's record, and what licences ask for, as sections."""
        parts = []
        if self.pictures:
            pictures = "\n\n".join(f"![{Path(path).stem}]({path})" for path in self.pictures)
            parts.append(f"## Pictures\n\n{pictures}\n")
        if self.record is not None:
            record = json.dumps(self.record, indent=2)
            parts.append(
                f"## Record of the run\n\n<details>\n<summary>What decided its result, and versions (<code>run.json"
                f"</code>)</summary>\n\n```json\n{record}\n```\n\n</details>\n"
            )
        if self.origin.restricted:
            parts.append("## Licence\n\n" + "\n".join(f"**{one}**" for one in self.origin.restricted) + "\n")
        return "\n" + "\n".join(parts) if parts else ""


def _write(
    folder: str | Path, name: str, task: str, tags: list[str], context: CardContext, results, body: str
) -> Path:
    origin = context.origin
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag=task,
        tags=["hf_mim", *tags],
        license=origin.license,
        base_model=origin.base_models or None,
        base_model_relation="finetune" if origin.base_models else None,
        datasets=origin.datasets or None,
        metrics=sorted({result.metric_type for result in results}) or None,
        model_name=name.rpartition("/")[2] if results else None,
        eval_results=results or None,
    )
    return write_text(Path(folder) / "README.md", str(ModelCard(f"---\n{data.to_yaml()}\n---\n{body}")))


def write_card(
    folder: str | Path,
    name: str,
    config,
    training: dict[str, str],
    results: dict | None,
    verdict: Verdict | None = None,
    context: CardContext | None = None,
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
        context ([`CardContext`], *optional*): What else is known.

    Returns:
        `Path`: the card.
    """
    context = context or CardContext()
    height, width_pixels = as_pair(config.image_size)
    use, rest = _use(name, config, context.form)
    body = _TEMPLATE.format(
        method=method_name(config.model_type),
        use=use,
        rest=rest,
        citation=RECORDS[config.model_type].citation,
        paper=RECORDS[config.model_type].paper,
        width=config.hidden_size,
        depth=config.num_hidden_layers,
        height=height,
        width_pixels=width_pixels,
        training=_listed(training),
        results=_results(results) + ("" if verdict is None else f"\n\n{verdict}") + _comparisons(results),
        appendix=context.appendix(),
    )
    tags = ["masked-image-modeling", config.model_type]
    return _write(folder, name, "image-feature-extraction", tags, context, _feature_results(results, context), body)


_CONVERSION_TEMPLATE = """
# The authors' {released}, converted

Read by `hf_mim convert` from a checkpoint that the authors released as a model of hf_mim ({model_type}).
{appendix}"""


def write_conversion_card(folder: str | Path, name: str, released: str, config, license: str) -> Path:
    """
    As `write_card`, of weights that others trained and released.

    Args:
        released (`str`): What they are called.
        license (`str`): Theirs, as the Hub names it.
    """
    terms = [restriction("the release", license)] if is_restricted(license) else []
    context = CardContext(Origin(license=license, restricted=terms))
    body = _CONVERSION_TEMPLATE.format(released=released, model_type=config.model_type, appendix=context.appendix())
    return _write(folder, name, "image-feature-extraction", [config.model_type], context, [], body)


def _use(name: str, config, form: str | None) -> tuple[str, str]:
    """How to load and run a pretrained encoder, as code, and what more is to be said."""
    is_baseline, prefix = config.model_type in BASELINES, MODEL_TYPES[config.model_type]
    if form is not None:
        by_mean = getattr(config, "pooling", "cls") == "mean"
        prefix_tokens = 1 + getattr(config, "num_register_tokens", 0)
        use = (_USE_ANYWHERE if config.num_channels == 3 else _USE_ANYWHERE_OF_CHANNELS).format(
            name=name,
            pooled=f"tokens[:, {prefix_tokens}:].mean(dim=1)" if by_mean else "tokens[:, 0]",
            what="the mean of the patches" if by_mean else "[CLS]",
            width=config.hidden_size,
        )
        rest = _REST_ANYWHERE_OF_BASELINE if is_baseline else _REST_ANYWHERE
        return use, rest.format(name=name, kind=_KINDS[form], prefix=prefix, pretraining=PRETRAINING)
    use, rest = _USE, _REST
    if is_baseline:
        whole = hasattr(transformers, f"{prefix}ForPreTraining")
        use = _USE_OF_BASELINE if RECORDS[config.model_type].stock_hides else _USE_OF_STOCK
        rest = _REST_OF_BASELINE.format(stock=prefix + ("ForPreTraining" if whole else "Model"))
    pooled = "pooler_output" if getattr(config, "use_cls_token", True) else "last_hidden_state.mean(dim=1)"
    return use.format(name=name, pooled=pooled, width=config.hidden_size), rest


def _listed(training: dict[str, str]) -> str:
    return "\n".join(f"- {name}: {value}" for name, value in training.items())


def _feature_results(results: dict | None, context: CardContext) -> list[EvalResult]:
    """k-NN and linear accuracy of what was trained, of each label; not of references."""
    found, notes = [], " ".join((results or {}).get("notes", ()))
    for name, scores in (results or {}).get("features", {}).items():
        if not name.startswith("trained"):
            continue
        for probe, told in (("knn", "k-NN"), ("linear", "linear probe")):
            for label, value in scores[probe].items():
                several = f"Of {label!r} a picture may have several" in notes
                metric, what = ("mean_average_precision", "mAP") if several else ("accuracy", "accuracy")
                if value is not None:
                    told_of = f"{told} {what} of {label} in % ({name})"
                    found.append(context.result("image-classification", metric, value, told_of))
    return found


def _results(results: dict | None) -> str:
    if results is None:
        return "Not evaluated: the training data was a stream."
    (what, first), *others = described_tables(results)
    parts = [f"{what}; RankMe of the held-out features.\n\n{markdown_table(first)}"]
    return "\n\n".join(parts + [f"{what}.\n\n{markdown_table(rows)}" for what, rows in others])


def _comparisons(results: dict | None) -> str:
    lines = [f"- {Comparison(**found)}." for found in (results or {}).get("comparisons", ())]
    return "\n\n" + "\n".join(lines) if lines else ""


_CLASSIFIER_TEMPLATE = """
# A classifier of {num_labels} classes, {width} wide, {depth} blocks

A Vision Transformer fine-tuned with hf_mim.

```python
{registers}from transformers import pipeline

pipeline("image-classification", "{name}")(image)
```
{rest}
## Training

{training}

## {score} in %

| held out ({num_test} pictures) | {names} |
|---{rules}|
| {accuracies} |
{appendix}"""
# Of a repository with a stock export at its root.
_REST_OF_CLASSIFIER = """
That is plain transformers ({kind}), for those with and without hf_mim; `use.py` is the same without a pipeline.
"""


def main_score(results: dict) -> float:
    """Of a classifier's results in percent: accuracy, or of several labels a picture mean average precision."""
    return results["mean_average_precision"] if "mean_average_precision" in results else results["accuracy"]


def write_classifier_card(
    folder: str | Path,
    name: str,
    config,
    training: dict[str, str],
    results: dict,
    context: CardContext | None = None,
) -> Path:
    """
    As `write_card`, of a classifier; `results` has `accuracy` or `mean_average_precision`, `num_test`, and
    `robustness` by test set.
    """
    context = context or CardContext()
    robustness = results["robustness"]
    accuracies = [main_score(metrics) for metrics in (results, *robustness.values())]
    by_precision = "mean_average_precision" in results
    body = _CLASSIFIER_TEMPLATE.format(
        registers=_REGISTERS if context.form is None and config.model_type in METHODS | ENCODER else "",
        rest="" if context.form is None else _REST_OF_CLASSIFIER.format(kind=_KINDS[context.form]),
        num_labels=config.num_labels,
        width=config.hidden_size,
        depth=config.num_hidden_layers,
        name=name,
        training=_listed(training),
        score="Mean average precision" if by_precision else "Accuracy",
        num_test=results["num_test"],
        names=" | ".join(robustness),
        rules="|---" * len(robustness),
        accuracies=" | ".join(f"{accuracy:.2f}" for accuracy in accuracies),
        appendix=context.appendix(),
    ).replace(" |  |\n", " |\n")
    metric, told = ("mean_average_precision", "mAP") if by_precision else ("accuracy", "accuracy")
    scores = [
        context.result("image-classification", metric, value, f"{told} in %", data)
        for data, value in zip((None, *robustness), accuracies, strict=True)
    ]
    return _write(folder, name, "image-classification", [config.model_type], context, scores, body)


_DENSE_TEMPLATE = """
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
{appendix}"""


def _write_dense_card(
    folder, name: str, config, training, results, context: CardContext | None, metrics: dict, **fields
) -> Path:
    """`metrics`: by name in `results`, the Hub's name of a metric, and what is told beside it."""
    context, pipeline = context or CardContext(), fields["pipeline"]
    body = _DENSE_TEMPLATE.format(
        width=config.hidden_size,
        depth=config.num_hidden_layers,
        name=name,
        training=_listed(training),
        num_test=results["num_test"],
        appendix=context.appendix(),
        **fields,
    )
    scores = [context.result(pipeline, metric, results[one], told) for one, (metric, told) in metrics.items()]
    return _write(folder, name, pipeline, [config.model_type], context, scores, body)


def write_segmenter_card(
    folder: str | Path,
    name: str,
    config,
    training: dict[str, str],
    results: dict,
    context: CardContext | None = None,
) -> Path:
    """As `write_card`, of a segmenter; `results` has its scores, `iou` by class, and `num_test`."""
    iou = {one: "" if value is None else f"{value:.2f}" for one, value in results["iou"].items()}
    metrics = {
        "miou": ("mean_iou", "mIoU in %"),
        "mean_accuracy": ("mean_accuracy", "mean accuracy in %"),
        "pixel_accuracy": ("accuracy", "pixel accuracy in %"),
    }
    scores = " | ".join(f"{results[one]:.2f}" for one in metrics)
    classes = "\n".join(f"| {one} | {value} |" for one, value in iou.items())
    tables = (
        f"In %:\n\n| mIoU | mean accuracy | pixel accuracy |\n|---|---|---|\n| {scores} |\n\n"
        f"| class | IoU |\n|---|---|\n{classes}"
    )
    title = f"A segmenter of {config.num_labels} classes"
    fields = {"pipeline": "image-segmentation", "title": title, "tables": tables}
    return _write_dense_card(folder, name, config, training, results, context, metrics, **fields)


def write_depth_card(
    folder: str | Path,
    name: str,
    config,
    training: dict[str, str],
    results: dict,
    context: CardContext | None = None,
) -> Path:
    """As `write_card`, of an estimator of depth; `results` has `rmse`, `abs_rel`, `delta1` and `num_test`."""
    tables = (
        "RMSE in the unit of the depths, the others in %:\n\n| RMSE | relative error | within a factor of 1.25 |\n"
        f"|---|---|---|\n| {results['rmse']:.4g} | {results['abs_rel']:.2f} | {results['delta1']:.2f} |"
    )
    metrics = {
        "rmse": ("rmse", "RMSE in the unit of the depths"),
        "abs_rel": ("abs_rel", "relative error in %"),
        "delta1": ("delta1", "within a factor of 1.25, in %"),
    }
    fields = {"pipeline": "depth-estimation", "title": "An estimator of depth", "tables": tables}
    return _write_dense_card(folder, name, config, training, results, context, metrics, **fields)


_PRECISIONS = {
    "map": "IoU 0.5 to 0.95",
    "map_50": "IoU 0.5",
    "map_75": "IoU 0.75",
    "map_small": "small",
    "map_medium": "medium",
    "map_large": "large",
}


def write_detector_card(
    folder: str | Path,
    name: str,
    config,
    training: dict[str, str],
    results: dict,
    context: CardContext | None = None,
) -> Path:
    """As `write_card`, of a detector; `results` has its scores, `box_ap` and `mask_ap` by class, and `num_test`."""
    kinds = {"box": "boxes", "mask": "masks"} if config.detection_masks else {"box": "boxes"}

    def row(first: str, values) -> str:
        numbers = ("" if value is None else f"{value:.2f}" for value in values)
        return f"| {' | '.join((first, *numbers))} |"

    lines = [
        "Mean average precision in %:\n",
        f"| | {' | '.join(_PRECISIONS.values())} |",
        "|---" * (1 + len(_PRECISIONS)) + "|",
        *(row(what, [results[f"{kind}_{score}"] for score in _PRECISIONS]) for kind, what in kinds.items()),
        "",
        f"| class | {' | '.join(kinds.values())} |",
        "|---" * (1 + len(kinds)) + "|",
        *(row(one, [results[f"{kind}_ap"][one] for kind in kinds]) for one in results["box_ap"]),
    ]
    title = f"A detector of {config.num_labels} classes ({'Mask' if config.detection_masks else 'Faster'} R-CNN)"
    metrics = {
        f"{kind}_{score}": (f"{kind}_{score}", f"mean average precision of {what}, {_PRECISIONS[score]}, in %")
        for kind, what in kinds.items()
        for score in ("map", "map_50")
        if results[f"{kind}_{score}"] is not None
    }
    fields = {"pipeline": "object-detection", "title": title, "tables": "\n".join(lines)}
    return _write_dense_card(folder, name, config, training, results, context, metrics, **fields)
