"""The command `hf_mim`, and what --help says."""

import re
import sys

import pytest
import setuptools

from hf_mim.__main__ import COMMANDS, main
from tiny_training import FLAGS, REPOSITORY, run, write_pictures


def test_help_names_the_commands(capsys):
    assert main(["--help"]) == 0
    out = capsys.readouterr().out
    assert all(re.search(rf"^  {name} ", out, re.MULTILINE) for name in COMMANDS)
    assert main([]) == 2


def test_unknown_command(capsys):
    assert main(["train"]) == 2
    error = capsys.readouterr().err
    assert "no command 'train'" in error and "pretrain" in error


@pytest.mark.parametrize(("command", "first"), [("pretrain", "The network"), ("probe", "The probe")])
def test_flags_are_in_groups_ours_first(command, first, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["hf_mim"])
    with pytest.raises(SystemExit) as end:
        main([command, "--help"])
    assert end.value.code == 0
    out = capsys.readouterr().out
    assert out.startswith(f"usage: hf_mim {command} [RECIPE.yaml] [--FLAG VALUE ...]\n")
    titles = re.findall(r"^(\S.*):$", out, re.MULTILINE)
    assert titles[:2] == ["options", first] and titles[-1] == "transformers' TrainingArguments"
    ours, stock = out.split("transformers' TrainingArguments:")
    for flag in ("--train_dir", "--base_learning_rate", "--preset"):
        assert f"  {flag} " in ours and f"  {flag} " not in stock
    assert "  --save_steps " in stock and "  --save_steps " not in ours


def test_same_job_as_the_script(tmp_path):
    folder = write_pictures(tmp_path / "pictures", 12)
    flags = [*FLAGS, f"--train_dir={folder}", f"--output_dir={tmp_path / 'run'}", "--max_steps=2"]
    result = run(["-m", "hf_mim", "pretrain", *flags, "--save_strategy=no"])
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "run" / "model.safetensors").is_file() and "The model is in" in result.stdout
    assert run(["-m", "hf_mim", "pretrain", "--nothing"]).returncode == 1


def test_the_console_command_is_installed(monkeypatch):
    told = {}
    monkeypatch.setattr(setuptools, "setup", lambda **settings: told.update(settings))
    exec(
        compile((REPOSITORY / "setup.py").read_text(), REPOSITORY / "setup.py", "exec"),
        {"__file__": str(REPOSITORY / "setup.py")},
    )
    assert told["entry_points"]["console_scripts"] == ["hf_mim=hf_mim.__main__:main"]
    assert "hf_mim.jobs" in told["packages"] and "hf_mim.models.tec" in told["packages"]
