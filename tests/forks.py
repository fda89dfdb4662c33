"""New interpreters for less: forks of one that has imported torch, so that what takes longest is paid once."""

import contextlib
import json
import subprocess
from collections.abc import Iterator

from tiny_training import started

# Of hf_mim and transformers nothing is imported yet: what is, and in which order, each piece of code decides.
_SERVER = """
import json, os, sys, tempfile, traceback
import torch, torch._dynamo
for line in sys.stdin:
    read, write = os.pipe()
    errors = tempfile.TemporaryFile("w+")
    if (child := os.fork()) == 0:
        os.dup2(write, 1), os.dup2(errors.fileno(), 2), os.close(read)
        status = 1
        try:
            exec(json.loads(line), {"__name__": "__main__"})
            status = 0
        except BaseException:
            traceback.print_exc()
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(status)
    os.close(write)
    with open(read) as pipe:
        said = pipe.read()
    status = os.waitpid(child, 0)[1]
    errors.seek(0)
    print(json.dumps([status, said, errors.read()]), flush=True)
    errors.close()
"""


class Forks:
    """Runs code as `python -c` would. Not for code that looks at signals, at its arguments or at how it ends."""

    def __init__(self, process: subprocess.Popen):
        self._process = process

    def __call__(self, code: str) -> str:
        """What the code prints; an AssertionError with its traceback if it fails."""
        self._process.stdin.write(json.dumps(code) + "\n")
        self._process.stdin.flush()
        status, said, errors = json.loads(self._process.stdout.readline())
        assert status == 0, errors
        return said


@contextlib.contextmanager
def open_forks() -> Iterator[Forks]:
    with started(["-c", _SERVER]) as process:
        yield Forks(process)
