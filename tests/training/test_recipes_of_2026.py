"""The recipes of MiniT2I and ours after it: published settings and sizes, the bill, and the dry run, trained end to end."""

import json
from dataclasses import asdict

import pytest
import torch

from microdit.config.load import load_recipe_folder
from microdit.config.recipes import RECIPES
from microdit.config.schema import Recipe, architecture
from microdit.models.microdit import MicroDiT
from microdit.planning.workload import assumed_shapes, phase_flops
from tests.training.processes import losses, start, wait_for

CHAIN = ["1-falling-mask", "2-fine-tuning", "3-four-steps"]
SHORT = ["phases.0.steps=6", "phases.0.warmup_steps=2", "phases.0.batch_size=8", "record.checkpoint_every=3", "record.metrics_every=1"]
SHORT += ["record.sample_prompts=[owl]", "record.sample_steps=2"]


def recipes_of(folder: str) -> dict[str, Recipe]:
    return load_recipe_folder(RECIPES / folder, None)


def parameters(recipe: Recipe) -> int:
    with torch.device("meta"):
        model = MicroDiT(architecture(recipe.model, in_channels=3, caption_channels=1024))
    return sum(weight.numel() for weight in model.parameters())


def published_parameters(patch: int) -> int:
    """Return the sum over the layers of models/mmjit.py in MiniT2I's repository, whose norms have learnt scales."""
    dim, hidden, text = 768, 2048, 1024
    attention = dim * 3 * dim + 3 * dim + dim * dim + dim + 2 * 64  # biases, and norms of queries and keys in each head
    one_stream = dim * 3 * dim + 3 * dim + dim * dim + dim + 3 * dim * hidden + 2 * dim
    block = 2 * one_stream + 2 * 64  # the two streams share the norms of queries and keys
    preamble = attention + 3 * dim * hidden + 2 * dim
    pixels = 3 * patch**2
    patches = pixels * 128 + 128 * dim + dim
    last = dim + dim * pixels + pixels
    return 17 * block + 2 * preamble + patches + text * dim + text + last


@pytest.mark.parametrize(("patch", "batch"), [(16, 1024), (32, 512)])
def test_minit2i_is_as_published(patch, batch):
    """configs/b16 and b32 of github.com/PeppaKing8/minit2i-jax, and its README's 258 M parameters for B/16."""
    chain = recipes_of(f"minit2i-b{patch}")
    assert [recipe.init_from for recipe in chain.values()] == [None, "1-pretraining"]
    table = [(p.steps, p.batch_size, p.learning_rate, p.warmup_steps, p.mask_ratio) for r in chain.values() for p in r.phases]
    assert table == [(250_000, batch, 4e-4, 5000, 0.0), (40_000, batch, 4e-5, 1000, 0.0)]
    assert chain["2-fine-tuning"].phases[0].weights == {"blip3o60k": 0.06, "dalle3": 0.016, "sharegpt4o": 0.04}
    for recipe in chain.values():
        assert (recipe.optimizer.method, recipe.optimizer.betas, recipe.optimizer.weight_decay) == ("adamw", (0.9, 0.95), 0)
        assert [asdict(ema) for ema in recipe.ema] == [{"decay": 0.99995, "start": 0}]
        assert (recipe.data.resolution, recipe.data.autoencoder, recipe.data.text_encoder) == (512, "pixels", "google/flan-t5-large")
        diffusion = recipe.diffusion
        assert (diffusion.objective, diffusion.prediction, diffusion.caption_dropout) == ("flow", "image", 0.1)
        assert (diffusion.t_mean, diffusion.t_std, diffusion.noise_scale, diffusion.training_floor) == (-0.8, 0.8, 2.0, 0.01)
        assert parameters(recipe) == published_parameters(patch)
    assert published_parameters(16) == pytest.approx(258e6, rel=0.01)


def test_ours_has_minit2is_network_and_stays_within_160_exaflops():
    chain, theirs = recipes_of("micro-2026"), recipes_of("minit2i-b16")["1-pretraining"].model
    assert list(chain) == CHAIN
    assert [recipe.init_from for recipe in chain.values()] == [None, *CHAIN[:2]]
    for recipe in chain.values():
        changed = {key for key, value in asdict(recipe.model).items() if value != getattr(theirs, key)}
        assert changed == {"mixer_depth", "routing", "unread_text"}
    assert [recipe.distillation is not None for recipe in chain.values()] == [False, False, True]
    first = chain[CHAIN[0]].phases[0]
    assert (first.mask_ratio_at(0), first.mask_ratio_at(first.steps - 1)) == (0.75, 0)
    flops = sum(phase_flops(recipe, phase, assumed_shapes(recipe)) for recipe in chain.values() for phase in recipe.phases)
    assert 150e18 < flops <= 160e18


def test_the_dry_run_has_the_phases_of_the_real_one():
    for (name, real), (dry_name, dry) in zip(recipes_of("micro-2026").items(), recipes_of("micro-2026-dry").items(), strict=True):
        assert name == dry_name
        assert (real.init_from, real.init_weights, real.diffusion) == (dry.init_from, dry.init_weights, dry.diffusion)
        assert (real.optimizer, real.distillation is None) == (dry.optimizer, dry.distillation is None)
        kept = ("mixer_depth", "routing", "attention", "conditioning", "positions", "norm", "qk_norm", "caption_embedding", "unread_text")
        assert all(getattr(real.model, key) == getattr(dry.model, key) for key in kept)
        [one], [other] = real.phases, dry.phases
        assert (one.name, one.mask_schedule, one.mask_ratio) == (other.name, other.mask_schedule, other.mask_ratio)
        assert (one.weights is None) == (other.weights is None)


@pytest.mark.slow
def test_the_dry_run_trains_fine_tunes_and_distils_and_continues_when_killed(tmp_path):
    logs = tmp_path / "logs"
    stored = ["--resolutions", "32", "--autoencoder", "pixels", "--store-latents", "jpeg", "--store-captions", "ids"]
    for source, name in (("emoji:held_out", "emoji"), ("scenes:40", "scenes")):
        encoding = start(logs, ["data", "encode", source, "--out", f"data/{name}-pixels-dry", *stored], cwd=tmp_path)
        assert encoding.wait() == [0], encoding.output
    whole, cut = tmp_path / "runs" / "whole", tmp_path / "runs" / "cut"
    running = start(logs, ["train", "micro-2026-dry", *SHORT, "--out", whole], cwd=tmp_path)
    assert running.wait() == [0], running.output
    states = [json.loads((whole / name / "checkpoints" / "step-00000006" / "state.json").read_text()) for name in CHAIN]
    assert [state["data"]["autoencoder"]["name"] for state in states] == ["pixels"] * 3
    assert all((whole / name / "samples" / "step-00000006.png").is_file() for name in CHAIN)

    running = start(logs, ["train", "micro-2026-dry", *SHORT, "--out", cut], cwd=tmp_path)
    wait_for(lambda: (cut / CHAIN[1] / "checkpoints" / "step-00000003").is_dir() and 4 in losses(cut / CHAIN[1]), running)
    running.kill()
    assert not (cut / CHAIN[2]).exists()
    resumed = start(logs, ["train", "micro-2026-dry", *SHORT, "--out", cut, "--resume"], cwd=tmp_path)
    assert resumed.wait() == [0], resumed.output
    assert [losses(cut / name) for name in CHAIN] == [losses(whole / name) for name in CHAIN]
