import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from microdit.models.patches import patchify, unpatchify

small = st.integers(1, 4)


@given(batch=small, channels=small, rows=small, columns=small, patch_size=st.integers(1, 3))
def test_unpatchify_undoes_patchify_for_any_height_and_width(batch, channels, rows, columns, patch_size):
    latents = torch.randn(batch, channels, rows * patch_size, columns * patch_size)
    patches = patchify(latents, patch_size)
    assert patches.shape == (batch, rows * columns, patch_size**2 * channels)
    assert torch.equal(unpatchify(patches, patch_size, *latents.shape[-2:]), latents)


def test_patches_come_row_by_row_and_hold_their_own_pixels():
    latents = torch.arange(2 * 4 * 6).view(1, 2, 4, 6).float()
    patches = patchify(latents, 2)
    second_row_third_column = latents[0, :, 2:4, 4:6]  # (C, p, p)
    assert torch.equal(patches[0, 1 * 3 + 2], second_row_third_column.permute(1, 2, 0).flatten())


def test_sizes_that_do_not_divide_are_refused():
    with pytest.raises(ValueError, match="5 x 4 cannot be cut"):
        patchify(torch.zeros(1, 1, 5, 4), 2)
    with pytest.raises(ValueError, match="needs 4"):
        unpatchify(torch.zeros(1, 3, 4), 2, 4, 4)
