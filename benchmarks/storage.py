"""How large is a stored sample, and what does a smaller packing cost in loss?

    python benchmarks/storage.py

1. Bytes per sample at 256 and 512 px (4-channel latents of an 8x autoencoder, captions of 1,024 channels), terabytes for the paper's
   37 million, and the mean caption length up to which that stays below a third and a fifth of the authors' 7.3 TB.
2. The loss of the demo's model on the exact latents and captions, after a few hundred steps on the emoji stored in each packing, with the
   same seeds and noise.
"""

import argparse
import tempfile
from pathlib import Path

import numpy as np
import torch

from microdit.config.load import load_recipe
from microdit.data.dataset import EncodedDataset
from microdit.data.encode import EncodeSettings, encode_source
from microdit.data.packing import CaptionPacking, LatentPacking, bytes_of_row
from microdit.data.sources.builtin import emoji_source
from microdit.diffusion.objective import denoising_loss, draw_sigma
from microdit.distributed import start_world
from microdit.encoders.autoencoder import load_autoencoder
from microdit.encoders.text import load_text_encoder
from microdit.io.console import PlainConsole, Reporter
from microdit.training.trainer import Trainer

SAMPLES, AUTHORS_TB = 37e6, 7.3
LATENT_SIDES, CHANNELS, CONTEXT = (32, 64), 1024, 77
CHECKSUMS = 3 * 8  # bytes: one a blob
PACKINGS: list[tuple[LatentPacking, CaptionPacking]] = [
    ("fp16", "full"),
    ("fp16", "fp16"),
    ("fp16", "int8"),
    ("int8", "int8"),
    ("int8", "ids"),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=float, default=25, help="mean length of the captions")
    parser.add_argument("--steps", type=int, default=400, help="of each training")
    parser.add_argument("--seeds", type=int, default=3)
    args = parser.parse_args()
    print_sizes(args.tokens)
    print_losses(args.steps, args.seeds)


def print_sizes(tokens: float) -> None:
    print(f"{'latents':10}{'captions':10}{'bytes':>10}{'TB':>8}{'of 7.3 TB':>11}   below a third up to / a fifth up to (tokens)")
    for latents, captions in PACKINGS:
        fixed = sum(4 * bytes_of_row(side * side, latents) for side in LATENT_SIDES) + CHECKSUMS
        per_token = bytes_of_row(CHANNELS, captions)
        weight = fixed + per_token * (CONTEXT if captions == "full" else tokens)
        limits = [(AUTHORS_TB * 1e12 / SAMPLES * share - fixed) / per_token for share in (1 / 3, 1 / 5)]
        said = ["never" if limit < (CONTEXT if captions == "full" else 1) else f"{min(limit, 9999):.0f}" for limit in limits]
        total = weight * SAMPLES / 1e12
        print(f"{latents:10}{captions:10}{weight:10,.0f}{total:8.2f}{total / AUTHORS_TB:11.0%}   {said[0]} / {said[1]}")


def print_losses(steps: int, seeds: int) -> None:
    autoencoder, text_encoder = load_autoencoder("icon"), load_text_encoder("minilm")
    print(f"\n{'latents':10}{'captions':10}{'loss after ' + str(steps) + ' steps, by seed':40}{'mean':>8}")
    with tempfile.TemporaryDirectory() as place:
        exact = Path(place) / "exact"
        encode_source(emoji_source("train"), exact, EncodeSettings((64,), "fp16", "fp16"), autoencoder, text_encoder)
        for latents, captions in PACKINGS[1:]:
            folder = Path(place) / f"{latents}-{captions}"
            encode_source(emoji_source("train"), folder, EncodeSettings((64,), latents, captions), autoencoder, text_encoder)
            losses = [train_and_measure(folder, exact, steps, seed, Path(place)) for seed in range(seeds)]
            print(f"{latents:10}{captions:10}{', '.join(f'{loss:.4f}' for loss in losses):40}{np.mean(losses):8.4f}", flush=True)


def train_and_measure(folder: Path, exact: Path, steps: int, seed: int, place: Path) -> float:
    overrides = [f"seed={seed}", f"data.path={folder}", "data.sets={}", f"phases=[{{name: all, steps: {steps}, batch_size: 32, "]
    overrides[-1] += "learning_rate: 3e-3, warmup_steps: 50, final_learning_rate: 0.05, grad_clip: 1.0}]"
    overrides.append("record.sample_prompts=[]")
    recipe = load_recipe("emoji", overrides)
    trainer = Trainer(recipe, place / f"run-{folder.name}-{seed}", Reporter(PlainConsole(quiet=True)), start_world("cpu"))
    trainer.train()
    return exact_loss(trainer, EncodedDataset(exact))


@torch.no_grad()
def exact_loss(trainer: Trainer, data: EncodedDataset) -> float:
    """Compute the loss on all samples as the encoders returned them, with the same noise for all models."""
    blobs = [data.read(0, number) for number in range(len(data))]
    latents_BCHW = data.latents([latents for latents, _ in blobs], 0)
    text_BLE, mask_BL = data.text([text for _, text in blobs])
    generator = torch.Generator().manual_seed(0)
    sigma_B = draw_sigma(trainer.state.objective, len(data), generator)
    noise_BCHW = torch.randn(latents_BCHW.shape, generator=generator)
    caption = trainer.state.model.embed_caption(text_BLE, mask_BL)
    return float(denoising_loss(trainer.state.model, trainer.state.objective, latents_BCHW, caption, sigma_B, noise_BCHW).mean())


if __name__ == "__main__":
    main()
