"""Flags of the example scripts: defaults, then the preset, then a recipe file, then what is typed."""

import argparse
import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path

import yaml
from accelerate import PartialState
from transformers import HfArgumentParser, TrainingArguments

from ..models.presets import PRESETS
from ..registry import MODEL_TYPES
from .presets import preset_training

# A flag, and the one that would take precedence over it. Whoever sets only the first overrules the second of a recipe
# or a preset.
_STRONGER = {
    "warmup_steps": "warmup_epochs",
    "base_learning_rate": "learning_rate",
    "num_train_epochs": "max_steps",
    "train_dir": "dataset_name",
    "dataset_name": "train_dir",
}
_DATA = ("train_dir", "dataset_name")
# A number of steps, and the strategy that it belongs to: whoever gives the number wants that strategy.
_BY_STEPS = {"save_steps": "save_strategy", "eval_steps": "eval_strategy", "logging_steps": "logging_strategy"}


@dataclass
class ModelArguments:
    """Which network is trained."""

    model_type: str = field(default="pilamim", metadata={"help": f"The method: {', '.join(MODEL_TYPES)}."})
    preset: str = field(default="tiny", metadata={"help": f"Sizes and schedule: {', '.join(PRESETS)}."})
    model_name_or_path: str | None = field(
        default=None,
        metadata={
            "help": "Continue from these weights: a pretraining checkpoint or encoder of hf_mim, ViTMAE, ViT, DeiT, "
            "DINOv2, DINOv3, CLIP or SigLIP, or a file of timm's vit_* weights. What they lack is built anew."
        },
    )
    base_model_name_or_path: str | None = field(
        default=None,
        metadata={
            "help": "TEC: the trained network to learn from, any ViT with [CLS]: of hf_mim, ViT, ViTMAE, DINOv2, "
            "DINOv3, CLIP. Required, unless model_name_or_path is a pretraining checkpoint, which holds it."
        },
    )
    teacher_model_name_or_path: str | None = field(
        default=None,
        metadata={
            "help": "dBOT: the trained network to learn from in the first stage, any that TEC takes as base. Default: "
            "one as untrained as the student."
        },
    )
    channel_map: list[str] | None = field(
        default=None,
        metadata={
            "help": "With model_name_or_path: for each channel of the images, in their order, which channel of the "
            "weights it is, from 0, or - for one that they do not have, e.g. 2 1 0 - for BGR and infrared. Default: "
            "the weights' channels, or with another num_channels the mean of their filters for each."
        },
    )
    base_channels: list[int] | None = field(
        default=None,
        metadata={
            "help": "TEC and dBOT: which channels of the images the network to learn from sees, in its order, from 0, "
            "e.g. 2 1 0. Default: all."
        },
    )
    cache_base_features: bool = field(
        default=False,
        metadata={
            "help": "TEC and dBOT: compute what the network to learn from has of each image once, in base_features/ "
            "of the run. Needs whole images: --crop_scale_min 1 --horizontal_flip false."
        },
    )
    trainable_blocks: int | None = field(
        default=None,
        metadata={"help": "With model_name_or_path: train the last so many blocks of the encoder and no others."},
    )
    lora_rank: int | None = field(
        default=None,
        metadata={
            "help": "With model_name_or_path: train low-rank updates of this rank on the encoder's blocks, by PEFT, "
            "in place of the encoder. They are saved in adapter/, and merged into the model at the end."
        },
    )
    patch_size: list[int] | None = field(
        default=None, metadata={"help": "Pixels of a patch: one number, or height and width."}
    )
    mask_ratio: float | None = field(default=None, metadata={"help": "Share of the patches that is hidden."})
    config_overrides: str | None = field(
        default=None,
        metadata={
            "help": "Other fields of the config, e.g. 'hidden_size=144,use_cls_loss=false'; in a recipe a table."
        },
    )
    attn_implementation: str | None = field(
        default=None,
        metadata={"help": "eager, sdpa, flash_attention_2, flex_attention, ...; best available if left out."},
    )


@dataclass
class ClassifierArguments:
    """Which network is fine-tuned, and what of it."""

    model_type: str = field(
        default="pilamim",
        metadata={"help": f"Without --model_name_or_path, an untrained network: {', '.join(MODEL_TYPES)}."},
    )
    preset: str = field(default="tiny", metadata={"help": f"Sizes and schedule: {', '.join(PRESETS)}."})
    model_name_or_path: str | None = field(
        default=None,
        metadata={
            "help": "Start from these weights: a pretraining checkpoint, encoder or classifier of hf_mim, ViTMAE, or "
            "any ViT that AutoModelForImageClassification knows."
        },
    )
    patch_size: list[int] | None = field(
        default=None, metadata={"help": "Of an untrained network: pixels of a patch, one number or height and width."}
    )
    config_overrides: str | None = field(
        default=None, metadata={"help": "Other fields of an untrained network's config, e.g. 'hidden_size=144'."}
    )
    attn_implementation: str | None = field(
        default=None,
        metadata={"help": "eager, sdpa, flash_attention_2, flex_attention, ...; best available if left out."},
    )
    pooling: str | None = field(
        default=None,
        metadata={
            "help": "What the head sees: mean (of the patches) or cls. Default: mean; a stock ViT and a classifier "
            "keep their own."
        },
    )
    drop_path_rate: float = field(
        default=0.1, metadata={"help": "Stochastic depth of the last block; rises linearly from 0."}
    )
    trainable: str = field(
        default="all",
        metadata={"help": "What is trained: all, head, or a mode that the model offers (its trainable_modes())."},
    )
    lora_rank: int | None = field(
        default=None,
        metadata={
            "help": "Train low-rank updates of this rank on the blocks' linear maps, by PEFT, and besides what "
            "--trainable says (all: the head)."
        },
    )

    def __post_init__(self):
        if self.pooling not in (None, "mean", "cls"):
            raise ValueError(f"--pooling is {self.pooling!r}; expected mean or cls.")
        if not 0 <= self.drop_path_rate < 1:
            raise ValueError(f"--drop_path_rate is {self.drop_path_rate}; expected a number in [0, 1).")
        if self.lora_rank is not None and self.lora_rank < 1:
            raise ValueError(f"--lora_rank is {self.lora_rank}; expected at least 1.")


def parse_arguments(
    argument_classes: tuple[type, ...], argv: list[str] | None = None, presets: Mapping[str, dict] | None = None
) -> tuple:
    """
    Instances of the dataclasses from the command line.

    The first word may be a `.json`, `.yaml` or `.yml` recipe: a table of flags without dashes. What is typed overrides
    the recipe, which overrides the preset, which overrides the defaults. `presets` has the flags that each preset
    sets; those of pretraining by default.

    Raises:
        ValueError: If the recipe is not a table, if a flag does not exist, or if a value is not of its type.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    recipe = _read_recipe(argv.pop(0)) if argv and argv[0].endswith((".json", ".yaml", ".yml")) else {}
    parser = _Parser(argument_classes)
    known = {action.dest for action in parser._actions}
    unknown = sorted(set(recipe) - known)
    if unknown:
        raise ValueError(
            f"The recipe has unknown flags: {', '.join(unknown)}. Run the script with --help for all flags."
        )
    typed = _chosen(argument_classes, argv)
    for steps, strategy in _BY_STEPS.items():
        if steps in recipe:
            recipe.setdefault(strategy, "steps")
        if steps in typed and strategy not in typed:
            argv.append(f"--{strategy}=steps")
            typed[strategy] = "steps"
    preset, model_type = (
        typed.get(name, recipe.get(name, parser.get_default(name))) for name in ("preset", "model_type")
    )
    if presets is None:
        scenes = not any((recipe | typed).get(name) for name in (*_DATA, "model_name_or_path"))
        presets = {name: preset_training(name, model_type, scenes) for name in PRESETS}
    if presets and preset not in presets:
        raise ValueError(f"preset is {preset!r}; expected one of {', '.join(presets)}.")
    defaults = dict(presets.get(preset, {}))
    for lower, upper in ((recipe, typed), (defaults, recipe), (defaults, typed)):
        # A torchvision data set has both: its name, and the folder that it lies in.
        together = str((lower | upper).get("dataset_name")).startswith("torchvision:")
        for flag, stronger in _STRONGER.items():
            if flag in upper and stronger not in upper and not (together and flag in _DATA):
                lower.pop(stronger, None)
    # null in a recipe: as if the preset did not set the flag.
    parser.set_defaults(**{flag: value for flag, value in defaults.items() if recipe.get(flag, value) is not None})
    # Before what is typed, a recipe's values are read as flags are, and flags override them.
    words = [word for flag, value in recipe.items() for word in _as_words(flag, value)]
    *arguments, left_over = parser.parse_args_into_dataclasses(words + argv, return_remaining_strings=True)
    if left_over:
        late = [word for word in left_over if word.endswith((".json", ".yaml", ".yml"))]
        hint = f" A recipe comes first: {late[0]}." if late else ""
        raise ValueError(f"There is no flag {' '.join(left_over)}.{hint} Run the script with --help for all flags.")
    return tuple(arguments)


def name_words(argv: list[str] | None, *flags: str) -> list[str]:
    """The command line, its words before any flag as these: `RUN OUT` as `--model_name_or_path=RUN --output=OUT`."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv and argv[0].endswith((".json", ".yaml", ".yml")):
        return argv
    named = []
    while argv and len(named) < len(flags) and not argv[0].startswith("-"):
        named.append(f"--{flags[len(named)]}={argv.pop(0)}")
    return named + argv


def _chosen(argument_classes: tuple[type, ...], argv: list[str]) -> dict:
    """The flags that are in `argv`, without anything's default."""
    parser = _Parser(argument_classes)
    for action in parser._actions:
        action.default = argparse.SUPPRESS
    return vars(parser.parse_known_args(argv)[0])


_STOCK_TITLE = "transformers' TrainingArguments"
_TITLES = {
    "ModelArguments": "The network",
    "ClassifierArguments": "The network",
    "DataArguments": "The images",
    "MIMTrainingArguments": "Training and evaluation",
    "MaskArguments": "The masks",
    "DepthMapArguments": "The depth maps",
    "FineTuningArguments": "Training and evaluation",
    "SegmentationArguments": "Training and evaluation",
    "DepthArguments": "Training and evaluation",
    "ObjectArguments": "The objects",
    "DetectionArguments": "Training and evaluation",
    "ProbeArguments": "The probe",
    "ReportArguments": "The report",
    "ReplayArguments": "The replay",
    "CheckArguments": "The check",
    "ConvertArguments": "The checkpoint",
    "EmbedArguments": "The table",
    "ExportArguments": "The export",
    "PackArguments": "Packing",
}


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Names each flag once, without its value's name and its spelling with dashes."""

    def _format_action_invocation(self, action):
        return action.option_strings[0] if action.option_strings else super()._format_action_invocation(action)


class _Parser(HfArgumentParser):
    """Takes whole names only, and says what is wrong without the usage, which is pages long."""

    def __init__(self, argument_classes: tuple[type, ...]):
        super().__init__(
            argument_classes,
            allow_abbrev=False,
            formatter_class=_HelpFormatter,
            usage="%(prog)s [RECIPE.yaml] [--FLAG VALUE ...]",
        )
        self._group(argument_classes)

    def _group(self, argument_classes: tuple[type, ...]) -> None:
        """Puts the flags into groups for --help: ours first, transformers' `TrainingArguments` last."""
        # What our arguments have besides, or say otherwise, is ours.
        stock = {argument.name: argument.metadata.get("help", "") for argument in fields(TrainingArguments)}
        titles = {}
        for argument_class in argument_classes:
            for argument in fields(argument_class):
                same = stock.get(argument.name) == argument.metadata.get("help", "")
                titles[argument.name] = _STOCK_TITLE if same else _TITLES[argument_class.__name__]
        groups = {}
        for action in list(self._optionals._group_actions):
            # A bool that is true by default has its opposite too, --no_FLAG.
            title = titles.get(action.dest)
            if title is not None:
                self._optionals._group_actions.remove(action)
                groups.setdefault(title, []).append(action)
        for title in sorted(groups, key=lambda title: title == _STOCK_TITLE):
            self.add_argument_group(title)._group_actions.extend(groups[title])

    def error(self, message: str):
        raise ValueError(f"{message[0].upper()}{message[1:]}. Run the script with --help for all flags.")


def _as_words(flag: str, value) -> list[str]:
    if value is None:
        return []
    if isinstance(value, list):
        return [f"--{flag}", *map(str, value)]
    return [f"--{flag}={json.dumps(value) if isinstance(value, dict) else value}"]


def _read_recipe(name: str) -> dict:
    path = Path(name)
    if not path.is_file():
        raise ValueError(f"There is no recipe {name}.")
    text = path.read_text(encoding="utf-8")
    try:
        recipe = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except (ValueError, yaml.YAMLError) as error:
        raise ValueError(f"The recipe {name} cannot be read: {error}") from error
    if not isinstance(recipe, dict):
        raise ValueError(f"The recipe {name} is not a table of flags.")
    return recipe


def say(text: str) -> None:
    """Prints once, not once a process."""
    if PartialState().is_main_process:
        print(text, flush=True)
