"""Estimate what recipes cost: FLOPs, hours and dollars of each phase, its memory, and the encoding and storage of the data."""

from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from microdit.config.schema import Recipe
from microdit.data.packing import bytes_of_row
from microdit.data.shards import CHECKSUM_BYTES
from microdit.planning.bill import Bill, bill_of, evaluation_seconds
from microdit.planning.hardware import Chip, Machine
from microdit.planning.memory import Footprint, MemoryPlan, PhaseMemory, usable
from microdit.planning.timings import Timings, find_timings
from microdit.planning.workload import KnownShapes, PhaseCost, Shapes, assumed_shapes, phase_costs, shapes_of

STORED_TOKENS = 25  # of a caption, on average: padding is not stored (docs/storage.md)
UTILISATION = 0.25  # of the chip's peak in the dtype, by the encoders: assumed, not measured
TF32_SHARE = 0.5  # of the 16-bit peak: what convolutions in float32 are on chips that have bfloat16, from the vendors' sheets
FLOAT32_TERAFLOPS = {"V100 32 GB": 15.7, "V100": 15.7, "T4": 8.1}  # chips without bfloat16, on which SDXL's autoencoder is left float32
MILLION = 1_000_000


@dataclass(frozen=True)
class EncodingCost:
    """Cost of encoding `images` pictures at all of the recipe's resolutions.

    `assumed` says that the number of images is a guess. `bytes_per_sample` is by storage format; for a set that is encoded already it is
    what the set takes on disk. Hours and dollars are those of the dtype that `data encode` chooses by default, the first of
    `hours_by_dtype`; they are None for encoded sets and for encoders whose FLOPs are not known.
    """

    images: int
    assumed: bool
    encoded: bool
    bytes_per_sample: dict[str, float]  # by the form that latents and captions are stored in
    flops_per_sample: float | None
    gpu_hours: float | None
    dollars: float | None
    hours_by_dtype: dict[str, float] = field(default_factory=dict)


def encoding_cost(shapes: list[Shapes], machine: Machine, images: int | None) -> EncodingCost:
    """Estimate the encoding for the `shapes` of the recipes' phases; each resolution is stored once.

    `images` defaults to the number of encoded samples, else to a million.
    """
    by_resolution = list({item.resolution: item for item in shapes}.values())
    first = by_resolution[0]
    if first.samples is not None and first.bytes is not None:
        return EncodingCost(images or first.samples, False, True, {"as encoded": first.bytes / first.samples}, None, None, None)
    stored = {form: _stored(by_resolution, form) for form in ("fp16", "int8")}
    count = images or MILLION
    if (first.autoencoder, first.text_encoder) != ("sdxl", "dfn-clip-h"):
        return EncodingCost(count, images is None, False, stored, None, None, None)
    flops = clip_h_text_flops(first.caption_tokens) + sum(
        share * sdxl_encoder_flops(h, w) for item in by_resolution for share, h, w in item.sides
    )
    hours = {dtype: count * flops / (peak * 1e12 * UTILISATION) / 3600 for dtype, peak in encoding_teraflops(machine.chip).items()}
    first_hours = next(iter(hours.values()))
    return EncodingCost(count, images is None, False, stored, flops, first_hours, first_hours * machine.price.dollars, hours)


def encoding_teraflops(chip: Chip) -> dict[str, float]:
    """Return the chip's peak in each dtype that encoding may use, first the default of `data encode`.

    float32 is an upper bound where it means TF32: PyTorch uses TF32 for convolutions, not for the text tower's products.
    """
    if chip.name in FLOAT32_TERAFLOPS:
        return {"float32": FLOAT32_TERAFLOPS[chip.name]}
    return {"bfloat16": chip.teraflops, "float32": chip.teraflops * TF32_SHARE}


def sdxl_encoder_flops(height: int, width: int) -> int:
    """Return the FLOPs of the encoder of SDXL's autoencoder for latents of that size (tests count them on diffusers' own).

    They are those of its convolutions and of the self-attention over all latents in its middle block.
    """
    latents = height * width
    return latents * (264_233_088 + 4 * 512 * latents)


def clip_h_text_flops(tokens: int) -> int:
    """Return the FLOPs of CLIP-H's text tower: 24 layers of width 1024, with a feed-forward width of 4096."""
    return 24 * (24 * tokens * 1024**2 + 4 * tokens**2 * 1024)


def _stored(by_resolution: list[Shapes], form: str) -> float:
    latents = sum(
        share * item.latent_channels * bytes_of_row(height * width, form)  # type: ignore[arg-type]
        for item in by_resolution
        for share, height, width in item.sides
    )
    text = STORED_TOKENS * bytes_of_row(by_resolution[0].caption_channels, form)  # type: ignore[arg-type]
    return latents + text + CHECKSUM_BYTES * (len(by_resolution) + 1)


SMALL_CARD_GB = 24  # what a good card for games has


@dataclass(frozen=True)
class PhaseEstimate:
    """The estimate for one phase of the recipe called `recipe`.

    `asked` and `parts` are the memory with the recipe's own engine settings. `divides` says whether its micro-batch divides a GPU's part of
    the batch, which `microdit train` requires. `advice` is the best plan for the chip, `small` the best for as many cards of 24 GB, and
    `small_alone` for one such card; None means that nothing fits.
    """

    recipe: str
    bill: PhaseCost
    asked: MemoryPlan
    parts: Footprint
    fits: bool
    divides: bool
    advice: MemoryPlan
    small: MemoryPlan | None
    small_alone: MemoryPlan | None


@dataclass(frozen=True)
class Estimate:
    machine: Machine
    parameters: int
    phases: list[PhaseEstimate]
    encoding: EncodingCost
    assumed: tuple[str, ...]
    flops: float
    images: int
    hours: float
    dollars: float
    measured: "Measured | None" = None

    def as_dict(self) -> dict[str, Any]:
        """Return the estimate as JSON values."""
        return asdict(self)


def estimate(
    recipes: dict[str, Recipe],
    machine: Machine,
    given: KnownShapes = KnownShapes(),  # noqa: B008 (frozen)
    images: int | None = None,
    check: Callable[[], None] = lambda: None,
) -> Estimate:
    """Estimate a series of recipes on `machine`.

    `images` is how many to encode. `check` is called before each slow computation and may raise to cancel it.
    Raises UserError for what cannot be trained on that machine.
    """
    shapes = {name: shapes_of(recipe, given) for name, recipe in recipes.items()}
    phases = [phase for name, recipe in recipes.items() for phase in _phases(name, recipe, shapes[name], machine, check)]
    bills = [phase.bill for phase in phases]
    last = list(recipes)[-1]
    return Estimate(
        machine,
        PhaseMemory(recipes[last], recipes[last].phases[-1], shapes[last], machine.count, check).parameters,
        phases,
        encoding_cost(list(shapes.values()), machine, images),
        tuple(dict.fromkeys(sentence for item in shapes.values() for sentence in item.assumed)),
        sum(item.flops for item in bills),
        sum(item.images for item in bills),
        sum(item.hours for item in bills),
        sum(item.dollars for item in bills),
    )


@dataclass(frozen=True)
class Measured:
    """The bills of recipes that were timed on this machine, by name, with the `date` of the oldest measurement.

    `evaluation` is the seconds of `microdit evaluate` after the last one, None if that was not timed.
    """

    bills: dict[str, Bill]
    date: str
    pictures_encoded_per_second: float | None
    evaluation: float | None

    @property
    def seconds(self) -> float:
        """All bills together. Evaluation comes afterwards, and is not in it."""
        return sum(bill.seconds for bill in self.bills.values())


def find_all_timings(recipes: dict[str, Recipe], given: KnownShapes = KnownShapes()) -> dict[str, Timings]:  # noqa: B008 (frozen)
    """Return the measurements of those recipes that were timed on this machine. Raises UserError if one is damaged."""
    found = {name: find_timings(recipe, shapes_of(recipe, given), assumed_shapes(recipe, given)) for name, recipe in recipes.items()}
    return {name: timings for name, timings in found.items() if timings is not None}


def with_measured_times(estimated: Estimate, recipes: dict[str, Recipe], timings: dict[str, Timings], images: int | None) -> Estimate:
    """Return the estimate with the times and the utilisation that were measured for all of its recipes on this machine.

    `images` is the number of pictures to encode, if that is known. They are encoded once at each resolution.
    """
    bills: dict[str, Bill] = {}
    resolutions: set[int] = set()
    for name, recipe in recipes.items():
        resolution = next(phase.bill.resolution for phase in estimated.phases if phase.recipe == name)
        is_due = images is not None and not estimated.encoding.encoded and resolution not in resolutions
        resolutions.add(resolution)
        bills[name] = bill_of(recipe, timings[name], images if is_due and images else 0)
    machine, steps = estimated.machine, [line.seconds for bill in bills.values() for line in bill.steps]
    phases = []
    for phase, seconds in zip(estimated.phases, steps, strict=True):
        bill = replace(phase.bill, hours=seconds / 3600, dollars=machine.dollars(seconds / 3600))
        phases.append(replace(phase, bill=bill))
    share = estimated.flops / sum(steps) / (machine.chip.teraflops * 1e12)
    last = timings[list(recipes)[-1]]
    date = min(item.date for item in timings.values())
    return replace(
        estimated,
        machine=replace(machine, utilisation=share, utilisation_source=f"measured on {date} by microdit bench --recipe"),
        phases=phases,
        hours=sum(phase.bill.hours for phase in phases),
        dollars=sum(phase.bill.dollars for phase in phases),
        measured=Measured(bills, date, last.pictures_encoded_per_second, evaluation_seconds(last)),
    )


def _phases(name: str, recipe: Recipe, shapes: Shapes, machine: Machine, check: Callable[[], None]) -> list[PhaseEstimate]:
    found = []
    for phase, cost in zip(recipe.phases, phase_costs(recipe, shapes, machine), strict=True):
        load, alone = PhaseMemory(recipe, phase, shapes, machine.count, check), PhaseMemory(recipe, phase, shapes, 1, check)
        advice = load.best_plan(machine.chip.memory_gb)
        if advice is None:
            raise load.no_fit_error(machine.chip.memory_gb, machine.chip.name)
        asked, parts = load.as_configured(recipe, machine.chip.memory_gb)
        fits = parts.total <= usable(machine.chip.memory_gb)
        divides = load.share % (recipe.engine.micro_batch or load.share) == 0
        small = load.best_plan(SMALL_CARD_GB), alone.best_plan(SMALL_CARD_GB)
        found.append(PhaseEstimate(name, cost, asked, parts, fits, divides, advice, *small))
    return found
