"""Quality of a run trained on the embedded emoji: are its pictures recognisable?"""

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from microdit.data.emoji import Row
from microdit.data.pixels import to_image, to_tensor
from microdit.evaluation.features import EfficientNetLite0
from microdit.evaluation.painters import ON_CPU, Compute, DrawSettings
from microdit.evaluation.retrieval import retrieval, spread_ids
from microdit.files import write_aside
from microdit.hub.opening import open_model
from microdit.pipeline import BATCH, Pipeline


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
    drawn = pipeline(captions, settings.sampler, settings.seed, on_step, batch_size=compute.batch_size or BATCH)
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


def _reconstruct(pipeline: Pipeline, images: list[Image.Image], size: int) -> list[Image.Image]:
    pixels_NCHW = torch.stack([to_tensor(image, size) for image in images])
    return pipeline.decode(pipeline.autoencoder.encode(pixels_NCHW))
