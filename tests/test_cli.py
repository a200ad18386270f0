"""The commands, one after the other, as a person would run them."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).parents[1]
RECIPE = ROOT / "tests" / "training" / "recipe.yaml"


def microdit(*arguments: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "microdit.cli", *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def workplace(tmp_path_factory) -> Path:
    """Encoded with the bundled autoencoder and trained for a few steps, by the commands."""
    place = tmp_path_factory.mktemp("workplace")
    encoded = microdit("data", "encode", "emoji", "--split", "held_out", "--out", "data/emoji", cwd=place)
    assert encoded.returncode == 0, encoded.stderr
    assert "latents of 8 x 8 x 8" in encoded.stdout
    overrides = [
        "data.path=data/emoji",
        "phases.0.steps=4",
        "phases.1.steps=2",
        "record.sample_prompts=[red heart]",
        "record.sample_steps=2",
    ]
    trained = microdit("train", RECIPE, *overrides, cwd=place)
    assert trained.returncode == 0, trained.stderr
    return place


def test_training_writes_into_its_run_folder(workplace):
    run = workplace / "runs" / "tiny"
    assert (run / "recipe.yaml").exists()
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 6
    assert [p.name for p in (run / "samples").iterdir()] == ["step-00000006.png"]


def test_sampling_is_the_same_for_the_same_seed_and_not_for_another(workplace):
    for name, seed in (("a", 5), ("b", 5), ("c", 6)):
        result = microdit(
            "sample", "runs/tiny", "red heart", "a green cat", "--steps", 3, "--seed", seed, "--out", f"{name}.png", cwd=workplace
        )
        assert result.returncode == 0, result.stderr
        assert f"seed {seed}" in result.stdout
    a, b, c = (Image.open(workplace / f"{name}.png").tobytes() for name in "abc")
    assert a == b != c


def test_data_verify(workplace):
    assert "is whole" in microdit("data", "verify", "data/emoji", cwd=workplace).stdout


def test_evaluation_measures_retrieval(workplace):
    result = microdit("evaluate", "runs/tiny", "-n", 8, "--steps", 2, cwd=workplace)
    assert result.returncode == 0, result.stderr
    metrics = json.loads((workplace / "runs" / "tiny" / "metrics.json").read_text())
    assert metrics["retrieval"]["captions"] == 8
    assert metrics["retrieval_of_reconstructions"]["top_10"] > 0.7


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["sample", "runs/none", "x"], "There is no checkpoint in runs/none"),
        (["sample", "runs/tiny", "x", "--steps", 0], "from 2 to 1000 steps, not 0"),
        (["sample", "runs/tiny", "x", "--steps", 1000000], "from 2 to 1000 steps"),
        (["sample", "runs/tiny", "x", "--guidance", "nan"], "guidance_scale must be a number"),
        (["train", "nowhere.yaml"], "There is no recipe at nowhere.yaml"),
        (["data", "encode", "emoji", "--out", "data/emoji"], "data/emoji exists already"),
        (["data", "encode", "emoji", "--out", "x", "--autoencoder", "nowhere"], "There is no autoencoder in nowhere"),
        (["data", "verify", "runs"], "There is no encoded data set in runs"),
    ],
)
def test_mistakes_end_in_one_sentence(workplace, arguments, sentence):
    result = microdit(*arguments, cwd=workplace)
    assert result.returncode == 1
    assert sentence in result.stderr
    assert "Traceback" not in result.stderr


def test_help_teaches(tmp_path):
    assert "data encode" in microdit("--help", cwd=tmp_path).stdout
    for command in ("train", "sample"):
        assert "Example: microdit" in microdit(command, "--help", cwd=tmp_path).stdout
