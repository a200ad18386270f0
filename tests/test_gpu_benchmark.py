"""benchmarks/gpu.py: its steps are processes whose ends never end the others."""

import json
import sys
import time
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import gpu  # noqa: E402
import gpu_measure  # noqa: E402


@pytest.fixture
def run(tmp_path):
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    return gpu.Run(tmp_path / "out", scratch, smoke=True, seconds=600, only=None)


def test_a_step_leaves_its_numbers_and_one_file_holds_all(run):
    run.take(gpu.STEPS[0])
    assert run.outcomes["ceilings"]["outcome"] == "ok"
    whole = json.loads((run.out / "results.json").read_text())
    assert whole["found"]["ceilings"]["bfloat16 product"]["tflops"] > 0
    assert "===== ceilings\nmachine:" in (run.out / "logs.txt").read_text()
    assert "| bfloat16 product | 256 |" in (run.out / "summary.md").read_text()


def test_a_step_that_fails_or_hangs_ends_no_other(run, monkeypatch):
    run.take(gpu.Step("unknown", 60, 1, "no such step"))
    assert run.outcomes["unknown"]["outcome"] == "failed with exit code 2"
    monkeypatch.setattr(gpu, "SMOKE_LIMIT", 0.2)
    run.take(gpu.STEPS[1])
    assert run.outcomes["xl-compiled"]["outcome"] == "stopped at its limit of 0 s"


def test_a_step_without_time_is_left_out_and_says_so(run):
    run.deadline = time.monotonic() + 5
    run.take(gpu.STEPS[1])
    assert run.outcomes["xl-compiled"]["outcome"].startswith("left out: ")
    assert not (run.out / "steps" / "xl-compiled.log").exists()


def test_what_fails_is_noted_and_the_rest_is_measured(tmp_path):
    results = gpu_measure.Results(tmp_path / "step.json")
    with results.attempt("first"):
        raise RuntimeError("out of\nmemory")
    with results.attempt("second"):
        results.put("second", {"seconds": 1.0})
    assert json.loads((tmp_path / "step.json").read_text()) == {
        "first": {"error": "RuntimeError: out of memory"},
        "second": {"seconds": 1.0},
    }
    assert results.failed == ["first"]


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("nvjet_hsh_128x256_64x4_2x1_v_bz_coopA_NNT", "matrix products"),
        ("void pytorch_flash::flash_fwd_kernel<...>", "attention"),
        ("void at::native::(anonymous namespace)::multi_tensor_apply_kernel<... FusedAdamMathFunctor", "optimizer and clipping"),
        ("triton_poi_fused_add_3", "compiled"),
        ("ncclDevKernel_AllGather_RING_LL", "collectives"),
        ("something new", "others"),
    ],
)
def test_kernels_are_told_apart_by_their_names(name, kind):
    assert gpu_measure.kind_of_kernel(name) == kind


@pytest.mark.slow
def test_all_steps_at_smoke_size(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--out", str(tmp_path / "out"), "--smoke"])
    gpu.main()
    whole = json.loads((tmp_path / "out" / "results.json").read_text())
    assert {name: of["outcome"] for name, of in whole["steps"].items()} == dict.fromkeys(whole["steps"], "ok")
    assert set(whole["found"]) == {step.name for step in gpu.STEPS}
    assert whole["found"]["demo"]["stopped"]["exit_code"] == 75
    assert whole["found"]["trainer"]["trainer"]["images_per_second"] > 0
