from pathlib import Path

import pytest
import torch

from microdit.config.load import load_recipe
from microdit.data.dataset import EncodedDataset
from microdit.errors import UserError
from microdit.training.setup import open_dataset

RECIPE = Path(__file__).parent / "recipe.yaml"


def opened(*overrides: str):
    return open_dataset(load_recipe(RECIPE, list(overrides)), print)


def test_one_path_is_one_set_seen_once_an_epoch(encoded_emoji):
    mixture = opened(f"data.path={encoded_emoji}", "phases.0.steps=5")
    seen = torch.cat([mixture.batch(step).latents_BCHW for step in range(5)])
    data = EncodedDataset(encoded_emoji)
    rows = data.latents([data.read(0, number)[0] for number in range(40)], 0)
    assert sorted(row.sum().item() for row in seen) == sorted(row.sum().item() for row in rows)


def test_phases_may_weigh_the_sets_differently(encoded_emoji):
    sets = [f"data.sets.{name}.path={encoded_emoji}" for name in ("a", "b")]
    mixture = opened("data.path=null", *sets, "phases.0.weights={a: 1}", "phases.1.weights={a: 1, b: 3}", "phases.1.batch_size=64")
    shares = [[place.set for place in mixture._sampler.batch(step)].count(1) for step in (3, 30)]
    assert shares[0] == 0
    assert shares[1] == pytest.approx(48, abs=12)


def test_the_wrong_encoder_is_refused_by_the_card(encoded_emoji):
    with pytest.raises(UserError, match=r"data\.autoencoder is sdxl, but .* was encoded with pixels"):
        opened(f"data.path={encoded_emoji}", "data.autoencoder=sdxl")
    with pytest.raises(UserError, match=r"data\.text_encoder is dfn-clip-h, but .* was encoded with minilm"):
        opened(f"data.path={encoded_emoji}", "data.text_encoder=dfn-clip-h")
    opened(f"data.path={encoded_emoji}", "data.autoencoder=pixels", "data.text_encoder=minilm")


def test_a_resolution_that_is_not_there_is_refused(encoded_emoji):
    with pytest.raises(UserError, match="holds the resolutions 16"):
        opened(f"data.path={encoded_emoji}", "data.resolution=32")
