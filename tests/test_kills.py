"""SIGKILL at chance moments, a third of them while something is written, and again: no bit changes."""

import pytest

from tiny_training import run


@pytest.mark.slow
def test_killed_and_started_again():
    """Pretraining with three methods, one of them in two stages, and fine-tuning."""
    result = run(["benchmarks/kills.py", "--kills", "12"], timeout=600)
    assert result.returncode == 0, result.stdout + result.stderr
    for job in ("pilamim", "ocl", "dbot", "fine-tuning"):
        assert f"{job}: {{'kills': 3," in result.stdout
    assert result.stdout.count("'refused': 0, 'other_weights': 0") == 4
