"""One run at a time in a folder."""

import contextlib
import errno
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from accelerate import PartialState
from transformers.utils import logging

from ..files import remove_leftovers

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

logger = logging.get_logger(__name__)

_NAME = ".lock"
# What this process holds: a trainer within a job is no other run.
_held: set[Path] = set()


@contextlib.contextmanager
def only_run_in(output_dir: str | Path, flag: str = "--output_dir") -> Iterator[None]:
    """
    Within, this run is the only one that writes into `output_dir`, which is made, and rid of what a killed process had
    begun to write. The system takes the lock from a process that has ended, however it did. Of several processes the
    first holds it. Within itself, of one process, it changes nothing. `flag` is named in errors.

    Raises:
        ValueError: If another run is in the folder, or the folder cannot be made or written to.
    """
    folder = Path(output_dir).resolve()
    if not PartialState().is_main_process or folder in _held:
        yield
        return
    is_new = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = _lock(folder / _NAME, flag)
    except (FileExistsError, NotADirectoryError) as error:
        raise ValueError(f"{flag} {output_dir} is a file, or below one; expected a folder, or none yet.") from error
    except OSError as error:
        raise ValueError(f"{flag} {output_dir} cannot be written to ({error.strerror}).") from error
    remove_leftovers(folder)
    remove_leftovers(folder / "reconstructions")
    _held.add(folder)
    try:
        yield
    finally:
        _held.remove(folder)
        # The name first: who has opened the file by now finds the name gone, and takes a new one.
        (folder / _NAME).unlink(missing_ok=True)
        lock.close()
        if is_new:
            with contextlib.suppress(OSError):
                # Nothing was written.
                folder.rmdir()


def _lock(path: Path, flag: str) -> TextIO:
    while True:
        file = path.open("a+")
        try:
            if fcntl is not None:
                # Unlike flock's, not shared with the data loader's workers, which may outlive a killed process.
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            file.seek(0)
            holder = file.read().strip()
            file.close()
            if error.errno in (errno.EACCES, errno.EAGAIN):
                raise ValueError(
                    f"Another run is writing into {path.parent}{f' ({holder})' if holder else ''}. Wait for it, or "
                    f"choose another {flag}."
                ) from error
            if error.errno not in (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS):
                raise
            logger.warning(f"{path.parent} lies where files cannot be locked: see to it that one run writes there.")
            return path.open("a+")
        with contextlib.suppress(FileNotFoundError):
            if os.fstat(file.fileno()).st_ino == path.stat().st_ino:
                file.truncate(0)
                file.write(f"process {os.getpid()} on {socket.gethostname()}")
                file.flush()
                return file
        # The run before has taken the name away in the meantime.
        file.close()
