import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image
from safetensors.torch import load_file, save_file

from microdit.errors import UserError
from microdit.pipelines.components import MicroDiTTransformer2DModel
from microdit.pipelines.export import export_run
from microdit.pipelines.pipeline import MicroDiTPipeline
from microdit.pipelines.settings import SamplerSettings
from tests.commands import importing_from
from tests.training.processes import on_each

STEPS = {"num_inference_steps": 3}
FRESH = "import sys; from tests.pipelines.test_pipeline_call import draw_into; draw_into(*sys.argv[1:])"


@pytest.fixture(scope="module")
def folder(workplace, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("hub") / "exported"
    export_run(workplace / "runs" / "tiny", out, pytest.fail)
    return out


@pytest.fixture(scope="module")
def pipeline(folder) -> MicroDiTPipeline:
    loaded = MicroDiTPipeline.from_pretrained(folder)
    loaded.set_progress_bar_config(disable=True)
    return loaded


def seeds(*numbers: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(number) for number in numbers]


def draw_into(folder: str, out: str) -> None:
    pipeline = MicroDiTPipeline.from_pretrained(folder)
    images = pipeline(["red heart", "a green cat"], num_inference_steps=3, generator=seeds(5, 6)).images
    for number, image in enumerate(images):
        image.save(f"{out}/{number}.png")


@pytest.mark.parametrize("interpreter", ["forked", pytest.param("new", marks=pytest.mark.slow)])
def test_a_fresh_process_draws_the_runs_pictures_to_the_last_bit(workplace, folder, tmp_path, interpreter):
    """A process that has drawn nothing yet; the slow one imports all for itself, which takes ten seconds."""
    ours = MicroDiTPipeline.from_pretrained(workplace / "runs" / "tiny").generate(["red heart", "a green cat"], SamplerSettings(3), seed=5)
    if interpreter == "new":
        environment = importing_from(Path(__file__).parents[2], OMP_NUM_THREADS=str(torch.get_num_threads()))
        subprocess.run([sys.executable, "-c", FRESH, folder, tmp_path], env=environment, check=True)
    else:
        drawing = on_each(draw_into, 1, 1, tmp_path / "logs", folder, tmp_path, threads=torch.get_num_threads())
        assert drawing.wait() == [0], drawing.output
    for number, image in enumerate(ours):
        assert Image.open(tmp_path / f"{number}.png").tobytes() == image.tobytes()


def test_the_denoiser_loads_alone_with_its_whole_architecture(workplace, folder):
    run = MicroDiTPipeline.from_pretrained(workplace / "runs" / "tiny")
    model = MicroDiTTransformer2DModel.from_pretrained(folder, subfolder="transformer")
    assert model.denoiser.config == run.model.config
    assert all(torch.equal(weight, run.model.state_dict()[name]) for name, weight in model.denoiser.state_dict().items())


def test_saving_again_changes_nothing(pipeline, tmp_path):
    pipeline.save_pretrained(tmp_path / "again")
    again = MicroDiTPipeline.from_pretrained(tmp_path / "again")
    assert not list((tmp_path / "again").rglob("*.bin"))
    drawn = [p("owl", generator=seeds(3), output_type="pt", **STEPS).images for p in (pipeline, again)]
    assert torch.equal(*drawn)


def test_outputs_come_in_every_form(pipeline):
    settings = {"prompt": ["red heart", "owl"], "generator": None, **STEPS}
    forms = {form: pipeline(**{**settings, "generator": seeds(1, 2)}, output_type=form).images for form in ("pil", "np", "pt", "latent")}
    assert [image.size for image in forms["pil"]] == [(64, 64)] * 2
    assert forms["np"].shape == (2, 64, 64, 3)
    assert np.array_equal(forms["np"], forms["pt"].permute(0, 2, 3, 1).numpy())
    assert np.abs(np.asarray(forms["pil"][0]) / 255 - forms["np"][0]).max() <= 0.5 / 255 + 1e-6
    assert forms["latent"].shape == (2, 8, 8, 8)
    assert torch.equal(pipeline.decode(forms["latent"], "pt"), forms["pt"])
    (images,) = pipeline("owl", return_dict=False, **STEPS)
    assert len(images) == 1


def test_pictures_of_a_prompt_stand_together_and_each_has_its_own_noise(pipeline):
    drawn = pipeline(["red heart", "owl"], num_images_per_prompt=2, generator=seeds(1, 2, 3, 4), output_type="pt", **STEPS).images
    alone = pipeline("owl", generator=seeds(3), output_type="pt", **STEPS).images
    assert torch.allclose(drawn[2], alone[0], atol=1e-4)
    one = pipeline(["red heart", "owl"], generator=torch.Generator().manual_seed(1), output_type="pt", **STEPS).images
    assert torch.equal(one, pipeline(["red heart", "owl"], generator=torch.Generator().manual_seed(1), output_type="pt", **STEPS).images)
    wide = pipeline("owl", height=32, width=96, **STEPS).images[0]
    assert wide.size == (96, 32)


def test_embedded_prompts_give_the_prompts_pictures(pipeline):
    settings = {"generator": None, "output_type": "latent", "guidance_scale": 4.0, **STEPS}
    text, mask = pipeline.encode_prompt(["red heart"])
    negative, negative_mask = pipeline.encode_prompt(["a cat left of a pizza"])
    by_words = pipeline("red heart", "a cat left of a pizza", **{**settings, "generator": seeds(1)}).images
    by_vectors = pipeline(
        prompt_embeds=text,
        prompt_attention_mask=mask,
        negative_prompt_embeds=negative,
        negative_prompt_attention_mask=negative_mask,
        **{**settings, "generator": seeds(1)},
    ).images
    assert torch.allclose(by_words, by_vectors, atol=1e-4)  # by words, both are embedded together
    without = pipeline("red heart", **{**settings, "generator": seeds(1)}).images
    assert not torch.equal(by_words, without)
    same = pipeline("red heart", "red heart", **{**settings, "generator": seeds(1)}).images  # nothing to move away from
    unguided = pipeline("red heart", **{**settings, "generator": seeds(1), "guidance_scale": 1.0}).images
    assert torch.allclose(same, unguided, atol=1e-4)


def test_callbacks_see_each_step_and_may_change_it_or_stop(pipeline):
    seen = []

    def watch(pipe, step, sigma, tensors):
        seen.append((step, float(sigma), tensors["latents"].shape))

    settings = {"prompt": "owl", "output_type": "latent", "num_inference_steps": 4}
    plain = pipeline(**settings, generator=seeds(1)).images
    watched = pipeline(**settings, generator=seeds(1), callback_on_step_end=watch).images
    assert torch.equal(plain, watched)
    assert [step for step, *_ in seen] == [0, 1, 2, 3]
    assert [sigma for _, sigma, _ in seen] == sorted((sigma for _, sigma, _ in seen), reverse=True)

    def to_zero_at_the_end(pipe, step, sigma, tensors):
        return {"latents": torch.zeros_like(tensors["latents"])} if step == 3 else {}

    assert not pipeline(**settings, callback_on_step_end=to_zero_at_the_end).images.any()

    def stop(pipe, step, sigma, tensors):
        seen.append("stop")
        pipe._interrupt = True

    pipeline(**settings, callback_on_step_end=stop)
    assert seen.count("stop") == 1


def test_half_precision_and_other_devices(folder, tmp_path, workplace):
    export_run(workplace / "runs" / "tiny", tmp_path / "half", pytest.fail, dtype="float16")
    stored = load_file(tmp_path / "half" / "transformer" / "diffusion_pytorch_model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.float16}
    half, whole = (MicroDiTPipeline.from_pretrained(path) for path in (tmp_path / "half", folder))
    assert half.transformer.dtype == torch.float32
    drawn = [p("owl", generator=seeds(1), output_type="pt", **STEPS).images for p in (half, whole)]
    assert (drawn[0] - drawn[1]).abs().max() < 0.05
    brain = MicroDiTPipeline.from_pretrained(folder, dtype=torch.bfloat16).to("cpu")
    assert {brain.transformer.dtype, brain.vae.dtype} == {torch.bfloat16}
    assert np.isfinite(brain("owl", output_type="np", **STEPS).images).all()


def test_models_wait_on_the_cpu_for_their_turn(pipeline, folder):
    """The order is right without a GPU, too; with accelerate the hooks are real, and the picture stays what it was."""
    parts = pipeline.model_cpu_offload_seq.split("->")
    assert set(parts) == {name for name, part in pipeline.components.items() if isinstance(part, torch.nn.Module)}
    pytest.importorskip("accelerate")
    offloaded = MicroDiTPipeline.from_pretrained(folder)
    offloaded.enable_model_cpu_offload(device="cpu")
    drawn = [p("owl", generator=seeds(1), output_type="pt", **STEPS).images for p in (offloaded, pipeline)]
    assert torch.equal(*drawn)


def test_it_is_a_pipeline_of_diffusers_in_every_respect(pipeline):
    assert isinstance(pipeline, DiffusionPipeline)
    assert set(pipeline.components) == {"transformer", "scheduler", "vae", "text_encoder", "tokenizer"}
    assert callable(pipeline.push_to_hub)
    assert pipeline.to("cpu") is pipeline


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"prompt": None}, "either prompt or prompt_embeds"),
        ({"prompt": []}, "There is no prompt"),
        ({"prompt_embeds": torch.zeros(1, 3, 384)}, "either prompt or prompt_embeds"),
        ({"prompt": None, "prompt_embeds": torch.zeros(1, 3, 5)}, "of shape"),
        ({"num_inference_steps": 1}, "from 2 to 1000"),
        ({"guidance_scale": float("nan")}, "must be a number"),
        ({"num_images_per_prompt": 0}, "at least 1"),
        ({"output_type": "jpeg"}, "pil, np, pt, latent"),
        ({"solver": "rk4"}, "There is no solver 'rk4'"),
        ({"guidance": "path-drop"}, "with routing deferred cannot run without"),
        ({"negative_prompt": "blue", "negative_prompt_embeds": torch.zeros(1, 3, 384)}, "either negative_prompt or"),
        ({"height": 60}, "multiple of 32"),
        ({"generator": seeds(1, 2)}, "the list holds 2"),
        ({"latents": torch.zeros(1, 4, 8, 8)}, "latents must be of shape"),
        ({"negative_prompt": ["a", "b"]}, "2 negative prompts for 1 prompts"),
        ({"callback_on_step_end_tensor_inputs": ["noise"]}, "may hold"),
    ],
)
def test_settings_that_make_no_picture_are_refused(pipeline, settings, sentence):
    with pytest.raises(UserError, match=sentence):
        pipeline(**{"prompt": "owl", **STEPS, **settings})


def test_parts_may_be_left_out(folder):
    bare = MicroDiTPipeline.from_pretrained(folder, text_encoder=None, vae=None)
    with pytest.raises(UserError, match="prompt_embeds"):
        bare("owl")
    embeds = torch.zeros(1, 3, 384)
    with pytest.raises(UserError, match="output_type"):
        bare(prompt_embeds=embeds, **STEPS)
    assert bare(prompt_embeds=embeds, output_type="latent", **STEPS).images.shape == (1, 8, 8, 8)


def test_folders_that_are_damaged_or_name_strange_parts_are_refused(pipeline, tmp_path):
    def broken(name, change):
        copy = tmp_path / name
        pipeline.save_pretrained(copy)
        change(copy)
        with pytest.raises(UserError) as caught:
            MicroDiTPipeline.from_pretrained(copy)
        return str(caught.value)

    weights = Path("transformer") / "diffusion_pytorch_model.safetensors"

    def cut(copy):
        (copy / weights).write_bytes((copy / weights).read_bytes()[:-100])

    def without(copy):
        tensors = load_file(copy / weights)
        del tensors["denoiser.head.linear.weight"]
        save_file(tensors, copy / weights, {"format": "pt"})

    def half_an_autoencoder(copy):
        path = copy / "vae" / "diffusion_pytorch_model.safetensors"
        tensors = load_file(path)
        name = max(tensors)
        del tensors[name]
        save_file(tensors, path, {"format": "pt"})

    def pickled(copy):
        torch.save(load_file(copy / weights), (copy / weights).with_suffix(".bin"))
        (copy / weights).unlink()

    def other_size(copy):
        config = json.loads((copy / "transformer" / "config.json").read_text())
        (copy / "transformer" / "config.json").write_text(json.dumps({**config, "dim": 2 * config["dim"]}))

    def strange(copy):
        index = json.loads((copy / "model_index.json").read_text())
        (copy / "model_index.json").write_text(json.dumps({**index, "vae": ["evil", "Autoencoder"]}))
        (copy / "vae" / "evil.py").write_text("raise SystemExit('it ran')")

    def other_pipeline(copy):
        index = json.loads((copy / "model_index.json").read_text())
        (copy / "model_index.json").write_text(json.dumps({**index, "_class_name": "StableDiffusionPipeline"}))

    assert "cut" in broken("cut", cut)
    assert "denoiser.head.linear.weight" in broken("without", without)
    assert "lacks the weights" in broken("half", half_an_autoencoder)
    assert "pickled" in broken("pickled", pickled)
    assert "other_size" in broken("other_size", other_size)
    assert "which is no component" in broken("strange", strange)
    assert "StableDiffusionPipeline" in broken("other_pipeline", other_pipeline)


def test_an_encoder_that_has_changed_is_refused(pipeline, tmp_path):
    pipeline.save_pretrained(tmp_path / "copy")
    config = tmp_path / "copy" / "text_encoder" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "fingerprint": "0" * 16}))
    with pytest.raises(UserError, match="is not the one"):
        MicroDiTPipeline.from_pretrained(tmp_path / "copy")
