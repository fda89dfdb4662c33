"""The notebook of examples/, executed from its first cell to its last."""

import json
import shutil

import nbformat
import pytest
from nbclient import NotebookClient

from tiny_training import REPOSITORY

NOTEBOOK = REPOSITORY / "examples" / "pretrain_on_your_pictures.ipynb"


def test_is_kept_without_what_it_printed():
    for cell in json.loads(NOTEBOOK.read_text())["cells"]:
        assert not cell.get("outputs") and cell.get("execution_count") is None


@pytest.mark.slow
def test_runs_and_learns(tmp_path):
    shutil.copy(NOTEBOOK, tmp_path)
    notebook = nbformat.read(tmp_path / NOTEBOOK.name, as_version=4)
    NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(tmp_path)}}).execute()
    shown = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    assert sum("image/png" in output.get("data", {}) for output in shown) == 3
    accuracies = eval(shown[-1]["data"]["text/plain"])
    assert accuracies.keys() == {"untrained", "trained"}
    assert (tmp_path / "runs" / "notebook" / "preprocessor_config.json").is_file()
