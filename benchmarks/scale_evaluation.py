"""What an evaluation costs with the number of pictures: the paper's has 30,000, at any size of the training run.

Features are fabricated, 2,048 wide as Inception's. At 3,000 pictures all is measured; at 30,000 the parts are, and multiplied.
Run alone it measures 30,000 in whole (docs/evaluation.md):

    python benchmarks/scale_evaluation.py
"""

import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from scale_row import Row
from torch import Tensor

from microdit.cli.terminal import progress
from microdit.evaluation.metrics.frechet import POINTS, Gaussian, fit_gaussian, frechet_infinity, frechet_interval
from microdit.evaluation.metrics.prdc import PRDC, compute_prdc

WIDTH, FEW, MANY = 2048, 3_000, 30_000
RESAMPLES = 50  # as `microdit evaluate` takes
FRECHET_BAR, MANIFOLD_BAR = 600, 900  # seconds
SAME = 1e-6


def rows(place: Path) -> list[Row]:
    """Nothing is written to `place`."""
    return [_frechet_row(), _manifold_row()]


def _frechet_row() -> Row:
    real_ND, drawn_ND = _features(FEW, 0), _features(FEW, 1)
    started = time.perf_counter()
    value, _ = _frechet(real_ND, drawn_ND)
    few = time.perf_counter() - started
    naive = _naive_frechet(fit_gaussian(drawn_ND), fit_gaussian(real_ND))
    many = _reckoned_frechet(_features(MANY, 0), _features(MANY, 1))
    return Row(
        f"Frechet distance, {WIDTH:,} wide, with {RESAMPLES} pairs of halves and {POINTS} points ({FEW:,}; {MANY:,}; the paper's {MANY:,})",
        {"1 x": f"{few:.0f} s", "10 x": f"-> {many:.0f} s", "paper": f"-> {many:.0f} s"},
        f"{FRECHET_BAR} s at {MANY:,}; within {SAME} of the definition",
        many <= FRECHET_BAR and abs(value - naive) <= SAME * naive,
    )


def _manifold_row() -> Row:
    real_ND, drawn_ND = _features(2 * FEW, 0), _features(2 * FEW, 1)
    seconds = []
    for count in (FEW, 2 * FEW):
        started = time.perf_counter()
        found = compute_prdc(real_ND[:count], drawn_ND[:count])
        seconds.append(time.perf_counter() - started)
    many = seconds[-1] * (MANY / (2 * FEW)) ** 2
    return Row(
        f"precision, recall, density and coverage, {WIDTH:,} wide ({FEW:,}; {MANY:,}; the paper's {MANY:,})",
        {"1 x": f"{seconds[0]:.1f} s", "10 x": f"-> {many:.0f} s", "paper": f"-> {many:.0f} s"},
        f"{MANIFOLD_BAR} s at {MANY:,}; the same as by the definition",
        many <= MANIFOLD_BAR and _is_naive(found, real_ND, drawn_ND),
    )


def _features(count: int, seed: int) -> Tensor:
    """Of two distributions that differ, with a few wide directions and many narrow ones."""
    generator = torch.Generator().manual_seed(seed)
    spread_D = torch.arange(1, WIDTH + 1).float() ** -0.5
    return (torch.randn(count, WIDTH, generator=generator) * (1 + 0.1 * seed) + 0.05 * seed) * spread_D


def _frechet(real_ND: Tensor, drawn_ND: Tensor, on_distance: Callable[[int], None] | None = None) -> tuple[float, float]:
    """The value and its extrapolation."""
    reference = fit_gaussian(real_ND)
    line = frechet_infinity(drawn_ND, reference, on_distance=on_distance)
    return frechet_interval(drawn_ND, reference, RESAMPLES, on_distance=on_distance).value, line.distance


def _reckoned_frechet(real_ND: Tensor, drawn_ND: Tensor) -> float:
    """Seconds of `_frechet`, from a few distances of each kind. The time of a distance rises with the number of samples."""
    stamps = [time.perf_counter()]

    def stamp(_: int) -> None:
        stamps.append(time.perf_counter())

    reference = fit_gaussian(real_ND)
    reference.root  # noqa: B018  (computed here, and kept)
    stamp(1)
    frechet_infinity(drawn_ND, reference, points=3, on_distance=stamp)
    frechet_interval(drawn_ND, reference, resamples=2, on_distance=stamp)
    fitting, smallest, middle, largest, whole, *halves = np.diff(stamps)  # the smallest and the whole with the samples' projection
    return float(fitting + smallest + (POINTS - 1) * max(middle, (middle + largest) / 2) + whole + 2 * RESAMPLES * np.mean(halves))


def _naive_frechet(a: Gaussian, b: Gaussian) -> float:
    """By the singular values of the product of the covariances' roots."""
    roots = np.linalg.svd(np.linalg.cholesky(a.covariance.numpy()).T @ np.linalg.cholesky(b.covariance.numpy()), compute_uv=False)
    return float((a.mean - b.mean).square().sum() + a.covariance.trace() + b.covariance.trace() - 2 * roots.sum())


def _is_naive(found: PRDC, real_ND: Tensor, drawn_ND: Tensor) -> bool:
    """From the whole matrices of distances. (Equal distances do not occur among these features.)"""
    real_ND, drawn_ND = real_ND.double(), drawn_ND.double()
    within_NN, within_MM, between_NM = (torch.cdist(a, b) for a, b in ((real_ND, real_ND), (drawn_ND, drawn_ND), (real_ND, drawn_ND)))
    radii_N, dense_N = (within_NN.kthvalue(k + 1, dim=1).values[:, None] for k in (3, 5))  # each is its own nearest
    radii_M = within_MM.kthvalue(4, dim=1).values
    inside_NM = between_NM <= dense_N
    pairs = (
        (found.precise_M, (between_NM <= radii_N).any(dim=0)),
        (found.recalled_N, (between_NM <= radii_M).any(dim=1)),
        (found.density_M, inside_NM.double().sum(dim=0) / 5),
        (found.covered_N, inside_NM.any(dim=1)),
    )
    return all(torch.equal(one.double(), other.double()) for one, other in pairs)


def main() -> None:
    real_ND, drawn_ND = _features(MANY, 0), _features(MANY, 1)
    for name, measure in (("Frechet distance", _frechet), ("neighbours", _whole_manifolds)):
        started, cpu = time.perf_counter(), time.process_time()
        with progress(name, None) as advance:
            found = measure(real_ND, drawn_ND, advance)
        spent = f"{time.perf_counter() - started:.0f} s, {time.process_time() - cpu:.0f} s of CPU"
        print(f"{name} at {MANY:,} x {WIDTH:,}, {torch.get_num_threads()} threads: {spent}: {found}")


def _whole_manifolds(real_ND: Tensor, drawn_ND: Tensor, on_rows: Callable[[int], None] | None = None) -> tuple[float, ...]:
    found = compute_prdc(real_ND, drawn_ND, on_rows=on_rows)
    return found.precision, found.recall, found.density, found.coverage


if __name__ == "__main__":
    main()
