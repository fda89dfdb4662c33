"""Settings of all tests: nothing is fetched, whatever a library would like to look up."""

import gc
import os
import re
from pathlib import Path

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"
if "PYTEST_XDIST_WORKER" in os.environ:
    # Tests run side by side, one a core: threads of one would wait for those of the other.
    os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_configure(config):
    # See test_transformers_common.py: transformers registers its own marks where its source has them, in its conftest.
    if source := os.environ.get("HF_MIM_TRANSFORMERS_SOURCE"):
        code = (Path(source) / "tests" / "test_modeling_common.py").read_text(encoding="utf-8")
        for name in set(re.findall(r"@(?:pytest\.)?mark\.(\w+)", code)):
            config.addinivalue_line("markers", f"{name}: of transformers")


def pytest_unconfigure():
    # See less_garbage_to_look_through: what is frozen would count as leaked at the interpreter's end.
    gc.unfreeze()


@pytest.fixture(scope="module", autouse=True)
def less_garbage_to_look_through():
    """
    At each training's end accelerate collects garbage, and so does each job: half of a tiny run, for all that torch,
    transformers and the tests have in memory for good.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def fork():
    """Runs code in a new interpreter; see `forks.Forks`."""
    # Only where it is wanted: it imports torch.
    from forks import open_forks

    with open_forks() as forks:
        yield forks


@pytest.fixture(scope="session")
def processes():
    """Runs a script in one or several processes; see `forks.Processes`."""
    from forks import open_processes

    with open_processes() as opened:
        yield opened
