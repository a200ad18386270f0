"""Frechet distance during training: images of captions of a reference set, drawn with the averaged weights, against its cached statistics.

The reference's captions, mean and covariance are kept in the user's cache, under a name made of everything that they depend on; a later
start reads them without opening an image. Captions and noise are those of `microdit evaluate --reference`, whose distance this is.
"""

import hashlib
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from microdit.config.schema import Recipe
from microdit.data.sources.base import Source
from microdit.data.sources.open import open_source
from microdit.distributed import World
from microdit.errors import UserError
from microdit.evaluation.evaluate import EvaluationSettings, load_feature_network, parts_of, reference_captions, reference_notes
from microdit.evaluation.extraction import extract, feature_cache, read_tensors, write_tensors
from microdit.evaluation.features import ImageFeatures
from microdit.evaluation.metrics.frechet import Gaussian, few_samples_warning, fit_gaussian, sample_distance
from microdit.evaluation.metrics.registry import label
from microdit.io.console import Reporter
from microdit.models.microdit import MicroDiT
from microdit.pipelines.pipeline import Encoders, MicroDiTPipeline
from microdit.pipelines.settings import SamplerSettings, suited_to

GROUP = 16  # images that one process generates together


class TrainingFID:
    """Draws the same captions from the same noise each time, and measures how far the images are from the reference set.

    `encoders`, called with what a checkpoint would say of itself, loads autoencoder and text encoder. `dtype` is that of matrix products.
    """

    def __init__(
        self,
        recipe: Recipe,
        side: int,
        world: World,
        dtype: torch.dtype,
        encoders: Callable[[dict[str, Any]], Encoders],
        reporter: Reporter,
    ):
        """Read or compute the statistics of the reference, at `side` pixels. All processes must call this.

        Raises UserError if the set cannot be read, has too few captions or too small images, or if the feature network is missing.
        """
        record = recipe.record
        assert record.fid_reference is not None, "checked when the recipe is loaded"
        self._record, self._world, self._dtype, self._encoders = record, world, dtype, encoders
        with world.together():
            self._network = load_feature_network("network", EvaluationSettings(["fid"], 0, record.fid_network), world.device)
            source = open_source(record.fid_reference)
        self._captions, self._reference = _statistics(source, self._network, record.fid_samples, side, world, reporter)
        self._name = f"{label('fid', self._network.name)} to {self._reference.count:,} images of {source.name}"
        if world.is_main and (warning := few_samples_warning(record.fid_samples, len(self._reference.mean))):
            reporter.warn(warning)

    def measure(self, model: MicroDiT, description: dict[str, Any]) -> dict[str, float]:
        """Return `fid` and the time it took, `fid_seconds`. `description` is that of a checkpoint. All processes must call this."""
        started, world = time.monotonic(), self._world
        encoders = self._encoders(description)
        pipeline = MicroDiTPipeline.around(model, description, encoders).to(world.device, self._dtype)
        settings = suited_to(pipeline.objective, SamplerSettings(self._record.sample_steps, self._record.guidance_scale))
        starts = range(0, len(self._captions), GROUP)
        mine: dict[int, Tensor] = {}
        for start in starts[world.rank :: world.size]:
            captions = self._captions[start : start + GROUP]
            mine[start] = self._network(pipeline.generate(captions, settings, start, warn=lambda sentence: None))
        for encoder in encoders:
            encoder.to("cpu")  # free the GPU's memory for training
        everyones = {start: group for share in world.gather(mine) for start, group in share.items()}
        features_ND = torch.cat([everyones[start] for start in starts])
        distance = world.share(sample_distance(features_ND, self._reference) if world.is_main else None)
        return {"fid": float(distance or 0.0), "fid_seconds": round(time.monotonic() - started, 2)}

    def describe(self, step: int, figures: dict[str, float]) -> str:
        """Return the figures as a sentence."""
        return f"{self._name} at step {step}: {figures['fid']:.4g}, by {len(self._captions):,} drawn in {figures['fid_seconds']:.1f} s"


def _statistics(
    source: Source, network: ImageFeatures, count: int, side: int, world: World, reporter: Reporter
) -> tuple[list[str], Gaussian]:
    """Return `count` captions of a source and the Gaussian of its images' features, from the cache or computed by all processes."""
    path = feature_cache() / f"statistics-{_key(source, network, count, side)}.safetensors"
    found = world.look(lambda: _read(path, reporter))
    if found is None:
        captions = reference_captions(source, count, world, reporter)
        features = extract(network, source.name, parts_of(source), side, feature_cache(), world, reporter)
        for note in reference_notes(source, features, side) if world.is_main else []:
            reporter.warn(note)
        found = world.look(lambda: _write(path, captions, fit_gaussian(features.features_ND)))
    return found


def _key(source: Source, network: ImageFeatures, count: int, side: int) -> str:
    """Return a digest of what the captions and statistics depend on: the files of the source, and how their images are looked at."""
    digest = hashlib.sha256(f"{source.name} {network.name} {network.fingerprint} {network.resize} {side} {count}".encode())
    for part in source.parts:
        digest.update(f"\0{part.name}\0{part.fingerprint()}".encode(errors="surrogatepass"))
    return digest.hexdigest()[:32]


def _read(path: Path, reporter: Reporter) -> tuple[list[str], Gaussian] | None:
    found = read_tensors(path, ("mean", "covariance", "deviations"), reporter)
    if found is None:
        return None
    tensors, metadata = found
    deviations_DN = tensors["deviations"].numpy() if tensors["deviations"].shape[1] else None
    return json.loads(metadata["captions"]), Gaussian(tensors["mean"], tensors["covariance"], int(metadata["count"]), deviations_DN)


def _write(path: Path, captions: list[str], gaussian: Gaussian) -> tuple[list[str], Gaussian]:
    """Keep captions and statistics, and return them."""
    deviations_DN = torch.zeros(len(gaussian.mean), 0) if gaussian.deviations is None else torch.tensor(gaussian.deviations)
    tensors = {"mean": gaussian.mean, "covariance": gaussian.covariance, "deviations": deviations_DN}
    metadata = {"captions": json.dumps(captions), "count": str(gaussian.count)}
    try:
        write_tensors(path, {name: tensor.contiguous() for name, tensor in tensors.items()}, metadata)
    except OSError as error:
        raise UserError(f"Statistics of record.fid_reference cannot be written to {path} ({error.strerror}): free some space.") from error
    return captions, gaussian
