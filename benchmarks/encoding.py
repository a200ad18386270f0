"""How much of the encoders' bare forward speed does `data encode` reach?

    python benchmarks/encoding.py                                   # small encoders, a minute on a CPU
    python benchmarks/encoding.py --shape sdxl --sides 256 512      # the paper's images, on a GPU

Images are JPEGs made for the benchmark, weights are random, and nothing is downloaded. The bare speed is that of both encoders alone, in
batches of the same size, on prepared pixels and tokens. `data encode` is timed from the first chunk of four batches that it writes to the
last, which excludes the start of its workers. Both are medians of --turns rounds, measured alternately.
"""

from __future__ import annotations

import argparse
import io
import json
import statistics
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

if __name__ != "__mp_main__":  # the workers that decode import this file too, and start sooner without these
    import torch
    from diffusers import AutoencoderKL
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import CLIPTextConfig, CLIPTextModel, PreTrainedTokenizerFast

    from microdit.data.encode import EncodeSettings, default_batch_size, default_workers, encode_source
    from microdit.data.encode_plan import EncodeEvents
    from microdit.data.pixels import normalise
    from microdit.data.sources.base import Part, Record, Source
    from microdit.devices import DTYPES, choose_device, choose_dtype, describe_device
    from microdit.encoders.autoencoder import Autoencoder, DiffusersAutoencoder
    from microdit.encoders.text import FrozenTextEncoder, TextEncoder, as_text_model

BAR = 0.9
WORDS = ["a", "red", "heart", "on", "the", "old", "bridge", "over", "seven", "rivers", "under", "one", "quiet", "cloud"]
PART = 1024  # pictures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--shape", choices=["small", "sdxl"], help="of the encoders [default: sdxl on a GPU, else small]")
    parser.add_argument("--sides", type=int, nargs="+", default=[256], help="resolutions to encode at")
    parser.add_argument("--jpeg-side", type=int, default=512, help="pixels of a side of the files")
    parser.add_argument("--pictures", type=int, help="[default: 8192 on a GPU, else 128]")
    parser.add_argument("--batch-size", type=int)
    parser.add_argument("--workers", type=int)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--out", type=Path, help="a JSON file to write as well")
    args = parser.parse_args()
    device = choose_device(args.device)
    dtype = choose_dtype(args.dtype, device)
    gpu = device.type == "cuda"
    settings = EncodeSettings(
        tuple(args.sides),
        dtype=str(dtype).removeprefix("torch."),
        device=device,
        batch_size=args.batch_size or default_batch_size(device, tuple(args.sides)),
        workers=default_workers(device.type) if args.workers is None else args.workers,
    )
    encoders = make_encoders(args.shape or ("sdxl" if gpu else "small"))
    count = args.pictures or (8192 if gpu else 128)
    print(
        f"{describe_device(device, dtype)}, batches of {settings.batch_size}, {settings.workers} workers, torch {torch.__version__}",
        flush=True,
    )
    result = measure(settings, make_source(count, args.jpeg_side), count, args.turns, *encoders)
    print(f"{'bare encoders, pictures/s':30}{result['bare']:10.1f}\n{'data encode, pictures/s':30}{result['encode']:10.1f}")
    print(f"{'share':30}{result['share']:10.0%}   (bar on a GPU: {BAR:.0%})")
    if args.out:
        args.out.write_text(
            json.dumps({**result, "device": describe_device(device, dtype), "sides": args.sides, "batch": settings.batch_size})
        )


def measure(
    settings: EncodeSettings, source: Source, count: int, turns: int, autoencoder: Autoencoder, text_encoder: TextEncoder
) -> dict[str, float]:
    """Measure images per second. An uncounted first round of each warms up the device."""
    bare, whole = [], []
    with tempfile.TemporaryDirectory() as place:
        for turn in range(turns + 1):
            autoencoder.to(settings.device, DTYPES[settings.dtype])
            text_encoder.to(settings.device, DTYPES[settings.dtype])
            some = min(count, 2048)
            bare.append(some / bare_seconds(settings, source, some, autoencoder, text_encoder))
            written: list[tuple[float, int]] = [(time.perf_counter(), 0)]

            def on_progress(records: int, parts: int, written: list[tuple[float, int]] = written) -> None:
                if records:
                    written.append((time.perf_counter(), written[-1][1] + records))

            encode_source(
                source, Path(place) / f"{turn}", settings, autoencoder, text_encoder, events=EncodeEvents(on_progress), warn=print
            )
            (first, before), (last, after) = written[1 if len(written) > 2 else 0], written[-1]
            whole.append((after - before) / (last - first))
    speeds = {"bare": statistics.median(bare[1:]), "encode": statistics.median(whole[1:])}
    return {**speeds, "share": speeds["encode"] / speeds["bare"]}


def bare_seconds(settings: EncodeSettings, source: Source, count: int, autoencoder: Autoencoder, text_encoder: TextEncoder) -> float:
    """Time the encoders alone on `count` images and captions."""
    captions = [f"{record.captions['caption']}" for part in source.parts for record in part.records()][:count]
    ids = sorted(text_encoder.tokenize(captions), key=len)
    size, generator = settings.batch_size, np.random.default_rng(0)
    batches = [
        normalise(torch.tensor(generator.integers(0, 256, (size, side, side, 3), np.uint8)).to(settings.device))
        for side in settings.resolutions
    ]
    _finish(settings.device)
    started = time.perf_counter()
    with torch.no_grad():
        for first in range(0, count, size):
            for pixels_BCHW in batches:
                autoencoder.encode(pixels_BCHW[: count - first])
            text_encoder.embed(ids[first : first + size])
    _finish(settings.device)
    return time.perf_counter() - started


def make_encoders(shape: str) -> tuple[Autoencoder, TextEncoder]:
    """Return SDXL's autoencoder and CLIP-H's text encoder with random weights, or small ones of the same kinds."""
    torch.manual_seed(0)
    widths, width, layers = ((128, 256, 512, 512), 1024, 24) if shape == "sdxl" else ((32, 64, 128, 128), 128, 4)
    blocks: dict[str, Any] = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    autoencoder = AutoencoderKL(block_out_channels=widths, latent_channels=4, layers_per_block=2, **blocks)
    tokenizer = make_tokenizer()
    text = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=49408,
            hidden_size=width,
            intermediate_size=4 * width,
            num_hidden_layers=layers,
            num_attention_heads=width // 64,
            hidden_act="gelu",
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    model = as_text_model(text, tokenizer, tokenizer.pad_token_id)
    return DiffusersAutoencoder("random", autoencoder, "random"), FrozenTextEncoder("random", model)


def make_tokenizer() -> Any:
    """Tokenize letter by letter, between CLIP's start and end tokens."""
    vocab = {piece: number for number, piece in enumerate(["<|startoftext|>", "<|endoftext|>", *"abcdefghijklmnopqrstuvwxyz"])}
    tokenizer = Tokenizer(models.BPE(vocab, []))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Whitespace(), decoders.BPEDecoder()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|startoftext|> $A <|endoftext|>", special_tokens=[("<|startoftext|>", 0), ("<|endoftext|>", 1)]
    )
    marks = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=77, **marks)


def make_source(count: int, side: int) -> Source:
    """Return a source that repeats 64 different JPEGs, with captions of about 25 tokens."""
    files = [jpeg(seed, side) for seed in range(64)]

    def records(first: int) -> Iterator[Record]:
        for number in range(first, min(first + PART, count)):
            words = (WORDS[(number + k) % len(WORDS)] for k in range(4 + number % 4))
            yield Record(f"{number}", {"caption": " ".join(words)}, files[number % len(files)])

    return Source("synthetic", [Part(f"{first}", partial(records, first)) for first in range(0, count, PART)])


def jpeg(seed: int, side: int) -> bytes:
    """Return an image with the statistics of a photograph: large shapes with fine grain."""
    generator = np.random.default_rng(seed)
    shapes = Image.fromarray(generator.integers(0, 256, (8, 8, 3), np.uint8)).resize((side, side), Image.Resampling.BICUBIC)
    grain = generator.normal(0, 8, (side, side, 1))
    buffer = io.BytesIO()
    Image.fromarray((np.asarray(shapes) + grain).clip(0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


if __name__ == "__main__":
    main()
