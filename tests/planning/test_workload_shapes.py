"""Shapes: from the encoded set where it is, else assumed in words."""

from dataclasses import replace
from pathlib import Path

import pytest

from microdit.config.load import load_recipe
from microdit.config.schema import DataRecipe, SetRecipe
from microdit.data.dataset import EncodedDataset
from microdit.errors import UserError
from microdit.planning.estimate import encoding_cost
from microdit.planning.workload import KnownShapes, shapes_of
from tests.planning.test_workload_bill import machine
from tests.training.processes import RECIPE


def with_data(data: DataRecipe):
    return replace(load_recipe(RECIPE), data=data)


def test_an_encoded_set_is_read(encoded_emoji):
    found = shapes_of(with_data(DataRecipe(str(encoded_emoji))))
    encoded = EncodedDataset(encoded_emoji)
    assert (found.resolution, found.latent_channels, found.sides) == (16, 3, ((1.0, 16, 16),))
    assert found.caption_channels == 384
    assert (found.samples, found.assumed) == (40, ())
    longest = encoded.text([encoded.read(0, number)[1] for number in range(40)])[0].shape[1]
    assert found.caption_tokens == longest
    assert found.bytes == sum((encoded_emoji / shard["name"]).stat().st_size for shard in encoded.manifest["shards"])
    stored = encoding_cost([found], machine(), None)
    assert stored.encoded
    assert stored.images == 40
    assert stored.bytes_per_sample == {"as encoded": found.bytes / 40}


def test_sets_that_are_not_there_are_taken_to_be_like_the_others(encoded_emoji):
    sets = {"here": SetRecipe(str(encoded_emoji)), "missing": SetRecipe("nowhere")}
    found = shapes_of(with_data(DataRecipe(sets=sets)))
    assert found.latent_channels == 3
    assert found.samples is None
    assert "not encoded yet" in found.assumed[0]


@pytest.mark.parametrize(
    ("data", "given", "expected"),
    [
        (DataRecipe("nowhere"), KnownShapes(), (4, 32, 77, 1024)),
        (DataRecipe("nowhere", resolution=512), KnownShapes(), (4, 64, 77, 1024)),
        (DataRecipe("nowhere", resolution=64, autoencoder="icon", text_encoder="minilm"), KnownShapes(), (8, 8, 16, 384)),
        (DataRecipe("nowhere", resolution=16, autoencoder="pixels"), KnownShapes(), (3, 16, 77, 1024)),
        (
            DataRecipe("nowhere", resolution=512, autoencoder="pixels", text_encoder="google/flan-t5-large"),
            KnownShapes(),
            (3, 512, 256, 1024),
        ),
        (DataRecipe("nowhere"), KnownShapes(16, 16, 20, 768), (16, 16, 20, 768)),
    ],
)
def test_without_data_shapes_are_assumed_and_said(data, given, expected):
    found = shapes_of(with_data(data), given)
    _, side, _ = found.sides[0]
    assert (found.latent_channels, side, found.caption_tokens, found.caption_channels) == expected
    assert f"latents of {expected[0]} x {side} x {side}" in " ".join(found.assumed)
    assert ("256 px" in found.assumed) == (data.resolution is None)


def test_patches_that_do_not_fit_are_refused(encoded_emoji):
    recipe = with_data(DataRecipe(str(encoded_emoji)))
    with pytest.raises(UserError, match="patch_size 5 does not divide the 16 x 16 latents"):
        shapes_of(replace(recipe, model=replace(recipe.model, patch_size=5)))


def test_a_damaged_set_is_named(encoded_emoji, tmp_path):
    import shutil

    copy = Path(shutil.copytree(encoded_emoji, tmp_path / "copy"))
    next(copy.glob("*.arrow")).unlink()
    with pytest.raises(UserError, match="is missing: the data set is damaged"):
        shapes_of(with_data(DataRecipe(str(copy))))
