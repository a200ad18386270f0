"""A new metric: the distance between the mean features of real and generated images, with a bootstrap interval.

It is the first term of the Frechet distance, which says how much of that comes from the means alone. The file is the command line with
one metric more:

    python examples/extend/metric.py evaluate runs/emoji --metrics fid,mean-distance -n 256
"""

from typing import Any

from torch import Tensor

from microdit.cli.main import main
from microdit.evaluation.metrics.bootstrap import bootstrap_interval
from microdit.evaluation.metrics.registry import METRICS, Metric, OnStep, Sets


def mean_distance(sets: Sets, resamples: int, on_step: OnStep) -> dict[str, Any]:
    """Return |m - m'|^2 of the means m' of the real images and m of resampled generated ones, with its 95% interval."""
    real_D = sets.real_ND.double().mean(dim=0)

    def distance(generated_MD: Tensor) -> float:
        return float((generated_MD.double().mean(dim=0) - real_D).square().sum())

    found = bootstrap_interval(distance, sets.generated_MD, resamples)
    return {"value": found.value, "low": found.low, "high": found.high}


METRICS["mean-distance"] = Metric("distance of means", "network", lower_is_better=True, compute=mean_distance)

if __name__ == "__main__":
    main()
