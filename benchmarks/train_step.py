"""How fast is a training step, as a share of what this machine can do?

    python benchmarks/train_step.py --size tiny --batch 16 --mask 0.75

Times whole steps (forward, backward, clipping, AdamW) of one of the paper's sizes on random latents at 256 px with captions of 77 x 1024,
and this machine's float32 matrix product, in turns, in one run. The FLOPs are those of the matrix products that the method needs,
forward and backward; the optimizer's are not counted, but its time is.
"""

import argparse
import time
from collections.abc import Callable

import torch
from torch import Tensor

from microdit.config.schema import OptimizerRecipe
from microdit.diffusion.edm import EDM
from microdit.diffusion.objective import denoising_loss, draw_sigma
from microdit.models.config import SIZES, resolve
from microdit.models.flops import training_flops
from microdit.models.microdit import MicroDiT
from microdit.models.routing import choose_kept, kept_tokens
from microdit.process_limits import keep_freed_memory
from microdit.training.optim import Optimizers

NAMES = {"tiny": "MicroDiT_Tiny_2", "xl": "MicroDiT_XL_2"}
LATENTS = (4, 32, 32)  # 256 px through the SDXL autoencoder
CAPTION = (77, 1024)
MATMUL = 2048


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=NAMES, default="tiny")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--mask", type=float, default=0.75, help="share of the patches that is dropped")
    parser.add_argument("--steps", type=int, default=8, help="timed steps")
    parser.add_argument("--return-memory", action="store_true", help="let the allocator hand freed memory back, as without microdit")
    args = parser.parse_args()
    if not args.return_memory:
        keep_freed_memory()

    gflops = flops_per_image(args.size, args.mask) / 1e9
    step, parts = training_step(args.size, args.batch, args.mask)
    matmul = matmul_of_this_machine()
    step(), matmul()  # warm up
    step_seconds, matmul_seconds = [], []
    for _ in range(args.steps):  # in turns, so that a noisy neighbour slows both
        step_seconds.append(seconds_of(step))
        matmul_seconds.append(min(seconds_of(matmul) for _ in range(5)))
    images_per_second = args.batch / median(step_seconds)
    peak = 2 * MATMUL**3 / median(matmul_seconds) / 1e9

    rows = [
        ("size", f"{NAMES[args.size]}, batch {args.batch}, mask {args.mask}, float32, {torch.get_num_threads()} threads"),
        ("GFLOPs an image", f"{gflops:.1f}"),
        ("images/s", f"{images_per_second:.2f}"),
        ("GFLOP/s of the step", f"{gflops * images_per_second:.0f}"),
        (f"GFLOP/s of a {MATMUL} x {MATMUL} product", f"{peak:.0f}"),
        ("share of the peak", f"{gflops * images_per_second / peak:.1%}"),
        ("seconds: " + ", ".join(parts), ", ".join(f"{s:.2f}" for s in parts.values())),
    ]
    for name, value in rows:
        print(f"{name:48} {value}")


def flops_per_image(size: str, mask_ratio: float) -> float:
    """Of the matrix products in a forward and a backward pass, attention included."""
    config = resolve(SIZES[NAMES[size]])
    tokens = LATENTS[1] * LATENTS[2] // config.patch_size**2
    return training_flops(config, tokens, kept_tokens(tokens, mask_ratio), CAPTION[0])


def build_loss(size: str, batch: int, mask_ratio: float) -> Callable[[], Tensor]:
    """A model on fixed random latents and captions, with a fresh loss at each call."""
    model = MicroDiT(resolve(SIZES[NAMES[size]])).train()
    latents, text = torch.randn(batch, *LATENTS), torch.randn(batch, *CAPTION)
    tokens = LATENTS[1] * LATENTS[2] // model.config.patch_size**2
    device = latents.device

    def loss() -> Tensor:
        keep_ids = choose_kept(torch.rand(batch, tokens, device=device), mask_ratio)
        sigma = draw_sigma(EDM(), batch, device=device)
        return denoising_loss(model, EDM(), latents, model.embed_caption(text), sigma, torch.randn_like(latents), keep_ids).mean()

    loss.model = model  # type: ignore[attr-defined]
    return loss


def training_step(size: str, batch: int, mask_ratio: float) -> tuple[Callable[[], None], dict[str, float]]:
    """One whole step as the trainer does it, and a dict that it fills with the seconds of its parts."""
    torch.manual_seed(0)
    loss = build_loss(size, batch, mask_ratio)
    model: MicroDiT = loss.model  # type: ignore[attr-defined]
    optimizers = Optimizers(model, OptimizerRecipe())
    optimizers.set_rate(2.4e-4)
    parts: dict[str, float] = {}

    def step() -> None:
        started = time.perf_counter()
        value = loss()
        forward = time.perf_counter()
        value.backward()
        backward = time.perf_counter()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.25, foreach=True)
        optimizers.step()
        optimizers.zero_grad()
        parts.update(forward=forward - started, backward=backward - forward, optimizer=time.perf_counter() - backward)

    return step, parts


def matmul_of_this_machine() -> Callable[[], None]:
    a, b = torch.randn(MATMUL, MATMUL), torch.randn(MATMUL, MATMUL)
    out = torch.empty(MATMUL, MATMUL)

    def matmul() -> None:
        torch.mm(a, b, out=out)

    return matmul


def seconds_of(work: Callable[[], None]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def median(values: list[float]) -> float:
    return sorted(values)[len(values) // 2]


if __name__ == "__main__":
    main()
