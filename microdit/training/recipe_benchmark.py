"""Time a recipe on this machine (`microdit bench --recipe`), by training it for a moment with the trainer itself.

Two short runs into a folder that is then deleted: the first takes a few steps of each phase, a checkpoint, a grid and whatever else the
recipe asks for; the second takes more steps, as many as there is time for. Where the data is not encoded yet, an encoded set of random
numbers takes its place. What one machine could not do in a moment (a batch of thousands, on a CPU) is done in part, and multiplied.
"""

import gc
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from microdit.config.schema import LEAST_QUALITY_SAMPLES, DataRecipe, PhaseRecipe, Recipe, SetRecipe
from microdit.data.encode import EncodeSettings, default_batch_size, default_workers, encode_source
from microdit.data.manifest import has_manifest
from microdit.data.random_set import RandomSet, write_random_set
from microdit.data.sources.base import Part, Source
from microdit.data.sources.open import open_source
from microdit.devices import choose_dtype, memory_of
from microdit.distributed import World
from microdit.encoders.autoencoder import Autoencoder, load_autoencoder
from microdit.encoders.text import TextEncoder, load_text_encoder
from microdit.errors import UserError
from microdit.evaluation.features import EfficientNetFeatures
from microdit.io.console import QUIET, Reporter
from microdit.io.places import location
from microdit.models.flops import training_flops
from microdit.planning.bill import EVALUATION_STEPS, GRIDS, HELD_OUT, QUALITY, START, steps_part
from microdit.planning.hardware import ASSUMED_UTILISATION, peak_flops
from microdit.planning.memory import PhaseMemory
from microdit.planning.timings import Repeated, StepTime, Stretch, Timings, stretches
from microdit.planning.workload import Shapes, config_of, phase_flops, time_factor
from microdit.process_limits import keep_freed_memory
from microdit.training.meters import peak_memory
from microdit.training.trainer import Trainer

WARM_UP = 2  # steps of each stretch that are not representative: kernels are chosen, blocks compiled
FIRST_LOOK = 2  # further steps of the first run, which say how many the second one can take
LONGEST_STEP, LONGEST_GRID = 3.0, 10.0  # seconds by estimate, above which a batch or a grid is timed in part
ENCODING_SECONDS, TRIED, MOST_ENCODED = 5.0, 4, 2048  # for the encoding; records of the first try, and at most
ROWS = 256  # of a set of random numbers, or as many as the recipe needs
SLOW_RATE = 1e-6  # learning rate: the true one, without its warm-up, could make the loss jump
LOOKED_AT = 16  # pictures that the feature network is timed on


def time_training(recipe: Recipe, shapes: Shapes, world: World, seconds: float, reporter: Reporter = QUIET) -> Timings:
    """Train the recipe for about `seconds`, and time all else that its training does. For the rest see `with_encoding_and_evaluation`.

    `shapes` are those of its data. Raises UserError if the machine's memory does not hold the training, and whatever the trainer raises.
    """
    if world.size > 1:
        raise UserError("A recipe is timed by one process: start microdit bench --recipe without torchrun.")
    keep_freed_memory()
    _check_memory(recipe, shapes, world)
    notes: list[str] = []
    with TemporaryDirectory(prefix="microdit-bench-") as place:
        part = _Part.of(_with_data(recipe, shapes, Path(place), notes), shapes, world)
        peak_flops.cache_clear()  # measured again while the trainer starts, as in a run
        first = _trained(part, Path(place) / "first", world, reporter, [FIRST_LOOK] * len(stretches(recipe)))
        again = _Again(first)
        memory = peak_memory(world.device) / 1e9 if part.is_whole else None
        spent, rough = first.cost.seconds, _step_times(part, first, [FIRST_LOOK] * len(stretches(recipe)))
        del first
        steps = _more_steps(part, rough, Path(place) / "second", world, seconds, reporter)
    grid = _repeated(spent, GRIDS, again.grid, part.grid_factor)
    prompts = len(recipe.record.sample_prompts)
    return Timings(
        date=datetime.now(UTC).strftime("%Y-%m-%d %H:%M"),
        recipe=recipe.name,
        start=spent[START],
        steps=tuple(steps),
        checkpoint_copy=again.copy,
        checkpoint_write=again.write,
        grid=grid,
        held_out=_repeated(spent, HELD_OUT, again.held_out, part.held_out_factor),
        quality=_repeated(spent, QUALITY, again.quality, part.quality_factor),
        picture=grid.again / prompts * EVALUATION_STEPS / recipe.record.sample_steps if grid else None,
        features=None,
        pictures_encoded_per_second=None,
        memory_gb=memory,
        notes=tuple(notes + part.notes()),
    )


def with_encoding_and_evaluation(timings: Timings, recipe: Recipe, shapes: Shapes, world: World, reporter: Reporter = QUIET) -> Timings:
    """Return the timings with those of encoding and of evaluation.

    Of several recipes, the training of all is timed first: the peak memory of a process includes whatever it did before.
    """
    notes = list(timings.notes)
    encoded = _pictures_encoded(recipe, shapes, world, reporter, notes)
    return replace(timings, features=_seconds_of_features(world, notes), pictures_encoded_per_second=encoded, notes=tuple(notes))


@dataclass(frozen=True)
class _Part:
    """The recipe as it is timed. The factors say how much longer the whole takes than the part that is timed."""

    recipe: Recipe
    batches: tuple[int, ...]  # the whole recipe's, by phase
    grid_factor: float
    held_out_factor: float
    quality_factor: float

    @classmethod
    def of(cls, recipe: Recipe, shapes: Shapes, world: World) -> "_Part":
        """Return as much of the recipe as takes a moment, by an estimate of the machine's speed."""
        peak, _ = peak_flops(world.device, choose_dtype(recipe.engine.precision, world.device))
        speed = peak * ASSUMED_UTILISATION
        engine, phases = recipe.engine, []
        for phase in recipe.phases:
            seconds = phase_flops(recipe, phase, shapes) * time_factor(recipe, phase, shapes) / phase.steps / speed
            phases.append(_smaller(phase, LONGEST_STEP / seconds, engine.micro_batch))
        if engine.micro_batch:
            engine = replace(engine, micro_batch=min(engine.micro_batch, *(phase.batch_size for phase in phases)))
        picture = _forward_flops(recipe, shapes) * 4 * recipe.record.sample_steps / speed  # guidance and Heun: four passes a step
        record, least = recipe.record, 2
        prompts = max(1, min(len(record.sample_prompts), int(LONGEST_GRID / picture)))
        steps = max(least, min(record.sample_steps, int(record.sample_steps * LONGEST_GRID / (prompts * picture))))
        quality = max(LEAST_QUALITY_SAMPLES, min(record.quality_samples, int(LONGEST_GRID / picture * record.sample_steps / steps)))
        held_out = max(1, min(record.held_out_samples, int(LONGEST_GRID * speed / _forward_flops(recipe, shapes))))
        short = replace(
            record,
            sample_prompts=record.sample_prompts[:prompts],
            sample_steps=steps,
            quality_samples=quality,
            held_out_samples=held_out,
            fid_every=None,
            wandb_project=None,
        )
        step_factor = record.sample_steps / steps
        return cls(
            replace(recipe, phases=phases, engine=engine, record=short),
            tuple(phase.batch_size for phase in recipe.phases),
            step_factor * len(record.sample_prompts) / prompts,
            record.held_out_samples / held_out,
            step_factor * record.quality_samples / quality,
        )

    @property
    def is_whole(self) -> bool:
        """Whether steps were timed on whole batches, so that memory was measured too."""
        return self.batches == tuple(phase.batch_size for phase in self.recipe.phases)

    def notes(self) -> list[str]:
        smaller = [
            f"{phase.batch_size} of {batch} samples ({phase.name})"
            for phase, batch in zip(self.recipe.phases, self.batches, strict=True)
            if phase.batch_size < batch
        ]
        return [f"Steps were timed on {', '.join(smaller)}, and multiplied."] if smaller else []


def _smaller(phase: PhaseRecipe, share: float, micro_batch: int | None) -> PhaseRecipe:
    """Return the phase with at most this share of its batch, in whole micro-batches as long as there are some."""
    if share >= 1:
        return phase
    samples = max(1, int(share * phase.batch_size))
    if micro_batch and samples > micro_batch:
        samples -= samples % micro_batch
    return replace(phase, batch_size=samples)


def _forward_flops(recipe: Recipe, shapes: Shapes) -> float:
    """Return the FLOPs of one pass through the whole model for one image: a third of those of a training step without a mask."""
    p = recipe.model.patch_size
    tokens = sum(share * (height // p) * (width // p) for share, height, width in shapes.sides)
    return training_flops(config_of(recipe, shapes), round(tokens), round(tokens), shapes.caption_tokens) / 3


def _check_memory(recipe: Recipe, shapes: Shapes, world: World) -> None:
    """Raise UserError if even a single sample at a time would not fit: swapping would make every figure worthless."""
    gigabytes = memory_of(world.device) / 1e9
    for phase in recipe.phases:
        load = PhaseMemory(recipe, phase, shapes, 1)
        if load.best_plan(gigabytes) is None:
            raise load.no_fit_error(gigabytes, "this machine")


def _with_data(recipe: Recipe, shapes: Shapes, place: Path, notes: list[str]) -> Recipe:
    """Return the recipe without initial weights, on its own data, or on random numbers if any of that is not encoded yet."""
    recipe = replace(recipe, init_from=None)
    data = recipe.data
    paths = [item.path for item in data.named_sets.values()] + ([data.held_out] if data.held_out else [])
    if all(path is not None and has_manifest(location(path)) for path in paths):
        return recipe
    notes.append("The data is not encoded yet: random numbers of the shapes that are assumed took its place.")
    folder = place / "random"
    recipe, kind = _random_kind(recipe, shapes, notes)
    write_random_set(folder, max(ROWS, recipe.record.quality_samples), kind)
    sets = {name: SetRecipe(str(folder)) for name in data.named_sets}
    random = DataRecipe(
        sets=sets, resolution=shapes.resolution, horizontal_flip=data.horizontal_flip, held_out=str(folder) if data.held_out else None
    )
    return replace(recipe, data=random)


def _random_kind(recipe: Recipe, shapes: Shapes, notes: list[str]) -> tuple[Recipe, RandomSet]:
    """Return what random numbers to write. If the encoders cannot be loaded, no pictures can be drawn, and the recipe asks for none."""
    names = [("", ""), ("", "")]
    try:
        loaded = load_autoencoder(shapes.autoencoder), load_text_encoder(shapes.text_encoder)
        names = [(encoder.name, encoder.fingerprint) for encoder in loaded]
    except UserError as error:
        if recipe.record.sample_prompts or recipe.record.quality_every:
            notes.append(f"Drawing pictures was not timed: {error}")
        recipe = replace(recipe, record=replace(recipe.record, sample_prompts=[], quality_every=None))
    _, height, width = max(shapes.sides)
    pixels = round(shapes.resolution / (height * width) ** 0.5)
    aligned = recipe.alignment
    kind = RandomSet(
        resolution=shapes.resolution,
        sides=(height * pixels, width * pixels),
        latents=(shapes.latent_channels, height, width),
        caption=(shapes.caption_tokens, shapes.caption_channels),
        autoencoder=names[0],
        text_encoder=names[1],
        captions="int8" if recipe.model.mask_padding else "full",
        vision=(aligned.encoder, "") if aligned else None,
        feature_channels=shapes.feature_channels or 0,
    )
    return recipe, kind


def _trained(part: _Part, run: Path, world: World, reporter: Reporter, steps: list[int], bare: bool = False) -> Trainer:
    """Train so many steps of each stretch, behind its warm-up, and return the trainer. `bare` leaves out everything but steps."""
    short = _short(part.recipe, steps, bare)
    with reporter.progress(f"{'time steps of' if bare else 'try'} {part.recipe.name}", short.total_steps) as advance:
        trainer = Trainer(short, run, QUIET, world)
        trainer.train(on_step=lambda: advance(1))
    return trainer


def _short(recipe: Recipe, steps: list[int], bare: bool) -> Recipe:
    phases, aligned = [], 0
    for stretch, count in zip(stretches(recipe), steps, strict=True):
        for name, length in zip(_names(stretch), (WARM_UP, count), strict=True):
            phase = recipe.phases[stretch.phase]
            phases.append(replace(phase, name=name, steps=length, learning_rate=SLOW_RATE, warmup_steps=0, final_learning_rate=1.0))
            aligned += length * stretch.aligned
    total = sum(phase.steps for phase in phases)
    never = total + 1
    record = replace(recipe.record, samples_every=never, checkpoint_every=never, held_out_every=never)
    record = replace(record, quality_every=never if recipe.record.quality_every else None)
    data = recipe.data
    if bare:
        record, data = replace(record, sample_prompts=[], quality_every=None), replace(data, held_out=None)
    alignment = replace(recipe.alignment, until=aligned / total) if recipe.alignment and aligned else None
    averages = [replace(average, start=0) for average in recipe.ema]
    return replace(recipe, phases=phases, record=record, data=data, alignment=alignment, ema=averages)


def _names(stretch: Stretch) -> tuple[str, str]:
    """Return the names of the phases that hold a stretch's first steps, and those that are timed."""
    name = f"{stretch.phase}{' aligned' if stretch.aligned else ''}"
    return f"{name}, first", name


def _step_times(part: _Part, trainer: Trainer, steps: list[int]) -> list[StepTime]:
    found, spent = [], trainer.cost.seconds
    phases = {phase.name: phase for phase in trainer.recipe.phases}
    for stretch, count in zip(stretches(part.recipe), steps, strict=True):
        first, others = (spent[steps_part(phases[name])] for name in _names(stretch))
        samples = part.recipe.phases[stretch.phase].batch_size
        step = others / count
        whole = part.batches[stretch.phase] / samples
        found.append(StepTime(stretch.phase, stretch.aligned, step * whole, max(0.0, first - WARM_UP * step), samples))
    return found


def _more_steps(part: _Part, rough: list[StepTime], run: Path, world: World, seconds: float, reporter: Reporter) -> list[StepTime]:
    """Time as many steps of each stretch as take its part of `seconds`, or return the `rough` times if there is no time for more.

    The warm-up is that of the first run, which was cold as a training is.
    """
    each = seconds / len(rough)
    counts = []
    for stretch, time_of in zip(stretches(part.recipe), rough, strict=True):
        whole = part.batches[stretch.phase] / time_of.samples
        counts.append(max(FIRST_LOOK, int(each / max(1e-6, time_of.seconds / whole))))
    if max(counts) <= FIRST_LOOK:
        return rough
    gc.collect()
    if world.device.type == "cuda":
        torch.cuda.empty_cache()
    trainer = _trained(part, run, world, reporter, counts, bare=True)
    better = _step_times(part, trainer, counts)
    return [replace(new, warm_up=old.warm_up) for new, old in zip(better, rough, strict=True)]


class _Again:
    """Seconds of what a finished trainer does once more, None for what its recipe does not ask for."""

    def __init__(self, trainer: Trainer):
        self.copy = _seconds(trainer.save)
        self.write = _seconds(trainer.checkpoints.finish)
        self.grid = _seconds(trainer.sample) if trainer.recipe.record.sample_prompts else None
        self.held_out = self.quality = None
        if trainer.held_out is not None:
            held_out, loss = trainer.held_out, trainer.state.gradients.current_loss()
            self.held_out = _seconds(lambda: held_out.measure(loss, trainer.recipe.engine.compile))
        if trainer.quality is not None:
            quality = trainer.quality
            self.quality = _seconds(lambda: quality.measure(trainer.state.ema_model()))


def _seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def _repeated(spent: dict[str, float], part: str, again: float | None, factor: float) -> Repeated | None:
    """Return the whole's time from that of the part which was timed: what the first one took longer is loading, and stays."""
    if again is None:
        return None
    return Repeated(max(0.0, spent[part] - again) + factor * again, factor * again)


def _pictures_encoded(recipe: Recipe, shapes: Shapes, world: World, reporter: Reporter, notes: list[str]) -> float | None:
    """Return how many pictures a second are encoded: the first of the recipe's source if it names one, else of the emoji."""
    try:
        encoders = load_autoencoder(shapes.autoencoder), load_text_encoder(shapes.text_encoder)
        named = next((item.source for item in recipe.data.sets.values() if item.source), None)
        source = open_source(named or "emoji")
    except UserError as error:
        notes.append(f"Encoding was not timed: {error}")
        return None
    with reporter.progress("encode pictures", None):
        speed = _encoding_speed(source, TRIED, shapes.resolution, world, encoders)
        count = min(MOST_ENCODED, int(speed * ENCODING_SECONDS))
        return _encoding_speed(source, count, shapes.resolution, world, encoders) if count > TRIED else speed


def _encoding_speed(source: Source, count: int, resolution: int, world: World, encoders: tuple[Autoencoder, TextEncoder]) -> float:
    device = world.device
    first = Source(source.name, [Part("first", lambda: islice(source.parts[0].records(), count))], source.caption_weights)
    settings = EncodeSettings(
        (resolution,),
        dtype=str(choose_dtype("auto", device)).removeprefix("torch."),
        device=device,
        batch_size=default_batch_size(device, (resolution,)),
        workers=default_workers(device.type),
    )
    with TemporaryDirectory(prefix="microdit-bench-") as place:
        started = time.perf_counter()
        manifest = encode_source(first, Path(place) / "set", settings, *encoders)
        assert manifest is not None, "nobody else writes this folder"
        return manifest["seen"] / (time.perf_counter() - started)


def _seconds_of_features(world: World, notes: list[str]) -> float | None:
    """Return the seconds in which the network that `microdit evaluate` uses looks at a picture."""
    from microdit.data.sources.builtin import emoji_images

    try:
        network = EfficientNetFeatures(world.device)
    except UserError as error:
        notes.append(f"Evaluation was not timed: {error}")
        return None
    images = [row.image for row in islice(emoji_images("train"), LOOKED_AT)]
    network(images)
    return _seconds(lambda: network(images)) / LOOKED_AT
