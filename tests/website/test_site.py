"""The documentation's site: built without a network and without a warning, and complete."""

import json
import os
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

import microdit
from website.command_pages import commands

PROJECT = Path(__file__).parents[2]
PARTS = ("docs", "microdit", "website", "examples", "mkdocs.yml", "README.md", "CONTRIBUTING.md", "CHANGELOG.md", "CITATION.cff")
LOADED = {"script": "src", "img": "src", "iframe": "src", "source": "src", "link": "href"}

pytestmark = pytest.mark.slow  # a build takes half a minute


def build(project: Path, site: Path) -> subprocess.CompletedProcess[str]:
    """Build as `make docs` does. Whatever asks for a proxy finds a closed port."""
    pytest.importorskip("mkdocs", reason="the extra docs is not installed: make docs installs it")
    nowhere = dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), "http://127.0.0.1:9")
    environment = {**os.environ, **nowhere, "NO_MKDOCS_2_WARNING": "1", "PYTHONPATH": str(project)}
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(site)]
    return subprocess.run(command, cwd=project, env=environment, capture_output=True, text=True)


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    done = build(PROJECT, folder)
    assert done.returncode == 0, done.stderr
    assert "WARNING" not in done.stdout + done.stderr
    return folder


class Resources(HTMLParser):
    """What a browser loads for a page, and the identifiers of its parts."""

    def __init__(self, page: Path):
        super().__init__()
        self.loaded: list[str] = []
        self.identifiers: set[str] = set()
        self.feed(page.read_text())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.identifiers.add(found.get("id") or "")
        if tag in LOADED and found.get("rel") not in ("canonical", "next", "prev"):
            self.loaded.append(found.get(LOADED[tag]) or "")


def test_no_page_loads_anything_from_elsewhere(site):
    pages = [page for page in site.rglob("*.html") if page.name != "404.html"]  # whose addresses begin at the server's root
    assert len(pages) > 100
    loaded = {(page, address) for page in pages for address in Resources(page).loaded if address and not address.startswith("data:")}
    assert [address for _, address in loaded if "//" in address] == []
    assert [address for page, address in loaded if not (page.parent / address.partition("?")[0]).resolve().exists()] == []


def test_every_page_command_and_name_is_there(site):
    for page in (PROJECT / "docs").rglob("*.md"):
        name = page.relative_to(PROJECT / "docs").with_suffix(".html").as_posix().replace("README.html", "index.html")
        assert (site / name).exists(), name
    assert {command.file.removesuffix(".md") for command in commands()} == {page.stem for page in (site / "commands").iterdir()}
    documented = set().union(*(Resources(page).identifiers for page in (site / "api").iterdir()))
    assert {f"microdit.{name}" for name in microdit.__all__ if name not in ("__version__", "edm_loss")} <= documented
    assert "microdit.models.routing.choose_kept" in documented
    assert (site / "first-hour.html").read_text().count('src="data:image/jpeg;base64,') > 8  # the notebook, with its pictures


def test_the_search_knows_commands_studies_and_docstrings(site):
    entries = json.loads((site / "search" / "search_index.json").read_text())["docs"]
    where = {words: [entry["location"] for entry in entries if words in entry["text"]] for words in ("--hold-out", "TREAD", "seed + i")}
    assert any(place.startswith("commands/data-encode.html") for place in where["--hold-out"])
    assert any(place.startswith("lab/masking/") for place in where["TREAD"])
    assert any(place.startswith("api/functions.html") for place in where["seed + i"])


@pytest.mark.parametrize("fault", ["[nothing](nowhere.md)", "[no heading](training.md#nothing)", "[outside](../microdit/nothing.yaml)"])
def test_a_link_that_leads_nowhere_stops_the_build(tmp_path, fault):
    for part in PARTS:
        copy = shutil.copytree if (PROJECT / part).is_dir() else shutil.copy
        copy(PROJECT / part, tmp_path / part)
    with (tmp_path / "docs" / "demo.md").open("a") as page:
        page.write(f"\n{fault}\n")
    done = build(tmp_path, tmp_path / "site")
    assert done.returncode != 0
    assert "WARNING -  Doc file 'demo.md' contains a link" in done.stderr
