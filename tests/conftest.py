"""Settings of all tests: nothing is fetched, whatever a library would like to look up."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
