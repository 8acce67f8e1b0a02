"""Every notebook runs from top to bottom, and is committed without outputs."""

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOKS = sorted((Path(__file__).parents[1] / "colabs").glob("*.ipynb"))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_runs_from_top_to_bottom(path):
    notebook = nbformat.read(path, as_version=4)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(not cell.outputs and cell.execution_count is None for cell in cells), "strip the outputs"
    NotebookClient(notebook, timeout=300, kernel_name="python3").execute(cwd=str(path.parents[1]))
    text = "".join(output.get("text", "") for cell in cells for output in cell.outputs)
    value = float(text.split("AUROC ")[1].split()[0])
    assert value > 0.9
