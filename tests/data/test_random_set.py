"""Encoded sets of random numbers: read, mixed and trained on like any other."""

import pytest
import torch

from microdit.data.dataset import EncodedDataset
from microdit.data.random_set import RandomSet, write_random_set

KIND = RandomSet(32, (32, 48), (8, 4, 6), (5, 16), ("icon", "one"), ("minilm", "two"), "int8")


def test_a_random_set_is_whole_and_has_the_shapes_that_were_asked_for(tmp_path):
    write_random_set(tmp_path / "set", 64, KIND)
    found = EncodedDataset(tmp_path / "set")
    assert found.verify() == []
    assert (len(found), found.latent_shape(), found.resolution) == (64, (8, 4, 6), 32)
    assert found.manifest["autoencoder"] == {"name": "icon", "fingerprint": "one"}
    latents_BCHW = found.latents([found.read(0, row)[0] for row in range(64)], 0)
    text_BLE, mask_BL = found.text([found.read(0, row)[1] for row in range(64)])
    assert (text_BLE.shape, mask_BL.all().item()) == ((64, 5, 16), True)
    assert (latents_BCHW.mean().item(), latents_BCHW.std().item()) == pytest.approx((0, 1), abs=0.05)
    assert not torch.equal(latents_BCHW[0], latents_BCHW[1])


def test_features_lie_beside_the_latents_of_a_recipe_with_alignment(tmp_path):
    aligned = RandomSet(32, (32, 32), (8, 4, 4), (5, 16), ("", ""), ("", ""), vision=("efficientnet", ""), feature_channels=24)
    write_random_set(tmp_path / "set", 4, aligned)
    found = EncodedDataset(tmp_path / "set")
    assert found.feature_shape() == (24, 2, 2)
    stored = found.stored_features([found.read_features(0, row) for row in range(4)], 0)
    assert stored.numbers_BRV.shape == (4, 4, 24)
