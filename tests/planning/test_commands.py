"""The commands as a person runs them."""

import json
import re
from pathlib import Path

import pytest

from microdit.cli.plan import bench
from microdit.config.load import load_recipe
from microdit.config.recipes import RECIPES
from microdit.planning.bill import recorded_comparisons
from microdit.planning.hardware import read_measurements
from tests.planning.test_hardware_machine import MEASURED
from tests.planning.test_workload_bill import PUBLISHED
from tests.training.processes import RECIPE, start


def microdit(tmp_path: Path, *arguments: object) -> tuple[int, str]:
    running = start(tmp_path / "logs", list(arguments), cwd=tmp_path)
    return running.wait()[0], running.output


def test_the_published_run_is_priced_without_its_data(tmp_path):
    code, output = microdit(tmp_path, "budget", PUBLISHED, "--chip", "h100", "--count", 8, "--price", 2.5, "--mfu", 0.45)
    assert code == 0, output
    for text in (
        "1,165.4 M parameters, on 8 x H100 SXM",
        "282.1",
        "714.2",
        "1069",
        "3003",
        "$512.47",
        "assumed, for want of",
        "On 1 x 24 GB: yes.",
    ):
        assert text in output


def test_json_says_the_same_and_overrides_count(tmp_path):
    code, output = microdit(tmp_path, "budget", PUBLISHED, "phases.0.steps=10", "--images", 1000, "--bench", "none.json", "--json")
    assert code == 0, output
    found = json.loads((tmp_path / "logs" / "0-0.log").read_text())  # all of it
    assert [phase["bill"]["steps"] for phase in found["phases"]] == [10] * 4
    assert found["encoding"]["images"] == 1000
    assert found["machine"]["price"]["dollars"] == 2.69


def test_a_sum_becomes_recipes_ready_to_train(tmp_path):
    code, output = microdit(tmp_path, "budget", "--dollars", 50, "--chip", "rtx4090", "--data", "data/cats", "--out", "bought")
    assert code == 0, output
    assert "Written: microdit train bought" in output
    assert load_recipe(tmp_path / "bought" / "1-256-falling.yaml").data.path == "data/cats"
    code, output = microdit(tmp_path, "budget", "--dollars", 50, "--chip", "rtx4090", "--family", "paper", "--out", "paper")
    assert code == 0, output
    assert load_recipe(tmp_path / "paper" / "1-256-masked.yaml").diffusion.objective == "edm"
    spent = re.search(r"Training \$(\S+) and encoding \$(\S+): \$(\S+) of \$50.00\.", output)
    training, encoding, both = (float(number) for number in spent.groups())
    assert training + encoding == pytest.approx(both, abs=0.011)
    assert both <= 50
    assert f"${encoding} encode 1,000,000 images (assumed; --images says how many), " in output


def test_a_sum_that_encodes_more_than_training_sees_is_told_so(tmp_path):
    arguments = ["--dollars", 7.31, "--chip", "h100", "--price", 2, "--images", 10**7]
    code, output = microdit(tmp_path, "budget", *arguments)
    assert code == 0, output
    assert re.search(r"Only [\d.]+ M images are seen: encode no more of them \(--images\)\.", output)


def test_a_users_own_chip_serves_recipes_and_sums(tmp_path):
    (tmp_path / "own.yaml").write_text("rtx5080: {teraflops: 112.6, memory_gb: 16, price: 0.3}\n")
    for what in (["--dollars", 50], [RECIPES / "microdit-tiny"]):
        code, output = microdit(tmp_path, "budget", *what, "--chip", "RTX5080", "--prices", "own.yaml")
        assert code == 0, output
        assert "on 1 x rtx5080 (112.6 TFLOP/s, 16 GB each)" in output
        assert "$0.30 a GPU-hour (own.yaml)" in output


def test_bench_measures_its_own_model_on_the_papers_shapes(tmp_path, monkeypatch, encoded_emoji):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "mine").symlink_to(encoded_emoji)
    monkeypatch.chdir(tmp_path)
    seen = []

    def measured(recipe, shapes, *_):
        seen.append((shapes.latent_channels, shapes.sides, shapes.caption_tokens, shapes.caption_channels))
        return MEASURED

    monkeypatch.setattr("microdit.training.benchmark.measure", measured)
    bench(recipe=None, seconds=1.0, micro_batch=None, device="cpu", file=tmp_path / "bench.json")
    assert seen == [(4, ((1.0, 32, 32),), 77, 1024)]


def test_bench_measures_a_real_step_and_keeps_it(tmp_path):
    code, output = microdit(tmp_path, "bench", "--seconds", 0.1, "--micro-batch", 1, "--device", "cpu", "--file", "bench.json")
    assert code == 0, output
    assert "images/s, MFU" in output
    (found,) = read_measurements(tmp_path / "bench.json").values()
    assert found.chip == "CPU, 1 threads"
    assert (found.micro_batch, found.model, found.precision) == (1, "MicroDiT_Tiny_2", "float32")
    assert 0 < found.utilisation < 1.5  # of a peak that is itself measured


def test_a_recipe_is_measured_billed_trained_and_compared(tmp_path, encoded_emoji):
    said = [f"data.path={encoded_emoji}", "record.sample_prompts=[owl]", "record.sample_steps=2"]
    code, output = microdit(tmp_path, "budget", RECIPE, *said, "--chip", "cpu")
    assert code == 0, output
    assert "on 1 x CPU, 1 threads" in output
    assert f"microdit bench --recipe {RECIPE} measures all of it." in output
    code, output = microdit(tmp_path, "bench", "--recipe", RECIPE, *said, "--seconds", 0.2, "--out", "kept")
    assert code == 0, output
    assert "steps of masked 25 " in output
    (file,) = (tmp_path / "logs" / "cache" / "microdit" / "timings").iterdir()
    assert (tmp_path / "kept" / "recipe.json").read_bytes() == file.read_bytes()
    code, output = microdit(tmp_path, "budget", RECIPE, *said, "phases.0.steps=50", "record.checkpoint_every=5", "--price", 3600, "--json")
    assert code == 0, output
    found = json.loads(max((tmp_path / "logs").glob("*-0.log")).read_text())
    lines = {line["part"]: (line["times"], line["seconds"]) for line in found["measured"]["bills"]["recipe"]["lines"]}
    assert (lines["steps of masked"][0], lines["checkpoints"][0], lines["sample grids"][0]) == (50, 13, 1)
    assert [phase["bill"]["dollars"] for phase in found["phases"]] == pytest.approx(
        [lines[f"steps of {of}"][1] for of in ("masked", "full")]
    )
    code, output = microdit(tmp_path, "train", RECIPE, *said, "--out", "run", "--price-per-hour", 3600)
    assert code == 0, output
    assert "tiny: planned and actual" in output
    (recorded,) = recorded_comparisons(tmp_path / "run").values()
    assert all(row.planned > 0 and row.actual > 0 for row in recorded.parts)
    assert [row.what for row in recorded.parts] == ["start", "steps of masked", "steps of full", "checkpoints", "sample grids"]
    assert recorded.total.actual == pytest.approx(sum(row.actual for row in recorded.parts))
    assert recorded.dollars.planned == pytest.approx(recorded.total.planned)
    assert recorded.memory.planned > 0 < recorded.memory.actual
    code, output = microdit(tmp_path, "budget", "--check", "run")
    assert code == 0, output
    assert "run: planned and actual" in output
    file.write_bytes(file.read_bytes().replace(b'"start"', b'"stars"'))
    code, output = microdit(tmp_path, "budget", RECIPE, *said)
    assert (code, "cannot be used: its checksum differs" in output) == (1, True), output


def test_a_run_without_a_measurement_is_finished_and_says_how_to_plan(tmp_path, encoded_emoji):
    code, output = microdit(tmp_path, "train", RECIPE, f"data.path={encoded_emoji}", "--out", "run")
    assert code == 0, output
    assert "No plan was made: before a run, microdit bench --recipe RECIPE measures what it takes here." in output
    (recorded,) = recorded_comparisons(tmp_path / "run").values()
    assert (recorded.has_plan, recorded.dollars.actual) == (False, None)
    assert recorded.total.actual > 0


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["bench", "--recipe", RECIPE, "--micro-batch", 4], "--micro-batch and --file go without --recipe"),
        (["bench", "seed=1"], "key=value and --out go with --recipe"),
        (["budget", "--check", "nowhere"], "There is no run in nowhere"),
        (["budget", PUBLISHED, "--check", "nowhere"], "one of the three"),
        (["budget", PUBLISHED, "--chip", "this", "--count", 8], "for --count 8, name the GPU"),
        (["budget"], "Name a recipe, to see what it costs, or --dollars"),
        (["budget", PUBLISHED, "--dollars", 5], "one of the three"),
        (["budget", PUBLISHED, "--out", "x"], "--out goes with --dollars"),
        (["budget", PUBLISHED, "--chip", "h900"], "There is no chip named h900 in our table; known are"),
        (["budget", PUBLISHED, "--price", -1], "--price is -1.0"),
        (["budget", PUBLISHED, "--mfu", 1.5], "must lie in (0, 1]"),
        (["budget", PUBLISHED, "model.dim=4096", "--chip", "t4"], "does not fit: one sample at a time"),
        (["budget", "nowhere.yaml"], "There is no recipe at nowhere.yaml"),
        (["budget", "--dollars", 0.001], "say how many there are with --images"),
        (["budget", "--dollars", 1e300], "more than we plan with"),
        (["bench", "--recipe", "nowhere.yaml"], "There is no recipe at nowhere.yaml"),
    ],
)
def test_mistakes_end_in_one_sentence(tmp_path, arguments, sentence):
    code, output = microdit(tmp_path, *arguments)
    assert code == 1
    assert sentence in output
    assert "Traceback" not in output
