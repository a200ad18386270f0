import numpy as np
import torch

from microdit.splitmix import as_int64, shift_right, splitmix64

SEED, GAMMA = 1234567, 0x9E3779B97F4A7C15
PUBLISHED = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431, 16408922859458223821]


def test_the_generator_gives_the_published_numbers():
    states = torch.tensor([as_int64(SEED + GAMMA * n) for n in range(1, 6)])
    assert splitmix64(states).tolist() == [as_int64(value) for value in PUBLISHED]


def test_arrays_and_tensors_are_hashed_alike():
    numbers = np.random.default_rng(0).integers(-(2**63), 2**63, 1000)
    assert splitmix64(torch.from_numpy(numbers)).tolist() == splitmix64(numbers).tolist()


def test_a_shift_to_the_right_fills_with_zeros():
    assert shift_right(torch.tensor([-1, -(2**63), 6]), 1).tolist() == [2**63 - 1, 2**62, 3]


def test_int64_wraps_around_as_unsigned_numbers_do():
    assert [as_int64(2**64 - 1), as_int64(2**63), as_int64(7)] == [-1, -(2**63), 7]
