"""What `pip install` of a wheel brings."""

import re
import shutil
import zipfile

import pytest

import hf_mim
from tiny_training import FLAGS, REPOSITORY, run, write_pictures


def copy_of_source(folder):
    """What the package is built from, in a folder of its own: building leaves folders behind."""
    # As pyproject.toml wants it; the environment of the lowest versions may have an older one.
    pytest.importorskip("setuptools", minversion="77")
    shutil.copytree(REPOSITORY / "src", folder / "src", ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(REPOSITORY / name, folder)
    return folder


def test_the_wheel_holds_the_package_and_nothing_else(tmp_path):
    source = copy_of_source(tmp_path / "source")
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


@pytest.mark.slow
def test_the_wheel_of_the_source_works_by_itself(tmp_path):
    pytest.importorskip("build")
    pytest.importorskip("twine")
    source = copy_of_source(tmp_path / "source")
    result = run(["-m", "build", "--no-isolation", f"--outdir={tmp_path / 'dist'}", str(source)])
    assert result.returncode == 0, result.stdout + result.stderr
    # The wheel is built from the archive of the source, which has all that it takes.
    archive, wheel = sorted((tmp_path / "dist").iterdir(), key=lambda path: path.suffix)
    assert (archive.suffix, wheel.suffix) == (".gz", ".whl")
    result = run(["-m", "twine", "check", "--strict", str(archive), str(wheel)])
    assert result.returncode == 0 and result.stdout.count("PASSED") == 2, result.stdout

    site = tmp_path / "site"
    result = run(["-m", "pip", "install", "--no-deps", "--no-index", f"--target={site}", str(wheel)])
    assert result.returncode == 0, result.stderr
    # Ahead of the source, which tests see else; what it depends on is this environment's.
    alone = {"PYTHONPATH": str(site)}
    command, out = str(site / "bin" / "hf_mim"), tmp_path / "out"
    where = run(["-c", "import hf_mim; print(hf_mim.__file__)"], **alone).stdout
    assert where.startswith(str(site))
    assert run([command, "--version"], **alone).stdout == f"hf_mim {hf_mim.__version__}\n"
    assert "--model_type" in run([command, "pretrain", "--help"], **alone).stdout
    pictures = write_pictures(tmp_path / "pictures", 12)
    for words in (
        ["pretrain", *FLAGS, f"--train_dir={pictures}", f"--output_dir={out}", "--max_steps=2", "--save_strategy=no"],
        ["embed", str(out), str(pictures), str(tmp_path / "features.parquet")],
        ["export", str(out), str(tmp_path / "vit")],
    ):
        result = run([command, *words], **alone)
        assert result.returncode == 0, result.stderr
    assert (tmp_path / "features.parquet").is_file() and (tmp_path / "vit" / "model.safetensors").is_file()


def test_the_version_is_in_one_place():
    said = []
    for path in (*(REPOSITORY / "src").rglob("*.py"), REPOSITORY / "setup.py", REPOSITORY / "pyproject.toml"):
        text = path.read_text(encoding="utf-8")
        said += [path.name for _ in re.findall(rf"[\"']{re.escape(hf_mim.__version__)}[\"']", text)]
    assert said == ["__init__.py"]
    # A format of its own, which cannot ask the package.
    citation = (REPOSITORY / "CITATION.cff").read_text(encoding="utf-8")
    assert re.search(rf"^version: \"?{re.escape(hf_mim.__version__)}\"?$", citation, re.MULTILINE)
