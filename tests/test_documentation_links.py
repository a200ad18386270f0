"""Every link between files of the repository leads somewhere, and every anchor to a heading."""

import re
import subprocess
from functools import cache
from pathlib import Path

import pytest

PROJECT = Path(__file__).parents[1]
PAGES = [PROJECT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "microdit/demo_model/README.md")]
PAGES += sorted(PROJECT.glob("docs/**/*.md"))
LINK = re.compile(r"\]\(([^()\s]+)\)")
CODE = re.compile(r"^ *```.*?^ *```|^ {4}.*?$|`[^`\n]+`", re.MULTILINE | re.DOTALL)


def links_of(page: Path) -> list[str]:
    return [link for link in LINK.findall(CODE.sub("", page.read_text())) if not re.match(r"[a-z]+:", link)]


@cache
def anchors_of(page: Path) -> set[str]:
    """The anchors that a repository's browser makes of headings: lower case, without punctuation, repeated ones with a number."""
    found: set[str] = set()
    for heading in re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL), re.MULTILINE):
        words = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading).strip().lower()
        anchor = re.sub(r"[^\w\- ]", "", words).replace(" ", "-")
        found.add(anchor if anchor not in found else f"{anchor}-{sum(name.startswith(anchor) for name in found)}")
    return found


def problem_of(link: str, page: Path) -> str | None:
    file, _, anchor = link.partition("#")
    target = (page.parent / file).resolve() if file else page
    if not target.exists() or not target.is_relative_to(PROJECT):
        return f"{page.relative_to(PROJECT)}: there is nothing at {link}"
    if anchor and anchor not in anchors_of(target):
        return f"{page.relative_to(PROJECT)}: {file or page.name} has no heading #{anchor}"
    return None


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(PROJECT).as_posix())
def test_links_lead_somewhere(page):
    assert [problem for link in links_of(page) if (problem := problem_of(link, page))] == []


def test_what_leads_nowhere_is_found():
    page = PROJECT / "docs" / "README.md"
    assert len(links_of(page)) > 15
    assert problem_of("nowhere.md", page) == "docs/README.md: there is nothing at nowhere.md"
    assert problem_of("../../elsewhere", page) == "docs/README.md: there is nothing at ../../elsewhere"
    assert problem_of("training.md#the-netwrk", page) == "docs/README.md: training.md has no heading #the-netwrk"
    assert problem_of("training.md#the-network", page) is None


def test_links_lead_to_files_that_are_in_the_repository():
    """Not to what lies in this working tree alone, such as runs or the built site."""
    ignored = subprocess.run(
        ["git", "ls-files", "-o", "-i", "--exclude-standard", "--directory"], cwd=PROJECT, capture_output=True, text=True
    )
    if ignored.returncode:
        pytest.skip("this is no checkout of git")
    outside = [PROJECT / name for name in ignored.stdout.splitlines()]
    targets = {(page.parent / link.partition("#")[0]).resolve() for page in PAGES for link in links_of(page)}
    assert [target for target in targets if any(target.is_relative_to(path) for path in outside)] == []
