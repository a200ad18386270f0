"""Curves for HTML pages: small SVG figures whose colours are CSS variables of the page, so that they follow its light or dark mode."""

import io
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator
from numpy.typing import NDArray

Numbers = NDArray[np.float64]

# Placeholder colours that become variables of the page's style sheet: --ink, --grid, --curve, --second, --noise-1 ... --noise-8.
INK, GRID, CURVE, SECOND = "#010101", "#020202", "#030303", "#040404"
NOISE = [f"#0501{level:02d}" for level in range(1, 9)]
VARIABLES = {INK: "ink", GRID: "grid", CURVE: "curve", SECOND: "second"} | {c: f"noise-{n}" for n, c in enumerate(NOISE, 1)}

SIZE = (4.8, 2.8)  # inches: keeps text legible on a phone
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "font.size": 10,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": GRID,
    "xtick.color": GRID,
    "ytick.color": GRID,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "grid.color": GRID,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "lines.linewidth": 1.6,
    "legend.frameon": False,
    "legend.fontsize": 9,
}
SMOOTH = 20  # the smoothing window covers 1/20 of the points
STEPS = [1, 2, 2.5, 5, 10]  # allowed tick distances
POINTS = 1200  # at most per curve, more than a screen is wide
LOG_FROM = 6  # ratio of largest to smallest value from which an axis is logarithmic


@dataclass(frozen=True)
class Curve:
    """A finished figure. `note` is a sentence on what it shows, or empty."""

    title: str
    svg: str
    note: str = ""


def draw_curves(metrics: list[dict[str, Any]], check: Callable[[], None] = lambda: None) -> list[Curve]:
    """Draw a curve for each metric with finite values. Dotted lines mark the start of a phase.

    `metrics` are the lines of metrics.jsonl by increasing step. `check` is called before each curve, and may raise to cancel.
    """
    curves = []
    with matplotlib.rc_context(STYLE):
        for drawing in filter(None, _drawings(metrics)):
            check()
            curves.append(Curve(drawing.title, _svg(drawing.figure, drawing.title, _phase_changes(metrics)), drawing.note))
    return curves


def draw_points(
    title: str,
    x_label: str,
    y_label: str,
    x: list[float],
    y: list[float],
    low: list[float | None] | None = None,
    high: list[float | None] | None = None,
    note: str = "",
) -> Curve:
    """Draw points joined by lines, with error bars from `low` to `high` where both are known."""
    with matplotlib.rc_context(STYLE):
        figure, axes = _blank(y_label)
        axes.set_xlabel(x_label)
        axes.xaxis.set_major_locator(MaxNLocator(5, steps=STEPS))
        axes.plot(x, y, color=CURVE, marker="o", markersize=4)
        for at, bottom, top in zip(x, low or [], high or [], strict=False):
            if bottom is not None and top is not None:
                axes.plot([at, at], [bottom, top], color=CURVE, alpha=0.5)
        return Curve(title, _svg(figure, title, []), note)


@dataclass(frozen=True)
class _Drawing:
    title: str
    figure: Figure
    note: str = ""


def _drawings(metrics: list[dict[str, Any]]) -> Iterator[_Drawing | None]:
    x = _column(metrics, "step")
    yield _loss(x, _column(metrics, "loss"), _column(metrics, "held_out_loss"))
    yield _by_noise(x, metrics, "loss_by_noise", "Loss by noise level", noisy=True)
    yield _by_noise(x, metrics, "held_out_by_noise", "Held-out loss by noise level", noisy=False)
    aligned_note = "Mean cosine similarity of projected tokens and a vision encoder's features, while representation alignment lasts."
    yield _single(x, _column(metrics, "alignment"), "Representation alignment", _Axis("similarity", noisy=True), aligned_note)
    kid_note = "KID between images generated for a fixed set of captions and their own decoded latents. Lower is better."
    yield _single(x, _column(metrics, "quality_kid"), "Distance from real images", _Axis("KID"), kid_note)
    recognised_note = "Share of generated images whose own real image is among the ten nearest. Higher is better."
    recognised = _column(metrics, "quality_retrieval") * 100
    yield _single(x, recognised, "Recognised images", _Axis("% of generated images", from_zero=True), recognised_note)
    fid_note = (
        "Frechet distance of images generated for captions of record.fid_reference to its images (FID with Inception). Lower is better."
    )
    yield _single(x, _column(metrics, "fid"), "Frechet distance", _Axis("distance"), fid_note)
    yield _single(x, _column(metrics, "learning_rate"), "Learning rate", _Axis("learning rate", from_zero=True, scientific=True))
    mask_ratio = _column(metrics, "mask_ratio") * 100
    if np.unique(mask_ratio[np.isfinite(mask_ratio)]).size > 1:
        yield _single(x, mask_ratio, "Mask ratio", _Axis("% of patches masked", from_zero=True))
    yield _single(x, _column(metrics, "grad_norm"), "Gradient norm", _Axis("norm", noisy=True, log=True))
    yield _single(x, _column(metrics, "images_per_second"), "Speed", _Axis("images per second", noisy=True, from_zero=True))
    yield _single(x, _column(metrics, "mfu") * 100, "Model FLOP utilisation", _Axis("% of the device's peak", noisy=True, from_zero=True))
    yield _single(x, _column(metrics, "data_wait") * 100, "Waiting for data", _Axis("% of the time", noisy=True, from_zero=True))
    yield _single(x, _column(metrics, "memory_gb"), "Peak memory", _Axis("GB", from_zero=True))


def _loss(x: Numbers, loss: Numbers, held_out: Numbers) -> _Drawing | None:
    if not np.isfinite(loss).any() and not np.isfinite(held_out).any():
        return None
    figure, axes = _blank("loss")
    _line(axes, x, loss, CURVE, noisy=True, label="training")
    known = np.isfinite(held_out)
    if known.any():
        axes.plot(x[known], held_out[known], color=SECOND, marker="o", markersize=3, linewidth=1.2, label="held out")
        axes.legend(loc="upper right")
    _scale(axes, np.concatenate([_smooth(loss), held_out]), loss, log=True)
    infinite = int(np.sum(~np.isfinite(loss)))
    note = f" {infinite:,} of {len(loss):,} points without a finite loss are omitted." if infinite else ""
    return _Drawing("Loss", figure, "Faint: as measured. Strong: smoothed." + note)


def _by_noise(x: Numbers, metrics: list[dict[str, Any]], key: str, title: str, noisy: bool) -> _Drawing | None:
    """Draw one line per noise level, over the steps that have values: held-out losses are measured rarely."""
    losses = np.array([_levels(line.get(key)) for line in metrics], dtype=np.float64).reshape(-1, len(NOISE))
    known = np.isfinite(losses).any(axis=1)
    if not known.any():
        return None
    figure, axes = _blank("loss")
    shown = np.stack([_smooth(column) if noisy else column for column in losses[known].T], axis=1)
    for level, colour in enumerate(NOISE):
        label = f"{level + 1}" + {0: " least", len(NOISE) - 1: " most"}.get(level, "")
        _plot(axes, x[known], shown[:, level], colour, label=label)
    _scale(axes, shown, shown, log=True)
    beside: dict[str, Any] = {"loc": "center left", "bbox_to_anchor": (1, 0.5)}
    axes.legend(title="noise", title_fontsize=9, handlelength=1.2, labelspacing=0.3, borderpad=0.2, **beside)
    return _Drawing(title, figure, "Eight levels, from the least noise to the most" + (", smoothed." if noisy else "."))


@dataclass(frozen=True)
class _Axis:
    """The y axis of a curve: its label and scale, and whether the values are noisy and so shown smoothed too."""

    label: str
    noisy: bool = False
    log: bool = False
    from_zero: bool = False
    scientific: bool = False


def _single(x: Numbers, y: Numbers, title: str, axis: _Axis, note: str = "") -> _Drawing | None:
    if not np.isfinite(y).any():
        return None
    figure, axes = _blank(axis.label)
    _line(axes, x, y, CURVE, axis.noisy)
    _scale(axes, _smooth(y) if axis.noisy else y, y, axis.log)
    if axis.from_zero:
        axes.set_ylim(bottom=0)
    if axis.scientific:
        axes.yaxis.set_major_formatter(FuncFormatter(_scientific))
    return _Drawing(title, figure, note)


def _blank(label: str) -> tuple[Figure, Axes]:
    figure = Figure(SIZE, layout="constrained")
    axes = figure.add_subplot()
    axes.set_xlabel("step")
    axes.set_ylabel(label)
    axes.grid(linewidth=0.6)
    axes.set_axisbelow(True)
    axes.xaxis.set_major_locator(MaxNLocator(5, steps=STEPS, integer=True))
    axes.xaxis.set_major_formatter(FuncFormatter(_short))
    figure.patch.set_alpha(0)
    axes.patch.set_alpha(0)
    return figure, axes


def _line(axes: Axes, x: Numbers, y: Numbers, colour: str, noisy: bool, label: str = "") -> None:
    """Draw a curve; draw a noisy one twice, faint as measured and strong after smoothing."""
    if noisy:
        _plot(axes, x, y, colour, linewidth=0.7, alpha=0.3)
    _plot(axes, x, _smooth(y) if noisy else y, colour, label=label or None)


def _plot(axes: Axes, x: Numbers, y: Numbers, colour: str, **settings: Any) -> None:
    """Draw the finite points joined by lines, with markers if they are few."""
    known = np.isfinite(y)
    axes.plot(*_thin(x[known], y[known]), color=colour, marker="o" if known.sum() <= 20 else None, markersize=2.5, **settings)


def _scale(axes: Axes, shown: Numbers, raw: Numbers, log: bool) -> None:
    """Fit the axis to all of `shown`, and to `raw` without rare spikes, which would flatten the rest."""
    shown, raw = shown[np.isfinite(shown)], raw[np.isfinite(raw)]
    ends = np.concatenate([shown, np.percentile(raw, [0.5, 99.5]) if raw.size else raw])
    low, high = float(ends.min()), float(ends.max())
    if log and low > 0 and high > LOG_FROM * low:
        axes.set_yscale("log")
        axes.set_ylim(low / 1.15, high * 1.15)
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 100 * low else (1,)))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        return
    margin = 0.06 * (high - low) or 0.1 * abs(high) or 1
    axes.set_ylim(low - margin, high + margin)
    axes.yaxis.set_major_locator(MaxNLocator(5, steps=STEPS))


def _svg(figure: Figure, salt: str, marks: list[int]) -> str:
    """Render for embedding in a page: without a prologue, without group ids (which would repeat across figures), with CSS colours."""
    for step in marks:
        figure.axes[0].axvline(step, color=INK, linestyle=":", linewidth=1, alpha=0.6)
    buffer = io.StringIO()
    metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    with matplotlib.rc_context({"svg.hashsalt": salt}):
        figure.savefig(buffer, format="svg", metadata=metadata)
    svg = buffer.getvalue()
    svg = re.sub(r'<g id="[^"]*"', "<g", svg[svg.index("<svg") :])
    svg = re.sub(r' (xmlns(:xlink)?|width|height)="[^"]*"', "", svg, count=4)
    svg = re.sub(r"<style.*?</style>", "", svg, flags=re.DOTALL)
    return re.sub("|".join(VARIABLES), lambda colour: f"var(--{VARIABLES[colour[0]]})", svg)


def _phase_changes(metrics: list[dict[str, Any]]) -> list[int]:
    return [line["step"] for before, line in pairwise(metrics) if line.get("phase") != before.get("phase")]


def _column(metrics: list[dict[str, Any]], key: str) -> Numbers:
    return np.array([_number(line.get(key)) for line in metrics], dtype=np.float64)


def _levels(value: Any) -> list[float]:
    values = value if isinstance(value, list) and len(value) == len(NOISE) else [None] * len(NOISE)
    return [_number(item) for item in values]


def _number(value: Any) -> float:
    """Convert to a float; anything but a number below 1e30 becomes NaN, which matplotlib omits."""
    return float(value) if isinstance(value, int | float) and abs(value) < 1e30 else np.nan


def _smooth(y: Numbers) -> Numbers:
    """Return a weighted moving average of the finite values; NaN where the value itself is not finite."""
    known = np.isfinite(y)
    width = min(max(3, len(y) // SMOOTH), 1001)
    window = np.hanning(width + 2 | 1)[1:-1][: max(1, len(y))]
    total = np.convolve(np.where(known, y, 0), window, "same")
    weight = np.convolve(known, window, "same")
    return np.where(known, total / np.where(known, weight, 1), np.nan)


def _thin(x: Numbers, y: Numbers) -> tuple[Numbers, Numbers]:
    """Keep the lowest and the highest point of each stretch, so that spikes remain."""
    if len(x) <= POINTS:
        return x, y
    kept: list[int] = []
    for stretch in np.array_split(np.arange(len(x)), POINTS // 2):
        kept += sorted({int(stretch[y[stretch].argmin()]), int(stretch[y[stretch].argmax()])})
    return x[kept], y[kept]


def _short(value: float, _: int | None = None) -> str:
    """Format a tick: 1500 -> 1.5k."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:g}{letter}"
    return f"{value:g}"


def _scientific(value: float, _: int | None = None) -> str:
    """Format a tick: 0.00024 -> 2.4e-4."""
    return np.format_float_scientific(value, precision=3, trim="-", exp_digits=1) if value else "0"
