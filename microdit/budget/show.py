"""A budget as tables that a person understands at once."""

from collections.abc import Callable

from rich.console import Console
from rich.table import Table

from microdit.budget.encoding import MILLION, STORED_TOKENS, UTILISATION, Encoding
from microdit.budget.fit import HEADROOM, Way
from microdit.budget.reckoning import SMALL_CARD_GB, Budget, PhaseBudget
from microdit.formats import count, duration, hours, money


def show(budget: Budget, console: Console) -> None:
    machine = budget.machine
    console.print(
        f"[bold]{budget.parameters / 1e6:,.1f} M parameters, on {machine.count} x {machine.chip.name}[/] "
        f"({machine.chip.teraflops:,.4g} TFLOP/s, {machine.chip.memory_gb} GB each)",
        highlight=False,
    )
    console.print(
        f"utilisation {machine.utilisation:.1%} ({machine.utilisation_source}); "
        f"{money(machine.price.dollars)} a GPU-hour ({machine.price.source})",
        highlight=False,
        soft_wrap=True,
    )
    if budget.assumed:
        console.print(f"assumed, for want of the encoded data: {'; '.join(budget.assumed)}", highlight=False, soft_wrap=True)
    for table in (_costs(budget), _memory(budget), _ways(budget)):
        console.print(table)
    for line in _data(budget.encoding):
        console.print(line, highlight=False, soft_wrap=True)


def _costs(budget: Budget) -> Table:
    table = _table("What it costs", "phase", "px", "dropped", "steps", "batch", "images", "GFLOPs a sample", "EFLOPs", "hours", "dollars")
    for phase in budget.phases:
        b = phase.bill
        numbers = [count(b.steps), count(b.batch_size), _short(b.images), f"{b.flops_per_sample / 1e9:,.4g}", f"{b.flops / 1e18:,.4g}"]
        table.add_row(b.name, str(b.resolution), _dropped(b.mask_ratios), *numbers, hours(b.hours), money(b.dollars))
    table.add_section()
    totals = [_short(budget.images), "", f"{budget.flops / 1e18:,.4g}", hours(budget.hours), money(budget.dollars)]
    table.add_row(f"all: {duration(3600 * budget.hours)}", "", "", "", "", *totals, style="bold")
    return table


def _memory(budget: Budget) -> Table:
    parts = ("parameters", "gradients", "moments", "averages", "activations", "gathered")
    names = ("weights", *parts[1:])
    card = budget.machine.chip.memory_gb
    table = _table("GB on each GPU, as the recipe's engine says", "phase", *names, "total", f"fits {card} GB?")
    for phase in budget.phases:
        values = [f"{getattr(phase.parts, part) / 1e9:.2f}" for part in parts]
        verdict = "[green]yes[/]" if phase.fits else "[red]no[/]"
        table.add_row(phase.bill.name, *values, f"{phase.asked.gigabytes:.1f}", f"{verdict}: {_setting(phase.asked)}")
    return table


def _ways(budget: Budget) -> Table:
    gpus, memory = budget.machine.count, budget.machine.chip.memory_gb
    columns: dict[str, Callable[[PhaseBudget], Way | None]] = {f"on {gpus} x {memory} GB": lambda phase: phase.advice}
    columns.setdefault(f"on {gpus} x {SMALL_CARD_GB} GB", lambda phase: phase.small)
    columns.setdefault(f"on 1 x {SMALL_CARD_GB} GB", lambda phase: phase.small_alone)
    table = Table(
        "phase", *columns, title=f"Engine settings that fit, {HEADROOM:.0%} of the card left free", title_justify="left", title_style="bold"
    )
    for phase in budget.phases:
        table.add_row(phase.bill.name, *(_way(choose(phase)) for choose in columns.values()))
    return table


def _data(data: Encoding) -> list[str]:
    images = f"{_short(data.images)} images"
    size = ", ".join(
        f"{value * data.images / 1e9:,.4g} GB ({form}, {value:,.0f} bytes each)" for form, value in data.bytes_per_sample.items()
    )
    lines = [f"[bold]Data:[/] {images} take {size}."]
    if data.encoded:
        return lines
    lines[0] += f" Captions of {STORED_TOKENS} tokens on average."
    if data.images == MILLION:
        lines[0] += " Say how many with --images."
    if data.gpu_hours is None or data.flops_per_sample is None:
        return [*lines, "What these encoders cost is not known here: only the SDXL autoencoder and DFN5B-CLIP-H are reckoned."]
    rate = (
        f"{data.flops_per_sample / 1e12:.3g} TFLOPs a sample, {UTILISATION:.0%} of the peak assumed, reading and decoding files not counted"
    )
    return [*lines, f"[bold]Encoding[/] them once: {hours(data.gpu_hours)} GPU-hours, {money(data.dollars)} ({rate})."]


def _table(title: str, first: str, *columns: str) -> Table:
    table = Table(first, title=title, title_justify="left", title_style="bold")
    for column in columns:
        table.add_column(column, justify="right")
    return table


def _way(way: Way | None) -> str:
    return "[red]does not fit[/]" if way is None else f"{_setting(way)} ({way.gigabytes:.1f} GB)"


def _setting(way: Way) -> str:
    return f"micro-batch {way.micro_batch}, {way.sharding}{', recomputed' if way.checkpointing else ''}"


def _dropped(ratios: tuple[float, float]) -> str:
    first, last = (f"{ratio:.0%}" for ratio in ratios)
    return first if first == last else f"{first} to {last}"


def _short(number: float) -> str:
    """12.3 M"""
    return f"{number / 1e6:,.4g} M" if number >= MILLION else count(number)
