"""Settings of all tests: nothing is fetched, whatever a library would like to look up."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
if "PYTEST_XDIST_WORKER" in os.environ:
    # Tests run side by side, one a core: threads of one would wait for those of the other.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
