"""The frozen encoders at work on one chunk of records after the other, on any device.

On a GPU nothing here waits for it: pixels cross as bytes from pinned memory and become numbers there, results come back into pinned memory
while the next chunk is queued, and `EncodedChunk.wait` is for whoever needs them. A batch that does not fit the GPU's memory is halved.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from microdit.data.decoding import Picture
from microdit.data.forms import CaptionForm
from microdit.data.pixels import normalise
from microdit.data.sources import Record
from microdit.encoders.autoencoder import Autoencoder
from microdit.encoders.text import TextEncoder
from microdit.errors import UserError

R = TypeVar("R")


@dataclass(frozen=True)
class EncodedChunk:
    """Records with what the encoders made of them, batch by batch: complete on the CPU only after `wait`.

    `ids` are all captions' tokens, in the order of the records. `text` and `latents` hold float32 batches with the numbers of the captions,
    or of the records, that are in them; those of `latents` have their resolution too. Without vectors (form `ids`) `text` is empty.
    """

    records: list[Record]
    buckets: list[int]
    ids: list[list[int]]
    text: list[tuple[list[int], Tensor]]
    latents: list[tuple[list[int], int, Tensor]]
    arrived: torch.cuda.Event | None

    def wait(self) -> None:
        if self.arrived is not None:
            self.arrived.synchronize()


class BatchEncoder:
    """Both encoders and their batches: `batch_size` pictures, or captions, at a time, as long as they fit.

    `warn` is told when fewer do. The encoders are on `device` already.
    """

    def __init__(
        self,
        autoencoder: Autoencoder,
        text_encoder: TextEncoder,
        device: torch.device,
        captions: CaptionForm,
        batch_size: int,
        warn: Callable[[str], None],
    ):
        self.autoencoder, self.text_encoder, self.device, self.captions, self.warn = autoencoder, text_encoder, device, captions, warn
        self._sizes = {"pictures": batch_size, "captions": batch_size}

    def encode(self, records: list[Record], pictures: list[Picture], resolutions: tuple[int, ...]) -> EncodedChunk:
        """`pictures` holds each record's bucket and its pixels at every resolution, (H, W, 3)."""
        ids = self.text_encoder.tokenize([caption for record in records for caption in record.captions.values()])
        text = [] if self.captions == "ids" else list(self._text(ids))
        latents = list(self._latents(pictures, resolutions))
        arrived = None
        if self.device.type == "cuda":
            arrived = torch.cuda.Event()
            arrived.record(torch.cuda.current_stream(self.device))
        return EncodedChunk(records, [bucket for bucket, _ in pictures], ids, text, latents, arrived)

    def _text(self, ids: list[list[int]]) -> Iterator[tuple[list[int], Tensor]]:
        """Batches hold captions of about one length."""
        by_length = sorted(range(len(ids)), key=lambda number: len(ids[number]))
        return self._batches("captions", by_length, lambda batch: self._back(self._embed([ids[number] for number in batch])))

    @torch.no_grad()
    def _embed(self, ids: list[list[int]]) -> Tensor:
        return self.text_encoder.embed_full(ids) if self.captions == "full" else self.text_encoder.embed(ids)[0]

    def _latents(self, pictures: list[Picture], resolutions: tuple[int, ...]) -> Iterator[tuple[list[int], int, Tensor]]:
        """Batches hold pictures of one bucket."""
        by_bucket: dict[int, list[int]] = {}
        for number, (bucket, _) in enumerate(pictures):
            by_bucket.setdefault(bucket, []).append(number)

        def encode(batch: list[int]) -> list[Tensor]:
            pixels = ([pictures[number][1][which] for number in batch] for which in range(len(resolutions)))
            return [self._back(self.autoencoder.encode(self._pixels(stack))) for stack in pixels]

        for numbers in by_bucket.values():
            for batch, latents in self._batches("pictures", numbers, encode):
                for resolution, latents_BCHW in zip(resolutions, latents, strict=True):
                    yield batch, resolution, latents_BCHW

    def _pixels(self, pixels: list[NDArray[np.uint8]]) -> Tensor:
        pixels_BHWC = torch.empty((len(pixels), *pixels[0].shape), dtype=torch.uint8, pin_memory=self.device.type == "cuda")
        np.stack(pixels, out=pixels_BHWC.numpy())
        return normalise(pixels_BHWC.to(self.device, non_blocking=True))

    def _back(self, tensor: Tensor) -> Tensor:
        return tensor.float().to("cpu", non_blocking=self.device.type == "cuda")  # into pinned memory

    def _batches(self, what: str, numbers: list[int], encode: Callable[[list[int]], R]) -> Iterator[tuple[list[int], R]]:
        """Each batch with what `encode` makes of it, the batch halved until it fits.

        Raises UserError when one alone does not.
        """
        first, refused = 0, False
        while first < len(numbers):
            batch = numbers[first : first + self._sizes[what]]
            try:
                result = encode(batch)
            except torch.OutOfMemoryError as error:
                if len(batch) == 1:
                    raise UserError(self._too_small(what, error)) from error
                self._sizes[what], refused = len(batch) // 2, True
            else:
                if refused:
                    refused = False
                    self.warn(f"The GPU's memory holds fewer {what} at a time: {self._sizes[what]} from here on.")
                yield batch, result
                first += len(batch)
                continue
            torch.cuda.empty_cache()  # outside of `except`, whose error keeps the tensors alive

    def _too_small(self, what: str, error: torch.OutOfMemoryError) -> str:
        dtype = str(self.autoencoder.dtype if what == "pictures" else self.text_encoder.dtype).removeprefix("torch.")
        return (
            f"The GPU's memory does not hold the encoders with one of the {what} in {dtype} ({str(error).splitlines()[0][:160]}): take "
            "--dtype bfloat16 (half of float32), smaller --resolutions, or --device cpu."
        )
