"""The parity scripts of benchmarks/, run as their command line does, in this process: starting one costs seconds."""

import io
import runpy
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import NamedTuple

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


class Ended(NamedTuple):
    returncode: int
    stdout: str
    stderr: str


def run_parity(script: str, fixture: Path) -> Ended:
    """`python benchmarks/SCRIPT FIXTURE`. What it exits with is a number, or a sentence that Python prints before it exits with 1."""
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(io.StringIO()) as printed:
        patch.syspath_prepend(BENCHMARKS)
        patch.setattr(sys, "argv", [script, str(fixture)])
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(BENCHMARKS / script), run_name="__main__")
    code = ended.value.code
    return Ended(1, printed.getvalue(), code) if isinstance(code, str) else Ended(int(code or 0), printed.getvalue(), "")
