import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from microdit.data.packing import bytes_of_row, pack_ids, pack_latents, pack_text, unpack, unpack_ids

NUMBERS = st.floats(-1000, 1000, width=32)


@given(arrays(np.float32, (3, 5), elements=NUMBERS))
def test_eight_bits_are_off_by_half_a_step_of_each_tokens_own_scale(text):
    back = unpack([memoryview(pack_text(text, "int8"))], 5, "int8")[0][0].numpy()
    largest = np.abs(text).max(axis=1, keepdims=True)
    # Half a step of 1/127, and float16's rounding of the scale (2**-11 of it, times 127 steps; 2**-25 where it is subnormal).
    allowed = largest / 127 * 0.5 + largest * 2.0**-11 + 127 * 2.0**-25
    assert (np.abs(back - text) <= allowed * 1.001).all()


@given(arrays(np.float32, (2, 4), elements=NUMBERS))
def test_sixteen_bits_are_float16(text):
    for form in ("fp16", "full"):
        assert np.array_equal(
            unpack([memoryview(pack_text(text, form))], 4, form)[0][0].numpy(), text.astype(np.float16).astype(np.float32)
        )


@pytest.mark.parametrize("form", ["fp16", "int8"])
def test_latents_keep_their_shape_and_each_channel_its_scale(form):
    latents = np.random.default_rng(0).normal(size=(4, 6, 2)).astype(np.float32) * np.asarray([1, 100, 0.01, 0], np.float32).reshape(
        4, 1, 1
    )
    blob = pack_latents(latents, form)
    assert len(blob) == 4 * bytes_of_row(12, form)
    back = unpack([memoryview(blob)], 12, form)[0][0].view(4, 6, 2).numpy()
    error = np.abs(back - latents).reshape(4, -1).max(axis=1)
    assert (error <= np.abs(latents).reshape(4, -1).max(axis=1) * 0.005).all()


@given(st.lists(st.integers(0, 2**32 - 1)))
def test_token_numbers_come_back(ids):
    assert unpack_ids(memoryview(pack_ids(ids))) == ids


@pytest.mark.parametrize("form", ["fp16", "int8"])
def test_captions_of_several_lengths_are_padded_with_zeros(form):
    texts = [np.full((length, 3), length, np.float32) for length in (2, 5, 1)]
    padded, lengths = unpack([memoryview(pack_text(text, form)) for text in texts], 3, form)
    assert padded.shape == (3, 5, 3)
    assert lengths.tolist() == [2, 5, 1]
    for row, text in zip(padded, texts, strict=True):
        assert np.allclose(row[: len(text)], text, rtol=1e-2)
        assert row[len(text) :].abs().sum() == 0
