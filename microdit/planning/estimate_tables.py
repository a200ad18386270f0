"""Print an estimate and a plan as tables."""

from collections.abc import Callable
from typing import Any, Literal

from rich.box import SIMPLE_HEAD
from rich.table import Column, Table
from rich.text import Text

from microdit.io.console import PlainConsole, joined, styled
from microdit.planning.bill import Bill, Compared, Comparison
from microdit.planning.estimate import MILLION, SMALL_CARD_GB, STORED_TOKENS, UTILISATION, EncodingCost, Estimate, Measured, PhaseEstimate
from microdit.planning.memory import HEADROOM, MemoryPlan
from microdit.planning.planner import Plan
from microdit.reports.formats import MISSING, count, duration, figure, hours, money

WIDE = 1000  # characters, more than any table takes


def print_estimate(budget: Estimate, console: PlainConsole) -> None:
    machine = budget.machine
    console.print(
        joined(
            styled(f"{budget.parameters / 1e6:,.1f} M parameters, on {machine.count} x {machine.chip.name}"),
            f" ({machine.chip.teraflops:,.4g} TFLOP/s, {machine.chip.memory_gb:g} GB each)",
        )
    )
    console.print(
        f"utilisation {machine.utilisation:.1%} ({machine.utilisation_source}); "
        f"{money(machine.price.dollars)} a GPU-hour ({machine.price.source})",
        soft_wrap=True,
    )
    if budget.assumed:
        console.print(f"assumed, for want of the encoded data: {'; '.join(budget.assumed)}", soft_wrap=True)
    costs = _costs(budget)
    if console.measure(costs, options=console.options.update(max_width=WIDE)).maximum > console.width:
        costs.padding = 0  # large sums: closer together rather than cut
    console.print(costs)
    if budget.measured is not None:
        _print_measured(budget, budget.measured, console)
    for table in (_memory(budget), _ways(budget)):
        console.print(table)
    data = _data(budget.encoding) if budget.measured is None else _data(budget.encoding)[:1]
    for line in [_fit_sentence(budget), *_settings(budget), *data]:
        console.print(line, soft_wrap=True)


def print_plan(plan: Plan, budget: Estimate, console: PlainConsole) -> None:
    """`budget`: of the plan's recipes."""
    for line in plan.describe():
        console.print(line, soft_wrap=True)
    print_estimate(budget, console)
    if plan.encoding.dollars is not None:
        parts = f"Training {money(budget.dollars)} and encoding {money(plan.encoding.dollars)}"
        spent = money(budget.dollars + plan.encoding.dollars)
        console.print(joined(f"{parts}: ", styled(f"{spent} of {money(plan.dollars)}"), "."))
        if plan.encoding.images > budget.images:
            console.print(f"Only {_short(budget.images)} images are seen: encode no more of them (--images).")


def _print_measured(budget: Estimate, measured: Measured, console: PlainConsole) -> None:
    for name, bill in measured.bills.items():
        print_bill(name, bill, console)
    whole = budget.machine.dollars(measured.seconds / 3600)
    parts: list[str | Text] = [styled(f"{duration(measured.seconds)} in all"), f", {money(whole)}." if whole else "."]
    if measured.evaluation is not None:
        parts.append(f" Afterwards microdit evaluate takes about {duration(measured.evaluation)} with its defaults.")
    if measured.pictures_encoded_per_second and not budget.encoding.encoded:
        parts.append(f" {figure(measured.pictures_encoded_per_second, 3)} pictures a second are encoded")
        parts.append(": say how many with --images." if budget.encoding.assumed else ".")
    console.print(joined(*parts), soft_wrap=True)


def print_bill(name: str, bill: Bill, console: PlainConsole) -> None:
    """Print what each part of a training takes, as it was measured."""
    table = _table(f"What {name} takes, part by part", "times", "each", "in all", first="part")
    for line in bill.lines:
        each = duration(line.seconds / line.times) if line.times else MISSING
        table.add_row(line.part, count(line.times), each, duration(line.seconds))
    table.add_section()
    table.add_row("all", "", "", duration(bill.seconds), style="bold")
    console.print(table)
    for note in bill.notes:
        console.print(note, soft_wrap=True)


def print_comparison(name: str, found: Comparison, console: PlainConsole) -> None:
    """Print planned beside actual time, memory and dollars of a finished run."""
    table = _table(f"{name}: planned and actual", "planned", "actual", "planned/actual", first="part")
    for row in found.parts:
        table.add_row(row.what, duration(row.planned), duration(row.actual), _ratio(row))
    table.add_section()
    total, memory, dollars = found.total, found.memory, found.dollars
    table.add_row("all", duration(total.planned), duration(total.actual), _ratio(total), style="bold")
    table.add_row("memory, GB", figure(memory.planned, 3), figure(memory.actual, 3), _ratio(memory))
    if dollars.planned is not None or dollars.actual is not None:
        table.add_row("dollars", money(dollars.planned), money(dollars.actual), _ratio(dollars))
    console.print(table)
    if not found.has_plan:
        console.print("No plan was made: before a run, microdit bench --recipe RECIPE measures what it takes here.", soft_wrap=True)


def _ratio(row: Compared) -> str:
    return MISSING if row.ratio is None else f"{row.ratio:.2f}"


def _costs(budget: Estimate) -> Table:
    table = _table("What it costs", "px", "drop", "steps", "batch", "images", "GFLOPs/\nsample", "EFLOPs", "hours", "dollars")
    for phase in budget.phases:
        b = phase.bill
        numbers = [count(b.steps), count(b.batch_size), _short(b.images), figure(b.flops_per_sample / 1e9), figure(b.flops / 1e18)]
        table.add_row(b.name, str(b.resolution), _dropped(b.mask_ratios), *numbers, _time(b.hours), money(b.dollars))
    table.add_section()
    totals = [_short(budget.images), "", figure(budget.flops / 1e18), _time(budget.hours), money(budget.dollars)]
    table.add_row("all", "", "", "", "", *totals, style="bold")
    all_of_it = "in all" if budget.measured is None else "for the steps"
    table.caption = f"{duration(3600 * budget.hours)} {all_of_it}"
    return table


def _memory(budget: Estimate) -> Table:
    """`gathered` are low-precision copies of weights. The total is less than the sum where gradients come as activations go."""
    table = _table("GB on each GPU, as the recipe says", "weights", "grads", "moments", "averages", "activations", "copies", "total")
    for phase in budget.phases:
        p = phase.parts
        parts = (p.parameters, p.gradients + p.passing, p.moments, p.averages, p.activations, p.gathered, p.total)
        table.add_row(phase.bill.name, *(f"{part / 1e9:.2f}" for part in parts))
    return table


def _ways(budget: Estimate) -> Table:
    columns = _places(budget)
    table = _table("Does it fit? Micro-batch, sharding, GB in use", "as the recipe says", *columns, justify="left")
    for phase in budget.phases:
        table.add_row(phase.bill.name, _asked(phase), *(_plan_cell(choose(phase)) for choose in columns.values()))
    table.caption = f"{HEADROOM:.0%} of a card is left free. recomputed: a second forward pass of the blocks or of the first of them."
    return table


def _fit_sentence(budget: Estimate) -> Text:
    """Return a sentence that says on which cards each phase fits."""
    fits = {"As it is": [phase.bill.name for phase in budget.phases if not (phase.fits and phase.divides)]}
    for place, choose in _places(budget).items():
        fits[place.replace("on", "On", 1)] = [phase.bill.name for phase in budget.phases if choose(phase) is None]
    said = [
        joined(f" {place}: ", styled("no", "red"), f", not {', '.join(missing)}.") if missing else joined(f" {place}: yes.")
        for place, missing in fits.items()
    ]
    return joined(styled("Fits?"), *said)


def _settings(budget: Estimate) -> list[Text]:
    """Return for each phase that does not fit as it is which overrides make it fit, and what they cost."""
    lines = []
    for phase in budget.phases:
        if phase.fits and phase.divides:
            continue
        time = phase.advice.time
        costs = f"{time - 1:.0%} more time" if time > 1 else "no more FLOPs"
        lines.append(joined(styled(phase.bill.name), f" fits with {' '.join(phase.advice.overrides())} ({costs})."))
    return lines


def _places(budget: Estimate) -> dict[str, Callable[[PhaseEstimate], MemoryPlan | None]]:
    """Return the machine, as many cards of 24 GB, and one such card, without duplicates, each with its plan of a phase."""
    gpus, memory = budget.machine.count, budget.machine.chip.memory_gb
    places: dict[str, Callable[[PhaseEstimate], MemoryPlan | None]] = {f"on {gpus} x {memory:g} GB": lambda phase: phase.advice}
    places.setdefault(f"on {gpus} x {SMALL_CARD_GB} GB", lambda phase: phase.small)
    places.setdefault(f"on 1 x {SMALL_CARD_GB} GB", lambda phase: phase.small_alone)
    return places


def _data(data: EncodingCost) -> list[Text]:
    images = f"{_short(data.images)} images"
    size = ", ".join(
        f"{value * data.images / 1e9:,.4g} GB ({form}, {value:,.0f} bytes each)" for form, value in data.bytes_per_sample.items()
    )
    taken = joined(styled("Data:"), f" {images} take {size}.")
    if data.encoded:
        return [taken]
    taken.append(f" Captions of {STORED_TOKENS} tokens on average.")
    if data.assumed:
        taken.append(" Say how many with --images.")
    if data.gpu_hours is None or data.flops_per_sample is None:
        return [taken, joined("What these encoders cost is not known here: only the SDXL autoencoder and DFN5B-CLIP-H are estimated.")]
    dtype, *others = data.hours_by_dtype
    rate = (
        f"{data.flops_per_sample / 1e12:.3g} TFLOPs a sample, {UTILISATION:.0%} of the peak assumed, reading and decoding files not counted"
    )
    slower = "".join(f"; in {other} at least {_time(data.hours_by_dtype[other])}" for other in others)
    cost = f" them once in {dtype}: {_gpu_hours(data.gpu_hours)}, {money(data.dollars)} ({rate}{slower})."
    return [taken, joined(styled("Encoding"), cost)]


def _table(title: str, *columns: str, justify: Literal["left", "right"] = "right", first: str = "phase") -> Table:
    """Narrow enough for 80 characters. Where names are too long for that they go on below; numbers stay whole."""
    look: dict[str, Any] = {"title_justify": "left", "title_style": "bold", "caption_justify": "left", "caption_style": "dim"}
    table = Table(Column(first, overflow="fold"), title=title, box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, **look)
    for column in columns:
        table.add_column(column, justify=justify, no_wrap=justify == "right")
    return table


def _asked(phase: PhaseEstimate) -> Text:
    if not phase.divides:
        return styled("micro_batch does not divide a GPU's share of the batch", "red")
    return _plan_cell(phase.asked) if phase.fits else styled(f"{_plan_cell(phase.asked)}: too much", "red")


def _plan_cell(way: MemoryPlan | None) -> Text:
    if way is None:
        return styled("does not fit", "red")
    return joined(way.summary())


def _gpu_hours(number: float) -> str:
    return f"{hours(number)} GPU-hours" if number >= 1 else f"{duration(3600 * number)} of a GPU"


def _time(number: float) -> str:
    """Hours; less than one in minutes and seconds, with their units."""
    return hours(number) if number >= 1 else duration(3600 * number)


def _dropped(ratios: tuple[float, float]) -> str:
    first, last = (f"{ratio:.0%}" for ratio in ratios)
    return first if first == last else f"{first[:-1]}-{last}"


def _short(number: float) -> str:
    """12.3 M, 1,230 M"""
    return f"{figure(number / 1e6, 3)} M" if number >= MILLION else count(number)
