"""Flags of the example scripts: defaults, then the preset, then a recipe file, then what is typed."""

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path

import yaml
from transformers import HfArgumentParser

from ..registry import METHODS
from .presets import PRESETS, preset_training


@dataclass
class ModelArguments:
    """Which network is trained."""

    model_type: str = field(default="pilamim", metadata={"help": f"The method: {', '.join(METHODS)}."})
    preset: str = field(default="tiny", metadata={"help": f"Sizes and schedule: {', '.join(PRESETS)}."})
    model_name_or_path: str | None = field(
        default=None,
        metadata={
            "help": "Continue from these weights: a pretraining checkpoint or encoder of hf_mim, ViTMAE or ViT. What it "
            "lacks is built anew."
        },
    )
    patch_size: list[int] | None = field(
        default=None, metadata={"help": "Pixels of a patch: one number, or height and width."}
    )
    mask_ratio: float | None = field(default=None, metadata={"help": "Share of the patches that is hidden."})
    config_overrides: str | None = field(
        default=None,
        metadata={"help": "Other fields of the config, e.g. 'hidden_size=144,use_cls_loss=false'; in a recipe a table."},
    )
    attn_implementation: str | None = field(
        default=None, metadata={"help": "eager, sdpa, flash_attention_2, flex_attention, ...; best available if left out."}
    )


def parse_arguments(argument_classes: tuple[type, ...], argv: list[str] | None = None) -> tuple:
    """
    Instances of the dataclasses from the command line.

    The first word may be a `.json`, `.yaml` or `.yml` recipe: a table of flags without dashes. What is typed overrides
    the recipe, which overrides the preset, which overrides the defaults.

    Raises:
        ValueError: If the recipe is not a table, or has a flag that does not exist.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    recipe = _read_recipe(argv.pop(0)) if argv and argv[0].endswith((".json", ".yaml", ".yml")) else {}
    parser = HfArgumentParser(argument_classes)
    known = {action.dest for action in parser._actions}
    unknown = sorted(set(recipe) - known)
    if unknown:
        raise ValueError(f"The recipe has unknown flags: {', '.join(unknown)}. Run the script with --help for all flags.")
    parser.set_defaults(**recipe)
    if "preset" in known:
        preset = parser.parse_known_args(argv)[0].preset
        if preset in PRESETS:
            parser.set_defaults(**(preset_training(preset) | recipe))
    return parser.parse_args_into_dataclasses(argv)


def _read_recipe(name: str) -> dict:
    path = Path(name)
    if not path.is_file():
        raise ValueError(f"There is no recipe {name}.")
    text = path.read_text(encoding="utf-8")
    recipe = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    if not isinstance(recipe, dict):
        raise ValueError(f"The recipe {name} is not a table of flags.")
    # YAML reads 1e-3 as text; the flags' own types are applied to text.
    return {key: json.dumps(value) if isinstance(value, dict) else value for key, value in recipe.items()}
