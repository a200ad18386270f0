"""How long do the authors' own code and ours take for the same work? A training step, and a guided forward pass as in sampling.

    git clone https://github.com/SonyResearch/micro_diffusion ../micro_diffusion
    OMP_NUM_THREADS=2 python benchmarks/peer_step.py --peer ../micro_diffusion

Tiny_2 on random latents at 256 px with captions of 77 x 1024, in float32 on the CPU, each side in a process of its own, in turns. First it
compares what both compute on the same weights. The step is forward, backward, clipping and AdamW, theirs as `train.py` makes them (plain
`torch.optim.AdamW`, `clip_grad_norm_`). The guided pass is one evaluation of the denoiser with an empty caption beside the prompt: theirs
embeds the captions each time, ours once for a whole picture, before. Our process keeps freed memory, as `microdit train` does; theirs hands
it back, as Python does, but with `--same-memory`.

Of their packages nothing has to be installed: these two passes use none of them, except timm's patch embedding, of which `PatchEmbed` here
takes the place.
"""

import argparse
import sys
import time
from collections.abc import Callable
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from train_step import CAPTION, LATENTS, NAMES, median, training_step

from microdit.diffusion.edm import EDM
from microdit.diffusion.guidance import guided_denoiser
from microdit.models.config import SIZES, resolve
from microdit.models.microdit import MicroDiT
from microdit.models.official import load_official
from microdit.process_limits import keep_freed_memory

WORKS = {"step": "training step", "guided": "guided forward pass"}
GUIDANCE = 5.0
SIGMA = 1.5
PACKAGES = ["einops", "torchmetrics", "open_clip", "transformers", "diffusers", "easydict", "composer", "composer.models"]
PACKAGES += ["timm", "timm.models", "timm.models.vision_transformer"]
LIMIT = 1e-4  # relative difference of what both compute


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", type=Path, required=True, help="a clone of SonyResearch/micro_diffusion")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--mask", type=float, default=0.75, help="share of the patches that is dropped in training")
    parser.add_argument("--turns", type=int, default=9)
    parser.add_argument("--same-memory", action="store_true", help="keep freed memory in their process too")
    args = parser.parse_args()
    if not (args.peer / "micro_diffusion" / "models" / "dit.py").is_file():
        sys.exit(f"{args.peer} holds no micro_diffusion/models/dit.py: clone https://github.com/SonyResearch/micro_diffusion there.")

    error = difference(args.peer)
    print(f"{NAMES['tiny']}, batch {args.batch}, mask {args.mask}, float32, {torch.get_num_threads()} threads")
    print(f"relative difference of the guided passes on the same weights: {error:.1e}")
    if not error <= LIMIT:
        sys.exit(f"That is more than {LIMIT:g}: they do not compute the same, so their times say nothing.")
    ours = Side(our_works, args.batch, args.mask, None, keeps_memory=True)
    theirs = Side(their_works, args.batch, args.mask, args.peer, keeps_memory=args.same_memory)
    for key, name in WORKS.items():
        ours.seconds(key), theirs.seconds(key)  # warm up
        turns = [(ours.seconds(key), theirs.seconds(key)) for _ in range(args.turns)]  # in turns, so that a noisy neighbour slows both
        by_clock, by_processor = (sorted(b[kind] / a[kind] for a, b in turns) for kind in (0, 1))
        print(f"{name}: ours {median([a[0] for a, _ in turns]):.2f} s, theirs {median([b[0] for _, b in turns]):.2f} s")
        print(f"  theirs takes {in_words(by_clock)} times ours by the clock, {in_words(by_processor)} by processor time", flush=True)
    ours.close()
    theirs.close()


def in_words(ratios: list[float]) -> str:
    return f"{median(ratios):.2f} ({ratios[len(ratios) // 4]:.2f} to {ratios[-1 - len(ratios) // 4]:.2f})"


Works = dict[str, Callable[[], object]]


class Side:
    """A process that does its works when asked."""

    def __init__(self, works: Callable[..., Works], batch: int, mask_ratio: float, peer: Path | None, keeps_memory: bool):
        context = get_context("spawn")
        self._asked, other = context.Pipe()
        self._process = context.Process(target=serve, args=(other, works, batch, mask_ratio, peer, keeps_memory), daemon=True)
        self._process.start()
        other.close()  # so that a process that died ends the wait for it

    def seconds(self, work: str) -> tuple[float, float]:
        """By the clock, and of processor time of all threads."""
        self._asked.send(work)
        answer: tuple[float, float] = self._asked.recv()
        return answer

    def close(self) -> None:
        self._asked.close()
        self._process.join()


def serve(asked: Connection, make: Callable[..., Works], batch: int, mask_ratio: float, peer: Path | None, keeps_memory: bool) -> None:
    if keeps_memory:
        keep_freed_memory()
    works = make(batch, mask_ratio, peer)
    while True:
        try:
            work = works[asked.recv()]
        except EOFError:
            return
        clock, processor = time.perf_counter(), time.process_time()
        work()
        asked.send((time.perf_counter() - clock, time.process_time() - processor))


def our_works(batch: int, mask_ratio: float, _: None) -> Works:
    step, _parts = training_step("tiny", batch, mask_ratio)
    return {"step": step, "guided": our_pass(MicroDiT(resolve(SIZES[NAMES["tiny"]])).eval(), *sample(batch))}


def their_works(batch: int, mask_ratio: float, peer: Path) -> Works:
    diffusion = load_peer(peer, mask_ratio)
    optimizer = torch.optim.AdamW(diffusion.dit.parameters(), lr=2.4e-4, weight_decay=0.1, eps=1e-8, betas=(0.9, 0.999))
    latents, text = sample(batch)

    def step() -> None:
        diffusion.train()
        loss, *_ = diffusion({"image_latents": latents, "caption_latents": text.unsqueeze(1)})
        loss.backward()
        torch.nn.utils.clip_grad_norm_(diffusion.parameters(), 0.25)
        optimizer.step()
        optimizer.zero_grad()

    return {"step": step, "guided": their_pass(diffusion, latents, text)}


def sample(batch: int) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(0)
    return torch.randn(batch, *LATENTS, generator=draw), torch.randn(batch, *CAPTION, generator=draw)


def our_pass(model: MicroDiT, noisy: Tensor, text: Tensor) -> Callable[[], Tensor]:
    with torch.inference_mode():
        denoiser = guided_denoiser(model, EDM(), text, guidance_scale=GUIDANCE)

    @torch.inference_mode()
    def guided() -> Tensor:
        return denoiser(noisy, torch.full((len(noisy),), SIGMA))

    return guided


def their_pass(diffusion: Any, noisy: Tensor, text: Tensor) -> Callable[[], Tensor]:
    def forward(*inputs: Tensor, **settings: float) -> dict[str, Tensor]:
        return diffusion.dit(*inputs, cfg=GUIDANCE, **settings)

    @torch.no_grad()
    def guided() -> Tensor:
        diffusion.eval()
        out = diffusion.model_forward_wrapper(noisy, torch.tensor(SIGMA), text.unsqueeze(1), forward, mask_ratio=0)
        return out["sample"]

    return guided


def difference(peer: Path) -> float:
    """Norm of the difference of both guided passes over the norm of theirs, on the same random weights: fresh ones would give zeros."""
    torch.manual_seed(0)
    diffusion = load_peer(peer, 0.0)
    with torch.no_grad():
        for weight in diffusion.dit.parameters():
            weight.add_(torch.randn_like(weight), alpha=0.02)
    ours = load_official(diffusion.dit.state_dict(), head_dim=SIZES[NAMES["tiny"]].head_dim).eval()
    reference = their_pass(diffusion, *sample(2))()
    return float((our_pass(ours, *sample(2))() - reference).norm() / reference.norm())


def load_peer(peer: Path, mask_ratio: float) -> Any:
    """Their `LatentDiffusion` around their Tiny_2, without autoencoder and text encoder, from their own files."""
    sys.modules.update({name: Unused(name) for name in PACKAGES})
    sys.path.insert(0, str(peer))
    from micro_diffusion.models import dit, model  # type: ignore[import-not-found]

    nothing = nn.Identity()
    nothing.config = SimpleNamespace(scaling_factor=1.0)  # type: ignore[assignment]
    denoiser = getattr(dit, NAMES["tiny"])()
    return model.LatentDiffusion(denoiser, nothing, nothing, nothing, dtype="float32", train_mask_ratio=mask_ratio)


class PatchEmbed(nn.Module):
    """What timm's does: one strided convolution, and tokens of it."""

    def __init__(self, side: int, patch_size: int, channels: int, dim: int, bias: bool):
        super().__init__()
        self.patch_size, self.num_patches = (patch_size, patch_size), (side // patch_size) ** 2
        self.proj = nn.Conv2d(channels, dim, patch_size, patch_size, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).flatten(2).transpose(1, 2)


class Settings(SimpleNamespace):
    """A dict's values as attributes."""

    def __init__(self, values: dict[str, float]):
        super().__init__(**values)


USED = {"PatchEmbed": PatchEmbed, "ComposerModel": nn.Module, "EasyDict": Settings}


class Unused(ModuleType):
    """In the place of a package that their files import: what the two passes need of it, and empty classes else."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return USED.get(name, type(name, (), {}))


if __name__ == "__main__":
    main()
