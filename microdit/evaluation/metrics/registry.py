"""The metrics that papers report, by name: which network each one uses, which direction is better, and how it is computed."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Literal

from torch import Tensor

from microdit.errors import UserError
from microdit.evaluation.metrics.bootstrap import Interval, bootstrap_interval, share_interval
from microdit.evaluation.metrics.clip_score import clip_score
from microdit.evaluation.metrics.frechet import POINTS, few_samples_warning, fit_gaussian, frechet_infinity, frechet_interval
from microdit.evaluation.metrics.kid import SUBSETS, cmmd, kid
from microdit.evaluation.metrics.prdc import PRDC, compute_prdc, prdc_rows

Kind = Literal["network", "clip", "dino"]
LARGEST_SUBSET = 1000  # samples of a KID subset, as in the paper


@dataclass(frozen=True)
class Metric:
    """A metric's title, the option that names its network (`kind`), and its direction."""

    title: str
    kind: Kind
    lower_is_better: bool


METRICS = {
    "fid": Metric("Frechet distance", "network", True),
    "kid": Metric("KID", "network", True),
    "precision": Metric("precision", "network", False),
    "recall": Metric("recall", "network", False),
    "density": Metric("density", "network", False),
    "coverage": Metric("coverage", "network", False),
    "clip-fid": Metric("Frechet distance", "clip", True),
    "cmmd": Metric("CMMD", "clip", True),
    "clip-score": Metric("CLIP score", "clip", False),
    "dino-fd": Metric("Frechet distance", "dino", True),
}
FRECHET_METRICS = tuple(name for name, metric in METRICS.items() if metric.title == "Frechet distance")
PRDC_METRICS = ("precision", "recall", "density", "coverage")
DEFAULT = ("fid", "kid", "precision", "recall", "density", "coverage")


def label(name: str, network: str) -> str:
    """Return the metric's usual title. The Frechet distance is called FID only with Inception features."""
    return "FID" if METRICS[name].title == METRICS["fid"].title and network.startswith("inception") else METRICS[name].title


def choose_metrics(names: str | None) -> list[str]:
    """Parse a list such as `fid,kid`; None selects the defaults. Raises UserError for unknown names."""
    chosen = list(DEFAULT) if names is None else [name.strip() for name in names.split(",") if name.strip()]
    unknown = [name for name in chosen if name not in METRICS]
    if unknown or not chosen:
        problem = f"there is no {', '.join(unknown)}" if unknown else "the list is empty"
        raise UserError(f"--metrics: {problem}; choose from {', '.join(METRICS)}, separated by commas.")
    return list(dict.fromkeys(chosen))


@dataclass(frozen=True)
class Sets:
    """Features from one network: N real images, M generated images, and the captions of the generated images in the same order.

    `prdc` holds the result of `compute_prdc` for both sets, so that four metrics share one neighbour search.
    """

    real_ND: Tensor
    generated_MD: Tensor
    captions_MD: Tensor | None = None
    prdc: PRDC | None = None


def measure(name: str, sets: Sets, resamples: int, on_step: Callable[[int], None] | None = None) -> dict[str, Any]:
    """Return `value`, the 95% interval `low` to `high`, and details that depend on the metric. Raises UserError for too few images.

    The interval of precision and density covers the choice of generated images, that of recall and coverage the choice of real images.
    CMMD has no interval.
    """
    real_ND, generated_MD = sets.real_ND, sets.generated_MD
    if name in FRECHET_METRICS:
        return _frechet(real_ND, generated_MD, resamples, on_step)
    if name == "kid":
        return _entry(kid(generated_MD, real_ND, subset_size=_kid_subset(sets), on_subset=on_step))
    if name in PRDC_METRICS:
        return _entry(_prdc_interval(name, sets.prdc or compute_prdc(real_ND, generated_MD, on_rows=on_step)))
    if name == "cmmd":
        return {"value": cmmd(generated_MD, real_ND, on_step), "low": None, "high": None}
    assert name == "clip-score"
    assert sets.captions_MD is not None, "the CLIP score needs captions"
    return _entry(clip_score(generated_MD, sets.captions_MD))


def steps_to_measure(name: str, sets: Sets, resamples: int) -> int:
    """Return the number of steps that `measure` reports to `on_step`."""
    if name in FRECHET_METRICS:
        return POINTS + 1 + 2 * resamples
    if name == "kid":
        return 1 if {len(sets.real_ND), len(sets.generated_MD)} == {_kid_subset(sets)} else SUBSETS
    if name in PRDC_METRICS:
        return 0 if sets.prdc else prdc_rows(sets.real_ND, sets.generated_MD)
    return 2 * len(sets.generated_MD) + len(sets.real_ND) if name == "cmmd" else 0


def _kid_subset(sets: Sets) -> int:
    return min(LARGEST_SUBSET, len(sets.real_ND), len(sets.generated_MD))


def _prdc_interval(name: str, found: PRDC) -> Interval:
    if name == "density":
        return bootstrap_interval(lambda rows: float(rows.mean()), found.density_M)
    return share_interval({"precision": found.precise_M, "recall": found.recalled_N, "coverage": found.covered_N}[name])


def _frechet(real_ND: Tensor, generated_MD: Tensor, resamples: int, on_distance: Callable[[int], None] | None) -> dict[str, Any]:
    """Return the distance, its extrapolation to infinitely many images, and the points that the line is fitted to."""
    reference = fit_gaussian(real_ND)
    line = frechet_infinity(generated_MD, reference, on_distance=on_distance)
    return {
        **_entry(frechet_interval(generated_MD, reference, resamples, on_distance=on_distance)),
        "infinity": line.distance,
        "at_counts": dict(zip(map(str, line.counts), line.distances, strict=True)),
        "warning": few_samples_warning(min(len(real_ND), len(generated_MD)), real_ND.shape[1]),
    }


def _entry(interval: Interval) -> dict[str, Any]:
    return asdict(interval)
