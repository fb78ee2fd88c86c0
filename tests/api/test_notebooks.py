"""The notebooks in docs/ run from the first cell to the last, as committed: without outputs, and without this machine's
paths."""

import json
import os
from pathlib import Path

import pytest

NOTEBOOKS = sorted((Path(__file__).parents[2] / "docs" / "notebooks").glob("*.ipynb"))
SMALLER = {"2000": "200", "500}": "100}", "epochs=10": "epochs=1", "epochs=3": "epochs=1", "range(1000)": "range(100)"}


def test_there_are_two_without_outputs():
    assert [path.stem for path in NOTEBOOKS] == ["pretrain_and_probe", "what_a_vit_sees"]
    for path in NOTEBOOKS:
        cells = json.loads(path.read_text())["cells"]
        assert not [cell for cell in cells if cell.get("outputs") or cell.get("execution_count")]
        assert all(len(cell["source"]) <= 20 for cell in cells if cell["cell_type"] == "code")
        assert "/home" not in path.read_text()
        assert "/work" not in path.read_text()


@pytest.mark.slow
@pytest.mark.processes
@pytest.mark.timeout(1800)
@pytest.mark.filterwarnings("ignore")  # of the notebooks' own machinery
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_to_its_end(path, tmp_path):
    """With fewer images and epochs."""
    nbclient = pytest.importorskip("nbclient")
    nbformat = pytest.importorskip("nbformat")
    pytest.importorskip("ipykernel")
    pytest.importorskip("matplotlib")
    text = path.read_text()
    for large, small in SMALLER.items():
        text = text.replace(large, small)
    made = nbformat.reads(text, as_version=4)
    os.environ.setdefault("MPLBACKEND", "module://matplotlib_inline.backend_inline")
    nbclient.NotebookClient(made, timeout=900, resources={"metadata": {"path": str(tmp_path)}}).execute()
    outputs = [output for cell in made.cells if cell.cell_type == "code" for output in cell.outputs]
    pictures = [one for one in outputs if "image/png" in one.get("data", {})]
    assert len(pictures) >= 4
    said = "".join(one.get("text", "") for one in outputs if one.output_type == "stream")
    assert "Warning" not in said
