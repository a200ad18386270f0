"""First sentences stored beside long captions: what is in them, how often they are drawn, and what else stays as it was."""

import json
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch

from microdit.config.load import load_recipe
from microdit.data.dataset import EncodedDataset, MixedDataset
from microdit.data.encode import EncodeSettings, encode_source
from microdit.data.sampler import SamplerPhase
from microdit.data.sources.base import Record, Source
from microdit.encoders.autoencoder import Pixels
from microdit.errors import UserError
from microdit.training.setup import open_dataset
from tests.commands import microdit
from tests.data.pictures import picture
from tests.data.test_encode import source_of
from tests.training.processes import RECIPE

PLAIN = EncodeSettings((16,), "fp16", "fp16")
BOTH = replace(PLAIN, first_sentences=True)
LONG = "A red cat sits on a mat. Behind it stands an owl. Soft light falls on both."
SHORT = "A red cat sits on a mat."


def captioned(count: int = 12) -> Source:
    """Records in turn of three sentences, of one, and of two captions of which the second has two sentences."""
    captions = [{"caption": LONG}, {"caption": "one owl"}, {"alt": "a cat", "caption": "It sleeps. It is red."}]
    records = [Record(f"k{n}", captions[n % 3], picture(n, "PNG", (16, 16))) for n in range(count)]
    return replace(source_of(records), caption_weights={"caption": 0.75, "alt": 0.25})


@pytest.fixture(scope="module")
def both(tmp_path_factory, text_encoder) -> EncodedDataset:
    folder = tmp_path_factory.mktemp("both") / "set"
    encode_source(captioned(), folder, BOTH, Pixels(), text_encoder)
    return EncodedDataset(folder)


def text_of(data: EncodedDataset, row: int, draw: float) -> torch.Tensor:
    return data.text([data.read(0, row, draw)[1]])[0][0]


def test_each_longer_caption_is_followed_by_its_first_sentence(both, text_encoder):
    assert both.column("captions")[:3] == [[LONG, SHORT], ["one owl"], ["It sleeps. It is red.", "It sleeps.", "a cat"]]
    assert both.column("weights")[:3] == [[0.75, 0.0], [0.75], [0.75, 0.0, 0.25]]
    assert both.manifest["captions"] == 4 * (2 + 1 + 3)
    both.use_first_sentences(1.0)
    for row, draw, caption in ((0, 0.3, SHORT), (1, 0.3, "one owl"), (2, 0.7, "It sleeps."), (2, 0.8, "a cat")):
        expected = text_encoder.encode([caption])[0][0]
        assert torch.allclose(text_of(both, row, draw), expected, atol=2e-3)


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_it_is_drawn_in_that_share(both, share):
    """Intervals of the draw, worked out by hand: of a caption of weight w, the first (1 - share) w is the whole."""
    both.use_first_sentences(share)
    draws = (np.arange(400) + 0.5) / 400
    long, short = 22, 10  # tokens of MiniLM, start and end among them
    assert (
        Counter(len(text_of(both, 0, draw)) for draw in draws)
        == Counter({long: int(400 * (1 - share)), short: int(400 * share)}) + Counter()
    )
    lengths = [len(text_of(both, 2, draw)) for draw in draws]
    cuts = [0, int(300 * (1 - share)), 300, 400]  # "It sleeps. It is red.", "It sleeps.", "a cat"
    assert lengths == [9] * cuts[1] + [5] * (cuts[2] - cuts[1]) + [4] * 100
    if share == 0:  # up to the last number below 1
        assert len(text_of(both, 0, np.nextafter(1, 0))) == long


def test_steps_depend_on_the_seed_and_their_number_alone(both):
    both.use_first_sentences(0.5)

    def lengths(steps: range) -> list[list[int]]:
        mixture = MixedDataset([both], [SamplerPhase(200, 6, (1,))], seed=3)
        return [mixture.stored(step).text_lengths_B.tolist() for step in steps]

    straight = lengths(range(40))
    assert lengths(range(25, 40)) == straight[25:]  # as after a resume
    both.use_first_sentences(0.0)
    assert lengths(range(40)) != straight
    both.use_first_sentences(0.5)
    assert lengths(range(40)) == straight
    count = Counter(length for step in straight for length in step)
    assert abs(count[22] - count[10]) < 30  # about 40 of 80 each


def test_without_the_option_nothing_changes(tmp_path, text_encoder, both):
    encode_source(captioned(), tmp_path / "plain", PLAIN, Pixels(), text_encoder)
    plain = EncodedDataset(tmp_path / "plain")
    assert plain.column("captions")[:3] == [[LONG], ["one owl"], ["It sleeps. It is red.", "a cat"]]
    assert "first_sentences" not in plain.manifest["settings"]
    assert both.manifest["settings"] == {**plain.manifest["settings"], "first_sentences": True}
    assert both.manifest["format"] == plain.manifest["format"]
    with pytest.raises(UserError, match=r"data\.first_sentence is 0\.3, and .*plain holds whole captions only: .*--first-sentences"):
        plain.use_first_sentences(0.3)
    both.use_first_sentences(0.0)
    for row in range(3):
        for draw in (0.0, 0.2, 0.74, 0.76, 0.999):
            assert torch.equal(text_of(plain, row, draw), text_of(both, row, draw))


def test_a_recipe_asks_for_them(both):
    def opened(*overrides: str) -> list[int]:
        recipe = load_recipe(RECIPE, [f"data.path={both.folder}", *overrides])
        return open_dataset(recipe, pytest.fail).stored(0).text_lengths_B.tolist()

    assert opened() == opened("data.first_sentence=0")
    assert opened("data.first_sentence=1") != opened()
    assert max(opened("data.first_sentence=1")) == 10


@pytest.mark.parametrize("change", [(PLAIN, BOTH), (BOTH, PLAIN)])
def test_an_unfinished_encoding_is_not_continued_with_the_other_setting(tmp_path, text_encoder, change):
    def broken() -> Source:
        source = captioned()
        return replace(source, parts=[*source.parts, replace(source.parts[0], name="breaks", records=lambda: 1 / 0)])

    with pytest.raises(ZeroDivisionError):
        encode_source(broken(), tmp_path / "set", change[0], Pixels(), text_encoder)
    with pytest.raises(UserError, match=r"other settings .*first_sentences differ"):
        encode_source(broken(), tmp_path / "set", change[1], Pixels(), text_encoder)


@pytest.mark.slow  # six commands
def test_commands_encode_and_train_with_both_lengths(tmp_path):
    (tmp_path / "pictures").mkdir()
    for n in range(8):
        (tmp_path / "pictures" / f"{n}.png").write_bytes(picture(n, "PNG", (64, 64)))
        (tmp_path / "pictures" / f"{n}.txt").write_text(LONG.replace("cat", f"cat {n}"))
    for name, options in (("both", ["--first-sentences"]), ("plain", [])):
        encoded = microdit("data", "encode", "pictures", "--out", name, "--autoencoder", "pixels", *options, cwd=tmp_path)
        assert encoded.returncode == 0, encoded.output
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "name: lengths\ndata: {path: both, first_sentence: 0.5}\n"
        "model: {dim: 32, depth: 2, head_dim: 8, mixer_dim: 16, mixer_depth: 1, patch_size: 16, num_experts: 1, round_ffn_to: 8}\n"
        "phases: [{name: one, steps: 6, batch_size: 4, learning_rate: 1e-3}]\nrecord: {metrics_every: 1, checkpoint_every: 3}\n"
    )

    def losses(run: str) -> list[float]:
        return [json.loads(line)["loss"] for line in (tmp_path / run / "metrics.jsonl").read_text().splitlines()]

    for run, more in (("a", []), ("whole", ["data.first_sentence=0"])):
        done = microdit("train", recipe, "--out", run, *more, cwd=tmp_path)
        assert done.returncode == 0, done.output
    assert len(losses("a")) == 6
    assert losses("a") != losses("whole")
    refused = microdit("train", recipe, "--out", "b", "data.path=plain", cwd=tmp_path)
    assert refused.returncode == 1
    assert "encode it again with --first-sentences" in refused.output
    changed = microdit("train", recipe, "--out", "a", "--resume", "data.first_sentence=0.2", cwd=tmp_path)
    assert "data.first_sentence: 0.5 then, 0.2 now" in changed.output
