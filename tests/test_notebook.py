"""The notebook for newcomers: whole and small as it is stored, and executed from its first cell to its last."""

import json
import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from nbformat import NotebookNode

NOTEBOOK = Path(__file__).parents[1] / "examples" / "first_hour.ipynb"
MACHINE = re.compile(r"/(root|home|work|tmp|usr|opt|Users)\b|[A-Z]:\\|site-packages|ipykernel_\d")
LINK = re.compile(r"\]\((?![a-z]+:)([^()\s#]+)(?:#[^()\s]*)?\)")
# What the slow test reads from the notebook's own variables, behind its last cell.
FACTS = """
import json
print(json.dumps({
    "loss": [line["loss"] for line in lines],
    "held_out_loss": [line["held_out_loss"] for line in measured],
    "steps": [step for step, _ in RunFolder(run).samples],
    "rows": [len(emoji), len(unseen)],
    "scores": scores,
    "same": before.tobytes() == after.tobytes(),
    "kept": [int((choose_kept(scores_BT, ratio)).shape[1]) for ratio in RATIOS],
}))
"""


@pytest.fixture
def notebook() -> NotebookNode:
    return nbformat.read(NOTEBOOK, as_version=4)


def code_cells(notebook: NotebookNode) -> list[NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def outputs_of(notebook: NotebookNode) -> list[NotebookNode]:
    return [output for cell in code_cells(notebook) for output in cell.outputs]


def printed(outputs: list[NotebookNode]) -> str:
    """Return all text of the outputs; pictures are not text."""
    return "\n".join(output.get("text") or output.get("data", {}).get("text/plain", "") for output in outputs)


def test_the_stored_notebook_is_valid_and_small(notebook):
    nbformat.validate(notebook)
    assert NOTEBOOK.stat().st_size < 600_000
    assert notebook.metadata.kernelspec.name == "python3"


def test_it_was_executed_in_order_and_without_an_error(notebook):
    cells = code_cells(notebook)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert {output.output_type for output in outputs_of(notebook)} <= {"stream", "display_data", "execute_result"}
    assert [output.text for output in outputs_of(notebook) if output.get("name") == "stderr"] == []
    assert "\x1b" not in printed(outputs_of(notebook))  # a progress line drawn anew for every step


def test_it_names_no_place_of_the_machine_that_executed_it(notebook):
    assert all(MACHINE.search(text) for text in ("see /home/somebody/x", "/tmp/ipykernel_12/3.py", "C:\\Users"))
    assert not MACHINE.search("first-hour/runs")
    assert MACHINE.findall(printed(outputs_of(notebook))) == []
    assert MACHINE.findall("".join(cell.source for cell in notebook.cells)) == []


def test_its_code_compiles(notebook):
    for number, cell in enumerate(code_cells(notebook), start=1):
        compile(cell.source, f"cell {number}", "exec")


def test_its_links_lead_to_files(notebook):
    links = [link for cell in notebook.cells if cell.cell_type == "markdown" for link in LINK.findall(cell.source)]
    assert len(links) > 5
    assert [link for link in links if not (NOTEBOOK.parent / link).resolve().is_file()] == []


def test_every_section_says_first_what_the_reader_will_see(notebook):
    sections = [cell.source for cell in notebook.cells if cell.cell_type == "markdown" and re.match(r"## \d", cell.source)]
    assert [int(section[3]) for section in sections] == list(range(1, 7))
    assert all(section.split("\n\n")[1].startswith("You will see ") for section in sections)


@pytest.mark.slow  # ten minutes, of which five are a training
def test_it_runs_and_what_it_says_holds(notebook, tmp_path, monkeypatch):
    nowhere = dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), "http://127.0.0.1:9")  # a closed port
    for name, value in {
        **nowhere,
        "HF_HUB_OFFLINE": "1",
        "XDG_CACHE_HOME": str(tmp_path / ".cache"),
        "IPYTHONDIR": str(tmp_path / ".ipython"),
    }.items():
        monkeypatch.setenv(name, value)
    notebook.cells.append(nbformat.v4.new_code_cell(FACTS))
    folder = tmp_path / "empty"
    folder.mkdir()
    NotebookClient(notebook, timeout=3000, kernel_name="python3", resources={"metadata": {"path": str(folder)}}).execute()
    assert [path.name for path in folder.iterdir()] == ["first-hour"]
    facts = json.loads(printed(notebook.cells[-1].outputs))

    assert facts["rows"][0] > 10 * facts["rows"][1] > 500
    assert facts["kept"] == [12, 8, 4]
    assert facts["steps"] == [200, 400, 600, 800, 1000]
    assert facts["loss"][-1] < 0.6 * facts["loss"][0]
    assert facts["held_out_loss"][-1] < facts["held_out_loss"][0]
    without, alone, mixed = (facts["scores"][kind] for kind in ("without the mixer", "mixer on the kept patches", "mixer on all patches"))
    assert all(known > 1.3 * max(other) for known, *other in zip(mixed, without, alone, strict=True))
    assert all(abs(one - other) < 0.04 for one, other in zip(alone, without, strict=True))
    assert without[0] < 0.5 < 0.6 < mixed[0] < 0.75  # less than half, and about two thirds
    assert mixed == sorted(mixed, reverse=True)
    assert facts["same"] is True
