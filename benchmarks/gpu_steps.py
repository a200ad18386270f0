"""The steps of benchmarks/gpu.py, each run in a process of its own: python benchmarks/gpu_steps.py STEP OUT SCRATCH [--smoke]

A step writes OUT/STEP.json whenever it has found something, so that one that is killed leaves what it had.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING, Any

import torch
from gpu_measure import Place, Results, free_memory, seconds_of, synchronize, time_of

from microdit.config.schema import EngineRecipe, Recipe
from microdit.distributed import World, start_world, stop_world
from microdit.planning.hardware import find_chip

if TYPE_CHECKING:  # imported where it is used: the first steps do not wait for it
    from gpu_training import Training

ROOT = Path(__file__).resolve().parent.parent
BAND, FIRST = 0.005, 50
"""How far apart the losses of each of a run's first steps may lie in float32 and bfloat16, as a share. On one H100 they were 0.09% apart at
most in the first 50 steps. Later, rounding grows to other trajectories: the same run twice ended 2% apart (docs/gpu)."""
LAST = 50  # steps
PATIENCE = 40.0  # seconds for a checkpoint of XL to be written
SMALL = ["model.dim=32", "model.depth=2", "model.head_dim=8", "model.mixer_dim=32", "model.round_ffn_to=16"]  # at smoke size
SET_SHAPES = (8, 8, 8), (16, 384)  # latents and captions of the emoji, where there are none


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", choices=STEPS)
    parser.add_argument("out", type=Path)
    parser.add_argument("scratch", type=Path)
    parser.add_argument("--smoke", action="store_true")
    args = parser.parse_args()
    place = Place(args.step, args.out, args.scratch, args.smoke)
    results = Results(args.out / f"{args.step}.json")
    STEPS[args.step](place, results)
    if results.failed:
        print(f"failed: {', '.join(results.failed)}")
    sys.stdout.flush()
    os._exit(1 if results.failed else 0)  # at once: compilers and collectives may take their time to end


def ceilings(place: Place, results: Results) -> None:
    """What the card does at best: products of random numbers, copies."""
    cuda = torch.cuda.is_available()
    device = torch.device("cuda" if cuda else "cpu")
    name = torch.cuda.get_device_name() if cuda else f"CPU, {torch.get_num_threads()} threads"
    chip = find_chip(name) if cuda else None
    versions = {"torch": torch.__version__, "cuda": torch.version.cuda, "python": sys.version.split()[0], "cores": os.cpu_count()}
    results.put("machine", {"device": name, **versions, "peak_tflops": chip.teraflops if chip else None})
    side = 256 if place.smoke else 8192
    for dtype in (torch.bfloat16, torch.float32):
        with results.attempt(f"{str(dtype).removeprefix('torch.')} product"):
            a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
            one, spread = time_of(lambda: torch.mm(a, b), 1.0 if dtype == torch.bfloat16 else 0.5)  # noqa: B023 (called at once)
            flops = 2 * side**3 / one
            found = {"side": side, "flops_per_second": flops, "tflops": flops / 1e12, "spread": spread}
            results.put(f"{str(dtype).removeprefix('torch.')} product", found)
    with results.attempt("copy"):
        source = torch.randn((1 << 16) if place.smoke else (1 << 29), device=device)
        target = torch.empty_like(source)
        one, spread = time_of(lambda: target.copy_(source), 0.5)
        results.put("copy", {"gb_per_second": 2 * source.nbytes / one / 1e9, "spread": spread})
    if cuda:
        with results.attempt("copy from the host"):
            pinned = torch.randn(1 << 26).pin_memory()
            part = target[: len(pinned)]
            one, spread = time_of(lambda: part.copy_(pinned, non_blocking=True), 0.5)
            results.put("copy from the host", {"gb_per_second": pinned.nbytes / one / 1e9, "spread": spread})


WHOLE, RECORDED = EngineRecipe(cuda_graphs=False), EngineRecipe()
SHARDED, COMPILED = EngineRecipe(sharding="fsdp"), EngineRecipe(compile=True)


def xl(place: Place, results: Results) -> None:
    """XL's step, eager: has it a synchronisation, is it bound by the CPU, does it fit?"""
    from gpu_training import Training

    from microdit.planning.phases import STAGES

    world = start_world()
    size, seconds = place.size("MicroDiT_XL_2"), 0.1 if place.smoke else 2.0
    samples = 2 if place.smoke else 128
    for name, engine in (("whole", WHOLE), ("FSDP", SHARDED)):
        with results.attempt(f"synchronisations, {name}"):
            training = Training(place, world, size, STAGES[0], engine)
            results.put(f"synchronisations, {name}", count_synchronisations(training, samples))
            if name == "whole":
                results.put("draws", draws_alike(training, samples))
            del training
    ways: list[tuple[str, EngineRecipe, int, bool, int]] = [
        (f"whole {samples}", WHOLE, samples, False, 0),
        (f"whole, recorded {samples}", RECORDED, samples, False, 0),
        (f"FSDP {samples}", SHARDED, samples, False, 0),
        (f"whole, recorded {samples}, padding masked", RECORDED, samples, True, 0),
        (f"512 px, whole, recorded {samples // 4}", RECORDED, max(1, samples // 4), False, 2),
    ]
    for name, engine, batch, mask_padding, stage in ways:
        with results.attempt(name):
            training = Training(place, world, size, STAGES[stage], engine, mask_padding)
            results.put(name, training.measure(batch, seconds))
            results.put(f"CPU alone, {name}", training.dispatch(batch))
            if engine is RECORDED and not mask_padding and not stage:
                results.put(f"kernels of {name}", training.kernels(batch))
            del training
    stop_world()


def count_synchronisations(training: "Training", samples: int) -> dict[str, Any]:
    """Two steps in which the first synchronisation raises. Warmed up before: memory is taken, kernels are loaded."""
    batch, device = training.host_batch(samples), training.world.device
    for _ in range(3):
        training.step(batch.to(device))
    synchronize()
    if not torch.cuda.is_available():
        return {"found": "not on a GPU: nothing to find"}
    torch.cuda.set_sync_debug_mode("error")
    try:
        training.step(batch.to(device))
        training.step(batch.to(device))
    except RuntimeError as error:
        frames = [frame for frame in _frames(error) if "microdit" in frame] or _frames(error)
        return {"found": f"{str(error).splitlines()[0][:120]} at {frames[-1]}"}
    finally:
        torch.cuda.set_sync_debug_mode("default")
        training.state.optimizers.zero_grad()
    return {"found": "none in two steps"}


def draws_alike(training: "Training", samples: int) -> dict[str, Any]:
    """Are the numbers that the device draws those that a CPU draws?"""
    batch = training.host_batch(samples)
    here, there = batch.to(torch.device("cpu")), batch.to(training.world.device)
    found: dict[str, Any] = {}
    for name in ("noise_BCHW", "sigma_B", "caption_kept_B", "keep_ids_BK"):
        ours, theirs = getattr(here, name), getattr(there, name).cpu()
        found[name] = {"numbers": ours.numel(), "differ": int((ours != theirs).sum()), "most": float((ours - theirs).abs().max())}
    return found


def _frames(error: BaseException) -> list[str]:
    frames, traceback = [], error.__traceback__
    while traceback is not None:
        frames.append(f"{traceback.tb_frame.f_code.co_filename}:{traceback.tb_lineno}")
        traceback = traceback.tb_next
    return frames


def xl_compiled(place: Place, results: Results) -> None:
    """Compile what lies between XL's products; record; find the batch that uses the chip best."""
    world = start_world()
    seconds = 0.1 if place.smoke else 2.0
    small, large = (2, 3) if place.smoke else (128, 256)
    training = compiled_training(place, results, world, "MicroDiT_XL_2", COMPILED)
    with results.attempt("replay"):
        results.put("replay", replay_alike(training, small))
    for samples in (small, large):
        with results.attempt(f"compiled, recorded {samples}"):
            training.forget_recorded()
            results.put(f"compiled, recorded {samples}", training.measure(samples, seconds))
            results.put(f"CPU alone, compiled, recorded {samples}", training.dispatch(samples))
            results.put(f"kernels of compiled, recorded {samples}", training.kernels(samples))
    del training
    free_memory()
    with results.attempt(f"compiled, FSDP {small}"):
        training = compiled_training(place, results, world, "MicroDiT_XL_2", replace(COMPILED, sharding="fsdp"))
        results.put(f"compiled, FSDP {small}", training.measure(small, seconds))
        del training
    stop_world()


def replay_alike(training: "Training", samples: int) -> dict[str, Any]:
    """Are replayed gradients those that are computed, from the same weights, on another batch than the recorded one?

    Weights that began at zero are random meanwhile: by adaLN-zero, hardly anything in the blocks would matter to the loss.
    """
    gradients, weights = training.state.gradients, list(training.state.model.parameters())
    zeros = [weight.detach() for weight in weights if weight.detach().abs().max() < 1e-3]
    before = [weight.clone() for weight in zeros]
    for weight in zeros:
        weight.normal_(std=0.02)

    def found(batch: Any) -> tuple[list[torch.Tensor], torch.Tensor]:
        training.state.optimizers.zero_grad()
        gradients.begin()
        loss_B = gradients.add(batch, samples, last=True).total_B.clone()
        return [weight.grad.clone() for weight in weights if weight.grad is not None], loss_B

    other, batch = training.batch(samples), training.batch(samples)
    computed, losses = found(batch)
    again, _ = found(batch)
    for _ in range(4):
        found(other)
    replayed, replayed_losses = found(batch)

    def apart(one: list[torch.Tensor], two: list[torch.Tensor]) -> float:
        distance = torch.stack([(a - b).norm() for a, b in zip(one, two, strict=True)]).norm()
        return float(distance / torch.stack([a.norm() for a in one]).norm())

    training.state.optimizers.zero_grad()
    torch._foreach_copy_(zeros, before)
    return {
        "gradients_apart": apart(computed, replayed),
        "computed_twice_apart": apart(computed, again),
        "losses_apart": float((losses - replayed_losses).abs().max() / losses.abs().max()),
        "recorded": training.recorded,
    }


def tiny(place: Place, results: Results) -> None:
    """Tiny_2, a small model: eager, where the CPU is what is waited for, recorded and compiled."""
    from gpu_training import Training

    from microdit.planning.phases import STAGES

    world = start_world()
    samples, seconds = (4, 0.1) if place.smoke else (256, 1.0)
    for name, engine in (("eager", WHOLE), ("recorded", RECORDED)):
        with results.attempt(f"{name} {samples}"):
            training = Training(place, world, place.size("MicroDiT_Tiny_2"), STAGES[0], engine)
            results.put(f"{name} {samples}", training.measure(samples, seconds))
            results.put(f"CPU alone, {name}", training.dispatch(samples))
    compiled = compiled_training(place, results, world, "MicroDiT_Tiny_2", COMPILED)
    for batch in (samples, 2 * samples):
        with results.attempt(f"compiled, recorded {batch}"):
            compiled.forget_recorded()
            results.put(f"compiled, recorded {batch}", compiled.measure(batch, seconds))
    with results.attempt("kernels"):
        results.put(f"kernels of compiled {2 * samples}", compiled.kernels(2 * samples))
    stop_world()


def compiled_training(place: Place, results: Results, world: World, name: str, engine: EngineRecipe) -> "Training":
    """Compiled by two steps. Numbers of samples are left open, which a third step of another size shows.

    The first size that a kernel meets is the one that it is tuned for, so it is as large as those that are measured. Not on a CPU, where
    its compiler would take minutes for the smallest model.
    """
    from gpu_training import Training

    from microdit.planning.phases import STAGES

    samples, compiled = 4 if place.smoke else 128, torch.cuda.is_available()
    training = Training(place, world, place.size(name), STAGES[0], replace(engine, compile=compiled))
    first = seconds_of(lambda: training.step(training.batch(samples)))
    second = seconds_of(lambda: training.step(training.batch(samples)))
    other = seconds_of(lambda: training.step(training.batch(samples // 2)))
    found = {"compiled": compiled, "first_step_s": first, "second_step_s": second, "other_batch_s": other, **graphs()}
    results.put("compiling, FSDP" if engine.sharding == "fsdp" else "compiling", found)
    free_memory()
    return training


def graphs() -> dict[str, int]:
    """How many were compiled in this process."""
    return {"graphs": torch._dynamo.utils.counters["stats"]["unique_graphs"]}


def emoji(place: Place, results: Results) -> None:
    """emoji.yaml by the real trainer in float32, bfloat16, and bfloat16 with FSDP: do the curves agree, where does it stop?"""
    from microdit.io.console import PlainConsole, Reporter
    from microdit.training.trainer import Trainer

    world = start_world()
    engines = {"float32": EngineRecipe(precision="float32")}
    if torch.cuda.is_available():
        engines["bfloat16"] = EngineRecipe(precision="bfloat16")
        engines["bfloat16, FSDP"] = EngineRecipe(precision="bfloat16", sharding="fsdp")
    else:  # many CPUs have no products in bfloat16
        engines["float32, FSDP"] = EngineRecipe(precision="float32", sharding="fsdp")
    steps = 6 if place.smoke else 150
    means: dict[str, float] = {}
    first: dict[str, list[float]] = {}
    for name, engine in engines.items():
        with results.attempt(name):
            recipe = short_emoji_recipe(place, "emoji.yaml", steps, engine)
            run = place.scratch / f"emoji-{name.replace(', ', '-')}"
            trainer, started = Trainer(recipe, run, Reporter(PlainConsole(width=100)), world), time.perf_counter()
            with synchronisations_noted(name == "bfloat16") as caught:
                trainer.train()
            seconds = time.perf_counter() - started
            losses = [line["loss"] for line in metrics(run)]
            means[name], first[name] = mean(losses[-LAST:]), losses[:FIRST]
            results.put(
                name, {"seconds": seconds, "steps": len(losses), "last_mean": means[name], "apart": means[name] / means["float32"] - 1}
            )
            results.put(f"losses, {name}", [round(loss, 5) for loss in losses])
            if caught:
                results.put("synchronisations in the loop", places_of(caught, steps))
    if len(means) == len(engines):
        apart = max(abs(a / b - 1) for losses in first.values() for a, b in zip(losses, first["float32"], strict=True))
        results.put("band", {"widest": apart, "allowed": BAND, "within": apart <= BAND})
        if apart > BAND:
            results.failed.append("band")
    stop_world()


@contextmanager
def synchronisations_noted(wanted: bool) -> Iterator[list[warnings.WarningMessage]]:
    """A warning for each time that the CPU waits for the GPU, which takes time itself."""
    if not wanted or not torch.cuda.is_available():
        yield []
        return
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield caught
        finally:
            torch.cuda.set_sync_debug_mode("default")


def places_of(caught: list[warnings.WarningMessage], steps: int) -> dict[str, Any]:
    """Where the trainer made the CPU wait for the GPU, in all of a run of `steps` steps with its start, checkpoint and end."""
    found = Counter(f"{Path(w.filename).name}:{w.lineno}" for w in caught if "synchronizing" in str(w.message))
    return {"steps": steps, "all": sum(found.values()), **dict(found.most_common(12))}


def short_emoji_recipe(place: Place, name: str, steps: int, engine: EngineRecipe) -> Recipe:
    """The first `steps` steps of the recipe, every one recorded, without prompts."""
    from microdit.config.load import load_recipe

    recipe = load_recipe(name, [*overrides_for(place), "record.metrics_every=1"])
    first = recipe.phases[0]
    phase = replace(first, steps=steps, batch_size=8 if place.smoke else first.batch_size)
    return replace(recipe, phases=[phase], engine=engine)


def overrides_for(place: Place) -> list[str]:
    """What the emoji recipes do without on a machine that lacks MiniLM and the features of quality, and where their sets are."""
    folders = [f"data.sets.{name}.path={folder}" for name, folder in emoji_sets(place).items()]
    return [*folders, "record.sample_prompts=[]", "record.quality_every=null", *(SMALL if place.smoke else [])]


def emoji_sets(place: Place) -> dict[str, Path]:
    """Emoji and scenes as they lie in data/, or, at smoke size, random numbers where they are missing."""
    sets = {name: ROOT / "data" / name for name in ("emoji", "scenes")}
    missing = [name for name, folder in sets.items() if not (folder / "card.json").is_file()]
    if missing and not place.smoke:
        sources = {"emoji": "emoji", "scenes": "scenes:1000"}
        commands = " and ".join(f"microdit data encode {sources[name]} --out data/{name}" for name in missing)
        raise FileNotFoundError(f"There is no {' nor '.join(f'data/{name}' for name in missing)}: make it first, by {commands}.")
    for name in missing:
        from microdit.data.random_set import RandomSet, write_random_set

        sets[name] = place.scratch / f"random-{name}"
        if not sets[name].exists():
            aside = place.scratch / f"random-{name}.{os.getpid()}"
            write_random_set(aside, 64, RandomSet(64, (64, 64), *SET_SHAPES, ("icon", ""), ("minilm", "")))
            try:
                aside.rename(sets[name])
            except OSError:
                if not sets[name].exists():  # another step was not first
                    raise
    return sets


def metrics(run: Path) -> list[dict[str, Any]]:
    path = run / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")] if path.is_file() else []


def demo(place: Place, results: Results) -> None:
    """emoji-fast by the command line, stopped by SIGTERM and resumed; its held-out loss, and pictures of stored captions."""
    run, held_out = place.scratch / "demo", ROOT / "data" / "held_out"
    steps, stop_at = (12, 4) if place.smoke else (800, 200)
    overrides = [*overrides_for(place), f"phases.0.steps={steps}"]
    overrides += ["phases.0.batch_size=8", "record.metrics_every=1", "record.held_out_samples=16"] if place.smoke else []
    overrides += [f"data.held_out={held_out}"] if (held_out / "card.json").is_file() else []
    command = [sys.executable, "-m", "microdit", "train", "emoji-fast", *overrides, "--out", str(run)]
    with results.attempt("stopped"):
        started = time.perf_counter()
        process = subprocess.Popen(command, cwd=ROOT)
        while process.poll() is None and not any(line["step"] >= stop_at for line in metrics(run)):
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        code = process.wait()
        results.put("stopped", {"exit_code": code, "seconds": time.perf_counter() - started, "step": last(run, "step")})
    with results.attempt("resumed"):
        started = time.perf_counter()
        code = subprocess.run([*command, "--resume"], cwd=ROOT, check=False).returncode
        found = {key: last(run, key) for key in ("step", "loss", "held_out_loss", "images_per_second", "memory_gb")}
        results.put("resumed", {"exit_code": code, "seconds": time.perf_counter() - started, **found})
        if code or results.found["stopped"]["exit_code"] not in (75, 0):
            results.failed.append("exit codes")
    results.put("losses", [[line["step"], line["loss"]] for line in metrics(run)])
    with results.attempt("pictures"):
        results.put("pictures", draw_stored_captions(place, run))


def last(run: Path, key: str) -> Any:
    return next((line[key] for line in reversed(metrics(run)) if line.get(key) is not None), None)


def draw_stored_captions(place: Place, run: Path) -> dict[str, Any]:
    """Draw captions of the emoji as they are stored, without a text encoder: OUT/pictures.png, each row above the pictures of the data."""
    from microdit.checkpoint import default_weights, find_weights
    from microdit.data.dataset import EncodedDataset
    from microdit.data.pixels import to_image
    from microdit.encoders.autoencoder import load_autoencoder
    from microdit.evaluation.recognition import spread_ids
    from microdit.pipelines.sampling import draw_latents, first_noise, frozen_model, recorded_objective
    from microdit.pipelines.settings import SamplerSettings
    from microdit.reports.grids import draw_grid

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    count = 4 if place.smoke else 32
    data = EncodedDataset(emoji_sets(place)["emoji"])
    rows = spread_ids(data.bucket_sizes[0], count).tolist()
    checkpoint = find_weights(run, print)
    assert checkpoint is not None, "the run left no checkpoint"
    model = frozen_model(checkpoint.model_config, checkpoint.tensors(default_weights(checkpoint))).to(device)
    stored = [data.read(0, row) for row in rows]
    text_BLE, mask_BL = data.text([text for _, text in stored])
    noise_BCHW = torch.stack([first_noise(data.latent_shape(), number) for number in range(count)])
    settings = SamplerSettings(2 if place.smoke else 12, 2.5, "dpm", noise_range=(0.05, 20.0))
    started = time.perf_counter()
    drawn_BCHW = draw_latents(
        model, recorded_objective(checkpoint.state), noise_BCHW.to(device), text_BLE.to(device), mask_BL.to(device), settings
    )
    seconds = time.perf_counter() - started
    true_BCHW = data.latents([latents for latents, _ in stored], 0)
    own = (drawn_BCHW.cpu()[:, None] - true_BCHW[None]).square().flatten(2).mean(-1).argmin(1)
    autoencoder = load_autoencoder("icon")
    drawn, true = ([to_image(pixels) for pixels in autoencoder.decode(latents.cpu().float()).cpu()] for latents in (drawn_BCHW, true_BCHW))
    captions = [data.column("captions")[row][0] for row in rows]
    images, labels = [], []
    for start in range(0, count, 8):
        part = slice(start, start + 8)
        images += drawn[part] + true[part]
        labels += captions[part] + ["(of the data)"] * len(true[part])
    draw_grid(images, labels, title=f"emoji-fast on {device}, captions as stored").save(place.out / "pictures.png")
    return {"drawn": count, "seconds": seconds, "nearest_is_own": int((own == torch.arange(count)).sum())}


def encoders(place: Place, results: Results) -> None:
    """What encoding costs: SDXL's autoencoder and the text half of CLIP-H, with random weights."""
    from diffusers import AutoencoderKL
    from transformers import CLIPTextConfig, CLIPTextModel

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    widths = (8, 8, 8, 8) if place.smoke else (128, 256, 512, 512)
    kinds = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    groups = 4 if place.smoke else 32
    torch.manual_seed(0)
    with device:
        autoencoder = AutoencoderKL(block_out_channels=widths, latent_channels=4, layers_per_block=2, norm_num_groups=groups, **kinds)
        width, layers, heads = (16, 1, 2) if place.smoke else (1024, 24, 16)
        config = CLIPTextConfig(
            hidden_size=width, num_hidden_layers=layers, num_attention_heads=heads, intermediate_size=4 * width, max_position_embeddings=77
        )
        text_model = CLIPTextModel(config)
    autoencoder.eval().requires_grad_(False)
    text_model.eval().requires_grad_(False)
    seconds = 0.1 if place.smoke else 2.0
    for dtype in (torch.bfloat16, torch.float32):
        name = str(dtype).removeprefix("torch.")
        autoencoder.to(dtype=dtype, memory_format=torch.channels_last)
        text_model.to(dtype)
        for side, samples in ((16, 2), (32, 1)) if place.smoke else ((256, 64), (512, 16)):
            with results.attempt(f"autoencoder, {name}, {side} px"), torch.no_grad():
                pixels = torch.randn(samples, 3, side, side, device=device, dtype=dtype).to(memory_format=torch.channels_last)
                one, spread = time_of(lambda: autoencoder.encode(pixels).latent_dist.mode(), seconds, 2)  # noqa: B023 (called at once)
                results.put(f"autoencoder, {name}, {side} px", {"samples": samples, "per_second": samples / one, "spread": spread})
        with results.attempt(f"text, {name}"), torch.no_grad():
            samples = 2 if place.smoke else 256
            ids = torch.randint(0, 1000, (samples, 77), device=device)
            one, spread = time_of(lambda: text_model(ids).last_hidden_state, seconds / 2, 2)  # noqa: B023
            results.put(f"text, {name}", {"samples": samples, "per_second": samples / one, "spread": spread})
    decode(place, results, autoencoder, device)


def decode(place: Place, results: Results, autoencoder: Any, device: torch.device) -> None:
    side = 4 if place.smoke else 32
    for dtype in (torch.float32, torch.bfloat16):
        key = f"decoding, {str(dtype).removeprefix('torch.')}, {8 * side} px"
        with results.attempt(key), torch.no_grad():
            autoencoder.to(dtype=dtype, memory_format=torch.channels_last)
            latents = torch.randn(4, 4, side, side, device=device, dtype=dtype)
            one, spread = time_of(lambda: autoencoder.decode(latents).sample, 0.1 if place.smoke else 1.0, 2)  # noqa: B023
            results.put(key, {"samples": 4, "per_second": 4 / one, "spread": spread})


def sampling(place: Place, results: Results) -> None:
    """XL's latency: 30 steps of Heun's method with guidance, float32 weights and bfloat16 ones."""
    from microdit.diffusion.edm import EDM
    from microdit.models.config import resolve
    from microdit.models.flops import forward_flops
    from microdit.models.microdit import MicroDiT
    from microdit.pipelines.sampling import draw_latents
    from microdit.pipelines.settings import SamplerSettings
    from microdit.planning.hardware import peak_flops

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    side, steps = (8, 2) if place.smoke else (32, 30)
    torch.manual_seed(0)
    with device:
        model = MicroDiT(resolve(place.size("MicroDiT_XL_2"), caption_channels=place.caption[1])).eval().requires_grad_(False)
    tokens = (side // 2) ** 2
    flops = 2 * (2 * steps - 1) * forward_flops(model.config, tokens, tokens, place.caption[0])  # guided; Heun's last step asks once
    for dtype in (torch.bfloat16, torch.float32):
        if dtype == torch.bfloat16 and device.type == "cpu":  # many have no products in it
            continue
        model.to(dtype)
        peak, _ = peak_flops(device, dtype)
        for samples in (1, 2) if place.smoke else (1, 16) if dtype == torch.bfloat16 else (1,):
            key = f"{str(dtype).removeprefix('torch.')}, {samples} at a time"
            with results.attempt(key):
                noise, text = (
                    torch.randn(samples, 4, side, side, device=device),
                    torch.randn(samples, *place.caption, device=device).to(dtype),
                )
                draw = lambda: draw_latents(model, EDM(), noise, text, None, SamplerSettings(steps, 5.0))  # noqa: B023, E731
                one, spread = time_of(draw, 0.1 if place.smoke else 4.0, 2)
                share = samples * flops / one / peak
                results.put(key, {"seconds": one, "spread": spread, "per_second": samples / one, "share_of_peak": share})


def trainer(place: Place, results: Results) -> None:
    """XL by the real trainer on an encoded set of random numbers: what does it cost beyond the bare step?"""
    from microdit.data.random_set import RandomSet, write_random_set
    from microdit.io.console import PlainConsole, Reporter
    from microdit.planning.hardware import peak_flops
    from microdit.planning.phases import STAGES, stage_recipe
    from microdit.training.parallel import compute_dtype
    from microdit.training.trainer import Trainer

    folder, run = place.scratch / "random-xl", place.scratch / "trainer"
    rows, batch, micro, steps, every = (32, 4, 2, 6, 1) if place.smoke else (1024, 1024, 256, 18, 3)
    side = 8 if place.smoke else 32
    write_random_set(folder, rows, RandomSet(256, (256, 256), (4, side, side), place.caption, ("sdxl", ""), ("dfn-clip-h", "")))
    results.put("set", {"rows": rows})
    compiled = torch.cuda.is_available()
    engine = replace(COMPILED, compile=compiled, micro_batch=micro)
    recipe = stage_recipe(STAGES[0], place.size("MicroDiT_XL_2"), steps, batch, str(folder), engine)
    record = replace(recipe.record, metrics_every=every, checkpoint_every=3 * every, keep_checkpoints=1, sample_prompts=[])
    recipe = replace(recipe, record=record, model=replace(recipe.model, mask_padding=False))
    world = start_world()
    peak, _ = peak_flops(world.device, compute_dtype(engine, world.device))
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    started = time.time()
    training = Trainer(recipe, run, Reporter(PlainConsole(width=100)), world)
    results.put("start", {"seconds": time.time() - started, "compiled": compiled, "micro_batch": micro})
    flops = training.flops.of_step(recipe.phases[0], 0, (side // 2) ** 2, place.caption[0])

    def note() -> bool:
        """What the metrics say so far; whether that is all."""
        lines, checkpoint = metrics(run), run / "checkpoints" / f"step-{3 * every:08}"
        if checkpoint.exists() and "checkpoint" not in results.found:
            results.put("checkpoint", {"whole_after_s": time.time() - lines[2]["time"]})
        ends = [started + results.found["start"]["seconds"], *(line["time"] for line in lines)]
        windows = [(after - before) / every for before, after in pairwise(ends)]  # seconds a step
        found: dict[str, Any] = {"windows": len(windows), **graphs()}
        if windows:
            found |= {"first_window_s": windows[0] * every}
        if len(windows) > 2:  # the second and third are neither of compiling nor of the checkpoint
            usual = sum(windows[1:3]) / 2
            found |= {"images_per_second": batch / usual, "share_of_peak": flops / usual / peak}
            found |= {"data_wait": mean(line["data_wait"] for line in lines[1:3]), "memory_gb": lines[2]["memory_gb"]}
            if len(windows) > 3:
                found |= {"checkpoint_stall_s": (windows[3] - usual) * every}
            if len(windows) > 4:
                found |= {"slower_while_writing": windows[4] / usual - 1}
        if found != results.found.get("trainer"):
            results.put("trainer", found)
        return len(windows) == steps // every and ("checkpoint" in results.found or time.time() - ends[-1] > PATIENCE)

    watch_while(training.train, note, wait=place.smoke)
    results.put("finished", {"seconds": time.time() - started})
    stop_world()


def watch_while(work: Callable[[], None], note: Callable[[], bool], wait: bool) -> None:
    """Call `note` again and again beside `work`. When it says that this is all, end the process, unless `wait`: the last checkpoint, of
    23 GB, tells nothing new.
    """
    done = threading.Event()

    def watch() -> None:
        while not done.wait(0.2):
            if note() and not wait:
                sys.stdout.flush()
                os._exit(0)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        work()
    finally:
        done.set()
        thread.join()
    note()


def kernels(place: Place, results: Results) -> None:
    """Ways to compute what lies between XL's products, against each other."""
    import gpu_kernels

    gpu_kernels.kernels(place, results)


def xl_by_hand(place: Place, results: Results) -> None:
    """The largest batch of `xl-compiled`, with the kernels of gpu_triton.py in the place of the package's."""
    if not torch.cuda.is_available():
        results.put("left out", {"why": "Triton has no kernels for a CPU"})
        return
    import gpu_triton

    from microdit.models import blocks
    from microdit.training import parallel

    world, samples = start_world(), 256
    for name in ("norms and experts by hand", "attention too"):
        with results.attempt(name):
            setattr(parallel, "compiled", gpu_triton.by_hand)  # noqa: B010 (the package offers no choice of kernels)
            if name == "attention too":
                blocks._attend = gpu_triton.attend_heads
            training = compiled_training(place, results, world, "MicroDiT_XL_2", COMPILED)
            results.put(name, training.measure(samples, 2.0))
            results.put(f"kernels of {name}", training.kernels(samples))
            del training
        free_memory()
    stop_world()


STEPS: dict[str, Callable[[Place, Results], None]] = {
    "ceilings": ceilings,
    "xl": xl,
    "xl-compiled": xl_compiled,
    "kernels": kernels,
    "xl-by-hand": xl_by_hand,
    "emoji": emoji,
    "demo": demo,
    "tiny": tiny,
    "encoders": encoders,
    "sampling": sampling,
    "trainer": trainer,
}

if __name__ == "__main__":
    main()
