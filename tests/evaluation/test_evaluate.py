"""`microdit evaluate --reference` from end to end."""

import json
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
from PIL import Image

from microdit.data.decode import decode, fit
from microdit.data.sources.base import Part, Record, Source
from microdit.data.sources.builtin import emoji_source
from microdit.data.sources.open import open_source
from microdit.distributed import World, start_world
from microdit.errors import UserError
from microdit.evaluation import evaluate as module
from microdit.evaluation.evaluate import EvaluationSettings, evaluate
from microdit.evaluation.generators import DrawSettings
from microdit.evaluation.metrics.registry import DEFAULT, METRICS
from tests.commands import microdit
from tests.conftest import first_of
from tests.evaluation.metrics.test_clip_score import save_clip
from tests.evaluation.test_extraction import Meeting
from tests.evaluation.test_features import save_dino, save_inception
from tests.training.processes import RECIPE, start, wait_for


@pytest.fixture(scope="module")
def networks(tmp_path_factory) -> list[str]:
    """Options that name tiny networks, saved as the real ones are."""
    folder = tmp_path_factory.mktemp("networks")
    save_inception(folder)
    save_clip(folder / "clip")
    save_dino(folder / "dino")
    return ["--network", f"inception:{folder / 'inception.pt'}", "--clip", str(folder / "clip"), "--dino", str(folder / "dino")]


@pytest.fixture
def world() -> World:
    return start_world("cpu")


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


class Copyist:
    """Returns for each caption the image that has it, changed by `change`."""

    batch = 8

    def __init__(self, source: Source, change: Callable[[Image.Image], Image.Image] = lambda image: image, side: int = 64):
        self.about: dict[str, Any] = {"run": "copyist", "step": 0}
        self._records = {record.captions["caption"]: record.image for part in source.parts for record in part.records()}
        self._change, self._side = change, side

    def __call__(self, prompts: list[str], seed: int, on_step: Callable[[int], None] | None = None) -> list[Image.Image]:
        return [self._change(Image.fromarray(fit(decode(self._records[prompt]), self._side, self._side))) for prompt in prompts]


def test_all_metrics_are_measured_and_the_same_for_two_processes(workplace, networks):
    command = ["evaluate", "runs/tiny", "--reference", "scenes:24", "-n", 20, "--steps", 2]
    everything = ["--metrics", ",".join(METRICS), *networks]
    alone = microdit(*command, *everything, "--out", "alone", cwd=workplace)
    assert alone.returncode == 0, alone.output
    assert "FID" in alone.output
    result = json.loads((workplace / "alone" / "metrics.json").read_text())
    assert (result["pictures"], result["reference"]["pictures"], result["reference"]["side"], result["step"]) == (20, 24, 64, 6)
    assert list(result["metrics"]) == list(METRICS)
    assert result["metrics"]["fid"]["network"] == "inception-2015-12-05"
    page = (workplace / "alone" / "report.html").read_text()
    assert page.count("<img") == 2 * 2 * 12
    assert "Farthest from every real picture" in page

    shared = microdit(*command, *everything, "--out", "shared", cwd=workplace, ranks=2)
    assert shared.returncode == 0, shared.output
    for picture in (workplace / "alone" / "pictures").glob("*.png"):
        assert (workplace / "shared" / "pictures" / picture.name).read_bytes() == picture.read_bytes()
    assert json.loads((workplace / "shared" / "metrics.json").read_text())["metrics"] == result["metrics"]

    pictures = {path: path.stat().st_mtime_ns for path in (workplace / "alone" / "pictures").iterdir()}
    assert microdit(*command, "--metrics", "kid", "--out", "alone", cwd=workplace).returncode == 0
    assert {path: path.stat().st_mtime_ns for path in (workplace / "alone" / "pictures").iterdir()} == pictures
    other = microdit(*command, "--out", "alone", "--guidance", 3, cwd=workplace)
    assert other.returncode == 1
    assert "generated with another guidance_scale" in other.output


def test_who_copies_is_perfect_and_shown_to_be_a_copyist(tmp_path, world):
    source = first_of(emoji_source("train"), 24)
    evaluation = EvaluationSettings(list(DEFAULT), 24, resamples=2)
    result = evaluate(Copyist(source), source, evaluation, DrawSettings(), tmp_path / "copies", world)
    metrics = result["metrics"]
    assert metrics["fid"]["value"] < 1e-3
    assert metrics["precision"]["value"] == metrics["recall"]["value"] == metrics["coverage"]["value"] == 1
    assert "distance 0" in (tmp_path / "copies" / "report.html").read_text()
    assert any("24 samples are too few for 1280 features" in note for note in result["notes"])

    grey = Copyist(source, lambda image: image.convert("L").convert("RGB"))
    worse = evaluate(grey, source, evaluation, DrawSettings(), tmp_path / "grey", world)["metrics"]
    assert worse["fid"]["value"] > 50 * max(1.0, metrics["fid"]["value"])
    assert worse["kid"]["value"] > metrics["kid"]["value"]


def test_captions_are_a_sample_of_which_a_smaller_one_is_the_beginning(world):
    source = emoji_source("train")
    captions = module.reference_captions(source, 60, world)
    assert module.reference_captions(source, 20, world) == captions[:20]
    records = [record for part in source.parts for record in part.records()]
    numbers = {record.captions["caption"]: number for number, record in enumerate(records)}
    total = len(numbers)
    assert 0.35 * total < sum(numbers[caption] for caption in captions) / 60 < 0.65 * total  # from all over the set


def test_captions_do_not_depend_on_the_number_of_processes(world):
    records = [record for part in emoji_source("held_out").parts for record in part.records()]
    read: list[int] = []

    def counted(start: int) -> Iterator[Record]:
        read.append(start)
        yield from records[start : start + 15]

    parts = [Part(f"part {start}", partial(counted, start)) for start in range(0, 106, 15)]
    source = replace(emoji_source("held_out"), parts=parts)
    alone = module.reference_captions(source, 40, world)
    read.clear()
    meeting = Meeting(3)

    def work(rank: int) -> list[str]:
        with meeting.turn:
            return module.reference_captions(source, 40, meeting.world(world, rank))

    with ThreadPoolExecutor(3) as pool:
        assert list(pool.map(work, range(3))) == [alone] * 3
    assert sorted(read) == list(range(0, 106, 15))


def test_an_empty_reference_is_refused_and_small_images_are_counted(tmp_path, world):
    source = first_of(emoji_source("train"), 8)
    evaluation = EvaluationSettings(["kid"], 8)
    with pytest.raises(UserError, match=r"All 8 images of .* are smaller than 300 px"):
        evaluate(Copyist(source, side=300), source, evaluation, DrawSettings(), tmp_path / "large", world)
    small = evaluate(Copyist(source, side=300), source, EvaluationSettings(["kid"], 8, side=32), DrawSettings(), tmp_path / "shrunk", world)
    assert small["reference"]["side"] == 32
    with pytest.raises(UserError, match="has only 8 records with captions, and 9 were requested"):
        evaluate(Copyist(source), source, EvaluationSettings(["kid"], 9), DrawSettings(), tmp_path / "many", world)

    folder = tmp_path / "folder"
    folder.mkdir()
    for number, record in enumerate(source.parts[0].records()):
        (folder / f"{number}.png").write_bytes(record.image if number else b"broken")
        (folder / f"{number}.txt").write_text(record.captions["caption"])
    with Image.open(folder / "1.png") as image:
        image.resize((20, 20)).save(folder / "1.png")
    result = evaluate(Copyist(source), open_source(str(folder)), evaluation, DrawSettings(), tmp_path / "mixed", world)
    assert result["reference"] | {"source": "", "fingerprint": ""} == {
        "source": "",
        "pictures": 7,
        "left_out": 1,
        "side": 64,
        "fingerprint": "",
    }
    assert any(note.startswith("1 of 8 images of") and "could not be read" in note for note in result["notes"])
    assert any("1 of 7 images of" in note and "smaller than 64 px and were enlarged" in note for note in result["notes"])


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--reference", "emoji:held_out", "-n", 107], "has only 106 records with captions, and 107 were requested"),
        (["--reference", "emoji:held_out", "--network", "vgg"], "use efficientnet or inception:FILE"),
        (["--reference", "emoji:held_out", "--network", "inception:nowhere"], "There is no Inception network at nowhere"),
        (["--reference", "emoji:held_out", "--metrics", "fid,psnr"], "there is no psnr; choose from fid, kid"),
        (["--reference", "emoji:held_out", "--metrics", "dino-fd", "--dino", "/nowhere"], "There is no folder"),
        (["--metrics", "psnr"], "there is no psnr; choose from fid, kid"),
    ],
)
def test_bad_input_ends_in_one_sentence(workplace, options, sentence):
    refused = microdit("evaluate", "runs/tiny", "--out", "other", *options, cwd=workplace)
    assert refused.returncode == 1
    assert sentence in refused.output
    assert "Traceback" not in refused.output


def test_checkpoints_are_evaluated_as_they_come_and_plotted(workplace, tmp_path):
    """While it trains; the checkpoints are kept, so that none can be missed."""
    overrides = ["data.path=data/emoji", "phases.0.steps=6", "phases.1.steps=2", "record.checkpoint_every=3"]
    keep = ["record.keep_every=1", "--price-per-hour", 2, "--out", "runs/watched"]
    training = start(workplace / ".logs", ["train", RECIPE, *overrides, *keep], cwd=workplace)
    wait_for(lambda: (workplace / "runs/watched/status.json").is_file(), training)
    watch = ["evaluate", "runs/watched", "--watch", "--reference", "scenes:16", "-n", 8, "--steps", 2, "--metrics", "kid,precision"]
    done = microdit(*watch, "--out", "watched", cwd=workplace)
    assert training.wait() == [0], training.output
    assert done.returncode == 0, done.output
    steps = sorted(path.name for path in (workplace / "watched").glob("step-*"))
    assert steps == ["step-00000003", "step-00000006", "step-00000008"]
    page = (workplace / "watched" / "quality.html").read_text()
    for title in ("by images seen", "by GPU-hours", "by dollars"):
        assert page.count(f"<figcaption>KID (efficientnet-lite0) {title}") == 1
        assert page.count(f"<figcaption>precision (efficientnet-lite0) {title}") == 1
    seen = [json.loads((workplace / "watched" / step / "metrics.json").read_text())["images_seen"] for step in steps]
    assert seen == [24, 48, 48 + 2 * 6]

    shutil.rmtree(workplace / "watched" / "step-00000006")
    again = microdit(*watch, "--out", "watched", cwd=workplace)
    assert again.returncode == 0, again.output
    assert "Step 6" in again.output
    assert "Step 3" not in again.output


def test_a_run_without_checkpoints_is_not_watched_for_ever(workplace, tmp_path):
    shutil.copytree(workplace / "runs" / "tiny", tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    for run, sentence in ((tmp_path / "run", "ended without a checkpoint"), (tmp_path, "is not a run folder")):
        done = microdit("evaluate", run, "--watch", "--reference", "emoji:held_out", cwd=workplace)
        assert done.returncode == 1
        assert sentence in done.output
