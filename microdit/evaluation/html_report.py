"""HTML pages of evaluations, each a single file: report.html of one evaluation, and quality.html of all checkpoints of a run."""

import io
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from microdit.data.decode import decode, fit
from microdit.evaluation.metrics.registry import METRICS, label
from microdit.io.files import from_checked_json, read_regular, write_aside
from microdit.reports.curves import Curve, draw_points
from microdit.reports.html import image_data_url, load_template

SHOWN_SIDE = 256  # pixels at most
COSTS = {"images_seen": "images seen", "gpu_hours": "GPU-hours", "dollars": "dollars"}


@dataclass(frozen=True)
class Neighbour:
    """A generated image and the real one nearest to it, both as the bytes of their files. The real one is cropped to `side` pixels."""

    caption: str
    generated: bytes
    real: bytes
    side: int
    distance: float


def write_evaluation_page(path: Path, result: dict[str, Any], near: list[Neighbour], far: list[Neighbour]) -> None:
    """Write report.html. `result` is the content of metrics.json."""
    rows = [
        {**vars(METRICS[name]), "title": label(name, entry["network"]), "name": name, **entry} for name, entry in result["metrics"].items()
    ]
    groups = [
        ("Nearest to a real picture", "If these are copies, the model has memorised training images.", _shown(near)),
        ("Farthest from every real picture", "By these features, the least realistic images.", _shown(far)),
    ]
    title = f"{result['run']}, step {result['step']:,}" if "run" in result else result["pipeline"]
    curves = [_distance_by_count(row) for row in rows if "at_counts" in row]
    template = load_template("evaluation.html.jinja")
    page = template.render(title=title, result=result, rows=rows, groups=groups, curves=curves, written=time.time())
    write_aside(path, page.encode(errors="replace"))


def _distance_by_count(row: dict[str, Any]) -> Curve:
    """Plot the distance against 1000 / count; the line ends at 0, which stands for infinitely many images."""
    counts = [float(count) for count in row["at_counts"]]
    points = sorted(
        [(0.0, row["infinity"]), *((1000 / count, distance) for count, distance in zip(counts, row["at_counts"].values(), strict=True))]
    )
    note = f"From {min(counts):,.0f} images (right) to {max(counts):,.0f}, extrapolated to infinitely many (0)."
    x, y = [x for x, _ in points], [y for _, y in points]
    return draw_points(f"{row['title']}, {row['network']}", "1000 / number of images", "distance", x, y, note=note)


def _shown(neighbours: list[Neighbour]) -> list[dict[str, Any]]:
    return [
        {
            "caption": one.caption,
            "distance": one.distance,
            "drawn": image_data_url("webp", _small(decode(one.generated))),
            "real": image_data_url("webp", _small(Image.fromarray(fit(decode(one.real), one.side, one.side)))),
        }
        for one in neighbours
    ]


def _small(image: Image.Image) -> bytes:
    image.thumbnail((SHOWN_SIDE, SHOWN_SIDE))
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", quality=90)
    return buffer.getvalue()


def read_evaluation(file: Path) -> dict[str, Any]:
    """Return the content of a metrics.json, or an empty dictionary if it is missing or damaged and must be written again."""
    try:
        result = from_checked_json(read_regular(file))
    except (OSError, ValueError):
        return {}
    return result if isinstance(result.get("metrics"), dict) else {}


def write_quality_page(path: Path, run: Path, out: Path) -> None:
    """Write quality.html from the evaluations `out`/step-*/metrics.json."""
    read = {file: read_evaluation(file) for file in sorted(out.glob("step-*/metrics.json"))}
    found = [file for file, result in read.items() if result]
    results = [read[file] for file in found]
    names = [name for name in METRICS if any(name in result["metrics"] for result in results)]
    curves = [curve for name in names for cost in COSTS if (curve := _quality_by_cost(name, cost, results))]
    rows = [(file.parent.name, result) for file, result in zip(found, results, strict=True)]
    template = load_template("quality.html.jinja")
    page = template.render(title=str(run), names=names, rows=rows, curves=curves, written=time.time())
    write_aside(path, page.encode(errors="replace"))


def _quality_by_cost(name: str, cost: str, results: list[dict[str, Any]]) -> Curve | None:
    """Plot a metric against a cost; None if no result has both."""
    known = sorted(
        ((r[cost], r["metrics"][name]) for r in results if r.get(cost) is not None and name in r["metrics"]), key=lambda pair: pair[0]
    )
    if not known:
        return None
    x, entries = [x for x, _ in known], [entry for _, entry in known]
    y, low, high = ([entry[key] for entry in entries] for key in ("value", "low", "high"))
    better = "Lower" if METRICS[name].lower_is_better else "Higher"
    title = f"{label(name, entries[0]['network'])} ({entries[0]['network']}) by {COSTS[cost]}"
    return draw_points(title, COSTS[cost], label(name, entries[0]["network"]), x, y, low, high, f"{better} is better. Bars: 95% intervals.")
