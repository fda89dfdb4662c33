"""Settings of all tests: nothing is fetched, whatever a library would like to look up."""

import os

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"
if "PYTEST_XDIST_WORKER" in os.environ:
    # Tests run side by side, one a core: threads of one would wait for those of the other.
    os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="session")
def fork():
    """Runs code in a new interpreter; see `forks.Forks`."""
    # Only where it is wanted: it imports torch.
    from forks import open_forks

    with open_forks() as forks:
        yield forks
