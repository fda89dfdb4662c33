"""Every command and flag that README, cards and scripts print is read as it would be from a command line."""

import re
import shlex

import pytest

from hf_mim.data.arguments import DataArguments
from hf_mim.jobs.check import CheckArguments, _name_data
from hf_mim.jobs.convert import ConvertArguments
from hf_mim.jobs.depth import CLASSES as DEPTH_CLASSES
from hf_mim.jobs.detection import CLASSES as DETECTION_CLASSES
from hf_mim.jobs.embed import EmbedArguments
from hf_mim.jobs.export import ExportArguments
from hf_mim.jobs.finetuning import FineTuningArguments
from hf_mim.jobs.linear_probe import PRESETS as PROBE_PRESETS
from hf_mim.jobs.linear_probe import ProbeArguments
from hf_mim.jobs.pack import PackArguments, name_both
from hf_mim.jobs.representation_report import ReportArguments
from hf_mim.jobs.segmentation import CLASSES as SEGMENTATION_CLASSES
from hf_mim.training.arguments import MIMTrainingArguments
from hf_mim.training.command import ClassifierArguments, ModelArguments, _Parser, name_words, parse_arguments
from hf_mim.training.presets import DEPTH_PRESETS, DETECTION_PRESETS, FINE_TUNING_PRESETS, SEGMENTATION_PRESETS
from tiny_training import REPOSITORY

# What each script reads, and its presets.
SCRIPTS = {
    "run_mim": ((ModelArguments, DataArguments, MIMTrainingArguments), None),
    "run_image_classification": ((ClassifierArguments, DataArguments, FineTuningArguments), FINE_TUNING_PRESETS),
    "run_semantic_segmentation": (SEGMENTATION_CLASSES, SEGMENTATION_PRESETS),
    "run_depth_estimation": (DEPTH_CLASSES, DEPTH_PRESETS),
    "run_object_detection": (DETECTION_CLASSES, DETECTION_PRESETS),
    "run_linear_probe": ((ProbeArguments, DataArguments), PROBE_PRESETS),
    "run_representation_report": ((ReportArguments, DataArguments), {}),
}
SUBCOMMANDS = dict(
    zip(("pretrain", "finetune", "segment", "depth", "detect", "probe", "report"), SCRIPTS.values(), strict=True)
)
# Flags without which nothing is read, for those that are printed alone.
NEEDED = {
    "run_mim": [],
    "run_image_classification": [],
    "run_semantic_segmentation": [],
    "run_depth_estimation": [],
    "run_object_detection": [],
    "run_linear_probe": ["--model_name_or_path=x"],
    "run_representation_report": ["--model_names_or_paths=x"],
}
NEEDED |= dict(zip(SUBCOMMANDS, NEEDED.values(), strict=True))
NEEDED = {name: ["--output_dir=x", *needed] for name, needed in NEEDED.items()}
# Sub-commands without a script, and the flags that their words stand for.
WITHOUT_SCRIPT = {
    "check": ((DataArguments, CheckArguments), {}),
    "convert": ((ConvertArguments,), {}),
    "embed": ((EmbedArguments, DataArguments), {}),
    "export": ((ExportArguments,), {}),
    "pack": ((DataArguments, PackArguments), {}),
}
NEEDED |= {
    "check": [],
    "convert": ["--checkpoint=x", "--output=x", "--model_type=x"],
    "embed": ["--model_name_or_path=x", "--images=x", "--output=x.parquet"],
    "export": ["--model_name_or_path=x", "--output=x"],
    "pack": ["--output_dir=x"],
}
SUBCOMMANDS |= WITHOUT_SCRIPT
PRINTED = [
    *REPOSITORY.glob("*.md"),
    *REPOSITORY.glob("docs/**/*.md"),
    *REPOSITORY.glob("model_cards/*.md"),
    *REPOSITORY.glob("examples/*.py"),
]


def commands(text: str) -> list[tuple[str, list[str]]]:
    """(script, its words) of every command in a text; continued lines are joined, variables are filled."""
    text = re.sub(r"\\\n\s*", " ", text)
    variables = dict(re.findall(r'^(\w+)="([^"]*)"$', text, flags=re.MULTILINE))
    for name, value in variables.items():
        text = text.replace(f"${name}", value)
    found = []
    # A command in a line of text ends with its backtick, and may go on in the next line; any other with its line.
    for span in re.findall(r"`([^`]+)`", re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)):
        text = text.replace(f"`{span}`", f"\n{span.replace(chr(10), ' ')}\n")
    for line in text.splitlines():
        match = re.search(rf"(?:examples/(run_\w+)\.py|\bhf_mim ({'|'.join(SUBCOMMANDS)}))\b(.*)", line)
        if match and (match[1] or re.match(r"\s*(\S+ )*(python -m |-m )?hf_mim ", line)):
            found.append((match[1] or match[2], shlex.split(match[3], comments=True)))
    return found


COMMANDS = [(path, *command) for path in PRINTED for command in commands(path.read_text(encoding="utf-8"))]


def test_there_are_some():
    assert len(COMMANDS) >= 15
    assert commands("x\n    python examples/run_mim.py --a b \\\n  --c\n") == [("run_mim", ["--a", "b", "--c"])]
    assert commands("see `accelerate launch examples/run_mim.py --a\nb` there") == [("run_mim", ["--a", "b"])]
    assert commands("accelerate launch -m hf_mim pretrain --a  # says why") == [("pretrain", ["--a"])]
    assert commands("so `hf_mim check mine` reads") == [("check", ["mine"])]
    assert {script for _, script, _ in COMMANDS} == {*SCRIPTS, *SUBCOMMANDS}


@pytest.mark.parametrize(
    ("path", "script", "words"), COMMANDS, ids=[f"{path.name}-{number}" for number, (path, *_) in enumerate(COMMANDS)]
)
def test_commands(monkeypatch, path, script, words):
    monkeypatch.chdir(REPOSITORY)
    classes, presets = (SCRIPTS | SUBCOMMANDS)[script]
    if script == "check":
        words = _name_data(words)
    elif script == "pack":
        words = name_both(words)
    elif script in WITHOUT_SCRIPT:
        words = name_words(words, *(word.partition("=")[0][2:] for word in NEEDED[script] if "type" not in word))
    # Commands that are only named, in a list of them, lack these.
    given = {word.partition("=")[0] for word in words}
    words = [*words, *(word for word in NEEDED[script] if word.partition("=")[0] not in given)]
    parse_arguments(classes, words, presets)


def flags(text: str) -> list[list[str]]:
    """The words of every code span that begins with a flag, and has no placeholder in it."""
    spans = re.findall(r"`\[?(--[a-z_]+[^`\]]*)\]?`", re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL))
    words = (span.replace("\n", " ").split() for span in spans)
    return [span for span in words if not any(re.search(r"[A-Z<\[]|\.\.\.", word) for word in span)]


FLAGS = {tuple(words) for path in PRINTED for words in flags(path.read_text(encoding="utf-8"))}


@pytest.mark.parametrize("words", sorted(FLAGS), ids=" ".join)
def test_flags(words):
    words = list(words)
    benchmarks = "".join(path.read_text() for path in REPOSITORY.glob("benchmarks/*.py"))
    names = [word.partition("=")[0] for word in words if word.startswith("--")]
    known = {
        script: {option for action in _Parser(classes)._actions for option in action.option_strings}
        for script, (classes, _) in (SCRIPTS | WITHOUT_SCRIPT).items()
    }
    owners = [script for script, options in known.items() if set(names) <= options]
    if not owners:
        assert all(f'"{name}"' in benchmarks for name in names), f"{' '.join(words)}: no script has these flags"
        return
    if words == names and len(words) == 1:
        return  # named, not given
    errors = []
    for script in owners:
        classes, presets = (SCRIPTS | WITHOUT_SCRIPT)[script]
        try:
            parse_arguments(classes, [*words, *NEEDED[script]], presets)
            return
        except ValueError as error:
            errors.append(str(error))
    raise AssertionError(errors)
