"""Files that are whole or not there: written under another name first, then renamed."""

import contextlib
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path

# How `replacing` calls a file that is being written.
_TEMPORARY = re.compile(r"\..+\.\d+\.tmp(\.\w+)?")


def remove_leftovers(folder: str | os.PathLike) -> None:
    """Deletes what processes that were killed had begun to write in a folder."""
    for path in Path(folder).glob(".*.tmp*"):
        if _TEMPORARY.fullmatch(path.name):
            path.unlink(missing_ok=True)


@contextlib.contextmanager
def replacing(path: str | os.PathLike) -> Iterator[Path]:
    """
    Within, a name beside `path`, with its ending, to write to; after, the file takes the name `path`. Whoever reads
    `path` finds what was there before or all of the new. Where writing fails, `path` stays as it was.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.tmp{path.suffix}")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def save_picture(path: str | os.PathLike, picture) -> Path:
    """Saves a `PIL.Image.Image`, whole or not at all; gives the path back."""
    with replacing(path) as temporary:
        picture.save(temporary)
    return Path(path)


def write_text(path: str | os.PathLike, text: str) -> Path:
    """Writes a text in UTF-8, whole or not at all; gives the path back."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return Path(path)


def write_json(path: str | os.PathLike, content) -> Path:
    """Writes JSON, indented, whole or not at all; gives the path back."""
    return write_text(path, json.dumps(content, indent=2) + "\n")
