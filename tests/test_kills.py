"""SIGKILL at chance moments, a third of them while something is written, and again: no bit changes."""

import subprocess
import sys

import pytest

from tiny_training import REPOSITORY, environment


@pytest.mark.slow
def test_killed_and_started_again():
    """Pretraining with three methods, one of them in two stages, and fine-tuning."""
    command = [sys.executable, "benchmarks/kills.py", "--kills", "12"]
    result = subprocess.run(
        command, cwd=REPOSITORY, env=environment(), capture_output=True, text=True, timeout=600, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr
    for job in ("pilamim", "ocl", "dbot", "fine-tuning"):
        assert f"{job}: {{'kills': 3," in result.stdout
    assert result.stdout.count("'refused': 0, 'other_weights': 0") == 4
