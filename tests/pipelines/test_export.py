import errno
import json
import shutil
import stat

import pytest
from PIL import Image

from microdit.data.encode import EncodeSettings, encode_source
from microdit.data.sources.builtin import emoji_source
from microdit.encoders.autoencoder import Pixels
from microdit.errors import UserError
from microdit.evaluation.generators import DrawSettings, RunGenerator, open_generator
from microdit.pipelines.export import export_run, write_folder
from microdit.pipelines.open_model import open_model
from microdit.pipelines.settings import SamplerSettings
from tests.commands import microdit
from tests.conftest import first_of


@pytest.fixture(scope="module")
def exported(workplace) -> str:
    done = microdit("export", "runs/tiny", "shared-model", cwd=workplace)
    assert done.returncode == 0, done.output
    return "shared-model"


def test_the_command_draws_a_run_and_its_export_alike(workplace, exported):
    for name, model in (("of-run", "runs/tiny"), ("of-export", exported)):
        drawn = microdit("sample", model, "red heart", "owl", "--steps", 3, "--seed", 4, "--out", f"{name}.png", cwd=workplace)
        assert drawn.returncode == 0, drawn.output
        assert "step 6, seed 4" in drawn.output
    of_run, of_export = Image.open(workplace / "of-run.png"), Image.open(workplace / "of-export.png")
    assert of_run.tobytes() == of_export.tobytes()
    assert len(of_export.info["model_sha256"]) == 64
    assert of_run.info["model"] == "tiny, step 6, ema.safetensors"


def test_the_card_says_what_the_record_knows_and_how_to_use_it(workplace, exported):
    folder = workplace / exported
    card, record = (folder / "README.md").read_text(), json.loads((folder / "record.json").read_text())
    assert record["images_seen"] == 4 * 8 + 2 * 6
    assert record["flops"] > 0
    assert record["sets"]["data"]["source"] == "emoji:held_out"
    for text in ("library_name: diffusers", "| steps | 6 |", "| images seen | 44 |", "PFLOPs", "licence: CC-BY 4.0", "Not measured"):
        assert text in card, card
    assert "mask_ratio: 0.75" in card
    assert f'MicroDiTPipeline.from_pretrained("{exported}")' in card
    assert f"microdit sample {exported} 'red heart'" in card
    assert all(path.stat().st_mode & stat.S_IROTH for path in folder.rglob("*"))
    assert not [path for path in folder.rglob("*") if path.suffix in (".bin", ".pt", ".ckpt", ".pkl")]


def test_figures_of_these_weights_come_along_and_those_of_others_do_not(workplace, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(workplace / "runs" / "tiny", run)
    measured = {"step": 6, "retrieval": {"captions": 8, "top_10": 0.25, "top_1": 0.125}}
    for step, expected in ((6, "25.0% of 8"), (5, "Not measured")):
        (run / "metrics.json").write_text(json.dumps({**measured, "step": step}))
        out = tmp_path / f"of-{step}"
        export_run(run, out, pytest.fail)
        assert expected in (out / "README.md").read_text()


def test_an_export_is_compared_with_a_set_as_a_run_is(workplace, exported):
    reference = workplace / "reference"
    reference.mkdir()
    for number in range(5):
        Image.new("RGB", (64, 64), (50 * number, 0, 90)).save(reference / f"{number}.png")
        (reference / f"{number}.txt").write_text(f"shade {number}")
    command = ["evaluate", exported, "--reference", "reference", "--metrics", "kid", "-n", 4, "--steps", 2, "--out", "measured"]
    done = microdit(*command, cwd=workplace)
    assert done.returncode == 0, done.output
    metrics = json.loads((workplace / "measured" / "metrics.json").read_text())
    assert metrics["step"] == 6
    assert metrics["images_seen"] == 44
    assert metrics["class"] == "MicroDiTPipeline"


def test_what_was_exported_is_drawn_by_the_generator_of_runs(workplace, exported):
    generator = open_generator(str(workplace / exported), DrawSettings(num_inference_steps=2), pytest.fail)
    assert isinstance(generator, RunGenerator)
    run = open_generator(str(workplace / "runs" / "tiny"), DrawSettings(num_inference_steps=2), pytest.fail)
    assert generator(["owl"], 3)[0].tobytes() == run(["owl"], 3)[0].tobytes()


@pytest.mark.slow
def test_an_exports_emoji_are_recognised_as_a_runs_are(workplace, exported):
    done = microdit("evaluate", exported, "-n", 8, "--steps", 2, cwd=workplace)
    assert done.returncode == 0, done.output
    metrics = json.loads((workplace / exported / "metrics.json").read_text())
    assert metrics["step"] == 6
    assert metrics["retrieval_of_reconstructions"]["top_10"] > 0.7


def test_an_export_does_not_say_where_on_this_machine_it_was_made(workplace, exported):
    files = [path for path in (workplace / exported).rglob("*") if path.suffix in (".json", ".md")]
    assert len(files) >= 6
    for path in files:
        assert str(workplace) not in path.read_text(), path
        assert "_name_or_path" not in path.read_text(), path


def test_nothing_is_overwritten_and_nothing_half_written_stays(workplace, exported, tmp_path):
    again = microdit("export", "runs/tiny", exported, cwd=workplace)
    assert again.returncode == 1
    assert f"{exported} exists already and is not empty" in again.output
    (tmp_path / "empty").mkdir()
    export_run(workplace / "runs" / "tiny", tmp_path / "empty", pytest.fail)
    assert (tmp_path / "empty" / "model_index.json").is_file()

    def full_disk(folder):
        (folder / "half.safetensors").write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(UserError, match=r"new could not be written: .*No space"):
        write_folder(tmp_path / "new", full_disk)
    with pytest.raises(KeyboardInterrupt):
        write_folder(tmp_path / "new", lambda folder: (_ for _ in ()).throw(KeyboardInterrupt))
    assert [path.name for path in tmp_path.iterdir()] == ["empty"]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["export", "nowhere", "x"], "There is no checkpoint in nowhere"),
        (["export", "runs/tiny", "x", "--weights", "other"], "no weights named other"),
        (["sample", "shared-model", "owl", "--weights", "ema"], "a pipeline with one set"),
    ],
)
def test_mistakes_end_in_one_sentence(workplace, exported, arguments, sentence):
    done = microdit(*arguments, cwd=workplace)
    assert done.returncode == 1
    assert sentence in done.output
    assert "Traceback" not in done.output
    assert not (workplace / "x").exists()


def test_a_run_of_pixels_is_exported_too(text_encoder, tmp_path):
    """Without an autoencoder; padding is seen; the picture is the run's."""
    from tests.training.processes import train

    full = EncodeSettings((16,), "fp16", "full")
    encode_source(first_of(emoji_source("train"), 16), tmp_path / "data", full, Pixels(), text_encoder)
    running = train(tmp_path / "run", tmp_path / "data", "phases.0.steps=2", "phases.1.steps=1", "model.mask_padding=false")
    assert running.wait() == [0], running.output
    export_run(tmp_path / "run", tmp_path / "out", pytest.fail)
    images = [open_model(str(tmp_path / place), pytest.fail).pipeline.generate(["owl"], SamplerSettings(3))[0] for place in ("run", "out")]
    assert images[0].size == (16, 16)
    assert images[0].tobytes() == images[1].tobytes()
    assert isinstance(images[0], Image.Image)
