"""The Frechet distance while training: that of `microdit evaluate`, by statistics computed once, and no trace of it in training."""

import json
import os
from pathlib import Path

import pytest
from safetensors.torch import load_file

from microdit.config.load import load_recipe
from microdit.data.sources.builtin import emoji_images
from microdit.errors import UserError
from microdit.reports.run_page import write_report
from tests.commands import microdit
from tests.training.processes import RECIPE, losses, recorded, train, wait_for

SHORT = ("phases.0.steps=5", "phases.1.steps=3", "record.checkpoint_every=4", "phases.0.learning_rate=4e-3")
SAMPLES = 24


@pytest.fixture(scope="module")
def reference(tmp_path_factory) -> Path:
    """30 pictures with captions."""
    folder = tmp_path_factory.mktemp("reference") / "pictures"
    folder.mkdir()
    for number, emoji in enumerate(list(emoji_images("train"))[:30]):
        emoji.image.resize((32, 32)).save(folder / f"{number:02}.png")
        (folder / f"{number:02}.txt").write_text(emoji.caption)
    return folder


def measuring(reference: Path) -> list[str]:
    return [f"record.fid_reference={reference}", "record.fid_every=5", f"record.fid_samples={SAMPLES}", "record.sample_steps=3"]


def figures(run: Path) -> dict[int, float]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["fid"] for line in lines if "fid" in line}


def trained(run: Path, data: Path, *more: object, ranks: int = 1) -> str:
    running = train(run, data, *SHORT, *more, ranks=ranks)
    assert running.wait() == [0] * ranks, running.output
    return running.output


@pytest.fixture(scope="module")
def measured(tmp_path_factory, encoded_emoji, reference) -> tuple[Path, str]:
    run = tmp_path_factory.mktemp("runs") / "measured"
    return run, trained(run, encoded_emoji, *measuring(reference))


def test_training_is_the_same_to_the_last_bit(tmp_path, encoded_emoji, measured):
    run, _ = measured
    trained(tmp_path / "silent", encoded_emoji, "record.sample_steps=3")
    assert figures(tmp_path / "silent") == {}
    assert sorted(figures(run)) == [5, 8]  # and at the end
    assert len(set(figures(run).values())) == 2
    assert losses(run) == losses(tmp_path / "silent")
    for name in ("model", "ema"):
        with_it, without = (load_file(one / f"checkpoints/step-00000008/{name}.safetensors") for one in (run, tmp_path / "silent"))
        assert all(with_it[key].equal(without[key]) for key in without)


def test_it_is_the_distance_that_evaluate_finds(measured, reference):
    run, _ = measured
    drawn = ["-n", SAMPLES, "--metrics", "fid", "--steps", 3, "--device", "cpu", "--dtype", "float32"]
    done = microdit("evaluate", run, "--reference", reference, *drawn, "--out", run / "evaluation", cwd=run.parent)
    assert done.returncode == 0, done.output
    evaluated = json.loads((run / "evaluation" / "metrics.json").read_text())
    assert evaluated["metrics"]["fid"]["value"] == pytest.approx(figures(run)[8], rel=1e-4)


def test_killed_and_resumed_it_finds_the_same_by_statistics_kept(tmp_path, encoded_emoji, measured, reference):
    """The second start reads no image: their bytes are spoilt, with sizes and times as they were."""
    run = tmp_path / "killed"
    running = train(run, encoded_emoji, *SHORT, *measuring(reference))
    wait_for(lambda: (run / "checkpoints" / "step-00000004").is_dir(), running)
    running.kill()
    kept = {path: (path.read_bytes(), path.stat()) for path in reference.glob("*.png")}
    for path, (content, status) in kept.items():
        path.write_bytes(bytes(len(content)))
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    try:
        trained(run, encoded_emoji, *measuring(reference), "--resume")
    finally:
        for path, (content, status) in kept.items():
            path.write_bytes(content)
            os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert figures(run) == figures(measured[0])


@pytest.mark.slow
def test_two_processes_find_the_same_as_one(tmp_path, encoded_emoji, measured, reference):
    trained(tmp_path / "two", encoded_emoji, *measuring(reference), ranks=2)
    one, two = figures(measured[0]), figures(tmp_path / "two")
    assert two == {step: pytest.approx(fid, rel=1e-3) for step, fid in one.items()}


def test_it_is_said_and_shown(measured):
    run, output = measured
    assert "Frechet distance to 30 images of" in output
    assert f"at step 5: {figures(run)[5]:.4g}, by {SAMPLES} drawn in" in output
    assert "24 samples are too few for 1280 features" in output
    assert min(recorded(run, "loss")) == 1
    page = write_report(run).read_text()
    assert "Frechet distance" in page
    assert "captions of record.fid_reference" in page


def test_what_cannot_be_measured_is_one_sentence(tmp_path, encoded_emoji, reference):
    with pytest.raises(UserError, match=r"record\.fid_every measures a distance to record\.fid_reference, which names no set"):
        load_recipe(RECIPE, ["record.fid_every=5"])
    for change, sentence in (
        (f"record.fid_samples={31}", "has only 30 records with captions, and 31 were requested"),
        ("record.fid_reference=nowhere", "nowhere"),
        ("record.fid_network=vgg", "vgg is unknown: use efficientnet or inception:FILE"),
    ):
        running = train(tmp_path / change[-5:], encoded_emoji, *SHORT, *measuring(reference), change)
        assert running.wait() == [1]
        assert sentence in running.output
        assert "Traceback" not in running.output
