"""The steps of the command line as functions, each with the defaults of its command. `import microdit` offers them all.

They print nothing: hand in `Reporter(console)` to see progress. What cannot be done is raised as a `UserError`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from microdit.io.console import QUIET, Reporter

if TYPE_CHECKING:
    from PIL import Image

    from microdit.config.schema import Recipe
    from microdit.data.dataset import EncodedDataset
    from microdit.data.sources.base import Source
    from microdit.io.places import Place
    from microdit.pipelines.pipeline import MicroDiTPipeline
    from microdit.pipelines.settings import SamplerSettings


def sample(
    model: MicroDiTPipeline | Path | str,
    prompts: str | Sequence[str],
    settings: SamplerSettings | None = None,
    *,
    seed: int = 0,
    negative_prompts: Sequence[str] = (),
    size: tuple[int | None, int | None] = (None, None),
    device: str = "auto",
    reporter: Reporter = QUIET,
) -> list[Image.Image]:
    """Return one image for each prompt, as `microdit sample` makes them.

    `model` is a run folder, an exported folder, a hub id, "demo" for the model that comes with microdit, or a pipeline that is loaded
    already. `settings` are by default those that suit it. Image i starts from the noise of seed + i, whatever the other prompts are.
    `size` is (height, width) in pixels, by default that of the training data. `negative_prompts` holds one for all images, or one for each.

    >>> from microdit import SamplerSettings
    >>> heart, owl = sample("demo", ["red heart", "owl"], SamplerSettings(num_inference_steps=2), seed=7)
    >>> heart.size
    (64, 64)
    """
    from microdit.devices import choose_device, choose_dtype
    from microdit.pipelines.open_model import open_model
    from microdit.pipelines.pipeline import DEMO
    from microdit.pipelines.settings import suited_to

    if isinstance(model, Path | str):
        where = choose_device(device)
        place = DEMO if model == "demo" else model
        pipeline = open_model(str(place), reporter.warn).pipeline.to(where, choose_dtype("auto", where))
    else:
        pipeline = model
    return pipeline.generate(
        [prompts] if isinstance(prompts, str) else list(prompts),
        settings or suited_to(pipeline.objective),
        seed,
        height=size[0],
        width=size[1],
        negative_prompts=list(negative_prompts),
        warn=reporter.warn,
    )


def encode_dataset(
    source: Source | str,
    out: Path | str,
    resolutions: Sequence[int] = (64,),
    autoencoder: str = "icon",
    text_encoder: str = "minilm",
    *,
    features: str | None = None,
    device: str = "auto",
    reporter: Reporter = QUIET,
) -> EncodedDataset:
    """Encode images and captions into the folder or place `out`, as `microdit data encode` does, and open the result.

    `source` is what `open_source` returns or takes. The encoders are named as on the command line; `features` names a vision encoder whose
    features are stored too, for representation alignment. An encoding that was interrupted goes on behind its last whole shard; images
    whose shorter side is below the smallest resolution are rejected.

    >>> encoded = encode_dataset("my-pictures", "data/mine")
    >>> len(encoded), encoded.latent_shape()
    (12, (8, 8, 8))
    """
    from microdit.data.dataset import EncodedDataset
    from microdit.data.encode import EncodeSettings, default_batch_size, encode_source
    from microdit.data.encode_plan import EncodeEvents
    from microdit.data.sources.open import open_source
    from microdit.devices import choose_device, choose_dtype
    from microdit.encoders.autoencoder import load_autoencoder
    from microdit.encoders.text import load_text_encoder
    from microdit.encoders.vision import load_vision_encoder
    from microdit.evaluation.reconstruction import save_reconstructions
    from microdit.io.places import location

    opened, place = open_source(source) if isinstance(source, str) else source, location(out)
    where, sides = choose_device(device), tuple(resolutions)
    settings = EncodeSettings(
        resolutions=sides,
        min_side=min(sides) if opened.min_side is None else opened.min_side,
        dtype=str(choose_dtype("auto", where)).removeprefix("torch."),
        device=where,
        batch_size=default_batch_size(where, sides),
    )
    encoders = load_autoencoder(autoencoder), load_text_encoder(text_encoder)
    vision = None if features is None else load_vision_encoder(features)

    def show(folder: Path) -> None:
        save_reconstructions(opened, folder, encoders[0], min(sides), reporter)

    with reporter.progress(f"encode {opened.name}", len(opened.parts)) as advance:
        events = EncodeEvents(lambda _, parts: advance(parts), show)
        encode_source(opened, place, settings, *encoders, events=events, warn=reporter.warn, vision=vision)
    return EncodedDataset(place, sides[0])


def train(
    recipe: Recipe | Path | str,
    out: Path | str | None = None,
    resume: bool = False,
    reporter: Reporter = QUIET,
    *,
    overrides: Sequence[str] = (),
) -> Path | Place:
    """Train a recipe, as `microdit train` does, and return its run folder, by default runs/NAME; `out` may be in an object store.

    `recipe` is a `Recipe`, a YAML file, or the name of a bundled recipe; `overrides`, such as "phases.0.steps=100", are for the last two.
    With `resume` a run that is there goes on from its newest intact checkpoint, with the same losses to the last bit.

    >>> run = train("my-pictures", overrides=["phases.0.steps=2", "phases.0.batch_size=4", "phases.1.steps=2", "phases.1.batch_size=4"])
    >>> (run / "metrics.jsonl").exists()
    True
    """
    from microdit.config.load import load_recipe
    from microdit.config.schema import Recipe
    from microdit.distributed import start_world, stop_world
    from microdit.io.places import location
    from microdit.training.multi_phase import RunSettings, default_run_folder, train_one

    loaded = recipe if isinstance(recipe, Recipe) else load_recipe(recipe, list(overrides))
    run = location(out) if out is not None else default_run_folder(loaded.name)
    world = start_world(loaded.engine.device)
    try:
        train_one(loaded, run, RunSettings(resume), reporter, world)
    finally:
        stop_world()
    return run


def evaluate(
    model: Path | str,
    reference: Source | str | None = None,
    count: int | None = None,
    metrics: Sequence[str] | None = None,
    out: Path | str | None = None,
    *,
    device: str = "auto",
    reporter: Reporter = QUIET,
) -> Mapping[str, Any]:
    """Compare images that a model generates with a reference set, as `microdit evaluate` does.

    The reference is by default the run's own held-out set, or else its training set, as the autoencoder decodes them. The captions of
    `count` of its records are the prompts, by default 256, or all of the run's own if they are fewer. `metrics` are names such as "fid"
    and "kid", by default all that need no download. Returns what metrics.json in the folder `out` holds (by default MODEL/evaluation):
    under "metrics" each value with its 95% interval and network. A report.html lies beside it.

    >>> figures = evaluate("runs/my-pictures", "my-pictures", count=8, metrics=["kid"])
    >>> sorted(figures["metrics"]["kid"])[:3]
    ['fingerprint', 'high', 'low']
    """
    from microdit.data.sources.open import open_source
    from microdit.devices import choose_dtype
    from microdit.distributed import start_world, stop_world
    from microdit.evaluation.evaluate import EvaluationSettings
    from microdit.evaluation.evaluate import evaluate as compare_with_reference
    from microdit.evaluation.generators import Compute, DrawSettings, open_generator
    from microdit.evaluation.metrics.registry import choose_metrics
    from microdit.evaluation.own_reference import COUNT, own_count, own_reference
    from microdit.pipelines.pipeline import DEMO

    place = DEMO if model == "demo" else model
    chosen = choose_metrics(",".join(metrics) if metrics else None)
    settings, folder = DrawSettings.suited_to(str(place), None, None, 0), Path(out) if out is not None else Path(place) / "evaluation"
    source = open_source(reference) if isinstance(reference, str) else reference
    world = start_world(device)
    try:
        if source is None:
            source = own_reference(Path(place), folder, world, reporter)
            count = count or own_count(source)
        question = EvaluationSettings(chosen, count or COUNT)
        generator = open_generator(str(place), settings, reporter.warn, Compute(world.device, choose_dtype("auto", world.device)))
        return compare_with_reference(generator, source, question, settings, folder, world, reporter=reporter)
    finally:
        stop_world()
