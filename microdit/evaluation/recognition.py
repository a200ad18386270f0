"""Is the picture of a caption recognisably its picture? The rank of the right one among all training pictures.

Quality of a run trained on the embedded emoji: are its pictures recognisable?
"""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from microdit.data.decode import to_image, to_tensor
from microdit.data.sources.builtin import Row
from microdit.evaluation.features import EfficientNetLite0
from microdit.evaluation.generators import ON_CPU, Compute, DrawSettings
from microdit.io.files import write_aside
from microdit.pipelines.load import open_model
from microdit.pipelines.pipeline import BATCH, MicroDiTPipeline


@dataclass(frozen=True)
class Retrieval:
    """Shares of generated pictures whose true picture is among the 1 or 10 nearest of all."""

    top_1: float
    top_10: float
    captions: int
    chance_top_10: float


def retrieval(generated_ND: Tensor, pictures_MD: Tensor, right_N: Tensor) -> Retrieval:
    """Cosine similarity of features. `right_N` holds, for each generated picture, the row of its true one in `pictures_MD`."""
    similarity_NM = F.normalize(generated_ND, dim=1) @ F.normalize(pictures_MD, dim=1).T
    right_similarity_N1 = similarity_NM.gather(1, right_N[:, None])
    rank_N = (similarity_NM > right_similarity_N1).sum(dim=1)
    top_1, top_10 = ((rank_N < top).float().mean().item() for top in (1, 10))
    return Retrieval(top_1, top_10, len(generated_ND), min(1.0, 10 / len(pictures_MD)))


def spread_ids(rows: int, count: int) -> Tensor:
    """`count` row numbers spread evenly over `rows`: the same captions for every model."""
    return torch.linspace(0, rows - 1, min(count, rows), dtype=torch.float64).round().long()


def evaluate_emoji_run(
    run: Path,
    rows: list[Row],
    count: int,
    settings: DrawSettings,
    warn: Callable[[str], None],
    on_step: Callable[[int], None] | None = None,
    compute: Compute = ON_CPU,
) -> dict[str, Any]:
    """Draw `count` of the captions of `rows`, look each picture up among all of their pictures; write and return metrics.json.

    The same is measured of the autoencoder's reconstructions: no model of these latents can do better.
    `on_step(n)` is called after each n more picture-steps.
    """
    opened = open_model(str(run), warn, settings.weights)
    pipeline, size = opened.pipeline.to(compute.device, compute.dtype), opened.resolution
    right_N = spread_ids(len(rows), count)
    chosen = [rows[i] for i in right_N]
    captions = [row.caption for row in chosen]
    drawn = pipeline.generate(captions, settings.sampler, settings.seed, on_step, warn=warn, batch_size=compute.batch_size or BATCH)
    network = EfficientNetLite0(compute.device)
    pictures_MD = network([to_image(to_tensor(row.image, size)) for row in rows])
    metrics: dict[str, Any] = {
        **{key: opened.about[key] for key in ("step", "images_seen") if key in opened.about},
        "sampler": asdict(settings),
        "dtype": compute.dtype_name,
        "retrieval": asdict(retrieval(network(drawn), pictures_MD, right_N)),
        "retrieval_of_reconstructions": asdict(
            retrieval(network(_reconstruct(pipeline, [row.image for row in chosen], size)), pictures_MD, right_N)
        ),
    }
    write_aside(run / "metrics.json", json.dumps(metrics, indent=1).encode())
    return metrics


def _reconstruct(pipeline: MicroDiTPipeline, images: list[Image.Image], size: int) -> list[Image.Image]:
    pixels_NCHW = torch.stack([to_tensor(image, size) for image in images])
    return pipeline.decode(pipeline.autoencoder.encode(pixels_NCHW))
