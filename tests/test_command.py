"""The command `hf_mim`, and what --help says."""

import re
import runpy
import sys

import pytest

import hf_mim
from hf_mim.__main__ import COMMANDS, main
from hf_mim.training import command
from setup_of import setup_arguments
from tiny_training import FLAGS, REPOSITORY, run, write_pictures


def test_help_names_the_commands(capsys):
    assert main(["--help"]) == 0
    out = capsys.readouterr().out
    assert all(re.search(rf"^  {name} ", out, re.MULTILINE) for name in COMMANDS)
    assert main([]) == 2


ANSWERS = """
import sys
from hf_mim.__main__ import main
for words in (["--help"], ["--version"], [], ["train"]):
    main(words)
print("imported:", *{"torch", "transformers", "numpy", "accelerate"} & {name.split(".")[0] for name in sys.modules})
"""


def test_answers_at_once():
    """That is, without importing what takes seconds."""
    result = run(["-c", ANSWERS])
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-1] == "imported:"
    assert f"\nhf_mim {hf_mim.__version__}\n" in result.stdout


def test_a_jobs_status_is_the_commands(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["hf_mim"])
    assert main(["pretrain", "--nothing"]) == 1
    assert "There is no flag --nothing" in capsys.readouterr().err


def test_unknown_command(capsys):
    assert main(["train"]) == 2
    error = capsys.readouterr().err
    assert "no command 'train'" in error and "pretrain" in error


@pytest.mark.parametrize(("name", "first"), [("pretrain", "The network"), ("probe", "The probe")])
def test_flags_are_in_groups_ours_first(name, first, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["hf_mim"])
    with pytest.raises(SystemExit) as end:
        main([name, "--help"])
    assert end.value.code == 0
    out = capsys.readouterr().out
    assert out.startswith(f"usage: hf_mim {name} [RECIPE.yaml] [--FLAG VALUE ...]\n")
    titles = re.findall(r"^(\S.*):$", out, re.MULTILINE)
    assert titles[:2] == ["options", first] and titles[-1] == "transformers' TrainingArguments"
    ours, stock = out.split("transformers' TrainingArguments:")
    for flag in ("--train_dir", "--base_learning_rate", "--preset"):
        assert f"  {flag} " in ours and f"  {flag} " not in stock
    assert "  --save_steps " in stock and "  --save_steps " not in ours


SCRIPTS = sorted(path.name for path in REPOSITORY.glob("examples/*.py"))


@pytest.mark.parametrize("program", [*COMMANDS, *SCRIPTS])
def test_help_tells_each_flag_once(program, capsys, monkeypatch):
    parsers = []

    class Recorded(command._Parser):
        def __init__(self, *args):
            super().__init__(*args)
            parsers.append(self)

    monkeypatch.setattr(command, "_Parser", Recorded)
    monkeypatch.setattr(sys, "argv", [program, "--help"])
    with pytest.raises(SystemExit) as end:
        if program in SCRIPTS:
            runpy.run_path(str(REPOSITORY / "examples" / program), run_name="__main__")
        else:
            main([program, "--help"])
    assert end.value.code == 0
    out = capsys.readouterr().out
    assert out.startswith(f"usage: {program if program in SCRIPTS else f'hf_mim {program}'} [RECIPE.yaml]")
    actions = parsers[0]._actions
    assert len(actions) >= 3
    assert [action.dest for action in actions if not (action.help or "").strip()] == []
    told = re.findall(r"^  (--?\w+)", out, re.MULTILINE)
    assert sorted(told) == sorted({action.option_strings[0] for action in actions})


def test_each_script_is_a_command():
    texts = [(REPOSITORY / "examples" / name).read_text() for name in SCRIPTS]
    jobs = {re.search(r"^from (hf_mim\.jobs\.\w+) import main$", text, re.MULTILINE)[1] for text in texts}
    assert len(jobs) == len(SCRIPTS) and jobs < {module for module, _ in COMMANDS.values()}


def test_same_job_as_the_script(tmp_path):
    folder = write_pictures(tmp_path / "pictures", 12)
    flags = [*FLAGS, f"--train_dir={folder}", f"--output_dir={tmp_path / 'run'}", "--max_steps=2"]
    result = run(["-m", "hf_mim", "pretrain", *flags, "--save_strategy=no"])
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "run" / "model.safetensors").is_file() and "The model is in" in result.stdout


def test_the_console_command_is_installed():
    told = setup_arguments()
    assert told["entry_points"]["console_scripts"] == ["hf_mim=hf_mim.__main__:main"]
    assert told["version"] == hf_mim.__version__
    assert "hf_mim.jobs" in told["packages"] and "hf_mim.models.tec" in told["packages"]
