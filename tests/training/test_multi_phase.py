"""A folder of recipes: the paper's four phases, in small."""

import json
import os
import shutil
import socket
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from microdit.config.load import load_recipe, load_recipe_folder
from microdit.config.recipes import RECIPES
from microdit.distributed import start_world
from microdit.errors import UserError
from microdit.io.console import PlainConsole, Reporter
from microdit.io.locks import sole_writer
from microdit.models.microdit import MicroDiT
from microdit.training.multi_phase import RunSettings, train_one
from microdit.training.setup import model_config
from tests.training.processes import RECIPE, losses, start, wait_for

DRY = RECIPES / "microdit-dry"
PHASES = ["1-32-masked", "2-32-full", "3-64-masked", "4-64-full"]
SHORT = ["phases.0.steps=6", "phases.0.warmup_steps=2", "phases.0.batch_size=8", "record.checkpoint_every=3", "record.metrics_every=1"]
SHORT += ["record.sample_prompts=[]"]
DRAWN = ["record.sample_prompts=[owl]", "record.sample_steps=2"]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("dry") / "emoji"
    running = start(folder.parent / "logs", ["data", "encode", "emoji:held_out", "--out", folder, "--resolutions", "32", "64"])
    assert running.wait() == [0], running.output
    return folder


def train_dry(out: Path, data: Path, *more: object, ranks: int = 1):
    return start(out.parent / "logs", ["train", DRY, f"data.path={data}", *SHORT, "--out", out, *more], ranks)


@pytest.fixture(scope="module")
def whole(tmp_path_factory, data) -> Path:
    out = tmp_path_factory.mktemp("runs") / "dry"
    running = train_dry(out, data, *DRAWN)
    assert running.wait() == [0], running.output
    return out


def test_four_phases_change_resolution_positions_and_noise(whole):
    assert sorted(p.name for p in whole.iterdir()) == PHASES
    states = [json.loads((whole / name / "checkpoints" / "step-00000006" / "state.json").read_text()) for name in PHASES]
    assert [state["data"]["resolution"] for state in states] == [32, 32, 64, 64]
    assert [state["data"]["latent_shape"] for state in states] == [[8, 4, 4], [8, 4, 4], [8, 8, 8], [8, 8, 8]]
    assert [state["model"]["position_scale"] for state in states] == [1.0, 1.0, 2.0, 2.0]
    assert [state["edm"]["P_mean"] for state in states] == [-0.6, -0.6, 0.0, 0.0]
    assert ["ema.safetensors" in state["files"] for state in states] == [False, False, True, True]
    assert all((whole / name / "samples" / "step-00000006.png").is_file() for name in PHASES)


def test_each_phase_begins_with_the_weights_of_the_one_before(tmp_path, data, whole):
    """A phase that learns at no rate to speak of ends with the weights that it began with."""
    out = tmp_path / "dry"
    shutil.copytree(whole, out)
    shutil.rmtree(out / PHASES[2])
    shutil.rmtree(out / PHASES[3])
    running = train_dry(out, data, "--resume", "--accept-changes", "phases.0.learning_rate=1e-30")
    assert running.wait() == [0], running.output
    files = [out / name / "checkpoints" / "step-00000006" / "model.safetensors" for name in PHASES[1:3]]
    second, third = (load_file(path) for path in files)
    assert second.keys() == third.keys()
    assert all(torch.allclose(second[key], third[key], atol=1e-12) for key in second)


def test_killed_in_the_third_phase_it_goes_on_there(tmp_path, data, whole):
    out = tmp_path / "dry"
    for name in PHASES[:2]:
        shutil.copytree(whole / name, out / name)
    running = train_dry(out, data, "--resume")
    wait_for(lambda: (out / PHASES[2] / "checkpoints" / "step-00000003").is_dir() and 4 in losses(out / PHASES[2]), running)
    running.kill()
    resumed = train_dry(out, data, "--resume")
    assert resumed.wait() == [0], resumed.output
    assert f"{out / PHASES[1]}isfinished" in resumed.output.replace(" ", "")  # lines break within long paths, too
    assert "3 of 4: 3-64-masked microdit-dry-64-masked" in resumed.output
    assert "4 of 4" in resumed.output
    for name in PHASES:
        assert losses(out / name) == losses(whole / name)


def test_two_processes_train_all_four_phases_alike(tmp_path, data, whole):
    out = tmp_path / "dry"
    running = train_dry(out, data, "engine.sharding=fsdp", ranks=2)
    assert running.wait() == [0, 0], running.output
    for name in PHASES:
        assert losses(out / name) == pytest.approx(losses(whole / name), abs=2e-5)


def test_the_mask_may_fall_while_it_trains(tmp_path, data):
    schedule = ["phases.0.mask_ratio=0", "phases.0.mask_schedule=[[0, 0.75], [0.5, 0.5], [1, 0]]"]
    arguments = ["train", DRY / "1-32-masked.yaml", f"data.path={data}", *SHORT, *schedule, "--out", tmp_path / "run"]
    running = start(tmp_path / "logs", arguments)
    assert running.wait() == [0], running.output
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    ratios = [line["mask_ratio"] for line in lines]
    assert (ratios[0], ratios[-1]) == (0.75, 0.0)
    assert ratios == sorted(ratios, reverse=True)
    assert len(set(ratios)) == 6
    assert all(line["loss"] is not None for line in lines)


@pytest.mark.parametrize("resume", [False, True])
def test_a_locked_run_is_refused_with_its_host_and_process(tmp_path, encoded_emoji, resume):
    recipe = load_recipe(RECIPE, [f"data.path={encoded_emoji}"])
    holder = f"process {os.getpid()} on {socket.gethostname()}"
    with sole_writer(tmp_path / "run"), pytest.raises(UserError, match=f"run is in use by {holder}: wait for it, or stop it"):
        train_one(recipe, tmp_path / "run", RunSettings(resume), Reporter(PlainConsole(quiet=True)), start_world("cpu"))
    assert not (tmp_path / "run").exists()


def test_nothing_is_overwritten(data, whole):
    again = train_dry(whole, data)
    assert again.wait() == [1]
    assert "holds runs of these recipes already: continue with --resume" in again.output


def phase(path: Path, init_from: str, data: Path, *more: object) -> list[object]:
    return ["train", path, f"data.path={data}", f"init_from={init_from}", *SHORT, "--out", *more]


@pytest.mark.parametrize(
    ("init_from", "more", "sentence"),
    [
        ("nowhere", [], "init_from is nowhere, and there is no checkpoint in"),
        ("1-32-masked", ["model.dim=32"], "model.dim: 64 there, 32 in the recipe"),
        ("1-32-masked", ["model.patch_size=2"], "model.patch_size: 1 there, 2 in the recipe"),
    ],
)
def test_what_a_phase_begins_from_must_be_there_and_fit(tmp_path, data, whole, init_from, more, sentence):
    source = str(whole / init_from) if init_from in PHASES else init_from
    running = start(tmp_path / "logs", [*phase(DRY / "2-32-full.yaml", source, data, tmp_path / "run"), *more])
    assert running.wait() == [1]
    assert sentence in running.output
    assert "Traceback" not in running.output
    assert not (tmp_path / "run").exists()


def test_a_folder_without_recipes_and_one_in_the_wrong_order_are_refused(tmp_path):
    with pytest.raises(UserError, match="no recipe"):
        load_recipe_folder(tmp_path, None)
    for name in ("1-32-masked", "2-32-full"):
        content = yaml.safe_load((DRY / f"{name}.yaml").read_text())
        (tmp_path / f"{'b' if name.startswith('1') else 'a'}.yaml").write_text(
            yaml.safe_dump({**content, "init_from": "b" if name[0] == "2" else None})
        )
    with pytest.raises(UserError, match=r"a\.yaml starts from b, which is trained after it"):
        load_recipe_folder(tmp_path, None)


@pytest.mark.parametrize(
    ("overrides", "ranks", "sentence"),
    [
        (["model.mask_padding=false"], 1, "holds captions without their padding (int8): take model.mask_padding=true"),
        (["phases.0.batch_size=9"], 2, "cannot be split over 2 processes in micro-batches of 4: use a multiple of 8, such as 8"),
        (["phases.0.batch_size=8", "engine.micro_batch=3"], 1, "in micro-batches of 3: use a multiple of 3, such as 9"),
    ],
)
def test_what_fits_neither_data_nor_processes_is_refused(tmp_path, data, overrides, ranks, sentence):
    running = train_dry(tmp_path / "dry", data, *overrides, ranks=ranks)
    assert running.wait() == [1] * ranks
    assert sentence in running.output


def test_more_processes_than_samples_are_refused(tmp_path):
    tiny = tmp_path / "one"
    encoding = start(tmp_path / "logs", ["data", "encode", "scenes:1", "--out", tiny, "--resolutions", "32"])
    assert encoding.wait() == [0], encoding.output
    running = train_dry(tmp_path / "dry", tiny, ranks=2)
    assert running.wait() == [1, 1]
    assert "There are 2 processes and 1 samples" in running.output


def test_the_published_recipe_holds_the_papers_numbers():
    """The table of the paper's appendix, and the model's 1,165 M parameters on the meta device."""
    chain = list(load_recipe_folder(RECIPES / "microdit-xl", None).values())
    table = [
        (recipe.data.resolution, p.mask_ratio, p.steps, p.learning_rate, p.final_learning_rate, p.warmup_steps, p.grad_clip, p.batch_size)
        for recipe in chain
        for p in recipe.phases
    ]
    assert table == [
        (256, 0.75, 250_000, 2.4e-4, 0.33, 2500, 0.25, 2048),
        (256, 0.0, 30_000, 8e-5, 1.0, 0, 0.25, 2048),
        (512, 0.75, 50_000, 8e-5, 1.0, 500, 0.5, 2048),
        (512, 0.0, 5_000, 8e-5, 1.0, 0, 0.5, 2048),
    ]
    assert [[(ema.decay, ema.start) for ema in recipe.ema] for recipe in chain] == [[], [], [(0.99975, 25_000)], [(0.9975, 1_000)]]
    assert [(r.diffusion.P_mean, r.diffusion.P_std) for r in chain] == [(-0.6, 1.2), (-0.6, 1.2), (0.0, 0.6), (0.0, 0.6)]
    at_512 = {"cc12m", "sa1b", "textcaps", "journeydb"}
    assert [set(r.data.sets) for r in chain] == [{*at_512, "diffusiondb"}] * 2 + [at_512] * 2
    assert [r.model.position_scale for r in chain] == [1.0, 1.0, 2.0, 2.0]
    for recipe in chain:
        assert (recipe.optimizer.betas, recipe.optimizer.eps, recipe.optimizer.weight_decay) == ((0.9, 0.999), 1e-8, 0.1)
        assert (recipe.optimizer.decay, recipe.model.mask_padding) == ("all", False)  # as in the released code
        with torch.device("meta"):
            model = MicroDiT(model_config(recipe, LikeSDXL(recipe.data.resolution)))
        assert sum(weight.numel() for weight in model.parameters()) == 1_165_442_320


class LikeSDXL:
    """The shapes of a set that was encoded by SDXL's autoencoder and DFN5B-CLIP-H."""

    bucket_sizes = (1,)
    manifest = {"text_channels": 1024}  # noqa: RUF012

    def __init__(self, resolution: int):
        self.resolution = resolution

    def latent_shape(self, bucket: int = 0) -> tuple[int, int, int]:
        return 4, self.resolution // 8, self.resolution // 8


def test_tiny_is_the_papers_tiny():
    recipe = load_recipe(RECIPES / "microdit-tiny" / "1-256-masked.yaml")
    with torch.device("meta"):
        model = MicroDiT(model_config(recipe, LikeSDXL(256)))
    assert sum(weight.numel() for weight in model.parameters()) == 200_692_752
