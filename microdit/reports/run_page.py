"""A run as one page of HTML that needs nothing else: for a browser without a network, today or in ten years."""

import io
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from PIL import Image

from microdit.errors import UserError
from microdit.io.files import write_aside
from microdit.reports import formats
from microdit.reports.curves import Curve, draw_curves
from microdit.reports.html import image_data_url, load_template
from microdit.reports.run_folder import RECIPE, RunFolder, is_run, state_of

TEMPLATE = "report.html.jinja"
PICTURES = 24  # of a run at most; they are chosen evenly, the first and the newest among them
NEWEST_BYTES = 2_000_000  # a larger newest picture is re-encoded
NEWEST_SIDE, THUMBNAIL_SIDE = 2048, 640  # pixels


@dataclass(frozen=True)
class Picture:
    """A sample grid, as the address of an <img>."""

    step: int
    address: str


@dataclass(frozen=True)
class RunPart:
    """What the page says of one run."""

    folder: str
    name: str
    state: str
    facts: dict[str, Any]  # how things stand: the status, and from the metrics the last known of each key that it has not
    starts: list[dict[str, Any]]
    data: dict[str, Any]
    measured: int  # lines of metrics
    damaged_lines: int
    has_damaged_record: bool
    phases: list[tuple[int, str]]  # the step from which each was trained, and its name
    curves: list[Curve]
    pictures: list[Picture]  # the newest first
    samples: int  # pictures on the disk
    unreadable: int  # of those that were to be shown
    recipe: str


def write_report(run: Path, out: Path | None = None) -> Path:
    """One HTML page of a run folder, or of a folder of several (the phases of one training, by name); `run`/report.html without `out`.

    Raises UserError if `run` is neither, or if the page cannot be written.
    """
    page = report_page(run)
    target = out or run / "report.html"
    try:
        write_aside(target, page)
    except OSError as error:
        raise UserError(f"The report could not be written to {target}: {error}. Name another file with --out.") from error
    return target


def report_page(run: Path, check: Callable[[], None] = lambda: None) -> bytes:
    """The page of `write_report`. `check` is called again and again, and ends it by raising. Raises UserError if `run` is no run."""
    runs = [run] if is_run(run) else _phase_folders(run)
    if not runs:
        raise UserError(
            f"{run} is no run folder: there is no {RECIPE} in it, nor in a folder directly below it. "
            "Name the folder that `microdit train` wrote, such as runs/emoji."
        )
    parts = [_read(RunFolder(path), check) for path in runs]
    title = parts[0].name if is_run(run) else run.resolve().name
    page = load_template(TEMPLATE).render(title=title, parts=parts, written=time.time(), totals=_totals(parts))
    return page.encode(errors="replace")


def _phase_folders(folder: Path) -> list[Path]:
    """Runs directly below, by name: 2-full before 10-long."""
    found = [path for path in folder.iterdir() if is_run(path)] if folder.is_dir() else []
    return sorted(found, key=lambda path: [int(piece) if piece.isdecimal() else piece for piece in re.split(r"(\d+)", path.name)])


def _read(run: RunFolder, check: Callable[[], None]) -> RunPart:
    metrics, damaged_lines = run.read_metrics(check)
    status, record, samples = run.status, run.record, run.samples
    chosen = _evenly(samples, PICTURES)
    pictures = []
    for number, (step, path) in enumerate(reversed(chosen)):
        check()
        if picture := _picture(step, path, newest=number == 0):
            pictures.append(picture)
    phases = [
        (line["step"], str(line.get("phase"))) for before, line in pairwise([{}, *metrics]) if line.get("phase") != before.get("phase")
    ]
    data = record.get("data")
    return RunPart(
        folder=run.path.resolve().name,
        name=str(status.get("name") or record.get("name") or run.path.resolve().name),
        state=state_of(status),
        facts={key: value for line in (*metrics, status) for key, value in line.items() if value is not None},
        starts=run.starts,
        data={name: one for name, one in data.items() if isinstance(one, dict)} if isinstance(data, dict) else {},
        measured=len(metrics),
        damaged_lines=damaged_lines,
        has_damaged_record=run.has_damaged_record,
        phases=phases,
        curves=draw_curves(metrics, check),
        pictures=pictures,
        samples=len(samples),
        unreadable=len(chosen) - len(pictures),
        recipe=run.recipe_text,
    )


def _evenly(items: list[tuple[int, Path]], most: int) -> list[tuple[int, Path]]:
    """All if there are no more than `most`; else so many, at even distances, with the first and the last."""
    if len(items) <= most:
        return items
    return [items[round(number * (len(items) - 1) / (most - 1))] for number in range(most)]


def _picture(step: int, path: Path, newest: bool) -> Picture | None:
    """None if the file is damaged: it may be just being written."""
    try:
        content = path.read_bytes()
        with Image.open(io.BytesIO(content), formats=["PNG"]) as image:
            image.load()
            if newest and len(content) <= NEWEST_BYTES:
                return Picture(step, image_data_url("png", content))
            small = image.convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):  # SyntaxError is how Pillow says that a PNG is broken
        return None
    side = NEWEST_SIDE if newest else THUMBNAIL_SIDE
    small.thumbnail((side, side))
    buffer = io.BytesIO()
    small.save(buffer, "WEBP", quality=90 if newest else 80)
    return Picture(step, image_data_url("webp", buffer.getvalue()))


def _totals(parts: list[RunPart]) -> dict[str, float | None]:
    """Of what is known; None where nothing is."""
    totals: dict[str, float | None] = {}
    for key in ("images_seen", "gpu_hours", "dollars"):
        known = [number for part in parts if (number := formats.finite(part.facts.get(key))) is not None]
        totals[key] = sum(known) if known else None
    return totals
