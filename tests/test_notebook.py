"""The notebook runs from top to bottom in a folder of its own, shows what it says, and is kept without outputs."""

import base64
import shutil
from pathlib import Path

import pytest

from tests.data.test_documents import needs_wiki
from tests.forks import ROOT

nbformat = pytest.importorskip("nbformat", reason="install the extra `notebook`")
nbclient = pytest.importorskip("nbclient", reason="install the extra `notebook`")
pytest.importorskip("matplotlib", reason="install the extra `notebook`")
NOTEBOOK = ROOT / "recipes" / "small_llm.ipynb"


def test_it_is_kept_without_outputs() -> None:
    cells = nbformat.read(NOTEBOOK, as_version=4).cells
    assert all(cell.execution_count is None and not cell.outputs for cell in cells if cell.cell_type == "code")


@needs_wiki
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # those of the kernel's own packages
def test_it_runs_from_top_to_bottom(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(ROOT / "recipes", tmp_path / "recipes")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    folder = {"metadata": {"path": str(tmp_path / "recipes")}}
    nbclient.NotebookClient(notebook, timeout=600, resources=folder).execute()
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    said = "".join(output.text for output in outputs if output.output_type == "stream" and output.name == "stdout")
    for words in ("train + ", "(8, 128)", "embedding (also the output)", "step 300/300", "always the likeliest"):
        assert words in said, words
    pictures = [output.data["image/png"] for output in outputs if "image/png" in output.get("data", {})]
    assert len(pictures) == 1
    (tmp_path / "curve.png").write_bytes(base64.b64decode(pictures[0]))
    assert (tmp_path / "runs/notebook/metrics.jsonl").is_file() and (tmp_path / "data").is_dir()
