"""The model card that goes with every trained model: what it is, how to use it, how it was made, how good it is."""

from pathlib import Path

from ..evaluation.report import describe_results, results_table
from ..models.vit.configuration_vit import as_pair
from ..registry import METHODS

_PAPERS = {
    "pilamim": "Lee et al., *PiLaMIM: Toward Richer Visual Representations by Integrating Pixel and Latent Masked "
    "Image Modeling*, NeurIPS 2024 Workshop: Self-Supervised Learning",
    "tec": "Gao et al., *Towards Sustainable Self-supervised Learning*, 2022",
    "dbot": "Liu et al., *Exploring Target Representations for Masked Autoencoders*, ICLR 2024",
}

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
import hf_mim  # registers the model with the Auto classes
from transformers import AutoImageProcessor, AutoModel

model = AutoModel.from_pretrained("{name}")
processor = AutoImageProcessor.from_pretrained("{name}")
features = model(**processor(image, return_tensors="pt")).pooler_output  # (1, {width})
```

The folder holds the whole pretraining model: `AutoModelForPreTraining` goes on from it, and
`AutoModelForImageClassification` takes its encoder for fine-tuning. `hf_mim.to_vit(model)` gives a stock `ViTModel`.

## Training

{training}

## How good the features are

{results}
"""


def write_card(folder: str | Path, name: str, config, training: dict[str, str], results: dict | None) -> Path:
    """
    Writes `README.md`.

    Args:
        folder: Where the model was saved.
        name (`str`): What to load it by: its repository on the Hub, or its folder.
        config: The model's.
        training (`dict[str, str]`): Settings worth telling, by name.
        results (`dict`, *optional*): As `evaluate_features` gives; None where features could not be evaluated.

    Returns:
        `Path`: the card.
    """
    height, width_pixels = as_pair(config.image_size)
    path = Path(folder) / "README.md"
    path.write_text(
        _TEMPLATE.format(
            model_type=config.model_type,
            method=METHODS[config.model_type],
            paper=_PAPERS[config.model_type],
            name=name,
            width=config.hidden_size,
            depth=config.num_hidden_layers,
            height=height,
            width_pixels=width_pixels,
            training="\n".join(f"- {name}: {value}" for name, value in training.items()),
            results=_results(results),
        ),
        encoding="utf-8",
    )
    return path


def _results(results: dict | None) -> str:
    if results is None:
        return "Not evaluated: the training data was a stream."
    head, *rows = results_table(results)
    lines = [f"{describe_results(results)}; RankMe of the held-out features.", ""]
    for row in (head, ["---"] * len(head), *rows):
        lines.append("| " + " | ".join(row) + " |")
    return "\n".join(lines)
