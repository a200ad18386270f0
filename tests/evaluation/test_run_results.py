import json
from pathlib import Path

import pytest
from PIL import Image

from microdit.errors import UserError
from microdit.evaluation.geneval.detector import evaluate_geneval
from microdit.evaluation.geneval.rules import Detection, parse_prompt
from microdit.evaluation.run_results import DPGResult, Measured, read_run
from microdit.io.files import to_checked_json
from microdit.models.microdit import MicroDiT
from tests.damage import flips
from tests.evaluation.run_folders import CONFIG, MEASURED, evaluated, trained


def test_a_trained_run_says_what_it_is_and_what_it_took(tmp_path: Path):
    result = read_run(trained(tmp_path / "run"))
    assert result.parameters == sum(weight.numel() for weight in MicroDiT(CONFIG).parameters())
    assert (result.images, result.seen, result.gpu_days, result.gpu, result.dollars) == (42, 2048, 0.25, "A100", 7.5)
    assert (result.metrics, result.geneval, result.recognised) == ({}, None, None)


def test_measured_figures_come_with_how_they_came_about(tmp_path: Path):
    run = evaluated(trained(tmp_path / "run"))
    (run / "metrics.json").write_text(json.dumps({"retrieval": {"top_10": 0.449}}))
    result = read_run(run)
    assert result.metrics == {"fid": Measured(14.2, "inception-2015-12-05", "coco2014", 40504, 30000, 256)}
    assert result.recognised == 0.449
    assert result.seen == 1920  # of the step that was measured


def test_what_is_missing_is_none(tmp_path: Path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "recipe.yaml").write_text("name: try\n")
    result = read_run(evaluated(run, {"metrics": {"fid": {"value": 3}, "kid": {"low": 1}}}))
    assert result.metrics == {"fid": Measured(3.0)}
    assert (result.parameters, result.images, result.seen, result.gpu_days, result.gpu, result.dollars) == (None,) * 6


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"metrics": {"fid": {"value": "12.3"}}}, "metrics.fid.value is '12.3', but should be a finite number"),
        ({"metrics": {"fid": {"value": float("nan")}}}, "metrics.fid.value is nan"),
        ({"metrics": {"fid": 12.3}}, "metrics.fid is 12.3, but should be an object"),
        ({**MEASURED, "pictures": -1}, "pictures is -1, but should be an integer of at least 0"),
        ({**MEASURED, "pictures": True}, "pictures is True"),
        ({**MEASURED, "reference": {"source": 3}}, "reference.source is 3, but should be a string"),
        ([], "is not a JSON object"),
    ],
)
def test_nonsense_is_refused_with_file_and_key(tmp_path: Path, content, said: str):
    run = evaluated(trained(tmp_path / "run"), content)
    with pytest.raises(UserError, match=r"metrics\.json") as error:
        read_run(run)
    assert said in str(error.value)


def test_half_a_file_and_other_folders_are_refused(tmp_path: Path):
    run = evaluated(trained(tmp_path / "run"))
    with pytest.raises(UserError, match="microdit geneval --out"):
        read_run(run, tmp_path)
    with pytest.raises(UserError, match="is not a run folder"):
        read_run(tmp_path)
    (run / "evaluation" / "metrics.json").write_text('{"metrics": ')
    with pytest.raises(UserError, match="cannot be read"):
        read_run(run)


def test_no_flipped_byte_changes_a_figure(tmp_path: Path):
    run = evaluated(trained(tmp_path / "run"))
    file = run / "evaluation" / "metrics.json"
    file.write_bytes(to_checked_json(json.loads(file.read_bytes())))
    for _ in flips(file, range(0, file.stat().st_size, 3)):
        with pytest.raises(UserError, match=r"metrics\.json cannot be read: .* Evaluate again"):
            read_run(run)


class Cats:
    """Sees one cat in every picture, and calls everything red."""

    fingerprint, class_names = "cats", frozenset({"cat"})

    def __call__(self, image: Image.Image, found: Detection | None = None):
        return "red" if found else [Detection("cat", 0.95, (0, 0, 20, 20))]


def test_genevals_own_summary_is_read(tmp_path: Path):
    lines = [
        {"tag": "single_object", "include": [{"class": "cat", "count": 1}], "prompt": "a photo of a cat"},
        {"tag": "counting", "include": [{"class": "cat", "count": 2}], "prompt": "a photo of two cats"},
    ]
    prompts = [parse_prompt(json.dumps(line), "here") for line in lines]
    for number in (0, 1):
        folder = tmp_path / "pictures" / f"{number:05}" / "samples"
        folder.mkdir(parents=True)
        Image.new("RGB", (24, 24)).save(folder / "0000.png")
    evaluate_geneval(tmp_path / "pictures", prompts, Cats(), Cats(), tmp_path / "out", pytest.fail)
    geneval = read_run(trained(tmp_path / "run"), tmp_path / "out").geneval
    assert geneval is not None
    assert geneval.shares == {"single_object": 1.0, "counting": 0.0}  # no overall while tasks are missing
    assert geneval.pictures == {"single_object": 1, "two_object": 0, "counting": 1, "colors": 0, "position": 0, "color_attr": 0}
    assert (geneval.prompts, geneval.without_pictures, geneval.judges) == (2, 0, "cats cats")


def test_dpg_benchs_own_summary_is_read(tmp_path: Path):
    run, summary = trained(tmp_path / "run"), {"score": 84.2, "prompts": 1065, "judge": "gpt-4o", "categories": {}}
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    assert read_run(run, dpg=tmp_path).dpg == DPGResult(84.2, 1065, "gpt-4o")
    (tmp_path / "summary.json").write_text("{}")
    with pytest.raises(UserError, match="score is missing"):
        read_run(run, dpg=tmp_path)
    with pytest.raises(UserError, match="microdit dpg --out"):
        read_run(run, dpg=tmp_path / "nowhere")
