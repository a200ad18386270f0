"""examples/launch/restart.sh, with a command that ends as processes do."""

import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "examples" / "launch" / "restart.sh"
COMMAND = """#!/bin/sh
echo "$@" >> calls
case $(wc -l < calls) in
  1) {end} ;;
  *) exit 3 ;;
esac
"""


@pytest.mark.parametrize(
    ("end", "again"),
    [
        ("exit 75", True),
        ("kill -BUS $$", True),
        ("kill -SEGV $$", True),
        ("kill -KILL $$", True),
        ("kill -TERM $$", True),
        ("exit 0", False),
        ("exit 1", False),
        ("exit 130", False),
    ],
)
def test_what_is_started_again_and_what_is_not(tmp_path, end, again):
    command = tmp_path / ".venv" / "bin" / "microdit"
    command.parent.mkdir(parents=True)
    command.write_text(COMMAND.format(end=end))
    command.chmod(0o755)
    done = subprocess.run(["bash", SCRIPT, "a recipe", "seed=1"], cwd=tmp_path, capture_output=True, text=True, timeout=600)
    calls = (tmp_path / "calls").read_text().splitlines()
    assert calls == ["train a recipe seed=1 --resume"] * (2 if again else 1)
    assert done.returncode == (3 if again else int(end.split()[-1]))
