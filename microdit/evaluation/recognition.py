"""Retrieval accuracy: whether a generated image is recognised as the image of its caption, among all images of a set.

Training, the lab and `microdit evaluate` without `--reference` all use `retrieval`. A generated image counts as recognised if the real
image of its caption is among the nearest real ones, by cosine similarity of features.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from microdit.data.pixels import to_image, to_tensor
from microdit.data.sources.builtin import CaptionedImage
from microdit.evaluation.features import EfficientNetFeatures
from microdit.evaluation.generators import ON_CPU, Compute, DrawSettings
from microdit.io.files import to_checked_json, write_aside
from microdit.pipelines.open_model import open_model
from microdit.pipelines.pipeline import BATCH, MicroDiTPipeline


@dataclass(frozen=True)
class Retrieval:
    """Shares of generated images whose own real image is the nearest, or among the 10 nearest, and the latter's chance level."""

    top_1: float
    top_10: float
    captions: int
    chance_top_10: float


def retrieval(generated_ND: Tensor, real_MD: Tensor, right_N: Tensor) -> Retrieval:
    """Rank the real images by similarity to each generated one. `right_N` holds the row of each one's own image in `real_MD`.

    `generated_ND` and `real_MD` are features of N generated and M real images. Ties count in favour of the own image.
    """
    similarity_NM = F.normalize(generated_ND, dim=1) @ F.normalize(real_MD, dim=1).T
    right_similarity_N1 = similarity_NM.gather(1, right_N[:, None])
    rank_N = (similarity_NM > right_similarity_N1).sum(dim=1)
    top_1, top_10 = ((rank_N < top).float().mean().item() for top in (1, 10))
    return Retrieval(top_1, top_10, len(generated_ND), min(1.0, 10 / len(real_MD)))


def spread_ids(rows: int, count: int) -> Tensor:
    """Return `count` row numbers spread evenly over `rows`, so that every model is given the same captions."""
    return torch.linspace(0, rows - 1, min(count, rows), dtype=torch.float64).round().long()


def evaluate_emoji_run(
    run: Path,
    rows: list[CaptionedImage],
    count: int,
    settings: DrawSettings,
    warn: Callable[[str], None],
    on_step: Callable[[int], None] | None = None,
    compute: Compute = ON_CPU,
) -> dict[str, Any]:
    """Generate images for `count` captions of `rows` and measure retrieval among all images of `rows`; write and return RUN/metrics.json.

    Retrieval of the autoencoder's reconstructions is measured too: it is the upper bound for any model of these latents. `on_step(n)` is
    called after n more image-steps. Raises UserError if `run` cannot be loaded.
    """
    opened = open_model(str(run), warn, settings.weights)
    pipeline, size = opened.pipeline.to(compute.device, compute.dtype), opened.resolution
    right_N = spread_ids(len(rows), count)
    chosen = [rows[i] for i in right_N]
    captions = [row.caption for row in chosen]
    generated = pipeline.generate(captions, settings.sampler, settings.seed, on_step, warn=warn, batch_size=compute.batch_size or BATCH)
    network = EfficientNetFeatures(compute.device)
    real_MD = network([to_image(to_tensor(row.image, size)) for row in rows])
    metrics: dict[str, Any] = {
        **{key: opened.about[key] for key in ("step", "images_seen") if key in opened.about},
        "sampler": asdict(settings),
        "dtype": compute.dtype_name,
        "retrieval": asdict(retrieval(network(generated), real_MD, right_N)),
        "retrieval_of_reconstructions": asdict(
            retrieval(network(_reconstruct(pipeline, [row.image for row in chosen], size)), real_MD, right_N)
        ),
    }
    write_aside(run / "metrics.json", to_checked_json(metrics))
    return metrics


def _reconstruct(pipeline: MicroDiTPipeline, images: list[Image.Image], size: int) -> list[Image.Image]:
    pixels_NCHW = torch.stack([to_tensor(image, size) for image in images])
    return pipeline.decode(pipeline.autoencoder.encode(pixels_NCHW))
