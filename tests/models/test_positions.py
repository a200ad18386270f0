import math

import pytest
import torch

from microdit.models.elementwise import rotated
from microdit.models.positions import rotary_of_image, rotary_of_text, sincos_positions

CPU = torch.device("cpu")


@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_positions_equal_the_formula(scale):
    rows, columns, dim = 3, 5, 16
    table = sincos_positions(rows, columns, dim, scale)
    for row in range(rows):
        for column in range(columns):
            expected = []
            for place in (column / scale, row / scale):
                angles = [place / 10000 ** (i / (dim // 4)) for i in range(dim // 4)]
                expected += [math.sin(a) for a in angles] + [math.cos(a) for a in angles]
            assert table[row * columns + column].tolist() == pytest.approx(expected, abs=1e-6)


def test_at_scale_2_a_doubled_grid_meets_the_old_positions():
    old, new = sincos_positions(4, 4, 16), sincos_positions(8, 8, 16, scale=2.0)
    assert torch.allclose(new.view(8, 8, 16)[::2, ::2], old.view(4, 4, 16))


def turned(x: list[float], angles: list[float]) -> list[float]:
    """Rotate each pair of numbers i and i + len/2, as complex numbers: a naive reference."""
    half = len(x) // 2
    pairs = [complex(x[i], x[i + half]) * complex(math.cos(angles[i]), math.sin(angles[i])) for i in range(half)]
    return [pair.real for pair in pairs] + [pair.imag for pair in pairs]


@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_image_tokens_turn_by_their_row_and_column(scale):
    rows, columns, head_dim = 3, 5, 12
    x = torch.randn(2, rows * columns, 3, head_dim, dtype=torch.float64)
    rotary = rotary_of_image(CPU, torch.float64, rows, columns, head_dim, scale)
    found = rotated(x, rotary.cos, rotary.sin)
    for token in range(rows * columns):
        frequencies = [10000 ** (-2 * i / (head_dim // 2)) for i in range(head_dim // 4)]
        angles = [place / scale * f for place in divmod(token, columns) for f in frequencies]
        for head in range(3):
            assert found[1, token, head].tolist() == pytest.approx(turned(x[1, token, head].tolist(), angles))


def test_caption_tokens_turn_by_their_number():
    x, rotary = torch.randn(1, 4, 1, 6, dtype=torch.float64), rotary_of_text(CPU, torch.float64, 4, 6)
    found = rotated(x, rotary.cos, rotary.sin)
    for token in range(4):
        angles = [token * 10000 ** (-2 * i / 6) for i in range(3)]
        assert found[0, token, 0].tolist() == pytest.approx(turned(x[0, token, 0].tolist(), angles))


def test_scores_depend_on_the_distance_of_tokens_alone():
    """The property that rotary positions are made for (2104.09864, eq. 11), here in both directions of an image."""
    q, k = torch.randn(8, dtype=torch.float64), torch.randn(8, dtype=torch.float64)
    rotary = rotary_of_image(CPU, torch.float64, 6, 7, 8)
    turned_q, turned_k = (rotated(x.expand(1, 42, 1, 8), rotary.cos, rotary.sin).view(6, 7, 8) for x in (q, k))
    scores = [(turned_q[row + 2, column + 1] @ turned_k[row, column]).item() for row in range(4) for column in range(6)]
    assert scores == pytest.approx([scores[0]] * 24)
    assert (turned_q[2, 3] @ turned_k[0, 0]).item() != pytest.approx(scores[0], abs=1e-3)


def test_the_kept_tokens_keep_their_angles():
    rotary, ids = rotary_of_image(CPU, torch.float32, 4, 4, 8), torch.tensor([[3, 15], [7, 0]])
    kept = rotary.take(ids)
    assert kept.cos.shape == (2, 2, 1, 8)
    for sample in range(2):
        for place in range(2):
            assert torch.equal(kept.cos[sample, place], rotary.cos[0, ids[sample, place]])
            assert torch.equal(kept.sin[sample, place], rotary.sin[0, ids[sample, place]])


def test_widths_that_do_not_divide_are_refused():
    with pytest.raises(ValueError, match="divisible by 4, got 6"):
        rotary_of_image(CPU, torch.float32, 2, 2, 6)
    with pytest.raises(ValueError, match="even width, got 5"):
        rotary_of_text(CPU, torch.float32, 2, 5)
