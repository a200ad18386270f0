"""An evaluation as one page of HTML that needs nothing else."""

import io
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from microdit.data.decode import decode, fit
from microdit.evaluation.metrics.registry import METRICS, label
from microdit.io.files import write_aside
from microdit.reports.curves import Curve, draw_points
from microdit.reports.html import page_template, picture_address

TEMPLATE = "evaluation.html.jinja"
SHOWN_SIDE = 256  # pixels at most


@dataclass(frozen=True)
class Neighbour:
    """A drawn picture and the real one nearest to it, as files' bytes; the latter is cut to `side`."""

    caption: str
    drawn: bytes
    real: bytes
    side: int
    distance: float


def write_page(path: Path, result: dict[str, Any], near: list[Neighbour], far: list[Neighbour]) -> None:
    """`result` is the content of metrics.json."""
    rows = [
        {**vars(METRICS[name]), "title": label(name, entry["network"]), "name": name, **entry} for name, entry in result["metrics"].items()
    ]
    groups = [
        ("Nearest to a real picture", "If these are copies, the model has learnt pictures by heart.", _shown(near)),
        ("Farthest from every real picture", "What the metrics think least of.", _shown(far)),
    ]
    title = f"{result['run']}, step {result['step']:,}" if "run" in result else result["pipeline"]
    curves = [_by_count(row) for row in rows if "at_counts" in row]
    page = page_template(TEMPLATE).render(title=title, result=result, rows=rows, groups=groups, curves=curves, written=time.time())
    write_aside(path, page.encode(errors="replace"))


def _by_count(row: dict[str, Any]) -> Curve:
    """The line ends at 0, which is infinitely many."""
    counts = [float(count) for count in row["at_counts"]]
    points = sorted(
        [(0.0, row["infinity"]), *((1000 / count, distance) for count, distance in zip(counts, row["at_counts"].values(), strict=True))]
    )
    note = f"From {min(counts):,.0f} pictures (right) to {max(counts):,.0f}, and extrapolated to infinitely many (0)."
    x, y = [x for x, _ in points], [y for _, y in points]
    return draw_points(f"{row['title']}, {row['network']}", "1000 / number of pictures", "distance", x, y, note=note)


def _shown(neighbours: list[Neighbour]) -> list[dict[str, Any]]:
    return [
        {
            "caption": one.caption,
            "distance": one.distance,
            "drawn": picture_address("webp", _small(decode(one.drawn))),
            "real": picture_address("webp", _small(Image.fromarray(fit(decode(one.real), one.side, one.side)))),
        }
        for one in neighbours
    ]


def _small(image: Image.Image) -> bytes:
    image.thumbnail((SHOWN_SIDE, SHOWN_SIDE))
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", quality=90)
    return buffer.getvalue()
