"""Mean and standard deviation of latents by channel, measured while they are encoded.

Each shard records the sums of its latents in float64. The sums of shards add up, so it does not matter which process encoded which shard,
or how often the encoding was interrupted.

Shape legend: B images of a batch, C channels, H W height and width.
"""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

DIGITS = 6  # decimals of the statistics

Statistics = dict[str, list[float]]  # mean and std, each with a number for every channel


class LatentSums:
    """The number of values in each channel of all latents so far, and the sums of these values and of their squares."""

    def __init__(self) -> None:
        self.count = 0
        self.sums_2C: NDArray[np.float64] | None = None

    def add(self, latents_BCHW: NDArray[np.float32]) -> None:
        """Add a batch of latents."""
        values_BCHW = latents_BCHW.astype(np.float64)
        sums_2C = np.stack([values_BCHW.sum(axis=(0, 2, 3)), np.square(values_BCHW).sum(axis=(0, 2, 3))])
        self._add(latents_BCHW[:, 0].size, sums_2C)

    def entry(self) -> dict[str, Any]:
        """Return the sums for a shard's entry."""
        sums = [[], []] if self.sums_2C is None else self.sums_2C.tolist()
        return {"count": self.count, "sums": sums[0], "squares": sums[1]}

    def add_entry(self, entry: dict[str, Any]) -> None:
        """Add what `entry` returned for another shard."""
        if entry["count"]:
            self._add(entry["count"], np.array([entry["sums"], entry["squares"]]))

    def statistics(self) -> Statistics:
        """Return mean and standard deviation of each channel. There must be at least one value."""
        assert self.sums_2C is not None
        mean_C, square_C = self.sums_2C / self.count
        std_C = np.sqrt(np.maximum(square_C - mean_C**2, 0))
        return {"mean": [round(value, DIGITS) for value in mean_C.tolist()], "std": [round(value, DIGITS) for value in std_C.tolist()]}

    def _add(self, count: int, sums_2C: NDArray[np.float64]) -> None:
        self.count += count
        self.sums_2C = sums_2C if self.sums_2C is None else self.sums_2C + sums_2C


def statistics_of_shards(shards: Iterable[dict[str, Any]]) -> dict[str, Statistics] | None:
    """Return the statistics by resolution from the entries of all shards; None if one of them was written without sums."""
    together: dict[str, LatentSums] = {}
    for shard in shards:
        if "latent_sums" not in shard:
            return None
        for resolution, entry in shard["latent_sums"].items():
            together.setdefault(resolution, LatentSums()).add_entry(entry)
    return {resolution: sums.statistics() for resolution, sums in together.items()}


def common_std(sets: Sequence[tuple[float, Statistics]]) -> float:
    """Return the standard deviation of all values in all channels of several sets, of which each has a weight.

    This is sigma_data of EDM (2206.00364, table 1), which is one number for all channels.
    """
    total = sum(weight for weight, _ in sets)
    mean = sum(weight * float(np.mean(one["mean"])) for weight, one in sets) / total
    square = sum(weight * float(np.mean(np.square(one["mean"]) + np.square(one["std"]))) for weight, one in sets) / total
    return math.sqrt(max(0.0, square - mean**2))
