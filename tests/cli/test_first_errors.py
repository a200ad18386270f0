"""The mistakes of docs/first-errors.md: each command says what stands beside it there."""

import re
import shlex
import socket
from pathlib import Path
from shutil import copytree

import pytest
import torch
from PIL import Image

from tests.commands import microdit

PAGE = Path(__file__).parents[2] / "docs" / "first-errors.md"
ROWS = re.findall(r"^\| (.+?) \| `microdit (.+?)` \| (.+) \|$", PAGE.read_text(), re.MULTILINE)
PORT = 7860


@pytest.fixture(scope="module")
def place(workplace, tmp_path_factory) -> Path:
    """The folder that the page describes."""
    folder = copytree(workplace, tmp_path_factory.mktemp("first") / "hour")
    for name in ("pictures", "uncaptioned", "empty"):
        (folder / name).mkdir()
    for colour in ("red", "green", "blue"):
        for name in ("pictures", "uncaptioned"):
            Image.new("RGB", (64, 64), colour).save(folder / name / f"{colour}.png")
        (folder / "pictures" / f"{colour}.txt").write_text(f"a {colour} square\n")
    return folder


@pytest.fixture(scope="module")
def port_in_use():
    with socket.socket() as held:
        try:
            held.bind(("127.0.0.1", PORT))
            held.listen()
        except OSError:  # by another program, which serves as well
            pass
        yield


def made(place: Path) -> set[Path]:
    """What lies there, without this test's logs and unfinished encodings, which the same command continues."""
    return {path for path in place.rglob("*") if not any(part == ".logs" or part.endswith(".part") for part in path.parts)}


def test_the_page_has_twenty_mistakes():
    assert len(ROWS) >= 20
    assert len(ROWS) == sum(line.startswith("|") for line in PAGE.read_text().splitlines()) - 2  # none is left out of the test


@pytest.mark.parametrize(("mistake", "command", "answer"), ROWS, ids=[row[0].replace(" ", "-") for row in ROWS])
def test_the_answer_is_the_pages(mistake, command, answer, place, port_in_use):
    if "cuda" in command and torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    before = made(place)
    done = microdit(*shlex.split(command), cwd=place)
    said = " ".join(done.output.split())
    assert " ".join(answer.split()) in said, (mistake, said)
    assert "Traceback" not in said
    assert done.returncode == (0 if mistake == "quotes forgotten" else 1)
    if done.returncode:
        assert made(place) == before, "a mistake leaves nothing behind"
