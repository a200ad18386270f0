"""How near a run's pictures are, as a whole, to a reference set's, on one network's features."""

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from microdit.data.images import Rejected, decode, fit
from microdit.data.sources import Source
from microdit.errors import UserError
from microdit.evaluation.drawing import DrawSettings, draw_pictures
from microdit.evaluation.frechet import fit_gaussian, frechet_distance, frechet_infinity
from microdit.evaluation.image_features import BATCH, ClipFeatures, DinoFeatures, EfficientNetFeatures, ImageFeatures, InceptionFeatures
from microdit.evaluation.kid import cmmd, kid
from microdit.evaluation.manifold import density_coverage, precision_recall
from microdit.files import write_aside
from microdit.pipeline import Pipeline

LARGEST_SUBSET = 1000  # of KID, as its authors take


def open_network(name: str, device: str) -> ImageFeatures:
    """efficientnet, inception:FILE, clip:PLACE or dino:PLACE. Raises UserError."""
    kind, _, place = name.partition(":")
    if kind == "efficientnet" and not place:
        return EfficientNetFeatures()
    if kind == "inception" and place:
        return InceptionFeatures(Path(place), device=device)
    if kind == "clip" and place:
        return ClipFeatures(place, device)
    if kind == "dino" and place:
        return DinoFeatures(place, device)
    raise UserError(f"--network {name}: write efficientnet, inception:FILE, clip:FOLDER-OR-HUB-NAME or dino:FOLDER-OR-HUB-NAME.")


def compare_with_reference(
    run: Path,
    reference: Source,
    count: int,
    network: ImageFeatures,
    settings: DrawSettings,
    out: Path,
    warn: Callable[[str], None],
    share: tuple[int, int] = (0, 1),
    on_step: Callable[[int], None] | None = None,
) -> dict[str, Any] | None:
    """Draw the captions of the first `count` records, compare with all of the reference's pictures, cut to the run's
    squares; write out/distribution.json.

    Under torchrun only `share`'s pictures are drawn, and None is returned while others are missing: the last process to end, or a later
    call, measures. Raises UserError for too few records or pictures.
    """
    captions, rejected = _captions(reference, count), 0
    side = Pipeline.from_run(run, warn, settings.weights)[1].state["data"]["resolution"]
    draw_pictures(run, captions, out / "pictures", settings, warn, share=share, on_step=on_step)
    paths = [out / "pictures" / f"{number:04}.png" for number in range(count)]
    if not all(path.is_file() for path in paths):
        return None
    generated_ND = _features(network, (Image.open(path).convert("RGB") for path in paths))

    def real_pictures() -> Iterator[Image.Image]:
        nonlocal rejected
        for part in reference.parts:
            for record in part.records():
                try:
                    yield Image.fromarray(fit(decode(record.image), side, side))
                except Rejected:
                    rejected += 1

    real_MD = _features(network, real_pictures())
    if rejected:
        warn(f"{rejected} pictures of {reference.name} could not be read, and are left out.")
    result = {
        "run": str(run),
        "reference": {"source": reference.name, "pictures": len(real_MD), "left_out": rejected, "side": side},
        "network": {"name": network.name, "fingerprint": network.fingerprint, "resize": network.resize},
        "pictures": count,
        "settings": asdict(settings),
        **measure(real_MD, generated_ND, isinstance(network, ClipFeatures)),
    }
    write_aside(out / "distribution.json", json.dumps(result, indent=1).encode())
    return result


def measure(real_MD: Tensor, generated_ND: Tensor, clip: bool = False) -> dict[str, Any]:
    """All distances of two sets of features of one network; CMMD if it is CLIP."""
    reference = fit_gaussian(real_MD)
    subset = min(LARGEST_SUBSET, len(real_MD), len(generated_ND))
    extrapolated = frechet_infinity(generated_ND, reference)
    return {
        "frechet_distance": frechet_distance(reference, fit_gaussian(generated_ND)),
        "frechet_distance_infinity": extrapolated.distance,
        "kid": asdict(kid(generated_ND, real_MD, subset_size=subset)),
        **asdict(precision_recall(real_MD, generated_ND)),
        **asdict(density_coverage(real_MD, generated_ND)),
        **({"cmmd": cmmd(generated_ND, real_MD)} if clip else {}),
    }


def _captions(reference: Source, count: int) -> list[str]:
    """One of each of the first records that have any: the first of those that the source would train with."""
    records = (record for part in reference.parts for record in part.records() if not record.problem)
    named = (next((record.captions[name] for name in reference.caption_weights if name in record.captions), "") for record in records)
    found = list(islice(filter(None, named), count))
    if len(found) < count:
        raise UserError(f"{reference.name} holds {len(found)} records with captions, fewer than the {count} asked for: lower -n.")
    return found


@torch.no_grad()
def _features(network: ImageFeatures, images: Iterator[Image.Image]) -> Tensor:
    batches = []
    while batch := list(islice(images, BATCH)):
        batches.append(network(batch))
    return torch.cat(batches)
