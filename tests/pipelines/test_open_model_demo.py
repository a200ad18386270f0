import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import microdit
from microdit.encoders.autoencoder import load_autoencoder
from microdit.errors import UserError
from microdit.pipelines.open_model import model_and_prompts, open_model
from microdit.pipelines.pipeline import DEMO
from microdit.pipelines.settings import SamplerSettings
from tests.commands import importing_from
from tests.commands import microdit as command


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    for folder in ("runs/emoji", "demo"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "prompts.txt").touch()
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("arguments", "model", "prompts"),
    [
        (["a red heart"], "demo", ["a red heart"]),
        (["owl", "pizza"], "demo", ["owl", "pizza"]),
        (["runs/emoji", "owl", "pizza"], "runs/emoji", ["owl", "pizza"]),
        (["runs/emoji"], "runs/emoji", []),
        (["a black/white cat"], "demo", ["a black/white cat"]),
        (["owl", "runs/emoji"], "demo", ["owl", "runs/emoji"]),
        ([""], "demo", [""]),
        (["cat " * 2500], "demo", ["cat " * 2500]),
    ],
)
def test_a_folder_is_the_model_and_anything_else_is_a_prompt(place, arguments, model, prompts):
    assert model_and_prompts(arguments, Path("demo")) == (model, prompts)


@pytest.mark.parametrize("first", ["runs/none", "runs/my run", "./owl", "../x", "/nowhere", "cat/dog", "prompts.txt", "~/model"])
def test_a_path_that_is_no_folder_is_no_prompt(place, first):
    with pytest.raises(UserError, match="There is no folder"):
        model_and_prompts([first, "owl"], Path("demo"))


def test_without_a_demo_model_it_says_so(place):
    with pytest.raises(UserError, match="holds no demo model"):
        model_and_prompts(["owl"], Path("not here"))


def test_sample_alone_explains_itself(tmp_path):
    assert 'microdit sample "red heart"' in command("sample", cwd=tmp_path).output


def test_the_demo_model_tells_a_red_heart_from_a_green_apple():
    assert sum(path.stat().st_size for path in DEMO.rglob("*") if path.is_file()) < 12e6
    heart, apple = open_model(str(DEMO), pytest.fail).pipeline.generate(["red heart", "green apple"], SamplerSettings(18), seed=0)
    red, green, blue = heart.getpixel((32, 32))
    assert red > 150 > 2 * max(green, blue)
    red, green, blue = apple.getpixel((32, 32))
    assert green > max(red, blue)


def test_an_installed_package_draws_with_its_demo_model(workplace, tmp_path):
    """As the weights get there: exported by the command into the package, which is then used from elsewhere."""
    package = tmp_path / "site" / "microdit"
    shutil.copytree(Path(microdit.__file__).parent, package, ignore=shutil.ignore_patterns("demo_model", "__pycache__"))
    exported = command("export", "runs/tiny", package / "demo_model", "--dtype", "float16", cwd=workplace)
    assert exported.returncode == 0, exported.output
    assert sum(path.stat().st_size for path in (package / "demo_model").rglob("*") if path.is_file()) < 12e6
    (tmp_path / "home").mkdir()
    done = subprocess.run(
        [sys.executable, "-m", "microdit", "sample", "a red heart", "--steps", "2"],
        cwd=tmp_path / "home",
        env=importing_from(package.parent, COLUMNS="300"),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 picture of demo_model, step 6" in done.stdout
    assert done.stderr == ""  # no library speaks of its own affairs
    assert (tmp_path / "home" / "grid.png").is_file()


def test_the_demo_model_refers_to_the_bundled_autoencoder():
    autoencoder = open_model(str(DEMO), pytest.fail).pipeline.autoencoder
    assert (autoencoder.name, autoencoder.fingerprint) == ("icon", load_autoencoder("icon").fingerprint)
    package = Path(microdit.__file__).parent
    weights = [path.read_bytes() for path in package.rglob("*.safetensors")]
    assert len(set(weights)) == len(weights) == 2


def test_what_a_wheel_holds_includes_the_demo_model():
    import tomllib

    project = tomllib.loads((Path(microdit.__file__).parents[1] / "pyproject.toml").read_text())
    patterns = project["tool"]["setuptools"]["package-data"]["microdit"]
    assert {"demo_model/*", "demo_model/*/*"} <= set(patterns)
