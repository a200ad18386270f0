"""OpenMP reads its setting when PyTorch is imported; one that is there already stays."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch


@pytest.mark.parametrize(("own", "found"), [(None, "10000"), ("77", "77")])
def test_threads_spin_for_a_short_time_unless_told_otherwise(own, found):
    environment = {name: value for name, value in os.environ.items() if name != "GOMP_SPINCOUNT"}
    if own:
        environment["GOMP_SPINCOUNT"] = own
    code = "import sys, microdit, os; print('torch' in sys.modules, os.environ['GOMP_SPINCOUNT'])"
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", found]


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere PyTorch comes with another OpenMP, which does not know this setting")
def test_openmp_itself_sees_it():
    environment = {name: value for name, value in os.environ.items() if name != "GOMP_SPINCOUNT"} | {"OMP_DISPLAY_ENV": "VERBOSE"}
    (library,) = (Path(torch.__file__).parent / "lib").glob("libgomp*")  # reads its settings when it is loaded, as by PyTorch's import
    code = f"import microdit, ctypes; ctypes.CDLL({str(library)!r})"
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert "GOMP_SPINCOUNT = '10000'" in done.stderr
