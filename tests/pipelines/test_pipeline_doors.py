"""The same words, settings and seed give the same image, however a model is reached; old folders load; foreign parts are refused."""

import json
import os
import shutil
from dataclasses import asdict
from functools import reduce
from pathlib import Path

import pytest
import torch
from diffusers import EulerDiscreteScheduler
from PIL import Image

from microdit.errors import UserError
from microdit.io.files import from_checked_json, to_checked_json
from microdit.pipelines.components import EDMSettings
from microdit.pipelines.export import export_run
from microdit.pipelines.open_model import open_model
from microdit.pipelines.pipeline import DEMO, MicroDiTPipeline, newest_checkpoint
from microdit.pipelines.settings import SamplerSettings
from microdit.reports.grids import draw_grid
from microdit.serve.queue import JobSpec, WorkQueue
from tests.commands import microdit
from tests.training.processes import HANG

LONG = "red heart, " * 30
SETTINGS = SamplerSettings(3, 3.0, "dpm", guidance_interval=(0.2, 5.0), guidance_rescale=0.5, noise_range=(0.01, 60.0))
OLD_NAMES = {"transformer": "microdit.hub.transformer", "scheduler": "microdit.hub.scheduler", "text_encoder": "microdit.hub.references"}


@pytest.fixture(scope="module")
def run(workplace) -> Path:
    return workplace / "runs" / "tiny"


@pytest.fixture(scope="module")
def exported(run, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("doors") / "exported"
    export_run(run, out, pytest.fail)
    return out


@pytest.fixture(scope="module")
def pipeline(run) -> MicroDiTPipeline:
    return quiet(MicroDiTPipeline.from_pretrained(run))


@pytest.fixture(autouse=True)
def as_many_threads_as_the_command_has():
    """`microdit` of tests.commands gives its process that many; the last bit of a sum depends on it."""
    before = torch.get_num_threads()
    torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else 2)
    yield
    torch.set_num_threads(before)


def quiet(pipeline: MicroDiTPipeline) -> MicroDiTPipeline:
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def seeds(seed: int, count: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed + i) for i in range(count)]


def bytes_of(images: list[Image.Image]) -> list[bytes]:
    return [image.tobytes() for image in images]


@pytest.mark.parametrize("negative", ["", "blue"])
def test_every_door_draws_the_same_and_says_that_a_prompt_is_cut(workplace, run, exported, pipeline, caplog, negative):
    prompts = [LONG, LONG]
    wanted = pipeline.generate(prompts, SETTINGS, 7, negative_prompts=[negative], warn=lambda sentence: None)
    assert not caplog.records
    for place in (run, exported):
        loaded = quiet(MicroDiTPipeline.from_pretrained(place))
        caplog.clear()
        called = loaded(LONG, negative, num_images_per_prompt=2, generator=seeds(7, 2), **asdict(SETTINGS)).images
        assert [record.getMessage() for record in caplog.records if "is cut" in record.getMessage()]
        assert bytes_of(called) == bytes_of(wanted)
        assert bytes_of(loaded.generate(prompts, SETTINGS, 7, negative_prompts=[negative])) == bytes_of(wanted)

    with WorkQueue({"tiny": pipeline}, 2) as queue:
        job = queue.add(JobSpec("tiny", LONG.strip(), SETTINGS, seed=7, count=2, negative_prompt=negative))
        assert job.ended.wait(HANG)
    assert bytes_of(job.images) == bytes_of(wanted)
    assert "is cut" in job.warnings[0]

    options = ["--solver", "dpm", "--steps", 3, "--guidance", 3, "--guidance-rescale", 0.5, "--seed", 7, "--device", "cpu"]
    options += ["--guidance-interval", 0.2, 5, "--noise-range", 0.01, 60, "--negative", negative, "--out", "door.png"]
    done = microdit("sample", run, *prompts, *options, cwd=workplace)
    assert done.returncode == 0, done.output
    assert "is cut: the text encoder minilm reads 32 tokens" in " ".join(done.output.split())
    assert Image.open(workplace / "door.png").tobytes() == draw_grid(wanted, [LONG.strip()] * 2).tobytes()


def test_empty_prompts_and_empty_negative_prompts(pipeline):
    plain = pipeline("owl", generator=seeds(1, 1), num_inference_steps=3).images
    assert bytes_of(pipeline("owl", "", generator=seeds(1, 1), num_inference_steps=3).images) == bytes_of(plain)
    assert bytes_of(pipeline(["owl"], [" \n"], generator=seeds(1, 1), num_inference_steps=3).images) == bytes_of(plain)
    text_BLE, _ = pipeline.encode_prompt(["", "owl"])
    assert not text_BLE[0].any()
    assert text_BLE[1].any()


def test_churn_goes_on_with_each_images_own_generator(pipeline):
    churned = SamplerSettings(3, churn=2.0)
    drawn = pipeline(["owl", "cat"], generator=seeds(4, 2), **asdict(churned)).images
    assert bytes_of(drawn) == bytes_of(pipeline.generate(["owl", "cat"], churned, 4))


def test_autoguidance_takes_a_second_pipeline_from_any_door(workplace, run, exported, pipeline):
    weak = MicroDiTPipeline.from_pretrained(run, weights="model")
    settings = {"num_inference_steps": 3, "guidance_scale": 4.0}
    drawn = pipeline("owl", weak_pipeline=weak, generator=seeds(1, 1), **settings).images
    assert bytes_of(drawn) != bytes_of(pipeline("owl", generator=seeds(1, 1), **settings).images)
    strong = MicroDiTPipeline.from_pretrained(exported)
    assert bytes_of(strong("owl", weak_pipeline=weak, generator=seeds(1, 1), **settings).images) == bytes_of(drawn)
    guided = pipeline.guided_by(weak).generate(["owl"], SamplerSettings(3, 4.0, guidance="autoguidance"), 1)
    assert bytes_of(guided) == bytes_of(drawn)
    with pytest.raises(UserError, match="weak_pipeline is for autoguidance"):
        pipeline("owl", weak_pipeline=weak, guidance="classifier-free")


def test_runs_take_weights_and_a_dtype_and_folders_refuse_weights(run, exported, pipeline):
    raw = MicroDiTPipeline.from_pretrained(run, weights="model")
    assert not torch.equal(raw.model.head.linear.weight, pipeline.model.head.linear.weight)
    rounded = MicroDiTPipeline.from_pretrained(run, torch_dtype=torch.bfloat16, device="cpu")
    again = MicroDiTPipeline.from_pretrained(exported, torch_dtype=torch.bfloat16)
    for one in (rounded, again):
        assert one.model.head.linear.weight.dtype == torch.bfloat16
        assert one.model.patch_embed.weight.dtype == torch.float32
    drawn = [one.generate(["owl"], SamplerSettings(3), 2) for one in (rounded, again)]
    assert bytes_of(drawn[0]) == bytes_of(drawn[1]) != bytes_of(pipeline.generate(["owl"], SamplerSettings(3), 2))
    with pytest.raises(UserError, match="a pipeline with one set"):
        MicroDiTPipeline.from_pretrained(exported, weights="ema")
    with pytest.raises(UserError, match="is a run, which takes torch_dtype, device and weights, not variant"):
        MicroDiTPipeline.from_pretrained(run, variant="fp16")
    with pytest.raises(UserError, match="There is no checkpoint in"):
        MicroDiTPipeline.from_pretrained(run.parent)


STRANGE = [None, [1], -1e308, "no", {}]


@pytest.mark.parametrize(
    ("key", "values"),
    [
        ("model", STRANGE),
        *((f"model.{key}", STRANGE) for key in ("caption_ffn_dim", "mixer", "in_channels", "patch_size", "blocks")),
        *((f"data.{kind}", STRANGE) for kind in ("autoencoder", "text_encoder", "latent_shape", "resolution")),
        ("data", STRANGE),
        ("data.captions", [None, 3]),
        ("data.text_encoder.fingerprint", [None, 3]),
        ("mask_padding", STRANGE),
    ],
)
def test_a_state_that_does_not_describe_its_weights_is_refused(run, tmp_path, key, values):
    """Its checksum is right: it may come from another version, or from elsewhere."""
    folder = shutil.copytree(newest_checkpoint(run, pytest.fail).folder, tmp_path / "run" / "checkpoints" / "step-00000006").parents[1]
    (folder / "recipe.yaml").write_bytes((run / "recipe.yaml").read_bytes())
    file = folder / "checkpoints" / "step-00000006" / "state.json"
    *path, last = key.split(".")
    for value in values:
        state = from_checked_json((run / "checkpoints" / "step-00000006" / "state.json").read_bytes())
        within = reduce(lambda inner, name: inner[name], path, state)
        within[last] = value
        if value is None:
            del within[last]
        file.write_bytes(to_checked_json(state))
        with pytest.raises(UserError, match=r"state\.json (describes no model|describes another model|does not say of what data)"):
            open_model(str(folder), pytest.fail)


@pytest.mark.parametrize("content", [b"7", b"[]", b"{}", b'{"name": 7}'])
def test_an_encoder_that_has_no_name_is_looked_for_nowhere(exported, tmp_path, content):
    folder = shutil.copytree(exported, tmp_path / "exported")
    (folder / "text_encoder" / "config.json").write_bytes(content)
    with pytest.raises(UserError, match=r"The configuration in .*text_encoder names no encoder: export or download it again"):
        MicroDiTPipeline.from_pretrained(folder)


def test_a_variant_round_trips(pipeline, exported, tmp_path):
    loaded = MicroDiTPipeline.from_pretrained(exported)
    wanted = loaded.generate(["owl"], SamplerSettings(3), 2)
    loaded.save_pretrained(tmp_path / "both")
    loaded.to(torch.float16).save_pretrained(tmp_path / "both", variant="fp16")
    weights = sorted(path.name for path in (tmp_path / "both" / "transformer").glob("*.safetensors"))
    assert weights == ["diffusion_pytorch_model.fp16.safetensors", "diffusion_pytorch_model.safetensors"]
    assert bytes_of(MicroDiTPipeline.from_pretrained(tmp_path / "both").generate(["owl"], SamplerSettings(3), 2)) == bytes_of(wanted)
    half = MicroDiTPipeline.from_pretrained(tmp_path / "both", variant="fp16")
    assert torch.equal(half.model.head.linear.weight, loaded.model.head.linear.weight.float())
    (tmp_path / "both" / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    MicroDiTPipeline.from_pretrained(tmp_path / "both", variant="fp16")  # needs nothing but the variant
    with pytest.raises(UserError, match="bf16"):
        MicroDiTPipeline.from_pretrained(tmp_path / "both", variant="bf16")


def test_a_foreign_scheduler_is_refused_when_it_is_loaded(exported, tmp_path):
    sentence = "cannot sample with EulerDiscreteScheduler: its scheduler is EDMSettings or FlowSettings"
    with pytest.raises(UserError, match=sentence):
        MicroDiTPipeline.from_pretrained(exported, scheduler=EulerDiscreteScheduler())
    pipeline = MicroDiTPipeline.from_pretrained(exported)
    with pytest.raises(UserError, match=sentence):
        pipeline.scheduler = EulerDiscreteScheduler()
    with pytest.raises(UserError, match="cannot sample with another scheduler's settings"):
        EDMSettings.from_config(EulerDiscreteScheduler().config)
    pipeline.save_pretrained(tmp_path / "named")
    EulerDiscreteScheduler().save_pretrained(tmp_path / "named" / "scheduler")
    with pytest.raises(UserError, match=sentence):
        MicroDiTPipeline.from_pretrained(tmp_path / "named")
    index = json.loads((tmp_path / "named" / "model_index.json").read_text())
    index["scheduler"] = ["diffusers", "EulerDiscreteScheduler"]
    (tmp_path / "named" / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match=sentence):
        MicroDiTPipeline.from_pretrained(tmp_path / "named")


def test_folders_that_name_the_modules_of_earlier_versions_load(exported, pipeline, tmp_path):
    loaded = MicroDiTPipeline.from_pretrained(exported)
    loaded.save_pretrained(tmp_path / "old")
    index = json.loads((tmp_path / "old" / "model_index.json").read_text())
    assert {index[name][0] for name in OLD_NAMES} == {"microdit.pipelines.components"}
    for name, module in OLD_NAMES.items():
        index[name][0] = module
    (tmp_path / "old" / "model_index.json").write_text(json.dumps(index))
    old = MicroDiTPipeline.from_pretrained(tmp_path / "old")
    assert bytes_of(old.generate(["owl"], SamplerSettings(2))) == bytes_of(pipeline.generate(["owl"], SamplerSettings(2)))
    old.save_pretrained(tmp_path / "new")
    assert "microdit.hub" not in (tmp_path / "new" / "model_index.json").read_text()


def test_demo_names_the_model_of_this_package(tmp_path, monkeypatch):
    (tmp_path / "demo").mkdir()
    monkeypatch.chdir(tmp_path)  # a folder of that name is ./demo
    drawn = MicroDiTPipeline.from_pretrained("demo").generate(["red heart"], SamplerSettings(4))
    assert bytes_of(drawn) == bytes_of(MicroDiTPipeline.from_pretrained(DEMO).generate(["red heart"], SamplerSettings(4)))
