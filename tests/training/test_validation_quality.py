"""What is measured of pictures while training: honest at both ends, the same on any number of processes, no trace of it in training."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from microdit.config.load import load_recipe
from microdit.config.schema import Recipe
from microdit.data.dataset import EncodedDataset
from microdit.data.encode import EncodeSettings, encode_source
from microdit.data.sources.builtin import emoji_source
from microdit.diffusion.edm import EDM
from microdit.distributed import start_world
from microdit.encoders.autoencoder import load_autoencoder
from microdit.errors import UserError
from microdit.models.config import Size, resolve
from microdit.models.microdit import MicroDiT
from microdit.training.validation import Quality
from tests.conftest import busy_model, first_of
from tests.training.processes import RECIPE, losses, train, wait_for

SHORT = ("phases.0.steps=6", "phases.1.steps=3", "record.checkpoint_every=4")
MEASURED = ("record.quality_every=6", "record.quality_samples=16", "record.sample_steps=3", "phases.0.learning_rate=4e-3")
SIZE = Size(dim=32, depth=2, head_dim=8, mixer_dim=16, mixer_depth=1, num_experts=2, round_ffn_to=8)


def recipe_for(*overrides: str) -> Recipe:
    return load_recipe(RECIPE, ["record.quality_every=1", *overrides])


def figures(run: Path) -> dict[int, tuple[float, float]]:
    """KID and recognised share by step."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: (line["quality_kid"], line["quality_retrieval"]) for line in lines if "quality_kid" in line}


def trained(run: Path, data: Path, *more: object, ranks: int = 1) -> Path:
    running = train(run, data, *SHORT, *more, ranks=ranks)
    assert running.wait() == [0] * ranks, running.output
    return run


@pytest.fixture(scope="module")
def icons(tmp_path_factory, text_encoder) -> Path:
    """64 emoji as latents of the icon autoencoder."""
    out = tmp_path_factory.mktemp("icons") / "emoji"
    encode_source(first_of(emoji_source("train"), 64), out, EncodeSettings((64,), "fp16", "fp16"), load_autoencoder("icon"), text_encoder)
    return out


@pytest.fixture(scope="module")
def few(tmp_path_factory, text_encoder) -> Path:
    """24 emoji as pixels: each is looked at by a network in every process that measures."""
    out = tmp_path_factory.mktemp("few") / "emoji"
    encode_source(first_of(emoji_source("train"), 24), out, EncodeSettings((16,), "fp16", "fp16"), load_autoencoder("pixels"), text_encoder)
    return out


@pytest.fixture(scope="module")
def quality(icons) -> Quality:
    return Quality(EncodedDataset(icons), recipe_for("record.quality_samples=24", "record.sample_steps=6"), EDM(), start_world("cpu"))


def fresh_model() -> MicroDiT:
    torch.manual_seed(0)
    return MicroDiT(resolve(SIZE, in_channels=8, caption_channels=384)).eval()


@pytest.fixture(scope="module")
def untrained(quality) -> dict[str, float]:
    return quality.measure(fresh_model())


def test_the_rows_themselves_are_perfect_and_an_untrained_model_is_far_off(quality, untrained):
    perfect = quality.compare(lambda part: quality.latents(quality.rows[part]))
    assert perfect["quality_retrieval"] == 1.0
    assert perfect["quality_kid"] == pytest.approx(0, abs=1e-9)
    assert untrained["quality_kid"] > 0.1
    assert untrained["quality_retrieval"] < 0.4  # by chance: 10 of 64
    assert untrained["quality_seconds"] > 0


def test_right_pictures_of_the_wrong_captions_are_near_but_not_recognised(quality, untrained):
    """What the one figure does not see, the other does; and what is a little wrong lies between."""
    others = sorted(set(range(64)) - set(quality.rows))
    swapped = quality.compare(lambda part: quality.latents(others[part]))
    assert abs(swapped["quality_kid"]) < untrained["quality_kid"] / 10
    assert swapped["quality_retrieval"] < 0.4  # by chance: 10 of 64, and emoji beside each other are alike

    def noisy(part: slice) -> Tensor:
        latents_BCHW = quality.latents(quality.rows[part])
        return latents_BCHW + torch.randn(latents_BCHW.shape, generator=torch.Generator().manual_seed(part.start))

    between = quality.compare(noisy)
    assert 1e-3 < between["quality_kid"] < untrained["quality_kid"]
    assert swapped["quality_retrieval"] < between["quality_retrieval"] <= 1


def test_it_is_the_same_every_time_and_depends_on_the_weights(quality, untrained):
    model = busy_model(SIZE, in_channels=8, caption_channels=384).float()
    first, again = ({**quality.measure(model), "quality_seconds": 0} for _ in range(2))
    assert first == again
    assert first["quality_kid"] != untrained["quality_kid"]


def test_the_sampler_is_that_of_the_recipe(few):
    model = busy_model(SIZE, in_channels=3, caption_channels=384).float()
    found = set()
    for settings in ((), ("record.sample_steps=3",), ("record.guidance_scale=6",)):
        quality = Quality(
            EncodedDataset(few),
            recipe_for("record.quality_samples=16", "record.sample_steps=2", *settings),
            EDM(),
            start_world("cpu"),
        )
        found.add(quality.measure(model)["quality_kid"])
    assert len(found) == 3


def test_too_few_rows_too_many_samples_and_damaged_rows_are_refused(tmp_path, encoded_emoji):
    data, world = EncodedDataset(encoded_emoji), start_world("cpu")
    with pytest.raises(UserError, match=r"record.quality_samples is 41, and .* has 40 rows"):
        Quality(data, recipe_for("record.quality_samples=41"), EDM(), world)
    copy = tmp_path / "copy"
    shutil.copytree(encoded_emoji, copy)
    shard = next(copy.glob("*.arrow"))
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 255
    shard.write_bytes(content)
    with pytest.raises(UserError, match=r"leave out record.quality_every"):
        Quality(EncodedDataset(copy), recipe_for("record.quality_samples=40"), EDM(), world)


@pytest.fixture(scope="module")
def measured(tmp_path_factory, few) -> Path:
    return trained(tmp_path_factory.mktemp("runs") / "measured", few, *MEASURED)


def test_training_is_the_same_to_the_last_bit(tmp_path, few, measured):
    silent = trained(tmp_path / "silent", few, MEASURED[-1])
    assert figures(silent) == {}
    assert sorted(figures(measured)) == [6, 9]  # and at the end
    assert len({kid for kid, _ in figures(measured).values()}) == 2
    assert losses(measured) == losses(silent)
    for name in ("model", "ema"):
        with_it, without = (load_file(run / f"checkpoints/step-00000009/{name}.safetensors") for run in (measured, silent))
        assert all(with_it[key].equal(without[key]) for key in without)


def test_what_is_found_is_said_and_goes_to_tensorboard(measured):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(measured / "tensorboard"))
    board.Reload()
    assert [event.step for event in board.Scalars("quality_kid")] == [6, 9]
    log = "".join(path.read_text() for path in (measured.parent / "logs").iterdir())
    assert "quality at step 6: KID" in log
    assert "recognised (42% by chance)" in log  # 10 of 24


def test_killed_and_resumed_it_finds_the_same(tmp_path, few, measured):
    run = tmp_path / "killed"
    running = train(run, few, *SHORT, *MEASURED)
    wait_for(lambda: (run / "checkpoints" / "step-00000004").is_dir(), running)
    running.kill()
    assert 9 not in figures(run)
    trained(run, few, *MEASURED, "--resume")
    assert figures(run) == figures(measured)


def test_two_sharded_processes_find_the_same_as_one(tmp_path, few, measured):
    one, two = figures(measured), figures(trained(tmp_path / "two", few, *MEASURED, "engine.sharding=fsdp", ranks=2))
    assert two.keys() == one.keys()
    for step, (kid, recognised) in one.items():
        assert two[step] == (pytest.approx(kid, rel=1e-3), pytest.approx(recognised, abs=0.063))  # one picture of 16
    assert len({round(kid, 4) for kid, _ in one.values()}) > 1


def test_the_held_out_set_is_looked_at_where_there_is_one(tmp_path, few, text_encoder):
    held_out = tmp_path / "held-out"
    encode_source(
        first_of(emoji_source("held_out"), 20), held_out, EncodeSettings((16,), "fp16", "fp16"), load_autoencoder("pixels"), text_encoder
    )
    run = tmp_path / "run"
    running = train(run, few, "phases.0.steps=1", "phases.1.steps=1", *MEASURED, f"data.held_out={held_out}")
    assert running.wait() == [0], running.output
    assert "(50% by chance)" in running.output  # 10 of 20
