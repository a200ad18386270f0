"""Runs that were cut off, or whose weights are no numbers, opened by whatever draws."""

import json

import pytest
import torch

from microdit.errors import UserError
from microdit.evaluation.generators import DrawSettings, open_generator
from microdit.pipelines.export import export_run
from microdit.pipelines.open_model import open_model
from microdit.pipelines.settings import SamplerSettings
from tests.training.untrained import save_untrained


def shaken(weight):
    """Fresh weights are zero where it matters: their pictures would all be alike."""
    return weight + 0.1


def test_a_preempted_run_is_sampled_exported_and_evaluated(encoded_emoji, tmp_path):
    whole = save_untrained(tmp_path / "whole", encoded_emoji, 5, shaken)
    in_haste = save_untrained(tmp_path / "in-haste", encoded_emoji, 5, shaken, in_haste=True)
    settings = SamplerSettings(2)
    for weights in (None, "model"):
        ours, theirs = (open_model(str(run), pytest.fail, weights) for run in (in_haste, whole))
        assert ours.pipeline.generate(["owl"], settings)[0].tobytes() == theirs.pipeline.generate(["owl"], settings)[0].tobytes()
    assert (ours.weights_file, theirs.weights_file.name) == (None, "model.safetensors")
    with pytest.raises(UserError, match=r"no weights named ema-0\.5, only ema, model"):
        open_model(str(in_haste), pytest.fail, "ema-0.5")
    drawn = open_generator(str(in_haste), DrawSettings(num_inference_steps=2), pytest.fail)(["owl"], 0)
    export_run(in_haste, tmp_path / "exported", pytest.fail)
    exported = open_model(str(tmp_path / "exported"), pytest.fail)
    assert exported.pipeline.generate(["owl"], settings)[0].tobytes() == drawn[0].tobytes()


def test_the_prompts_of_a_run_go_with_it(workplace, tmp_path):
    export_run(workplace / "runs/tiny", tmp_path / "exported", pytest.fail)
    for place in (workplace / "runs/tiny", tmp_path / "exported"):
        assert open_model(str(place), pytest.fail).sample_prompts == ["red heart"]
    record = json.loads((tmp_path / "exported" / "record.json").read_text())
    for prompts, found in ((["an\nowl", 3, None, " "], ["an owl"]), ({"a": 1}, []), (None, [])):
        record["recipe"]["record"]["sample_prompts"] = prompts
        (tmp_path / "exported" / "record.json").write_text(json.dumps(record))
        assert open_model(str(tmp_path / "exported"), pytest.fail).sample_prompts == found


def test_weights_that_are_not_finite_are_neither_drawn_nor_exported(encoded_emoji, tmp_path):
    run = save_untrained(tmp_path / "run", encoded_emoji, 5, lambda weight: torch.full_like(weight, 1e6))
    with pytest.raises(UserError, match=r"As float16, the weights \(transformer\) are not finite in .*export with --dtype float32"):
        export_run(run, tmp_path / "half", pytest.fail, dtype="float16")
    assert not (tmp_path / "half").exists()
    export_run(run, tmp_path / "exported", pytest.fail)
    file = next((tmp_path / "exported" / "transformer").glob("*.safetensors"))
    content = file.read_bytes()
    file.write_bytes(content[:-4] + torch.tensor(float("nan")).numpy().tobytes())
    with pytest.raises(UserError, match=r"The denoiser's weights are not finite in 1 of"):
        open_model(str(tmp_path / "exported"), pytest.fail)
    save_untrained(run, encoded_emoji, 6, lambda weight: weight * float("inf"))
    for weights in (None, "model"):
        with pytest.raises(UserError, match="step-00000006 are not finite"):
            open_model(str(run), pytest.fail, weights)
