import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from microdit.errors import UserError
from microdit.evaluation.metrics import prdc as module
from microdit.evaluation.metrics.prdc import nearest


@given(st.integers(1, 12), st.integers(1, 12), st.integers(0, 99), st.sampled_from([0.0, 1e6]))
def test_it_is_the_naive_search(generated, real, seed, offset):
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(generated, 3, generator=generator, dtype=torch.float64) + offset
    others = torch.randn(real, 3, generator=generator, dtype=torch.float64) + offset
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "BLOCK", 5)
        distances, rows = nearest(drawn, others)
    for one, distance, row in zip(drawn, distances, rows, strict=True):
        all_distances = [float((one - other).norm()) for other in others]
        assert float(distance) == pytest.approx(min(all_distances), rel=1e-6)
        assert all_distances[int(row)] == pytest.approx(min(all_distances), rel=1e-6)


def test_other_encoders_are_refused():
    with pytest.raises(UserError, match="Features of 2 and 3 dimensions"):
        nearest(torch.zeros(4, 2), torch.zeros(4, 3))
