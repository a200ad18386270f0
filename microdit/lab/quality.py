"""The quality of an arm's checkpoint: the same captions and noise for every arm, without masking, with EMA weights.

Two kinds of reference set, by the study's `source`:

- the images of a source, such as `emoji`, with captions that the text encoder embeds;
- `encoded`: the rows of the encoded set itself, whose latents are decoded and whose stored caption vectors are used. Neither the images nor
  the text encoder need to be there, and the autoencoder's own error does not count against the model.

EfficientNet-Lite0 judges every study. A study may name further judges, which owe nothing to it: an arm that it teaches would please it.

Shape legend: N generated images, M images of the reference set, D features, B batch.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import torch
from PIL import Image
from torch import Tensor

from microdit.checkpoint import Checkpoint, default_weights, find_weights
from microdit.data.dataset import EncodedDataset
from microdit.data.decode import decode, fit
from microdit.data.pixels import to_image
from microdit.data.shards import DamagedShard
from microdit.data.sources.open import open_source
from microdit.distributed import World
from microdit.encoders.autoencoder import load_autoencoder
from microdit.errors import UserError
from microdit.evaluation.extraction import Features, extract, feature_cache, read_tensors, write_tensors
from microdit.evaluation.features import EfficientNetFeatures, ImageFeatures, PixelFeatures
from microdit.evaluation.metrics.frechet import Gaussian, fit_gaussian, sample_distance
from microdit.evaluation.metrics.kid import kid
from microdit.evaluation.picture_classifier import trained_classifier
from microdit.evaluation.recognition import retrieval, spread_ids
from microdit.io.console import Reporter
from microdit.io.places import location
from microdit.lab.study import ENCODED, MEASURES, Judge, Study
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
    """One measurement. `recognised` is top-10 retrieval among all training images, with EfficientNet-Lite0 features.

    `judged` holds what the study's further judges measured.
    """

    held_out_loss: float
    frechet_distance: float
    kid: float
    recognised: float
    judged: dict[str, float] = field(default_factory=dict)

    def by_name(self) -> dict[str, float]:
        """Return all values by the names of their measures."""
        values: dict[str, float] = {name: getattr(self, name) for name in MEASURES}
        return values | {str(name): value for name, value in self.judged.items()}


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
        self._judges = {judge: self._judge(judge) for judge in study.judges}
        self._judged_MD = {judge: self._references.features(network) for judge, network in self._judges.items()}

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
            judged={measure: value for judge in self._judges for measure, value in self._judged(judge, images).items()},
        )
        return metrics, strip, captions

    def _judge(self, judge: Judge) -> ImageFeatures:
        if judge == "pixels":
            return PixelFeatures()
        return trained_classifier(self._references.images(), self._world.device, self._reporter)

    def _judged(self, judge: Judge, images: list[Image.Image]) -> dict[str, float]:
        """Return the measures of one of the study's further judges."""
        generated_ND, real_MD = self._judges[judge](images), self._judged_MD[judge]
        recognised = retrieval(generated_ND, real_MD, self._references.right_N).top_10
        if judge == "pixels":
            return {"recognised_pixels": recognised}
        distance = sample_distance(generated_ND, fit_gaussian(real_MD))
        return {"frechet_distance_classifier": distance, "recognised_classifier": recognised}

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

    def features(self, network: ImageFeatures) -> Tensor:
        """Return features of all images, (M, D), from the cache if it has them."""
        ...

    def images(self) -> list[Image.Image]:
        """Return all images, in the order of their features."""
        ...

    def pipeline(self, checkpoint: Checkpoint) -> MicroDiTPipeline: ...

    def generate(self, pipeline: MicroDiTPipeline, settings: SamplerSettings) -> tuple[list[Image.Image], list[Image.Image], list[str]]:
        """Return the N images to measure, a strip of images to look at, and its captions."""
        ...


class _SourceReferences:
    """The images of a source, with their captions as text."""

    def __init__(self, study: Study, side: int, network: EfficientNetFeatures, world: World, reporter: Reporter):
        self._study, self._side, self._world, self._reporter = study, side, world, reporter
        self._records = [record for part in open_source(study.source).parts for record in part.records()]
        found = self._extract(network)  # without images that cannot be read
        self._readable = [self._records[number] for number in found.numbers_N]
        self.features_MD = found.features_ND
        self.gaussian = fit_gaussian(self.features_MD)
        self.right_N = spread_ids(len(self.features_MD), study.pictures)
        self._captions = [next(iter(self._readable[row].captions.values())) for row in self.right_N]
        self._encoders: dict[tuple[str, str], Encoders] = {}  # by their names, so that each is loaded once

    def _extract(self, network: ImageFeatures) -> Features:
        parts = [lambda: (record.image for record in self._records)]
        return extract(network, self._study.source, parts, self._side, feature_cache(), self._world, self._reporter)

    def features(self, network: ImageFeatures) -> Tensor:
        return self._extract(network).features_ND

    def images(self) -> list[Image.Image]:
        return [Image.fromarray(fit(decode(record.image), self._side, self._side)) for record in self._readable]

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
        self._data, self._world, self._reporter = data, world, reporter
        self._bucket = data.largest_bucket
        self._rows = data.bucket_sizes[self._bucket]
        self.right_N = spread_ids(self._rows, study.pictures)
        stored = data.manifest["autoencoder"]
        self._autoencoder = check_unchanged(load_autoencoder(stored["name"]), stored["fingerprint"])
        self._autoencoder.to(world.device)
        self._text_BLE, self._mask_BL = data.text([self._read(row)[1] for row in self.right_N.tolist()])
        captions = data.column("captions")
        self._captions = [captions[row][0] for row in self.right_N.tolist()] if len(captions) == self._rows else []
        self.features_MD = self.features(network)
        self.gaussian = fit_gaussian(self.features_MD)

    def features(self, network: ImageFeatures) -> Tensor:
        shards = [shard["sha256"] for shard in self._data.manifest["shards"]]  # with the rest, all that features depend on
        facts = [shards, self._data.resolution, network.fingerprint, self._world.device.type]
        path = feature_cache() / f"encoded-{hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:32]}.safetensors"
        if (found := read_tensors(path, ("features",), self._reporter)) is not None:
            return found[0]["features"]
        features = []
        with self._reporter.progress(f"features of {self._data.folder}, decoded", self._rows) as advance:
            for images in self._decoded():
                features.append(network(images))
                advance(len(images))
        features_MD = torch.cat(features)
        write_tensors(path, {"features": features_MD})
        return features_MD

    def images(self) -> list[Image.Image]:
        return [image for images in self._decoded() for image in images]

    def _decoded(self) -> Iterator[list[Image.Image]]:
        for rows in _batches(range(self._rows)):
            latents_BCHW = self._data.latents([self._read(row)[0] for row in rows], self._bucket)
            yield [to_image(pixels) for pixels in self._autoencoder.decode(latents_BCHW.to(self._world.device))]

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
