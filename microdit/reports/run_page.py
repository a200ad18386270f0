"""`microdit report`: a training run as a single self-contained HTML page."""

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
from microdit.io.files import read_regular, write_aside
from microdit.io.untrusted_text import parse_json_object
from microdit.reports import formats
from microdit.reports.curves import Curve, draw_curves
from microdit.reports.html import image_data_url, load_template
from microdit.reports.run_folder import RECIPE, RECONSTRUCTIONS, RunFolder, is_run, state_of

TEMPLATE = "report.html.jinja"
PICTURES = 24  # at most per run, spread evenly, including the first and the newest
NEWEST_BYTES = 2_000_000  # size above which the newest image is re-encoded
NEWEST_SIDE, THUMBNAIL_SIDE = 2048, 640  # pixels


@dataclass(frozen=True)
class Picture:
    """A sample grid as a data URL."""

    step: int
    address: str


@dataclass(frozen=True)
class Ceiling:
    """Reconstructions of an encoded set's images by its autoencoder, as a data URL, and their figures, which may be missing."""

    name: str
    address: str
    figures: dict[str, Any]


@dataclass(frozen=True)
class RunPart:
    """The content of the page for one run."""

    folder: str
    name: str
    state: str
    facts: dict[str, Any]  # the status, and the last known value of each metric that it lacks
    starts: list[dict[str, Any]]
    data: dict[str, Any]
    measured: int  # lines of metrics
    damaged_lines: int
    has_damaged_record: bool
    phases: list[tuple[int, str]]  # first step and name of each
    curves: list[Curve]
    pictures: list[Picture]  # newest first
    ceilings: list[Ceiling]
    samples: int  # images on disk
    unreadable: int  # of the images chosen for the page
    recipe: str


def write_report(run: Path, out: Path | None = None) -> Path:
    """Write the page of a run folder, or of a folder of several (the phases of one training), to `out` or `run`/report.html.

    Returns the page's path. Raises UserError if `run` holds no run, or the page cannot be written.
    """
    page = report_page(run)
    target = out or run / "report.html"
    try:
        write_aside(target, page)
    except OSError as error:
        raise UserError(f"The report could not be written to {target}: {error}. Name another file with --out.") from error
    return target


def report_page(run: Path, check: Callable[[], None] = lambda: None) -> bytes:
    """Return the HTML of `write_report`. `check` is called repeatedly, and may raise to cancel. Raises UserError if `run` holds no run."""
    runs = [run] if is_run(run) else _phase_folders(run)
    if not runs:
        raise UserError(
            f"{run} is not a run folder: there is no {RECIPE} in it or in a folder directly below it. "
            "Name a folder that `microdit train` wrote, such as runs/emoji."
        )
    parts = [_read(RunFolder(path), check) for path in runs]
    title = parts[0].name if is_run(run) else run.resolve().name
    page = load_template(TEMPLATE).render(title=title, parts=parts, written=time.time(), totals=_totals(parts))
    return page.encode(errors="replace")


def _phase_folders(folder: Path) -> list[Path]:
    """Return the runs directly below `folder` in natural order: 2-full before 10-long."""
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
    sets = record.get("data")
    data = {name: one for name, one in sets.items() if isinstance(one, dict)} if isinstance(sets, dict) else {}
    return RunPart(
        folder=run.path.resolve().name,
        name=str(status.get("name") or record.get("name") or run.path.resolve().name),
        state=state_of(status),
        facts={key: value for line in (*metrics, status) for key, value in line.items() if value is not None},
        starts=run.starts,
        data=data,
        measured=len(metrics),
        damaged_lines=damaged_lines,
        has_damaged_record=run.has_damaged_record,
        phases=phases,
        curves=draw_curves(metrics, check),
        pictures=pictures,
        ceilings=[ceiling for name, one in data.items() if (ceiling := _ceiling(name, Path(str(one.get("path")))))],
        samples=len(samples),
        unreadable=len(chosen) - len(pictures),
        recipe=run.recipe_text,
    )


def _evenly(items: list[tuple[int, Path]], most: int) -> list[tuple[int, Path]]:
    """Return at most `most` of the items, evenly spaced, including the first and the last."""
    if len(items) <= most:
        return items
    return [items[round(number * (len(items) - 1) / (most - 1))] for number in range(most)]


def _picture(step: int, path: Path, newest: bool) -> Picture | None:
    """Encode a sample grid; None if the file is damaged, since it may be incomplete yet."""
    read = _read_png(path)
    if read is None:
        return None
    content, image = read
    if newest and len(content) <= NEWEST_BYTES:
        return Picture(step, image_data_url("png", content))
    return Picture(step, _shrunk(image, NEWEST_SIDE if newest else THUMBNAIL_SIDE, quality=90 if newest else 80))


def _ceiling(name: str, encoded: Path) -> Ceiling | None:
    """Return the reconstructions in the folder of an encoded set; None if there are none, as of sets encoded by earlier versions."""
    read = _read_png(encoded / RECONSTRUCTIONS)
    if read is None:
        return None
    _, image = read
    try:
        figures = parse_json_object(str(image.info.get("reconstructions")))
    except ValueError:
        figures = {}
    return Ceiling(name, _shrunk(image, NEWEST_SIDE, quality=90), figures)


def _read_png(path: Path) -> tuple[bytes, Image.Image] | None:
    """Return the content of a PNG file and its image; None if it is missing or damaged."""
    try:
        content = read_regular(path)
        with Image.open(io.BytesIO(content), formats=["PNG"]) as image:
            image.load()
            return content, image
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):  # Pillow raises SyntaxError for a broken PNG
        return None


def _shrunk(image: Image.Image, side: int, quality: int) -> str:
    small = image.convert("RGB")
    small.thumbnail((side, side))
    buffer = io.BytesIO()
    small.save(buffer, "WEBP", quality=quality)
    return image_data_url("webp", buffer.getvalue())


def _totals(parts: list[RunPart]) -> dict[str, float | None]:
    """Sum each cost over the runs that know it; None if none does."""
    totals: dict[str, float | None] = {}
    for key in ("images_seen", "gpu_hours", "dollars"):
        known = [number for part in parts if (number := formats.finite(part.facts.get(key))) is not None]
        totals[key] = sum(known) if known else None
    return totals
