"""The wheel, built and installed where the checkout is out of reach: what `pip install microdit` gives."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from PIL import Image

from tests.python_examples import own_pictures

PROJECT = Path(__file__).parents[1]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built from a copy, so that no build folder is left in the checkout."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    files = subprocess.run(["git", "ls-files", "-co", "--exclude-standard", "-z"], cwd=PROJECT, capture_output=True, check=True).stdout
    for name in files.decode().split("\0"):
        if name.startswith(("microdit/", "pyproject.toml", "README.md", "LICENSE")) and (PROJECT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((PROJECT / name).read_bytes())
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder), str(source)]
    done = subprocess.run(build, capture_output=True, text=True, timeout=600)
    if "No module named" in done.stderr or "BackendUnavailable" in done.stderr:
        build.remove("--no-build-isolation")  # this environment has no setuptools: pip fetches it
        done = subprocess.run(build, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = folder.glob("microdit-*.whl")
    return path


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """`run(*arguments, cwd=...)` of the installed command; its libraries are those of this environment, its microdit the wheel's alone."""
    target = tmp_path_factory.mktemp("installed")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", str(target), str(wheel)]
    done = subprocess.run(pip, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr

    def run(*arguments: object, cwd: Path) -> subprocess.CompletedProcess:
        command = [sys.executable, str(target / "bin" / "microdit"), *map(str, arguments)]
        environment = {**os.environ, "PYTHONPATH": str(target), "OMP_NUM_THREADS": "2"}
        return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=600)

    where = [sys.executable, "-c", "import microdit; print(microdit.__file__)"]
    found = subprocess.run(where, cwd=target, env={**os.environ, "PYTHONPATH": str(target)}, capture_output=True, text=True, check=True)
    assert Path(found.stdout.strip()).is_relative_to(target)
    return run


def test_the_wheel_holds_every_file_of_the_package(wheel):
    tracked = subprocess.run(["git", "ls-files", "microdit"], cwd=PROJECT, capture_output=True, text=True, check=True).stdout.split()
    missing = {name for name in tracked if (PROJECT / name).exists()} - set(zipfile.ZipFile(wheel).namelist())
    assert missing == set()


def test_the_demo_model_draws(installed, tmp_path):
    done = installed("sample", "red heart", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert Image.open(tmp_path / "grid.png").width >= 64


def test_recipes_are_listed_and_trained_from_own_pictures(installed, tmp_path):
    listed = installed("recipes", cwd=tmp_path)
    assert "emoji-fast" in listed.stdout, listed.stderr
    missing = installed("train", "emoji-fast", cwd=tmp_path)
    assert missing.returncode == 1
    assert "data/emoji" in missing.stderr
    assert "Traceback" not in missing.stderr
    own_pictures(tmp_path / "my-pictures", 12)
    encoded = installed("data", "encode", "my-pictures", "--out", "data/mine", cwd=tmp_path)
    assert encoded.returncode == 0, encoded.stdout + encoded.stderr
    short = ["phases.0.steps=2", "phases.0.batch_size=4", "phases.1.steps=2", "phases.1.batch_size=4"]
    trained = installed("train", "my-pictures", *short, cwd=tmp_path)
    assert trained.returncode == 0, trained.stdout + trained.stderr


def test_the_embedded_data_set_is_encoded_and_emoji_fast_trains_on_it(installed, tmp_path):
    for source, out in (("emoji", "data/emoji"), ("scenes:40", "data/scenes")):
        encoded = installed("data", "encode", source, "--out", out, cwd=tmp_path)
        assert encoded.returncode == 0, encoded.stdout + encoded.stderr
    trained = installed("train", "emoji-fast", "phases.0.steps=2", "record.sample_prompts=[]", cwd=tmp_path)
    assert trained.returncode == 0, trained.stdout + trained.stderr
