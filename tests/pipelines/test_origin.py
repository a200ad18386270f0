"""What a trained model says of itself."""

import shutil
from dataclasses import replace

import pytest

from microdit.config.schema import ModelRecipe, architecture, objective_of
from microdit.diffusion.edm import EDM
from microdit.diffusion.flow import Flow
from microdit.errors import UserError
from microdit.models.config import SIZES
from microdit.pipelines.origin import describing_recipe, diffusion_of, origin_of_pipeline, pipeline_place
from microdit.pipelines.pipeline import DEMO


@pytest.mark.parametrize("name", [*SIZES, "unusual"])
def test_the_lines_of_a_recipe_are_found_from_an_architecture_alone(name):
    size = SIZES["MicroDiT_Tiny_2"] if name == "unusual" else SIZES[name]
    fields = {key: getattr(size, key) for key in size.__dataclass_fields__}
    model = ModelRecipe(**fields, position_scale=2.0)
    if name == "unusual":
        model = replace(model, ffn_range=(0.7, 3.1))
    config = architecture(model, 4, 1024)
    found = describing_recipe(config)
    assert (found is None) if name == "unusual" else architecture(found, 4, 1024) == config


def test_the_demo_model_is_meant_by_its_name_unless_there_is_such_a_folder(tmp_path):
    assert pipeline_place("demo", [tmp_path / "demo"]) == DEMO
    (tmp_path / "demo").mkdir()
    assert pipeline_place("demo", [tmp_path / "demo"]) is None
    assert pipeline_place("other", [tmp_path / "other"]) is None


def test_the_demo_model_says_what_it_is():
    origin = origin_of_pipeline(DEMO)
    assert origin.model is not None
    assert (origin.model.dim, origin.model.routing) == (128, "none")
    assert origin.encoders["autoencoder"]["name"] == "icon"


@pytest.mark.parametrize("objective", [EDM(0.5, 0.1, 0.7), Flow("image", t_mean=-0.8, noise_scale=2.0)])
def test_an_objective_becomes_the_part_of_a_recipe_that_makes_it(objective):
    assert objective_of(diffusion_of(objective)) == objective


def test_a_damaged_folder_is_a_sentence(tmp_path):
    shutil.copytree(DEMO, tmp_path / "model")
    (tmp_path / "model" / "scheduler" / "scheduler_config.json").write_text('{"_class_name": "DDIMScheduler"}')
    with pytest.raises(UserError, match=r"model is damaged .*: export or import it again"):
        origin_of_pipeline(tmp_path / "model")
