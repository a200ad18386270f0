from dataclasses import replace

import pytest
import torch

from microdit.errors import UserError
from microdit.evaluation.metrics.clip_score import clip_scores
from microdit.evaluation.metrics.frechet import fit_gaussian, frechet_distance
from microdit.evaluation.metrics.kid import cmmd, kid
from microdit.evaluation.metrics.prdc import compute_prdc
from microdit.evaluation.metrics.registry import METRICS, PRDC_METRICS, Sets, choose_metrics, label, measure, steps_to_measure


def normal(count: int, dimensions: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, dimensions, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def sets() -> Sets:
    return Sets(normal(300, 6), normal(200, 6, 1) + 0.4, normal(200, 6, 2))


@pytest.mark.parametrize("name", METRICS)
def test_each_metric_has_its_value_and_an_interval_around_it(sets, name):
    counted: list[int] = []
    entry = measure(name, sets, 20, counted.append)
    assert sum(counted) == steps_to_measure(name, sets, 20)
    real, drawn, captions = sets.real_ND, sets.generated_MD, sets.captions_MD
    if METRICS[name].title == "Frechet distance":
        assert entry["value"] == pytest.approx(frechet_distance(fit_gaussian(drawn), fit_gaussian(real)))
        assert entry["infinity"] < entry["value"]
        assert entry["warning"] is None
    elif name == "kid":
        assert entry["value"] == pytest.approx(kid(drawn, real, subset_size=200).value)
    elif name == "cmmd":
        assert (entry["value"], entry["low"], entry["high"]) == (pytest.approx(cmmd(drawn, real)), None, None)
        return
    elif name == "clip-score":
        assert entry["value"] == pytest.approx(float(clip_scores(drawn, captions).mean()))
    else:
        assert 0 < entry["value"] < 1.2
    assert entry["low"] < entry["value"] < entry["high"]


def test_neighbours_that_were_found_are_not_searched_again(sets):
    found = compute_prdc(sets.real_ND, sets.generated_MD)
    shared = replace(sets, prdc=found)
    for name in PRDC_METRICS:
        counted: list[int] = []
        assert measure(name, shared, 20, counted.append) == measure(name, sets, 20)
        assert sum(counted) == steps_to_measure(name, shared, 20) == 0


def test_a_set_is_near_itself_and_a_shifted_one_is_as_far_as_its_shift():
    real = normal(400, 8)
    same, shifted = Sets(real, real.clone()), Sets(real, real + 3.0)
    assert measure("fid", same, 2)["value"] < 1e-8
    assert all(measure(name, same, 2)["value"] == 1 for name in ("precision", "recall", "coverage"))
    assert measure("fid", shifted, 2)["value"] == pytest.approx(8 * 9.0)
    assert measure("kid", shifted, 2)["value"] > 1
    assert measure("precision", shifted, 2)["value"] < 0.05


def test_more_pictures_make_the_interval_narrower():
    widths = []
    for count in (100, 1600):
        entry = measure("fid", Sets(normal(4000, 4), normal(count, 4, 1) + 0.5), 60)
        widths.append(entry["high"] - entry["low"])
    assert widths[1] == pytest.approx(widths[0] / 4, rel=0.4)  # with the root of their number


def test_too_few_pictures_are_warned_of():
    assert "10 samples are too few for 12 features" in measure("dino-fd", Sets(normal(50, 12), normal(10, 12, 1)), 2)["warning"]


def test_metrics_are_chosen_by_name():
    assert choose_metrics("kid, fid,kid") == ["kid", "fid"]
    assert "clip-score" not in choose_metrics(None)
    for names in ("fid,psnr", "", " , "):
        with pytest.raises(UserError, match="choose from fid, kid, precision"):
            choose_metrics(names)


def test_a_frechet_distance_is_called_fid_with_inceptions_features_only():
    assert label("fid", "inception-2015-12-05") == "FID"
    assert label("fid", "efficientnet-lite0") == "Frechet distance"
    assert label("kid", "inception-2015-12-05") == "KID"
