"""The notebooks run from first cell to last, with two steps of training and no network (`make notebooks`)."""

from __future__ import annotations

from pathlib import Path

import pytest


nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")
pytest.importorskip("ipykernel")
NOTEBOOKS = sorted((Path(__file__).resolve().parents[2] / "examples" / "notebooks").glob("*.ipynb"))


def test_there_are_notebooks() -> None:
    assert len(NOTEBOOKS) == 2


@pytest.mark.slow
@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs(notebook: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STEPS", "2")
    # no kernel has to be registered: the one of this very Python is started
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path))
    content = nbformat.read(notebook, as_version=4)
    nbformat.validate(content)
    client = nbclient.NotebookClient(content, timeout=300, resources={"metadata": {"path": str(tmp_path)}})
    client.execute()
    assert all(cell.execution_count for cell in content.cells if cell.cell_type == "code")
    assert not any(output.output_type == "error" for cell in content.cells for output in cell.get("outputs", ()))
