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
class Sets:
    """Features from one network: N real images, M generated images, and the captions of the generated images in the same order.

    `prdc` holds the result of `compute_prdc` for both sets, so that four metrics share one neighbour search.
    """

    real_ND: Tensor
    generated_MD: Tensor
    captions_MD: Tensor | None = None
    prdc: PRDC | None = None


OnStep = Callable[[int], None] | None


@dataclass(frozen=True)
class Metric:
    """A metric's title, the option that names its network (`kind`), its direction, and how it is computed.

    `compute` takes the sets, the number of bootstrap resamples and a function that is told of progress, and returns `value`, the 95%
    interval `low` to `high` (or None) and details of its own. `steps` returns the number of steps that it tells of.
    """

    title: str
    kind: Kind
    lower_is_better: bool
    compute: Callable[[Sets, int, OnStep], dict[str, Any]]
    steps: Callable[[Sets, int], int] = lambda sets, resamples: 0


PRDC_METRICS = ("precision", "recall", "density", "coverage")
DEFAULT = ("fid", "kid", *PRDC_METRICS)


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


def measure(name: str, sets: Sets, resamples: int, on_step: OnStep = None) -> dict[str, Any]:
    """Return `value`, the 95% interval `low` to `high`, and details that depend on the metric. Raises UserError for too few images.

    The interval of precision and density covers the choice of generated images, that of recall and coverage the choice of real images.
    CMMD has no interval.
    """
    return METRICS[name].compute(sets, resamples, on_step)


def steps_to_measure(name: str, sets: Sets, resamples: int) -> int:
    """Return the number of steps that `measure` reports to `on_step`."""
    return METRICS[name].steps(sets, resamples)


def _frechet(sets: Sets, resamples: int, on_step: OnStep) -> dict[str, Any]:
    """Return the distance, its extrapolation to infinitely many images, and the points that the line is fitted to."""
    real_ND, generated_MD = sets.real_ND, sets.generated_MD
    reference = fit_gaussian(real_ND)
    line = frechet_infinity(generated_MD, reference, on_distance=on_step)
    return {
        **_entry(frechet_interval(generated_MD, reference, resamples, on_distance=on_step)),
        "infinity": line.distance,
        "at_counts": dict(zip(map(str, line.counts), line.distances, strict=True)),
        "warning": few_samples_warning(min(len(real_ND), len(generated_MD)), real_ND.shape[1]),
    }


def _frechet_steps(sets: Sets, resamples: int) -> int:
    return POINTS + 1 + 2 * resamples


def _kid(sets: Sets, resamples: int, on_step: OnStep) -> dict[str, Any]:
    return _entry(kid(sets.generated_MD, sets.real_ND, subset_size=_kid_subset(sets), on_subset=on_step))


def _kid_steps(sets: Sets, resamples: int) -> int:
    return 1 if {len(sets.real_ND), len(sets.generated_MD)} == {_kid_subset(sets)} else SUBSETS


def _kid_subset(sets: Sets) -> int:
    return min(LARGEST_SUBSET, len(sets.real_ND), len(sets.generated_MD))


def _prdc(name: str, sets: Sets, on_step: OnStep) -> dict[str, Any]:
    found = sets.prdc or compute_prdc(sets.real_ND, sets.generated_MD, on_rows=on_step)
    if name == "density":
        return _entry(bootstrap_interval(lambda rows: float(rows.mean()), found.density_M))
    return _entry(share_interval({"precision": found.precise_M, "recall": found.recalled_N, "coverage": found.covered_N}[name]))


def _prdc_metric(name: str) -> Metric:
    return Metric(name, "network", False, lambda sets, _, on_step: _prdc(name, sets, on_step), _prdc_steps)


def _prdc_steps(sets: Sets, resamples: int) -> int:
    return 0 if sets.prdc else prdc_rows(sets.real_ND, sets.generated_MD)


def _cmmd(sets: Sets, resamples: int, on_step: OnStep) -> dict[str, Any]:
    return {"value": cmmd(sets.generated_MD, sets.real_ND, on_step), "low": None, "high": None}


def _cmmd_steps(sets: Sets, resamples: int) -> int:
    return 2 * len(sets.generated_MD) + len(sets.real_ND)


def _clip_score(sets: Sets, resamples: int, on_step: OnStep) -> dict[str, Any]:
    assert sets.captions_MD is not None, "the CLIP score needs captions"
    return _entry(clip_score(sets.generated_MD, sets.captions_MD))


def _entry(interval: Interval) -> dict[str, Any]:
    return asdict(interval)


METRICS = {
    "fid": Metric("Frechet distance", "network", True, _frechet, _frechet_steps),
    "kid": Metric("KID", "network", True, _kid, _kid_steps),
    **{name: _prdc_metric(name) for name in PRDC_METRICS},
    "clip-fid": Metric("Frechet distance", "clip", True, _frechet, _frechet_steps),
    "cmmd": Metric("CMMD", "clip", True, _cmmd, _cmmd_steps),
    "clip-score": Metric("CLIP score", "clip", False, _clip_score),
    "dino-fd": Metric("Frechet distance", "dino", True, _frechet, _frechet_steps),
}
