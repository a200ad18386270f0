"""The paths of docs/start: their commands run word for word, in an empty folder.

What the reader sees decides what is run. A block under a paragraph that begins with "**Needs" or "**Takes hours" is not; one under
"**Runs until" serves until Ctrl-C.
"""

import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import NamedTuple

import pytest
from PIL import Image

PAGES = {page.stem: page for page in sorted((Path(__file__).parents[1] / "docs" / "start").glob("*.md"))}
BLOCK = re.compile(r"^```(\w+)\n(.*?)\n```$", re.MULTILINE | re.DOTALL)
LEAVES = {  # what must be there at the end of a path
    "see-it-work": ["first.png", "guidance.png", "mine.png", "runs/emoji/report.html"],
    "pictures-and-a-laptop": ["look.png", "trial.png", "runs/my-pictures/evaluation/metrics.json", "runs/my-pictures/report.html"],
    "one-gpu": ["runs/dry/4-64-full/checkpoints", "grid.png"],
    "500-dollars": ["recipes/mine"],
    "masking": ["data/emoji-unnamed-held-out/card.json", "lab/masking"],
    "one-part": [],
}


class Block(NamedTuple):
    paragraph: str
    language: str
    code: str

    def is_marked(self, mark: str) -> bool:
        return self.paragraph.startswith(f"**{mark}")


def blocks_of(name: str) -> list[Block]:
    text = PAGES[name].read_text()
    return [Block(text[: found.start()].rstrip().rpartition("\n\n")[2], *found.groups()) for found in BLOCK.finditer(text)]


def environment(folder: Path) -> dict[str, str]:
    """Commands of this environment, and none of this user's caches or measurements."""
    own = {"XDG_CACHE_HOME": str(folder / ".cache"), "XDG_STATE_HOME": str(folder / ".state"), "COLUMNS": "100"}
    return {**os.environ, **own, "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])}


def run(block: Block, folder: Path) -> str:
    command = [sys.executable, "-c", block.code] if block.language == "python" else ["bash", "-euo", "pipefail", "-c", block.code]
    done = subprocess.run(command, cwd=folder, env=environment(folder), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert done.returncode == 0, f"{block.code}\n\n{done.stdout}"
    return done.stdout


def serve(block: Block, folder: Path) -> None:
    """Start what serves until Ctrl-C, load its page, and press Ctrl-C."""
    with socket.socket() as probe:
        if probe.connect_ex(("127.0.0.1", 7860)) == 0:
            pytest.skip("another program has port 7860")
    command = ["bash", "-c", f"exec {block.code}"]
    with subprocess.Popen(
        command, cwd=folder, env=environment(folder), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as server:
        said = ""
        while "http://127.0.0.1:7860" not in said:
            said += server.stdout.readline()
            assert server.poll() is None, said
        with urllib.request.urlopen("http://127.0.0.1:7860/") as page:
            assert b"<html" in page.read()
        server.send_signal(signal.SIGINT)
        assert server.wait(timeout=600) == 0


def test_there_is_a_path_for_each_line_of_the_start_page():
    start = (PAGES["masking"].parents[1] / "README.md").read_text()
    assert set(re.findall(r"\(start/([a-z0-9-]+)\.md\)", start)) == set(PAGES) == set(LEAVES)
    readme = (PAGES["masking"].parents[2] / "README.md").read_text()
    assert all(f"(docs/start/{name}.md)" in readme for name in PAGES)
    assert len(readme.splitlines()) <= 120


@pytest.mark.parametrize("name", PAGES)
def test_every_path_can_be_tried_without_a_gpu_or_a_network(name):
    assert any(not block.is_marked("Needs") for block in blocks_of(name))
    assert all(
        re.match(r"\*\*(Needs|Takes|Runs until) [^*]+\*\*", block.paragraph) for block in blocks_of(name) if block.paragraph[:2] == "**"
    )


def test_the_parts_run(tmp_path):
    """The path of docs/start/one-part.md; the others take longer."""
    loss, network = (run(block, tmp_path) for block in blocks_of("one-part"))
    assert re.fullmatch(r"loss [12]\.\d+ on 64 of 256 patches\n", loss)
    assert re.match(r"[\d,]+ parameters, losses \[[\d.]+, [\d.]+, [\d.]+, [\d.]+\]\n", network)


@pytest.mark.slow  # minutes each: one of them trains emoji-flow to its end, another a recipe of `microdit new`
@pytest.mark.parametrize("name", PAGES)
def test_the_commands_of_a_path_run_word_for_word(name, tmp_path):
    for block in blocks_of(name):
        if block.is_marked("Runs until"):
            serve(block, tmp_path)
        elif not block.is_marked("Needs") and not block.is_marked("Takes hours"):
            began = time.monotonic()
            print(block.code, run(block, tmp_path), f"{time.monotonic() - began:.0f} s", sep="\n")
    for path in LEAVES[name]:
        assert (tmp_path / path).exists(), path
        if path.endswith(".png"):
            assert Image.open(tmp_path / path).width >= 64
