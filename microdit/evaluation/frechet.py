"""Frechet distance between Gaussians fitted to the features of two sets of pictures (FID, Heusel et al. 2017, arXiv 1706.08500).

- Moments are streamed and merged in float64, so that no set of features need be held whole.
- The trace of the matrix square root needs no inverse and no complex numbers: it is right for singular covariances too.
- A finite sample lifts the distance. `frechet_infinity` removes that bias; `bootstrap_interval` says how far chance alone moves a metric.
- Statistics on the disk carry what made them, and are refused for anything else.

Shapes: N samples, B of them in a batch, D features, R the rank of a covariance.
"""

import hashlib
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import safetensors
import torch
from numpy.typing import NDArray
from safetensors.torch import save
from torch import Tensor

from microdit.errors import UserError
from microdit.files import write_aside

_KIND = "microdit feature statistics 1"
_Matrix = NDArray[np.float64]


@dataclass(frozen=True)
class Gaussian:
    """Mean (D,) and unbiased covariance (D, D), both float64 on the CPU, of `count` feature vectors."""

    mean: Tensor
    covariance: Tensor
    count: int


class Moments:
    """Mean and scatter of features that arrive in batches: any split, in any order, gives the same but for rounding.

    Batches are centred before they are multiplied, and joined by the update of Chan, Golub & LeVeque (1979): far from the origin no
    digits are lost, as they would be by subtracting the square of the mean from the mean of the squares.
    """

    def __init__(self, dimensions: int):
        """`dimensions` is D."""
        self.count = 0
        self._mean_D = torch.zeros(dimensions, dtype=torch.float64)
        self._scatter_DD = torch.zeros(dimensions, dimensions, dtype=torch.float64)

    def add(self, features_BD: Tensor) -> None:
        """A batch of any length from 1. Raises UserError for features that are not finite, or of another D."""
        batch_BD = float64_features(features_BD).cpu()
        _refuse_other_dimensions(batch_BD.shape[1], len(self._mean_D))
        mean_D = batch_BD.mean(dim=0)
        centred_BD = batch_BD - mean_D
        self._join(len(batch_BD), mean_D, centred_BD.T @ centred_BD)

    def merge(self, other: "Moments") -> None:
        """Takes in all that `other` has seen; `other` stays as it is. Raises UserError if its D is another."""
        _refuse_other_dimensions(len(other._mean_D), len(self._mean_D))
        if other.count:
            self._join(other.count, other._mean_D, other._scatter_DD)

    def gaussian(self) -> Gaussian:
        """Raises UserError for fewer than 2 feature vectors, which have no covariance."""
        if self.count < 2:
            raise UserError(f"A covariance needs the features of at least 2 pictures, and there are {self.count}.")
        return Gaussian(self._mean_D.clone(), self._scatter_DD / (self.count - 1), self.count)

    def _join(self, count: int, mean_D: Tensor, scatter_DD: Tensor) -> None:
        total = self.count + count
        shift_D = mean_D - self._mean_D
        self._scatter_DD = self._scatter_DD + scatter_DD + torch.outer(shift_D, shift_D) * (self.count * count / total)
        self._mean_D = self._mean_D + shift_D * (count / total)
        self.count = total


def fit_gaussian(features_ND: Tensor) -> Gaussian:
    """Of features that are held whole. Raises UserError as `Moments` does."""
    features_ND = float64_features(features_ND)
    moments = Moments(features_ND.shape[1])
    moments.add(features_ND)
    return moments.gaussian()


def frechet_distance(a: Gaussian, b: Gaussian) -> float:
    """|mean_a - mean_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)), equation 6 of arXiv 1706.08500: squared, as FID is. Never below 0.

    Raises UserError if a and b are of different D.
    """
    _refuse_other_dimensions(len(a.mean), len(b.mean))
    return _distance(a, b, _root(a.covariance), _root(b.covariance))


@dataclass(frozen=True)
class ExtrapolatedDistance:
    """`distance` for infinitely many samples, and the distances at finite `counts` through which the line was laid."""

    distance: float
    counts: tuple[int, ...]
    distances: tuple[float, ...]


def frechet_infinity(
    features_ND: Tensor, reference: Gaussian, points: int = 15, smallest: int | None = None, seed: int = 0
) -> ExtrapolatedDistance:
    """FID_infinity (Chong & Forsyth 2020, arXiv 1911.07023): the bias of FID is linear in 1/N, so a line through FIDs ends at 0 bias.

    `points` random subsets of `smallest` (a tenth of N, as the paper's 5,000 of 50,000) to N samples; least squares in 1/N. The bias is
    linear only where N is well above D. About 0 the result may be negative: it is unbiased, not a distance. The reference's own bias
    stays. Raises UserError for fewer than 2 points, or if `smallest` does not lie in [2, N).
    """
    features_ND = float64_features(features_ND).cpu()
    total = len(features_ND)
    smallest = max(2, total // 10) if smallest is None else smallest
    if points < 2 or not 2 <= smallest < total:
        raise UserError(
            f"FID-infinity needs at least 2 subsets, of 2 to {total - 1} of the {total} samples: not {points} from {smallest} upwards."
        )
    _refuse_other_dimensions(features_ND.shape[1], len(reference.mean))
    generator = torch.Generator().manual_seed(seed)
    counts = [round(count) for count in np.linspace(smallest, total, points)]
    root_DR, distances = _root(reference.covariance), []
    for count in counts:
        subset = fit_gaussian(features_ND[torch.randperm(total, generator=generator)[:count]])
        distances.append(_distance(subset, reference, _root(subset.covariance), root_DR))
    _, intercept = np.polyfit(1 / np.array(counts), distances, deg=1)
    return ExtrapolatedDistance(float(intercept), tuple(counts), tuple(distances))


@dataclass(frozen=True)
class Interval:
    """The metric of all samples, and between which bounds its expectation lies."""

    value: float
    low: float
    high: float


def bootstrap_interval(
    metric: Callable[[Tensor], float], samples: Tensor, resamples: int = 1000, confidence: float = 0.95, seed: int = 0
) -> Interval:
    """Of `metric(samples)`, where `samples` (N, ...) are independent rows: rows are drawn anew, with repeats (Efron 1979).

    The interval is for the metric's expectation at this N. It is the pivotal one, from the resamples' deviations from their own mean:
    repeats lift a biased metric such as FID further than the bias of the samples themselves, and percentiles would lie above the value.
    Raises UserError for fewer than 2 samples or resamples, or a confidence outside (0, 1).
    """
    if len(samples) < 2 or resamples < 2 or not 0 < confidence < 1:
        raise UserError(
            f"A bootstrap interval needs at least 2 samples and resamples, and a confidence between 0 and 1: not {len(samples)} samples, "
            f"{resamples} resamples and a confidence of {confidence}."
        )
    generator = torch.Generator().manual_seed(seed)
    value = metric(samples)
    drawn = np.array(
        [metric(samples[torch.randint(len(samples), (len(samples),), generator=generator).to(samples.device)]) for _ in range(resamples)]
    )
    below, above = np.quantile(drawn - drawn.mean(), [(1 - confidence) / 2, (1 + confidence) / 2])
    return Interval(value, value - float(above), value - float(below))


@dataclass(frozen=True)
class Origin:
    """What made statistics: the encoder's fingerprint, how pictures were resized for it, and which pictures they were."""

    encoder: str
    resize: str
    source: str


def save_statistics(path: Path, gaussian: Gaussian, origin: Origin) -> None:
    """One safetensors file; `origin` and a checksum lie in its metadata."""
    tensors = {"mean": gaussian.mean.contiguous(), "covariance": gaussian.covariance.contiguous()}
    metadata = {"kind": _KIND, "count": str(gaussian.count), **asdict(origin)}
    write_aside(path, save(tensors, {**metadata, "checksum": _checksum(tensors, metadata)}))


def load_statistics(path: Path, encoder: str, resize: str) -> tuple[Gaussian, Origin]:
    """What `save_statistics` wrote. Raises UserError if it is damaged, or was made by another encoder or with another resize."""
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = dict(file.metadata() or {})
            tensors = {name: file.get_tensor(name) for name in ("mean", "covariance")}
        checksum = metadata.pop("checksum")
        if metadata["kind"] != _KIND or checksum != _checksum(tensors, metadata):
            raise ValueError("it is not what was written")
        origin = Origin(metadata["encoder"], metadata["resize"], metadata["source"])
        gaussian = Gaussian(tensors["mean"], tensors["covariance"], int(metadata["count"]))
    except (OSError, ValueError, KeyError, safetensors.SafetensorError) as error:
        raise UserError(f"{path} holds no whole feature statistics ({error}): compute them again.") from error
    if (origin.encoder, origin.resize) != (encoder, resize):
        raise UserError(
            f"{path} holds statistics of the encoder {origin.encoder} with pictures resized by {origin.resize}, and the pictures to "
            f"compare are seen by {encoder}, resized by {resize}: compute the statistics anew."
        )
    return gaussian, origin


def few_samples_warning(count: int, dimensions: int) -> str | None:
    """A sentence if there are so few samples that a Frechet distance says more of their number than of the pictures."""
    if count > dimensions:
        return None
    return (
        f"{count} samples are too few for {dimensions} features: the covariance is singular, and the Frechet distance far too high. "
        f"Compare only distances of equally many samples, take more than {dimensions} of them, or use KID."
    )


def float64_features(features_ND: Tensor) -> Tensor:
    """As float64. Raises UserError unless they are (N, D) with N and D from 1, and finite."""
    if features_ND.ndim != 2 or not features_ND.numel():
        raise UserError(
            f"Features must be a table of pictures by dimensions, at least one of each; these have the shape {tuple(features_ND.shape)}."
        )
    broken = int((~features_ND.isfinite()).any(dim=1).sum())
    if broken:
        raise UserError(
            f"The features of {broken} of {len(features_ND)} pictures are not finite: leave these pictures out, or repair them."
        )
    return features_ND.detach().double()


def _distance(a: Gaussian, b: Gaussian, root_a_DR: _Matrix, root_b_DR: _Matrix) -> float:
    """The eigenvalues of C_a C_b are those of the symmetric F_a^T C_b F_a, where F F^T = C, and their square roots are the singular values
    of F_a^T F_b. These are taken directly: the root of an eigenvalue that is 0 but for rounding would keep only half of the digits."""
    root_trace = np.linalg.svd(root_a_DR.T @ root_b_DR, compute_uv=False).sum()
    apart = (a.mean - b.mean).square().sum()
    return max(0.0, float(apart + a.covariance.trace() + b.covariance.trace() - 2 * root_trace))


def _root(covariance_DD: Tensor) -> _Matrix:
    """F (D, R) with F F^T = C: Cholesky's factor, or, where C is singular but for rounding, eigenvectors without those of the value 0.

    By numpy: on CPUs its decompositions were measured to be several times faster than those of torch.
    """
    matrix_DD = covariance_DD.numpy()
    rounding = len(matrix_DD) * np.finfo(np.float64).eps
    try:
        factor_DD = np.linalg.cholesky(matrix_DD)
        if factor_DD.diagonal().min() ** 2 > rounding * matrix_DD.trace():
            return factor_DD
    except np.linalg.LinAlgError:
        pass
    eigenvalues_D, vectors_DD = np.linalg.eigh(matrix_DD)
    kept_D = eigenvalues_D > np.abs(eigenvalues_D).max() * rounding
    return vectors_DD[:, kept_D] * np.sqrt(eigenvalues_D[kept_D])


def _refuse_other_dimensions(one: int, other: int) -> None:
    if one != other:
        raise UserError(f"Features of {one} and of {other} dimensions cannot be compared: they are of different encoders.")


def _checksum(tensors: dict[str, Tensor], metadata: dict[str, str]) -> str:
    digest = hashlib.sha256(repr(sorted(metadata.items())).encode())
    for name in sorted(tensors):
        digest.update(tensors[name].numpy().tobytes())
    return digest.hexdigest()
