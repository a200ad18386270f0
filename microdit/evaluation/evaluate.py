"""`microdit evaluate --reference`: generate images for the captions of a reference set and compare the two sets with metrics.

    OUT/pictures/0000.png ...   the generated images, with settings.json and prompts.jsonl
    OUT/features/               their features (those of the reference set go into a per-user cache)
    OUT/metrics.json            each metric with its interval, network and reference
    OUT/report.html             the same for people, with the images nearest to and farthest from the reference set

Every step resumes where it was interrupted, and torchrun's processes share the work.
"""

import hashlib
import heapq
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from microdit.data.sources.base import Part, Record, Source
from microdit.distributed import World
from microdit.errors import UserError
from microdit.evaluation.extraction import BLOCK, Features, Pictures, extract, feature_cache, pick
from microdit.evaluation.features import ClipFeatures, DinoFeatures, EfficientNetFeatures, ImageFeatures, InceptionFeatures
from microdit.evaluation.generators import DrawSettings, ImageGenerator, draw_pictures, steps_to_draw
from microdit.evaluation.html_report import Neighbour, write_evaluation_page
from microdit.evaluation.metrics.clip_score import ClipCaptions
from microdit.evaluation.metrics.prdc import compute_prdc, nearest, prdc_rows
from microdit.evaluation.metrics.registry import METRICS, PRDC_METRICS, Kind, Sets, measure, steps_to_measure
from microdit.io.console import QUIET, Reporter
from microdit.io.files import to_checked_json, write_aside
from microdit.io.locks import sole_writer
from microdit.reports.grids import picture_name

EXTREMES = 12  # images that the report shows of the nearest, and of the farthest


@dataclass(frozen=True)
class EvaluationSettings:
    """The metrics to compute, on how many images, and the networks that see them.

    `network` is "efficientnet" or "inception:FILE". `clip` and `dino` are folders or hub ids, and are loaded only if a metric needs them.
    """

    metrics: list[str]
    count: int
    network: str = "efficientnet"
    clip: str = "openai/clip-vit-large-patch14"
    dino: str = "facebook/dinov2-large"
    side: int | None = None  # pixels to which both sets are cropped and resized; None: the size of the generated images
    resamples: int = 50


def evaluate(
    generator: ImageGenerator,
    reference: Source,
    evaluation: EvaluationSettings,
    settings: DrawSettings,
    out: Path,
    world: World,
    reporter: Reporter = QUIET,
) -> dict[str, Any]:
    """Evaluate `generator` and return the content of OUT/metrics.json, which the first process writes together with OUT/report.html.

    Every process must call this; all but the first get an empty result. Raises UserError if the reference set has too few captions, a
    network cannot be loaded, or `out` holds other images or is in use by another process.
    """
    with sole_writer(out, world):
        return _evaluate(generator, reference, evaluation, settings, out, world, reporter)


def _evaluate(
    generator: ImageGenerator,
    reference: Source,
    evaluation: EvaluationSettings,
    settings: DrawSettings,
    out: Path,
    world: World,
    reporter: Reporter,
) -> dict[str, Any]:
    kinds = list(dict.fromkeys(METRICS[name].kind for name in evaluation.metrics))
    networks = {kind: load_feature_network(kind, evaluation, world.device) for kind in kinds}  # fail before hours of generation
    captions = reference_captions(reference, evaluation.count, world, reporter)
    with reporter.progress("generate images", steps_to_draw(evaluation.count, generator, settings, world)) as advance:
        draw_pictures(generator, captions, out / "pictures", settings, world, on_step=advance)
    paths = [out / "pictures" / picture_name(number) for number in range(evaluation.count)]
    with Image.open(paths[0], formats=["PNG"]) as first:
        side = evaluation.side or min(first.size)

    notes: list[str] = []
    generated, real = {}, {}
    for kind, network in networks.items():
        generated[kind] = extract(network, "generated images", _files_as_parts(paths), evaluation.side, out / "features", world, reporter)
        real[kind] = extract(network, reference.name, parts_of(reference), side, feature_cache(), world, reporter)
    notes += reference_notes(reference, real[kinds[0]], side)
    if not world.is_main:
        return {}

    metrics = _measure(evaluation, networks, real, generated, captions, world.device, reporter)
    notes += list(dict.fromkeys(entry["warning"] for entry in metrics.values() if entry.get("warning")))
    for note in notes:
        reporter.warn(note)
    result = {
        **generator.about,
        "reference": {
            "source": reference.name,
            "pictures": len(real[kinds[0]].numbers_N),
            "left_out": real[kinds[0]].left_out,
            "side": side,
            "fingerprint": real[kinds[0]].fingerprint,
        },
        "pictures": evaluation.count,
        "settings": asdict(settings),
        "metrics": metrics,
        "notes": notes,
    }
    write_aside(out / "metrics.json", to_checked_json(result))
    extremes = _extremes(reference, generated[kinds[0]], real[kinds[0]], captions, paths, side, reporter)
    write_evaluation_page(out / "report.html", result, *extremes)
    return result


def load_feature_network(kind: Kind, evaluation: EvaluationSettings, device: torch.device) -> ImageFeatures:
    """Load the network of `kind` that `evaluation` names. Raises UserError if the name is unknown or the network cannot be loaded."""
    if kind == "clip":
        return ClipFeatures(evaluation.clip, device)
    if kind == "dino":
        return DinoFeatures(evaluation.dino, device)
    name, _, file = evaluation.network.partition(":")
    if name == "efficientnet" and not file:
        return EfficientNetFeatures(device)
    if name == "inception" and file:
        return InceptionFeatures(Path(file), device=device)
    raise UserError(f"--network {evaluation.network} is unknown: use efficientnet or inception:FILE.")


def reference_captions(reference: Source, count: int, world: World, reporter: Reporter = QUIET) -> list[str]:
    """Return `count` captions: those of the records whose names have the smallest hashes, one caption each.

    The choice is random with respect to the set's order but always the same, and a smaller sample is a prefix of a larger one. A record
    with several captions contributes the first that the source would train with. Each process reads its share of the parts.
    """
    mine = reference.parts[world.rank :: world.size]
    with reporter.progress(f"captions of {reference.name}", len(mine)) as advance:
        hashed = heapq.nsmallest(count, _hashed_captions(reference, mine, advance))
    found = [caption for _, caption in heapq.nsmallest(count, chain.from_iterable(world.gather(hashed)))]
    if len(found) < count:
        raise UserError(f"{reference.name} has only {len(found)} records with captions, and {count} were requested: lower -n.")
    return found


def _hashed_captions(reference: Source, parts: list[Part], on_part: Callable[[int], None]) -> Iterator[tuple[bytes, str]]:
    for part in parts:
        for record in part.records():
            if caption := _caption(reference, record):
                yield _hash(part.name, record.key), caption
        on_part(1)


def _caption(reference: Source, record: Record) -> str:
    """Return the record's caption, or an empty string if it has none or is unusable."""
    return "" if record.problem else next((record.captions[name] for name in reference.caption_weights if name in record.captions), "")


def _hash(part: str, key: str) -> bytes:
    return hashlib.sha256(f"{part}/{key}".encode(errors="surrogatepass")).digest()


def parts_of(reference: Source) -> list[Pictures]:
    """Return the images of a source, part by part."""
    return [partial(_images, part) for part in reference.parts]


def _images(part: Part) -> Iterator[bytes]:
    return (record.image for record in part.records())


def _files_as_parts(paths: list[Path]) -> list[Pictures]:
    return [partial(map, Path.read_bytes, paths[start : start + BLOCK]) for start in range(0, len(paths), BLOCK)]


def reference_notes(reference: Source, real: Features, side: int) -> list[str]:
    """Return sentences about unreadable and enlarged images. Raises UserError if no image of the reference set is usable."""
    seen = len(real.numbers_N)
    if not seen:
        raise UserError(f"None of the {real.total} images of {reference.name} could be read, so there is nothing to compare with.")
    if real.enlarged == seen:
        raise UserError(
            f"All {seen} images of {reference.name} are smaller than {side} px, and enlarging would blur them: use the set at its full "
            "resolution, or compare at a smaller --side."
        )
    notes = []
    if real.left_out:
        notes.append(f"{real.left_out} of {real.total} images of {reference.name} could not be read and are left out.")
    if real.enlarged:
        notes.append(f"{real.enlarged} of {seen} images of {reference.name} are smaller than {side} px and were enlarged.")
    return notes


def _measure(
    evaluation: EvaluationSettings,
    networks: dict[Kind, ImageFeatures],
    real: dict[Kind, Features],
    generated: dict[Kind, Features],
    captions: list[str],
    device: torch.device,
    reporter: Reporter,
) -> dict[str, Any]:
    results, prdc = {}, None
    for name in evaluation.metrics:
        kind = METRICS[name].kind
        network, real_ND, generated_MD = networks[kind], real[kind].features_ND, generated[kind].features_ND
        captions_MD: Tensor | None = None
        if name == "clip-score":
            with reporter.progress(f"captions, {network.name}", len(captions)) as advance:
                captions_MD = ClipCaptions(evaluation.clip, device)(captions, advance)
        if name in PRDC_METRICS and prdc is None:
            with reporter.progress(f"nearest neighbours, {network.name}", prdc_rows(real_ND, generated_MD)) as advance:
                prdc = compute_prdc(real_ND, generated_MD, on_rows=advance)
        sets = Sets(real_ND, generated_MD, captions_MD, prdc)
        with reporter.progress(f"{name}, {network.name}", steps_to_measure(name, sets, evaluation.resamples)) as advance:
            results[name] = {
                **measure(name, sets, evaluation.resamples, advance),
                "network": network.name,
                "fingerprint": network.fingerprint,
                "resize": network.resize,
            }
    return results


def _extremes(
    reference: Source, generated: Features, real: Features, captions: list[str], paths: list[Path], side: int, reporter: Reporter
) -> tuple[list[Neighbour], list[Neighbour]]:
    """Return the generated images nearest to a real one, nearest first, and the farthest ones, farthest first."""
    with reporter.progress("nearest real images", len(generated.features_ND)) as advance:
        distance_M, row_M = nearest(generated.features_ND, real.features_ND, advance)
    order = distance_M.argsort().tolist()
    chosen = order[:EXTREMES], order[: -EXTREMES - 1 : -1]
    needed = sorted({int(real.numbers_N[row_M[m]]) for group in chosen for m in group})
    contents = dict(pick(parts_of(reference), real.counts, needed))
    near, far = (
        [Neighbour(captions[m], paths[m].read_bytes(), contents[int(real.numbers_N[row_M[m]])], side, float(distance_M[m])) for m in group]
        for group in chosen
    )
    return near, far
