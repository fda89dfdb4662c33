"""What `pip install` of a wheel brings."""

import shutil
import zipfile

import pytest

import hf_mim
from tiny_training import REPOSITORY, run


def test_the_wheel_holds_the_package_and_nothing_else(tmp_path):
    # As pyproject.toml wants it; the environment of the lowest versions may have an older one.
    pytest.importorskip("setuptools", minversion="77")
    # Of a copy: building leaves folders behind.
    source = tmp_path / "source"
    shutil.copytree(REPOSITORY / "src", source / "src", ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(REPOSITORY / name, source)
    result = run(["-m", "pip", "wheel", "--no-deps", "--no-build-isolation", f"--wheel-dir={tmp_path}", str(source)])
    assert result.returncode == 0, result.stdout + result.stderr
    (path,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(path) as wheel:
        names = set(wheel.namelist())
        told = {name.rpartition("/")[2]: wheel.read(name).decode() for name in names if ".dist-info/" in name}
    files = {
        str(file.relative_to(source / "src")) for file in (source / "src" / "hf_mim").rglob("*") if file.is_file()
    }
    assert {name for name in names if ".dist-info/" not in name} == files
    assert "hf_mim/py.typed" in files and "hf_mim/models/tec/modeling_tec.py" in files
    assert "hf_mim = hf_mim.__main__:main" in told["entry_points.txt"].splitlines()
    assert path.name.startswith(f"hf_mim-{hf_mim.__version__}-")
    assert f"Version: {hf_mim.__version__}" in told["METADATA"].splitlines()
    assert told["LICENSE"] == (REPOSITORY / "LICENSE").read_text()
