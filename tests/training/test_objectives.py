"""A run with flow matching, from the recipe to an exported folder."""

import json

import pytest
import torch

from microdit.api import train
from microdit.checkpoint import find_weights
from microdit.config.load import load_recipe
from microdit.diffusion.edm import EDM
from microdit.diffusion.flow import Flow
from microdit.errors import UserError
from microdit.pipelines.export import export_run
from microdit.pipelines.pipeline import MicroDiTPipeline
from microdit.pipelines.sampling import objective_record, recorded_objective
from microdit.pipelines.settings import SamplerSettings
from tests.training.processes import RECIPE

FLOW = ["diffusion.objective=flow", "diffusion.prediction=image", "diffusion.t_mean=-0.8", "diffusion.t_std=0.8", "diffusion.noise_scale=2"]


def no_warning(sentence):
    raise AssertionError(sentence)


def test_a_run_with_flow_matching_learns_samples_and_is_exported(tmp_path, encoded_emoji):
    more = ["record.held_out_every=20", "engine.device=cpu", f"data.held_out={encoded_emoji}"]
    run = train(RECIPE, tmp_path / "run", overrides=[f"data.path={encoded_emoji}", *more, *FLOW])
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = [record["loss"] for record in records if record.get("loss") is not None]
    assert sum(losses[-8:]) < 0.8 * sum(losses[:8])
    held_out = [record for record in records if "held_out_loss" in record]
    assert held_out[-1]["held_out_loss"] < held_out[0]["held_out_loss"]
    assert [mean is not None for mean in held_out[-1]["held_out_by_noise"]] == [True] * 8  # five samples in each bin

    wanted = Flow("image", -0.8, 0.8, 1.0, 2.0)
    checkpoint = find_weights(run, no_warning)
    assert recorded_objective(checkpoint.state) == wanted
    assert "edm" not in checkpoint.state
    pipeline = MicroDiTPipeline.from_pretrained(run)
    settings = SamplerSettings(4, 3.0, guidance_interval=(0.1, 0.9), guidance_rescale=0.5)
    pictures = pipeline.generate(["red heart"], settings)
    export_run(run, tmp_path / "exported", no_warning)
    exported = MicroDiTPipeline.from_pretrained(tmp_path / "exported")
    assert exported.objective == wanted
    assert exported.generate(["red heart"], settings)[0].tobytes() == pictures[0].tobytes()
    for solver in ("euler", "dpm"):
        assert pipeline.generate(["red heart"], SamplerSettings(4, solver=solver, noise_range=(0.05, 0.95)))[0].size == (16, 16)
    with pytest.raises(UserError, match="Churn adds the noise of EDM"):
        pipeline.generate(["red heart"], SamplerSettings(4, churn=40))
    with pytest.raises(UserError, match="end at 1"):
        pipeline.generate(["red heart"], SamplerSettings(4, noise_range=(0.05, 20)))
    of_edm = MicroDiTPipeline.of_parts(pipeline.model, EDM(), pipeline.autoencoder, None, (16, 16), mask_padding=True)
    with pytest.raises(UserError, match="another objective"):
        pipeline.guided_by(of_edm)


def test_a_checkpoints_objective_is_read_as_it_was_written():
    for objective in (EDM(0.5, 0.8, 1.0), Flow("noise", shift=3.0, noise_scale=2.0)):
        assert recorded_objective(json.loads(json.dumps(objective_record(objective)))) == objective
    assert objective_record(EDM()) == {"edm": {"sigma_data": 0.9, "P_mean": -0.6, "P_std": 1.2}}  # as in every earlier checkpoint


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["diffusion.objective=flow", "diffusion.P_mean=0.8"], "diffusion.P_mean is a setting of diffusion.objective edm"),
        (["diffusion.shift=3"], "diffusion.shift is a setting of diffusion.objective flow"),
        (["diffusion.prediction=image"], "with diffusion.objective edm the network predicts denoised"),
        (["diffusion.objective=flow", "diffusion.prediction=denoised"], "predicts velocity or image or noise"),
    ],
)
def test_settings_of_the_other_objective_are_refused(overrides, sentence):
    with pytest.raises(UserError, match=sentence):
        load_recipe(RECIPE, ["data.path=data", *overrides])


def test_edm_and_flow_get_the_same_noise_from_the_same_numbers():
    normal = torch.linspace(-2, 2, 5)
    assert torch.equal(EDM().training_sigma(normal), (normal * 1.2 - 0.6).exp())
    assert torch.allclose(Flow().training_sigma(normal), torch.sigmoid(normal))
