"""`microdit evaluate --reference`: draw a set's captions, see both sets through networks, measure, and write it down.

    OUT/pictures/0000.png ...   what was drawn, and settings.json, prompts.jsonl
    OUT/features/               features of these pictures; the reference's lie in a cache of the user's
    OUT/metrics.json            every metric with its interval, network and reference
    OUT/report.html             the same for people, with the pictures nearest to the reference and farthest from it

Each step goes on where it was stopped, and is shared among the processes of torchrun.
"""

import hashlib
import heapq
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from microdit.cli.terminal import progress, warn
from microdit.data.sources.base import Part, Record, Source
from microdit.distributed import World
from microdit.errors import UserError
from microdit.evaluation.extraction import BLOCK, Features, Pictures, extract, feature_cache, pick
from microdit.evaluation.features import ClipFeatures, DinoFeatures, EfficientNetFeatures, ImageFeatures, InceptionFeatures
from microdit.evaluation.generators import DrawSettings, Painter, draw_pictures, picture_name, steps_to_draw
from microdit.evaluation.html_report import Neighbour, write_page
from microdit.evaluation.metrics.clip_score import ClipCaptions
from microdit.evaluation.metrics.prdc import compare_manifolds, nearest, rows_to_compare
from microdit.evaluation.metrics.registry import MANIFOLD_METRICS, METRICS, Kind, Sets, measure, steps_to_measure
from microdit.io.files import write_aside
from microdit.io.locks import sole_writer

EXTREMES = 12  # nearest pictures on the page, and farthest ones


@dataclass(frozen=True)
class Question:
    """What to measure. `network`: efficientnet or inception:FILE; `clip`, `dino`: folders or ids of the hub, opened only if needed."""

    metrics: list[str]
    count: int
    network: str = "efficientnet"
    clip: str = "openai/clip-vit-large-patch14"
    dino: str = "facebook/dinov2-large"
    side: int | None = None  # pixels that both are cut to before anything sees them; None: as drawn
    resamples: int = 50


def evaluate(painter: Painter, reference: Source, question: Question, settings: DrawSettings, out: Path, world: World) -> dict[str, Any]:
    """Every process must call this; the first one writes OUT/metrics.json and OUT/report.html. Returns the former's content.

    Raises UserError for too few records, networks that cannot be opened, or a folder that holds other pictures or is being written.
    """
    with sole_writer(out, world):
        return _evaluate(painter, reference, question, settings, out, world)


def _evaluate(painter: Painter, reference: Source, question: Question, settings: DrawSettings, out: Path, world: World) -> dict[str, Any]:
    kinds = list(dict.fromkeys(METRICS[name].kind for name in question.metrics))
    networks = {kind: open_network(kind, question, world.device) for kind in kinds}  # before hours of drawing
    captions = _captions(reference, question.count, world)
    with progress("draw", steps_to_draw(question.count, painter, settings, world)) as advance:
        draw_pictures(painter, captions, out / "pictures", settings, world, on_step=advance)
    paths = [out / "pictures" / picture_name(number) for number in range(question.count)]
    with Image.open(paths[0], formats=["PNG"]) as first:
        side = question.side or min(first.size)

    notes: list[str] = []
    drawn, real = {}, {}
    for kind, network in networks.items():
        drawn[kind] = extract(network, "what was drawn", _parts_of(paths), question.side, out / "features", world, warn)
        real[kind] = extract(network, reference.name, _parts(reference), side, feature_cache(), world, warn)
    notes += _complaints(reference, real[kinds[0]], side)
    if not world.is_main:
        return {}

    metrics = _measure(question, networks, real, drawn, captions, world.device)
    notes += list(dict.fromkeys(entry["warning"] for entry in metrics.values() if entry.get("warning")))
    for note in notes:
        warn(note)
    result = {
        **painter.about,
        "reference": {
            "source": reference.name,
            "pictures": len(real[kinds[0]].numbers_N),
            "left_out": real[kinds[0]].left_out,
            "side": side,
            "fingerprint": real[kinds[0]].fingerprint,
        },
        "pictures": question.count,
        "settings": asdict(settings),
        "metrics": metrics,
        "notes": notes,
    }
    write_aside(out / "metrics.json", json.dumps(result, indent=1).encode())
    write_page(out / "report.html", result, *_extremes(reference, drawn[kinds[0]], real[kinds[0]], captions, paths, side))
    return result


def open_network(kind: Kind, question: Question, device: torch.device) -> ImageFeatures:
    """Raises UserError."""
    if kind == "clip":
        return ClipFeatures(question.clip, device)
    if kind == "dino":
        return DinoFeatures(question.dino, device)
    name, _, file = question.network.partition(":")
    if name == "efficientnet" and not file:
        return EfficientNetFeatures(device)
    if name == "inception" and file:
        return InceptionFeatures(Path(file), device=device)
    raise UserError(f"--network {question.network}: write efficientnet, or inception:FILE.")


def _captions(reference: Source, count: int, world: World) -> list[str]:
    """One caption each, the first of those that the source would train with, of the records whose names have the smallest hashes.

    A sample by chance, but always the same one, and a smaller one is the beginning of a larger. (Sets are often ordered by content.)
    The parts are dealt out to the processes.
    """
    mine = reference.parts[world.rank :: world.size]
    with progress(f"captions of {reference.name}", len(mine)) as advance:
        hashed = heapq.nsmallest(count, _hashed_captions(reference, mine, advance))
    found = [caption for _, caption in heapq.nsmallest(count, chain.from_iterable(world.gather(hashed)))]
    if len(found) < count:
        raise UserError(f"{reference.name} holds {len(found)} records with captions, fewer than the {count} asked for: lower -n.")
    return found


def _hashed_captions(reference: Source, parts: list[Part], on_part: Callable[[int], None]) -> Iterator[tuple[bytes, str]]:
    for part in parts:
        for record in part.records():
            if caption := _caption(reference, record):
                yield _hash(part.name, record.key), caption
        on_part(1)


def _caption(reference: Source, record: Record) -> str:
    """Empty if it has none, or cannot be used."""
    return "" if record.problem else next((record.captions[name] for name in reference.caption_weights if name in record.captions), "")


def _hash(part: str, key: str) -> bytes:
    return hashlib.sha256(f"{part}/{key}".encode(errors="surrogatepass")).digest()


def _parts(reference: Source) -> list[Pictures]:
    return [partial(_images, part) for part in reference.parts]


def _images(part: Part) -> Iterator[bytes]:
    return (record.image for record in part.records())


def _parts_of(paths: list[Path]) -> list[Pictures]:
    return [partial(map, Path.read_bytes, paths[start : start + BLOCK]) for start in range(0, len(paths), BLOCK)]


def _complaints(reference: Source, real: Features, side: int) -> list[str]:
    """Raises UserError if nothing of the reference can be compared."""
    seen = len(real.numbers_N)
    if not seen:
        raise UserError(f"None of the {real.total} pictures of {reference.name} can be read: there is nothing to compare with.")
    if real.enlarged == seen:
        raise UserError(
            f"All {seen} pictures of {reference.name} are smaller than {side} px, and would be blurred by enlarging them: take the set "
            "at its full size, or compare at a smaller --side."
        )
    notes = []
    if real.left_out:
        notes.append(f"{real.left_out} of {real.total} pictures of {reference.name} could not be read, and are left out.")
    if real.enlarged:
        notes.append(f"{real.enlarged} of {seen} pictures of {reference.name} are smaller than {side} px, and were enlarged.")
    return notes


def _measure(
    question: Question,
    networks: dict[Kind, ImageFeatures],
    real: dict[Kind, Features],
    drawn: dict[Kind, Features],
    captions: list[str],
    device: torch.device,
) -> dict[str, Any]:
    results, manifolds = {}, None
    for name in question.metrics:
        kind = METRICS[name].kind
        network, real_ND, drawn_MD = networks[kind], real[kind].features_ND, drawn[kind].features_ND
        captions_MD: Tensor | None = None
        if name == "clip-score":
            with progress(f"captions, {network.name}", len(captions)) as advance:
                captions_MD = ClipCaptions(question.clip, device)(captions, advance)
        if name in MANIFOLD_METRICS and manifolds is None:
            with progress(f"neighbours, {network.name}", rows_to_compare(real_ND, drawn_MD)) as advance:
                manifolds = compare_manifolds(real_ND, drawn_MD, on_rows=advance)
        sets = Sets(real_ND, drawn_MD, captions_MD, manifolds)
        with progress(f"{name}, {network.name}", steps_to_measure(name, sets, question.resamples)) as advance:
            results[name] = {
                **measure(name, sets, question.resamples, advance),
                "network": network.name,
                "fingerprint": network.fingerprint,
                "resize": network.resize,
            }
    return results


def _extremes(
    reference: Source, drawn: Features, real: Features, captions: list[str], paths: list[Path], side: int
) -> tuple[list[Neighbour], list[Neighbour]]:
    """The pictures nearest to a real one, nearest first, and the farthest, farthest first."""
    with progress("nearest pictures", len(drawn.features_ND)) as advance:
        distance_M, row_M = nearest(drawn.features_ND, real.features_ND, advance)
    order = distance_M.argsort().tolist()
    chosen = order[:EXTREMES], order[: -EXTREMES - 1 : -1]
    wanted = sorted({int(real.numbers_N[row_M[m]]) for group in chosen for m in group})
    contents = dict(pick(_parts(reference), real.counts, wanted))
    near, far = (
        [Neighbour(captions[m], paths[m].read_bytes(), contents[int(real.numbers_N[row_M[m]])], side, float(distance_M[m])) for m in group]
        for group in chosen
    )
    return near, far
