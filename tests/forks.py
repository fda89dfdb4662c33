"""New processes for less: forks of one that has imported what takes longest, so that it is paid once."""

import contextlib
import json
import subprocess
from collections.abc import Iterator

from tiny_training import started

# Of hf_mim and transformers nothing is imported yet: what is, and in which order, each piece of code decides.
_SERVER = """
import gc, json, os, sys, tempfile, traceback
import torch, torch._dynamo
gc.freeze()
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


# As torchrun: where one process fails the others are ended.
_LAUNCHER = """
import gc, json, os, runpy, signal, socket, sys, tempfile, time, traceback
import torch, torch._dynamo
import hf_mim.jobs.linear_probe, hf_mim.jobs.pretraining
gc.freeze()

def begin(command, number, rank, port, out, err):
    if child := os.fork():
        return child
    os.dup2(out.fileno(), 1), os.dup2(err.fileno(), 2)
    if number > 1:
        os.environ |= {"RANK": f"{rank}", "LOCAL_RANK": f"{rank}", "WORLD_SIZE": f"{number}", "MASTER_PORT": f"{port}"}
        os.environ |= {"LOCAL_WORLD_SIZE": f"{number}", "MASTER_ADDR": "127.0.0.1"}
    sys.argv, sys.path[0], status = command, os.path.dirname(command[0]), 1
    try:
        runpy.run_path(command[0], run_name="__main__")
        status = 0
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush(), sys.stderr.flush()
    # At the interpreter's end gloo's threads abort the process now and then.
    os._exit(status)

for line in sys.stdin:
    command, number, deadline = json.loads(line)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    files = [[tempfile.TemporaryFile("w+") for _ in range(2)] for _ in range(number)]
    running = {begin(command, number, rank, port, *files[rank]) for rank in range(number)}
    failed, deadline = 0, time.monotonic() + deadline
    while running:
        child, status = os.waitpid(-1, os.WNOHANG)
        running.discard(child)
        failed = failed or (os.waitstatus_to_exitcode(status) if child else 0)
        if running and (failed or time.monotonic() > deadline):
            failed = failed or -signal.SIGKILL
            for other in running:
                os.kill(other, signal.SIGKILL)
        if not child:
            time.sleep(0.02)
    said = ["", ""]
    for pair in files:
        for stream, file in enumerate(pair):
            file.seek(0)
            said[stream] += file.read()
            file.close()
    print(json.dumps([failed, *said]), flush=True)
"""


class Processes:
    """
    Runs a script as `python SCRIPT ...` or torchrun would, for tests of what it does. For those of launchers, and of
    what importing does, there is `tiny_training.run`.
    """

    def __init__(self, process: subprocess.Popen):
        self._process = process

    def __call__(self, command: list[str], number: int = 1, timeout: float = 240) -> subprocess.CompletedProcess:
        """What `number` processes of one group say, one after the other, and how the first that failed ended."""
        self._process.stdin.write(json.dumps([command, number, timeout]) + "\n")
        self._process.stdin.flush()
        return subprocess.CompletedProcess(command, *json.loads(self._process.stdout.readline()))


@contextlib.contextmanager
def open_processes() -> Iterator[Processes]:
    with started(["-c", _LAUNCHER]) as process:
        yield Processes(process)
