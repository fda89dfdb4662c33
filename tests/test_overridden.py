"""Which private methods of transformers' Trainer ours depend on, and whether they are those that were looked at."""

import ast
import hashlib
import inspect
import textwrap

import pytest
import transformers
from packaging.version import Version
from transformers import Trainer

from hf_mim.training.base_trainer import CALLED, OVERRIDDEN
from hf_mim.training.finetuning_trainer import FineTuningTrainer
from hf_mim.training.trainer import MIMTrainer

# The newest transformers whose methods were read, and what they are there, without comments and docstrings.
LOOKED_AT = "5.24.0"
SOURCES = {
    "_get_dataloader": "b9dbc317b3c11aff",
    "_get_train_sampler": "ea94088497240764",
    "_get_eval_sampler": "6eee8f3cff63eefb",
    "_run_epoch": "2898c67349bc2093",
    "_get_grad_norm": "4262ab7efcb623e8",
    "_issue_warnings_after_load": "7435b67dd70dc34c",
    "_save": "7b1a6396e0ed4d6d",
    "_save_checkpoint": "e4ed968434a0b6c7",
    "_get_output_dir": "cd224dfb06f557f1",
    "_prepare_inputs": "0eac07b20782843f",
    "_push_from_checkpoint": "aa8789d91015f80f",
}


def source_of(name: str) -> str:
    """A hash of a method's lines, the same whatever Python reads them."""
    source = textwrap.dedent(inspect.getsource(getattr(Trainer, name)))
    (function,) = ast.parse(source).body
    lines = source.splitlines()
    if ast.get_docstring(function) is not None:
        docstring = function.body[0]
        del lines[docstring.lineno - 1 : docstring.end_lineno]
    code = "".join("".join(line.split()) for line in lines if not line.lstrip().startswith("#"))
    return hashlib.sha256(code.encode()).hexdigest()[:16]


def test_all_are_listed():
    ours = {cls for trainer in (MIMTrainer, FineTuningTrainer) for cls in trainer.__mro__}
    ours = {cls for cls in ours if cls.__module__.startswith("hf_mim.")}
    names = {name for cls in ours for name in vars(cls) if name.startswith("_") and not name.startswith("__")}
    assert {name for name in names if hasattr(Trainer, name)} == set(OVERRIDDEN)
    assert all(reason for reason in OVERRIDDEN.values())


@pytest.mark.parametrize("name", [*OVERRIDDEN, *CALLED])
def test_is_still_there(name):
    assert callable(getattr(Trainer, name, None)), f"transformers {transformers.__version__} has no Trainer.{name}"


@pytest.mark.parametrize("name", SOURCES)
def test_is_the_one_that_was_looked_at(name):
    """Fails when a newer transformers changes one of these methods, and at no other release."""
    if Version(transformers.__version__) < Version(LOOKED_AT):
        pytest.skip(f"Looked at in transformers {LOOKED_AT}; this is {transformers.__version__}.")
    assert source_of(name) == SOURCES[name], (
        f"Trainer.{name} of transformers {transformers.__version__} is not that of {LOOKED_AT}. Read it: does what we "
        f"override it for still hold ({OVERRIDDEN.get(name, 'it is called')})? Then write {source_of(name)!r} here."
    )


def test_every_one_was_looked_at():
    assert set(SOURCES) == {*OVERRIDDEN, *CALLED}
