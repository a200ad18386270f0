"""The metrics that papers print, by name: what each sees pictures with, and what is better."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Literal

from torch import Tensor

from microdit.errors import UserError
from microdit.evaluation.clip_score import clip_score
from microdit.evaluation.frechet import fit_gaussian, frechet_infinity, frechet_interval
from microdit.evaluation.intervals import Interval, bootstrap_interval, share_interval
from microdit.evaluation.kid import cmmd, kid
from microdit.evaluation.manifold import density_coverage, precision_recall
from microdit.evaluation.vectors import few_samples_warning

Kind = Literal["network", "clip", "dino"]
LARGEST_SUBSET = 1000  # of KID, as its authors take


@dataclass(frozen=True)
class Metric:
    """`kind`: the option that names its network."""

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
DEFAULT = ("fid", "kid", "precision", "recall", "density", "coverage")


def label(name: str, network: str) -> str:
    """As papers call it: the Frechet distance is FID with Inception's features only."""
    return "FID" if METRICS[name].title == METRICS["fid"].title and network.startswith("inception") else METRICS[name].title


def choose_metrics(names: str | None) -> list[str]:
    """`fid,kid` -> ["fid", "kid"]. Raises UserError."""
    chosen = list(DEFAULT) if names is None else [name.strip() for name in names.split(",") if name.strip()]
    unknown = [name for name in chosen if name not in METRICS]
    if unknown or not chosen:
        raise UserError(f"--metrics: there is no {', '.join(unknown) or 'name'}; choose from {', '.join(METRICS)}, with commas between.")
    return list(dict.fromkeys(chosen))


@dataclass(frozen=True)
class Sets:
    """Features of one network: of the reference, of the generated pictures, and of the captions in the order of the pictures."""

    real_ND: Tensor
    generated_MD: Tensor
    captions_MD: Tensor | None = None


def measure(name: str, sets: Sets, resamples: int, on_resample: Callable[[int], None] | None = None) -> dict[str, Any]:
    """`value`, `low` and `high` (a 95% interval), and what else is worth knowing. Raises UserError for too few pictures.

    The interval of precision and density is that of other generated pictures, of recall and coverage of other real ones; CMMD has none.
    """
    real_ND, generated_MD = sets.real_ND, sets.generated_MD
    if name in ("fid", "clip-fid", "dino-fd"):
        return _frechet(real_ND, generated_MD, resamples, on_resample)
    if name == "kid":
        return _entry(kid(generated_MD, real_ND, subset_size=min(LARGEST_SUBSET, len(real_ND), len(generated_MD))))
    if name in ("precision", "recall"):
        near = precision_recall(real_ND, generated_MD)
        return _entry(share_interval(near.precise_M if name == "precision" else near.recalled_N))
    if name == "density":
        return _entry(bootstrap_interval(lambda rows: float(rows.mean()), density_coverage(real_ND, generated_MD).density_M))
    if name == "coverage":
        return _entry(share_interval(density_coverage(real_ND, generated_MD).covered_N))
    if name == "cmmd":
        return {"value": cmmd(generated_MD, real_ND), "low": None, "high": None}
    assert name == "clip-score"
    assert sets.captions_MD is not None, "the CLIP score needs captions"
    return _entry(clip_score(generated_MD, sets.captions_MD))


def resamples_of(name: str, resamples: int) -> int:
    """How often `measure` calls `on_resample`."""
    return 2 * resamples + 1 if name in ("fid", "clip-fid", "dino-fd") else 0


def _frechet(real_ND: Tensor, generated_MD: Tensor, resamples: int, on_resample: Callable[[int], None] | None) -> dict[str, Any]:
    """With its extrapolation to infinitely many pictures, and the points that this is laid through."""
    reference = fit_gaussian(real_ND)
    line = frechet_infinity(generated_MD, reference)
    return {
        **_entry(frechet_interval(generated_MD, reference, resamples, on_resample=on_resample)),
        "infinity": line.distance,
        "at_counts": dict(zip(map(str, line.counts), line.distances, strict=True)),
        "warning": few_samples_warning(min(len(real_ND), len(generated_MD)), real_ND.shape[1]),
    }


def _entry(interval: Interval) -> dict[str, Any]:
    return asdict(interval)
