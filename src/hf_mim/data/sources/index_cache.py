"""What it takes long to find out about files, kept beside the caches of the Hub's libraries."""

import contextlib
import hashlib
import os
import zipfile
from pathlib import Path

import numpy as np
from huggingface_hub.constants import HF_HOME

from ...files import replacing

FOLDER = Path(HF_HOME) / "hf_mim" / "indices"
# Below, files are looked at again in less time than it takes to think of it.
LEAST = 20_000


def kept(kind: str, root: str) -> dict[str, np.ndarray] | None:
    """What `keep` was given last for a folder; None where that is nothing, or cannot be read."""
    try:
        with np.load(_file(kind, root), allow_pickle=False) as arrays:
            return dict(arrays)
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None


def keep(kind: str, root: str, arrays: dict[str, np.ndarray]) -> None:
    """Keeps arrays of what was found out about a folder, if there is a place for it. Who reads them checks them."""
    path = _file(kind, root)
    # No place to write to: the next run will look again.
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary:
            np.savez(temporary, **arrays)


def _file(kind: str, root: str) -> Path:
    place = os.path.realpath(root).encode(errors="surrogateescape")
    return FOLDER / f"{kind}-{hashlib.sha256(place).hexdigest()[:32]}.npz"
