"""Quality of a checkpoint for the lab: small, always the same pictures and noise, nothing masked, averaged weights."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from PIL import Image
from torch import Tensor

from microdit.checkpoint import find_weights
from microdit.data.sources import open_source
from microdit.distributed import World
from microdit.encoders.autoencoder import Autoencoder
from microdit.encoders.text import TextEncoder
from microdit.errors import UserError
from microdit.evaluation.extraction import extract, feature_cache
from microdit.evaluation.frechet import Gaussian, fit_gaussian, sample_distance
from microdit.evaluation.image_features import EfficientNetFeatures
from microdit.evaluation.kid import kid
from microdit.evaluation.retrieval import retrieval, spread_ids
from microdit.lab.study import Study
from microdit.pipeline import Pipeline, SamplerSettings
from microdit.terminal import warn
from microdit.training.held_out import HeldOut
from microdit.training.step import DenoisingLoss

HELD_OUT = 106  # samples: as many as there are held-out emoji


@dataclass(frozen=True)
class Reading:
    """`recognised`: share of captions whose picture is among the 10 nearest of all training pictures, by EfficientNet-Lite0."""

    held_out_loss: float
    frechet_distance: float
    kid: float
    recognised: float


class Reader:
    """Holds what all readings of a study share: the reference's features, captions, the network."""

    def __init__(self, study: Study, world: World):
        self._study, self._world = study, world
        self._network = EfficientNetFeatures()
        self._records = [record for part in open_source(study.source).parts for record in part.records()]
        self._right_N = spread_ids(len(self._records), study.pictures)
        self._captions = [self._records[i].captions["caption"] for i in self._right_N]
        self._real: tuple[Tensor, Gaussian] | None = None
        self._encoders: dict[tuple[str, str], tuple[Autoencoder, TextEncoder]] = {}  # by their names: loaded once for all readings

    def read(self, run: Path, held_out: str | None) -> tuple[Reading, list[Image.Image]]:
        """Of the newest checkpoint, and pictures of the study's prompts. `held_out`: the folder of samples that were not learnt from."""
        pipeline, side = self._open(run)
        real_MD, gaussian = self._reference(side)
        settings = SamplerSettings(self._study.num_inference_steps, self._study.guidance_scale)
        drawn_ND = self._network(pipeline(self._captions, settings, seed=0))
        strip = pipeline(list(self._study.prompts), settings, seed=0)
        subset = min(len(drawn_ND), len(real_MD), 1000)
        reading = Reading(
            held_out_loss=self._held_out_loss(pipeline, side, held_out),
            frechet_distance=sample_distance(drawn_ND, gaussian),
            kid=kid(drawn_ND, real_MD, subset_size=subset, subsets=20).value,
            recognised=retrieval(drawn_ND, real_MD, self._right_N).top_10,
        )
        return reading, strip

    def _open(self, run: Path) -> tuple[Pipeline, int]:
        """The newest checkpoint's pipeline, and the side of its pictures."""
        checkpoint = find_weights(run, _refuse)
        assert checkpoint is not None, "the run has just ended"
        data = checkpoint.state["data"]
        names = data["autoencoder"]["name"], data["text_encoder"]["name"]
        pipeline = Pipeline.from_checkpoint(checkpoint, loaded=self._encoders.get(names))
        self._encoders[names] = pipeline.autoencoder, pipeline.text_encoder
        return pipeline, data["resolution"]

    def _held_out_loss(self, pipeline: Pipeline, side: int, folder: str | None) -> float:
        assert folder is not None
        held_out = HeldOut(Path(folder), side, HELD_OUT, pipeline.edm, self._world)
        found = held_out.measure(DenoisingLoss(pipeline.model, pipeline.edm, pipeline.mask_padding))["held_out_loss"]
        assert isinstance(found, float)
        return found

    def _reference(self, side: int) -> tuple[Tensor, Gaussian]:
        if self._real is None:
            found = extract(self._network, self._study.source, [self._pictures], side, feature_cache(), self._world, warn)
            self._real = found.features_ND, fit_gaussian(found.features_ND)
        return self._real

    def _pictures(self) -> Iterator[bytes]:
        return (record.image for record in self._records)


def _refuse(sentence: str) -> None:
    """A run of the lab that is damaged is no result."""
    raise UserError(sentence)
