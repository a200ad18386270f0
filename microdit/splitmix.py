"""The finaliser of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014): a hash of 64-bit integers, the same on every device.

Torch has no unsigned 64-bit arithmetic, but products of int64 wrap around in the same way, so int64 stands for unsigned numbers. Arrays of
NumPy are hashed as they are: for the few numbers of a batch, the same operations take a fifth of the time that they take on tensors.
"""

from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

Integers = TypeVar("Integers", Tensor, NDArray[np.int64])


def splitmix64(x: Integers) -> Integers:
    """Hash each number of an int64 tensor or array: every input bit affects every output bit."""
    x = (x ^ shift_right(x, 30)) * as_int64(0xBF58476D1CE4E5B9)
    x = (x ^ shift_right(x, 27)) * as_int64(0x94D049BB133111EB)
    return x ^ shift_right(x, 31)


def shift_right(x: Integers, bits: int) -> Integers:
    """Shift int64 numbers to the right and fill with zeros, where `>>` would copy the sign."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def as_int64(value: int) -> int:
    """Return the signed number that has the same lower 64 bits as `value`."""
    return (value + (1 << 63)) % (1 << 64) - (1 << 63)
