"""A study from end to end, by the commands: stopped and resumed, an arm that diverges, the report."""

import json
import shutil

import pytest

from microdit.errors import UserError
from microdit.io.console import PlainConsole, Reporter
from microdit.io.files import to_checked_lines
from microdit.lab.equal_cost import read_plan
from microdit.lab.run_study import drop_damaged, read_results
from microdit.lab.study import MEASURES
from tests.commands import microdit
from tests.damage import flips
from tests.training.processes import start, wait_for

BASE = """
name: base
data: {path: data/emoji, held_out: data/emoji}
model: {dim: 32, depth: 3, head_dim: 8, mixer_dim: 32, mixer_depth: 1, num_experts: 0, round_ffn_to: 8, patch_size: 2}
phases: [{name: all, steps: 1, batch_size: 4, learning_rate: 1e-3}]
ema: [{decay: 0.9}]
"""
STUDY = """
name: small
question: which is better?
source: scenes:12
reference: {arm: none, steps: 2}
seeds: [0, 1]
readings: [0.5, 1.0]
measures: [frechet_distance, held_out_loss]
pictures: 4
num_inference_steps: 2
prompts: [red heart, owl]
arms:
  none: [model.routing=none]
  deferred: [phases.0.mask_ratio=0.75]
  finish: ["phases=[{name: a, steps: 1, mask_ratio: 0.75, REST}, {name: b, steps: 1, REST}]"]
  wild: [phases.0.learning_rate=1e30]
claims:
  - {says: masking is cheaper, better: deferred, worse: none, measure: held_out_loss}
  - {says: wild is good, better: wild, worse: none}
""".replace("REST", "batch_size: 4, learning_rate: 1e-3")

STRANGE_PLANS = ({"flops_per_step": "much"}, {"seconds_per_step": 0}, {"steps": [1]}, {"steps": {"flops": None}}, {"more": 1})

LONGER = STUDY.replace("  wild:", "  half: [phases.0.mask_ratio=0.5]\n  wild:")


@pytest.fixture(scope="module")
def laboratory(workplace):
    (workplace / "base.yaml").write_text(BASE)
    (workplace / "small.yaml").write_text(STUDY)
    return workplace


@pytest.fixture(scope="module")
def finished(laboratory):
    """The same place with the study's results, whichever test comes first."""
    if not (laboratory / "lab" / "small" / "plan.json").is_file():
        done = microdit("lab", "run", "small.yaml", cwd=laboratory)
        assert done.returncode == 0, done.output
    return laboratory


def test_a_study_that_is_killed_goes_on_and_its_report_says_what_happened(laboratory):
    out = laboratory / "lab" / "small"
    running = start(laboratory / ".logs", ["lab", "run", "small.yaml"], cwd=laboratory)
    wait_for(lambda: len(read_results(out)) >= 3, running)
    running.kill()
    before = read_results(out)
    with (out / "results.jsonl").open("a") as file:
        file.write('{"arm": "none", "se')  # as a kill in the middle of a line leaves it
    beside = start(laboratory / ".logs", ["lab", "run", "small.yaml"], cwd=laboratory)
    done = microdit("lab", "run", "small.yaml", cwd=laboratory)
    assert done.returncode == 0, done.output
    assert beside.wait() == [0]  # two processes shared the study
    results = read_results(out)
    assert results[: len(before)] == before
    plan = json.loads((out / "plan.json").read_text())["arms"]
    for arm in ("none", "deferred"):
        steps = plan[arm]["steps"].values()
        legs = {max(1, round(share * count)) for share in (0.5, 1.0) for count in steps}
        for seed in (0, 1):
            lines = [line for line in results if (line["arm"], line["seed"]) == (arm, seed)]
            assert sorted(line["step"] for line in lines) == sorted(legs)  # each once
            assert all(line["flops"] == line["step"] * plan[arm]["flops_per_step"] for line in lines)
            assert all(line["held_out_loss"] > 0 and line["frechet_distance"] > 0 for line in lines)
    for arm in ("none", "deferred", "finish"):  # a finish of one step is a deferred one, if its budget of seconds is so small
        distances = [line["frechet_distance"] for line in results if line["arm"] == arm]
        assert len(set(distances)) == len(distances) >= 4
    finish = [line["step"] for line in results if (line["arm"], line["seed"]) == ("finish", 1)]
    assert sorted(finish) == sorted(set(plan["finish"]["steps"].values()))  # each budget's end, and nothing on the way
    costs = [plan[arm]["flops_per_step"] for arm in ("none", "deferred", "finish")]
    assert costs[2] == pytest.approx((costs[0] + costs[1]) / 2)  # half of the steps are masked
    diverged = [line for line in results if line.get("diverged")]
    assert [(line["arm"], line["seed"]) for line in diverged] == [("wild", 0), ("wild", 1)]
    assert not list((out / "runs").glob("*/*"))  # run folders of arms that are done are gone
    assert plan["none"]["steps"]["flops"] == plan["none"]["steps"]["seconds"] == 2
    assert plan["deferred"]["flops_per_step"] < plan["none"]["flops_per_step"]

    again = microdit("lab", "run", "small.yaml", cwd=laboratory)
    assert again.returncode == 0, again.output
    assert read_results(out) == results

    reported = microdit("lab", "report", "small.yaml", "--to", "docs-small", cwd=laboratory)
    assert reported.returncode == 0, reported.output
    page = (laboratory / "docs-small" / "README.md").read_text()
    assert "**wild diverged for seed 0 before step" in page
    assert "| masking is cheaper | Held-out loss: deferred" in page
    assert "2 seeds of wild diverged" in page
    assert "the same samples, noise and captions for every arm" in page
    assert "KID" not in page  # only the measures that the study asks for
    assert page.count("\n| deferred |") == 3  # a table for each budget
    for name in ("frechet_distance.png", "held_out_loss.png", "strips.png", "plan.json", "results.jsonl"):
        assert (laboratory / "docs-small" / name).stat().st_size > 100


def test_an_arm_may_be_added_and_what_was_done_stays(finished):
    out = finished / "lab" / "small"
    (finished / "small.yaml").write_text(LONGER)
    plan, results = json.loads((out / "plan.json").read_text()), read_results(out)
    # As a version wrote it that did not know this key, and wrote no checksum: its default is what was done then.
    older = {key: value for key, value in plan.items() if key not in ("checked_by", "self_sha256")}
    (out / "plan.json").write_text(json.dumps(older).replace("  gated_ffn: true\\n", ""))
    assert "gated_ffn" not in (out / "plan.json").read_text()
    early = microdit("lab", "report", "small.yaml", "--to", "docs-small", cwd=finished)
    assert (early.returncode, "has no results yet of half" in early.output) == (0, True), early.output
    assert "| half |" not in (finished / "docs-small" / "README.md").read_text()
    done = microdit("lab", "run", "small.yaml", cwd=finished)
    assert done.returncode == 0, done.output
    plan_now, results_now = json.loads((out / "plan.json").read_text()), read_results(out)
    half = plan_now["arms"].pop("half")
    assert plan_now["arms"] == plan["arms"]
    assert plan["arms"]["deferred"]["flops_per_step"] < half["flops_per_step"] < plan["arms"]["none"]["flops_per_step"]
    assert half["steps"]["images"] == 2
    assert half["steps"]["seconds"] == round(2 * plan["arms"]["none"]["seconds_per_step"] / half["seconds_per_step"])
    assert results_now[: len(results)] == results
    assert {(line["arm"], line["seed"]) for line in results_now[len(results) :]} == {("half", 0), ("half", 1)}


def test_a_study_that_changed_is_not_mixed_with_its_old_results(finished):
    (finished / "small.yaml").write_text(LONGER.replace("mask_ratio=0.75", "mask_ratio=0.25"))
    refused = microdit("lab", "run", "small.yaml", cwd=finished)
    assert refused.returncode == 1
    assert "holds results from before deferred changed: choose another --out" in refused.output
    for key, value in (("pictures: 4", "pictures: 13"), ("readings:", "budgets: [flops]\nreadings:")):
        (finished / "small.yaml").write_text(LONGER.replace(key, value))
        for command in ("run", "report"):
            otherwise = microdit("lab", command, "small.yaml", cwd=finished)
            assert otherwise.returncode == 1
            assert f"from before {'pictures' if '13' in value else 'the budget'} changed" in otherwise.output
    nothing = microdit("lab", "report", "small.yaml", "--out", "nowhere", cwd=finished)
    assert nothing.returncode == 1
    assert "There are no results in nowhere: run the study first" in nothing.output


def test_damaged_results_are_left_out_and_dropped_once_with_a_copy_kept(tmp_path, capsys):
    good = {"arm": "none", "seed": 0, "step": 4, "flops": 1.0, "seconds": 2, **dict.fromkeys(MEASURES, 0.5)}
    content = json.dumps(good) + '\nnot JSON\n{"arm": "none"}\n[1]\n' + json.dumps(good | {"seed": 1}) + '\n\xff\n{"arm": "no'
    (tmp_path / "results.jsonl").write_bytes(content.encode("latin-1"))
    reporter = Reporter(PlainConsole())
    assert read_results(tmp_path, reporter) == [good, good | {"seed": 1}]
    assert "lines 2, 3, 4, 6 are damaged and skipped" in " ".join(capsys.readouterr().out.split())
    drop_damaged(tmp_path, reporter)
    assert "are damaged and dropped" in " ".join(capsys.readouterr().out.split())
    assert (tmp_path / "results.jsonl.damaged-1").read_bytes() == content.encode("latin-1")
    assert read_results(tmp_path, reporter) == [good, good | {"seed": 1}]
    drop_damaged(tmp_path, reporter)
    assert capsys.readouterr().out == ""


def test_no_flipped_byte_of_the_results_is_measured_quality(tmp_path):
    good = [{"arm": "none", "seed": seed, "step": 4, "flops": 1.0, "seconds": 2, **dict.fromkeys(MEASURES, 0.5)} for seed in range(2)]
    path = tmp_path / "results.jsonl"
    path.write_bytes(to_checked_lines(good))
    size = path.stat().st_size
    assert read_results(tmp_path) == good
    for at in flips(path):
        expected = [] if at == size // 2 - 1 else good[:1] if at >= size // 2 else good[1:]  # two lines that became one are both lost
        assert read_results(tmp_path) == expected


@pytest.mark.parametrize("key", ["arm", "seed", "step", "flops", "seconds", "held_out_loss", "recognised"])
@pytest.mark.parametrize("value", [None, [1], {}, True])
def test_a_line_of_other_types_is_damaged(tmp_path, key, value):
    good = {"arm": "none", "seed": 0, "step": 4, "flops": 1.0, "seconds": 2, **dict.fromkeys(MEASURES, 0.5)}
    lost = {"arm": "none", "seed": 0, "step": 4, "diverged": "why"}
    lines = [good, good | {key: value}, lost, lost | {"diverged": value}]
    (tmp_path / "results.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    assert read_results(tmp_path) == [good, lost]


def test_a_damaged_plan_is_named(finished):
    (finished / "small.yaml").write_text(LONGER)
    out = finished / "damaged"
    shutil.copytree(finished / "lab" / "small", out)
    older = {key: value for key, value in json.loads((out / "plan.json").read_text()).items() if key not in ("checked_by", "self_sha256")}
    lacking = [{key: value for key, value in older.items() if key != lost} for lost in ("asked", "arms")]
    strange = [older | {"arms": dict.fromkeys(older["arms"], older["arms"]["none"] | change)} for change in STRANGE_PLANS]
    no_recipe = older | {"asked": older["asked"] | {"arms": dict.fromkeys(older["arms"], "[" * 5000)}}
    for content in (*lacking, *strange, no_recipe, older | {"asked": []}, older | {"arms": []}):
        (out / "plan.json").write_text(json.dumps(content))
        with pytest.raises(UserError, match=r"plan\.json is damaged"):
            read_plan(out)
    (out / "plan.json").write_text(json.dumps(older))
    assert read_plan(out) == read_plan(finished / "lab" / "small")
    shutil.copy(finished / "lab" / "small" / "plan.json", out)
    for _ in flips(out / "plan.json", range(0, (out / "plan.json").stat().st_size, 7)):
        with pytest.raises(UserError, match=r"plan\.json is damaged"):
            read_plan(out)
    (out / "plan.json").write_text("{}")
    refused = microdit("lab", "run", "small.yaml", "--out", "damaged", cwd=finished)
    assert (refused.returncode, "plan.json is damaged" in refused.output) == (1, True), refused.output
    elsewhere = microdit("lab", "report", "small.yaml", "--to", "base.yaml", cwd=finished)
    assert (elsewhere.returncode, "The report's folder base.yaml cannot be created" in elsewhere.output) == (1, True), elsewhere.output


def test_what_is_wrong_with_the_machine_is_no_divergence(laboratory):
    """Training cannot write its checkpoints: the study stops, and goes on once it can."""
    (laboratory / "broken.yaml").write_text(STUDY.replace("name: small", "name: broken").replace("seeds: [0, 1]", "seeds: [0]"))
    first = start(laboratory / ".logs", ["lab", "run", "broken.yaml"], cwd=laboratory, file_size=300_000)
    assert first.wait() == [1], first.output
    assert "Traceback" not in first.output
    assert read_results(laboratory / "lab" / "broken") == []


def test_arms_may_have_their_own_encoders_but_not_their_own_pictures(laboratory):
    encoded = microdit("data", "encode", "emoji:held_out", "--autoencoder", "pixels", "--out", "data/px", cwd=laboratory)
    assert encoded.returncode == 0, encoded.output
    other = microdit("data", "encode", "scenes:8", "--out", "data/other", cwd=laboratory)
    assert other.returncode == 0, other.output
    arms = STUDY[STUDY.index("arms:") : STUDY.index("claims:")]
    own = "arms:\n  none: [model.routing=none]\n  pixels: [data.path=data/px, data.held_out=data/px, model.patch_size=8]\n"
    study = STUDY[: STUDY.index("claims:")].replace(arms, own).replace("name: small", "name: own")
    study = study.replace("readings: [0.5, 1.0]", "readings: [1.0]\nbudgets: [images]")
    (laboratory / "own.yaml").write_text(study.replace("seeds: [0, 1]", "seeds: [0]"))
    done = microdit("lab", "run", "own.yaml", cwd=laboratory)
    assert done.returncode == 0, done.output
    assert {line["arm"] for line in read_results(laboratory / "lab" / "own")} == {"none", "pixels"}

    (laboratory / "own.yaml").write_text(study.replace("name: own", "name: strange").replace("data.path=data/px", "data.path=data/other"))
    refused = microdit("lab", "run", "own.yaml", cwd=laboratory)
    assert refused.returncode == 1
    assert (
        "All arms of a study must train on the same images: none from data/emoji, 106 rows of emoji:held_out at [64] px; pixels from"
        in " ".join(refused.output.split())
    )
