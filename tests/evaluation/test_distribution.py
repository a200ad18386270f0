import torch

from microdit.evaluation.distribution import measure


def test_a_set_is_near_itself_and_a_shifted_one_is_as_far_as_its_shift():
    torch.manual_seed(0)
    real = torch.randn(400, 8)
    same, shifted = measure(real, real.clone()), measure(real, real + 3.0)
    assert same["frechet_distance"] < 1e-8
    assert same["precision"] == same["recall"] == same["coverage"] == 1
    assert abs(shifted["frechet_distance"] - 8 * 9.0) < 1e-6
    assert shifted["kid"]["value"] > 1
    assert shifted["precision"] < 0.05


def test_cmmd_comes_with_clip_alone():
    real = torch.randn(50, 8)
    assert "cmmd" not in measure(real, real.clone())
    assert measure(real, real.clone(), clip=True)["cmmd"] < 1e-6
