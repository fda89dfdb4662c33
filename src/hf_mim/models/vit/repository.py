"""Where the pretraining checkpoint is in a repository of the Hub whose root is for those without hf_mim."""

import json
from pathlib import Path

from huggingface_hub import snapshot_download
from transformers.utils import CONFIG_NAME, cached_file

# The folder in the repository.
PRETRAINING = "pretraining"
# Which repository and version of it is meant.
HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "revision", "subfolder", "token")


def locate(path: str | Path) -> str:
    """
    What to load for a run: `path`, or the folder of its pretraining checkpoint where its root is a stock export, as in
    a pushed repository or a copy of one. What is on the Hub is fetched. Whoever loads it says what is wrong with it.
    """
    path = str(path)
    if not _is_below(path, None, {}):
        return path
    if (Path(path) / PRETRAINING).is_dir():
        return str(Path(path) / PRETRAINING)
    pattern = f"{PRETRAINING}/*"
    return str(Path(snapshot_download(path, allow_patterns=pattern, ignore_patterns=f"{pattern}/*")) / PRETRAINING)


def with_subfolder(model_type: str, path: str | Path | None, kwargs: dict) -> dict:
    """
    The arguments of `from_pretrained` for a model of this type, with the `subfolder` that has it where none is given
    and the root of the repository has another.
    """
    if path is None or kwargs.get("subfolder"):
        return kwargs
    hub = {name: kwargs[name] for name in HUB_ARGUMENTS if name in kwargs and name != "subfolder"}
    return kwargs | {"subfolder": PRETRAINING} if _is_below(str(path), model_type, hub) else kwargs


def _is_below(path: str, model_type: str | None, hub: dict) -> bool:
    """Whether a model of this type, or of any, is in the folder and another at the root."""
    root = _model_type(path, "", hub)
    if root in (None, model_type):
        return False
    below = _model_type(path, PRETRAINING, hub)
    return below not in (None, root) and model_type in (None, below)


def _model_type(path: str, subfolder: str, hub: dict) -> str | None:
    quietly = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False}
    try:
        file = cached_file(path, CONFIG_NAME, subfolder=subfolder, **quietly, **hub)
        return None if file is None else json.loads(Path(file).read_text(encoding="utf-8")).get("model_type")
    except (OSError, ValueError, AttributeError):
        # No such repository or file of weights, or no config that can be read.
        return None
