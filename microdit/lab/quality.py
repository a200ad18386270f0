"""The quality of an arm's checkpoint: the same captions and noise for every arm, without masking, with EMA weights.

Two kinds of reference set, by the study's `source`:

- the images of a source, such as `emoji`, with captions that the text encoder embeds;
- `encoded`: the rows of the encoded set itself, whose latents are decoded and whose stored caption vectors are used. Neither the images nor
  the text encoder need to be there, and the autoencoder's own error does not count against the model.

Shape legend: N generated images, M images of the reference set, D features, B batch.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from PIL import Image
from torch import Tensor

from microdit.checkpoint import Checkpoint, default_weights, find_weights
from microdit.data.dataset import EncodedDataset
from microdit.data.pixels import to_image
from microdit.data.shards import DamagedShard
from microdit.data.sources.open import open_source
from microdit.distributed import World
from microdit.encoders.autoencoder import load_autoencoder
from microdit.errors import UserError
from microdit.evaluation.extraction import extract, feature_cache, read_tensors, write_tensors
from microdit.evaluation.features import EfficientNetFeatures
from microdit.evaluation.metrics.frechet import Gaussian, fit_gaussian, sample_distance
from microdit.evaluation.metrics.kid import kid
from microdit.evaluation.recognition import retrieval, spread_ids
from microdit.io.console import Reporter
from microdit.io.places import location
from microdit.lab.study import ENCODED, Study
from microdit.pipelines.components import check_unchanged
from microdit.pipelines.pipeline import BATCH, Encoders, MicroDiTPipeline, load_encoders
from microdit.pipelines.sampling import frozen_model, recorded_objective
from microdit.pipelines.settings import SamplerSettings
from microdit.training.parallel import DenoisingLoss
from microdit.training.validation import HeldOut

HELD_OUT = 256  # samples of the held-out loss, at most
STRIP = 8  # images of a strip, where the study's own prompts cannot be embedded


@dataclass(frozen=True)
class QualityMetrics:
    """One measurement. `recognised` is top-10 retrieval among all training images, with EfficientNet-Lite0 features."""

    held_out_loss: float
    frechet_distance: float
    kid: float
    recognised: float


class QualityEvaluator:
    """Measures checkpoints. It holds what all measurements of a study share: captions, feature network, features of the reference set."""

    def __init__(self, study: Study, encoded: EncodedDataset, world: World, reporter: Reporter):
        """Compute the features of the reference set, or read them from the cache that all processes share.

        `encoded` is what the reference arm is trained on. Raises UserError.
        """
        self._study, self._world, self._reporter = study, world, reporter
        self._network = EfficientNetFeatures(world.device)
        self._references: _References
        if study.source == ENCODED:
            self._references = _EncodedReferences(study, encoded, self._network, world, reporter)
        else:
            self._references = _SourceReferences(study, encoded.resolution, self._network, world, reporter)

    def measure(self, run: Path, held_out: str | None) -> tuple[QualityMetrics, list[Image.Image], list[str]]:
        """Measure the newest checkpoint of `run`; return its metrics, and a strip of images with their captions.

        `held_out` is the folder of the encoded set for the held-out loss. Raises UserError if the checkpoint is damaged.
        """
        checkpoint = find_weights(run, _raise)
        assert checkpoint is not None, "the run has just ended"
        side = checkpoint.state["data"]["resolution"]
        pipeline = self._references.pipeline(checkpoint)
        pipeline.to(self._world.device)
        real_MD, gaussian = self._references.features_MD, self._references.gaussian
        settings = SamplerSettings(self._study.num_inference_steps, self._study.guidance_scale)
        images, strip, captions = self._references.generate(pipeline, settings)
        generated_ND = self._network(images)
        subset = min(len(generated_ND), len(real_MD), 1000)
        metrics = QualityMetrics(
            held_out_loss=self._held_out_loss(pipeline, side, held_out),
            frechet_distance=sample_distance(generated_ND, gaussian),
            kid=kid(generated_ND, real_MD, subset_size=subset, subsets=20).value,
            recognised=retrieval(generated_ND, real_MD, self._references.right_N).top_10,
        )
        return metrics, strip, captions

    def _held_out_loss(self, pipeline: MicroDiTPipeline, side: int, folder: str | None) -> float:
        assert folder is not None
        held_out = HeldOut(location(folder), side, HELD_OUT, pipeline.objective, self._world)
        found = held_out.measure(DenoisingLoss(pipeline.model, pipeline.objective, pipeline.config.mask_padding))["held_out_loss"]
        assert isinstance(found, float)
        return found


class _References(Protocol):
    """The features of a reference set. `right_N` holds the row of each generated image's own caption."""

    right_N: Tensor
    features_MD: Tensor
    gaussian: Gaussian

    def pipeline(self, checkpoint: Checkpoint) -> MicroDiTPipeline: ...

    def generate(self, pipeline: MicroDiTPipeline, settings: SamplerSettings) -> tuple[list[Image.Image], list[Image.Image], list[str]]:
        """Return the N images to measure, a strip of images to look at, and its captions."""
        ...


class _SourceReferences:
    """The images of a source, with their captions as text."""

    def __init__(self, study: Study, side: int, network: EfficientNetFeatures, world: World, reporter: Reporter):
        self._study, self._reporter = study, reporter
        records = [record for part in open_source(study.source).parts for record in part.records()]
        parts = [lambda: (record.image for record in records)]
        found = extract(network, study.source, parts, side, feature_cache(), world, reporter)  # without images that cannot be read
        self.features_MD = found.features_ND
        self.gaussian = fit_gaussian(self.features_MD)
        self.right_N = spread_ids(len(self.features_MD), study.pictures)
        self._captions = [next(iter(records[found.numbers_N[row]].captions.values())) for row in self.right_N]
        self._encoders: dict[tuple[str, str], Encoders] = {}  # by their names, so that each is loaded once

    def pipeline(self, checkpoint: Checkpoint) -> MicroDiTPipeline:
        data = checkpoint.state["data"]
        names = data["autoencoder"]["name"], data["text_encoder"]["name"]
        if names not in self._encoders:
            self._encoders[names] = load_encoders(data)
        return MicroDiTPipeline.from_checkpoint(checkpoint, encoders=self._encoders[names])

    def generate(self, pipeline: MicroDiTPipeline, settings: SamplerSettings) -> tuple[list[Image.Image], list[Image.Image], list[str]]:
        images = pipeline.generate(self._captions, settings, warn=self._reporter.warn)
        return images, pipeline.generate(self._study.prompts, settings, warn=self._reporter.warn), self._study.prompts


class _EncodedReferences:
    """The rows of an encoded set: decoded latents, stored caption vectors."""

    def __init__(self, study: Study, data: EncodedDataset, network: EfficientNetFeatures, world: World, reporter: Reporter):
        self._data, self._network, self._world, self._reporter = data, network, world, reporter
        self._bucket = data.largest_bucket
        self._rows = data.bucket_sizes[self._bucket]
        self.right_N = spread_ids(self._rows, study.pictures)
        stored = data.manifest["autoencoder"]
        self._autoencoder = check_unchanged(load_autoencoder(stored["name"]), stored["fingerprint"])
        self._autoencoder.to(world.device)
        self._text_BLE, self._mask_BL = data.text([self._read(row)[1] for row in self.right_N.tolist()])
        captions = data.column("captions")
        self._captions = [captions[row][0] for row in self.right_N.tolist()] if len(captions) == self._rows else []
        self.features_MD = self._features()
        self.gaussian = fit_gaussian(self.features_MD)

    def _features(self) -> Tensor:
        """Return the features of all rows, from the cache if it has them. The name of its file depends on everything they depend on."""
        shards = [shard["sha256"] for shard in self._data.manifest["shards"]]
        facts = [shards, self._data.resolution, self._network.fingerprint, self._world.device.type]
        path = feature_cache() / f"encoded-{hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:32]}.safetensors"
        if (found := read_tensors(path, ("features",), self._reporter)) is not None:
            return found[0]["features"]
        features = []
        with self._reporter.progress(f"features of {self._data.folder}, decoded", self._rows) as advance:
            for rows in _batches(range(self._rows)):
                latents_BCHW = self._data.latents([self._read(row)[0] for row in rows], self._bucket)
                pixels_BCHW = self._autoencoder.decode(latents_BCHW.to(self._world.device))
                features.append(self._network([to_image(pixels) for pixels in pixels_BCHW]))
                advance(len(rows))
        features_MD = torch.cat(features)
        write_tensors(path, {"features": features_MD})
        return features_MD

    def pipeline(self, checkpoint: Checkpoint) -> MicroDiTPipeline:
        state = checkpoint.state
        model = frozen_model(checkpoint.model_config, checkpoint.tensors(default_weights(checkpoint)))
        _, height, width = state["data"]["latent_shape"]
        pipeline = MicroDiTPipeline.of_parts(
            model,
            recorded_objective(state),
            self._autoencoder,
            None,
            (height, width),
            state["mask_padding"],
            state["data"]["captions"] == "full",
        )
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    def generate(self, pipeline: MicroDiTPipeline, settings: SamplerSettings) -> tuple[list[Image.Image], list[Image.Image], list[str]]:
        images: list[Image.Image] = []
        for numbers in _batches(range(len(self.right_N))):
            (drawn,) = pipeline(
                prompt_embeds=self._text_BLE[numbers.start : numbers.stop],
                prompt_attention_mask=self._mask_BL[numbers.start : numbers.stop],
                generator=[torch.Generator().manual_seed(number) for number in numbers],
                num_inference_steps=settings.num_inference_steps,
                guidance_scale=settings.guidance_scale,
                solver=settings.solver,
                return_dict=False,
            )
            images += drawn
        shown = spread_ids(len(images), STRIP).tolist()
        return images, [images[n] for n in shown], [self._captions[n] if self._captions else "" for n in shown]

    def _read(self, row: int) -> tuple[memoryview, memoryview]:
        try:
            return self._data.read(self._bucket, row)
        except DamagedShard as damage:
            raise UserError(f"{damage}. Quality is measured on that row: encode it again.") from damage


def _batches(numbers: range) -> Iterator[range]:
    return (numbers[start : start + BATCH] for start in range(0, len(numbers), BATCH))


def _raise(sentence: str) -> None:
    """Treat a warning about a damaged checkpoint as an error: its measurement would be of an older one."""
    raise UserError(sentence)
