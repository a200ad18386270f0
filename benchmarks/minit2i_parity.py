"""Does our model compute what MiniT2I's own JAX code computed? Prints the relative error of every number in a fixture.

    python benchmarks/minit2i_parity.py tests/fixtures/minit2i_a.safetensors

A fixture holds `state.*` (the parameter tree of the JAX code), `in.*`, `out.*`, `loss.*`, `grad.*` and `sample.*`, and in its metadata the
objective. Images are (batch, height, width, channels), and noise is scaled already. Sizes are read off the tensors.
Exits with 1 when an error exceeds 1e-4 (samples: 1e-3).
"""

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from official_parity import LIMIT, SAMPLE_LIMIT, read_fixture, relative_error
from torch import Tensor

from microdit.diffusion.flow import Flow
from microdit.diffusion.guidance import guided_denoiser
from microdit.diffusion.objective import denoise, denoising_loss
from microdit.diffusion.samplers import Solver, solve
from microdit.errors import UserError
from microdit.models.microdit import MicroDiT
from microdit.models.minit2i import convert_to_minit2i, load_minit2i

Comparison = tuple[str, Tensor, Tensor]


def main(path: Path) -> int:
    tensors, metadata = read_fixture(path)
    state = {name.removeprefix("state."): tensor for name, tensor in tensors.items() if name.startswith("state.")}
    model = load_minit2i(state, caption_length=tensors["in.context_BLE"].shape[1])
    flow = flow_of(json.loads(metadata["objective"]))
    config = model.config
    print(
        f"{path.name}: {sum(p.numel() for p in model.parameters()):,} parameters, {len(config.blocks)} blocks of {config.dim} "
        f"behind {len(config.preamble)} of the caption"
    )

    exported = convert_to_minit2i(model.state_dict(), config)
    exact = exported.keys() == state.keys() and all(torch.equal(exported[name], state[name]) for name in state)
    print(f"{'theirs -> ours -> theirs, bit for bit':64} {'yes' if exact else 'NO'}")

    failures, seen = 0 if exact else 1, set()
    for name, ours, reference in comparisons(model, flow, tensors):
        error = relative_error(ours, reference)
        limit = SAMPLE_LIMIT if name.startswith("sample.") else LIMIT
        ok = error <= limit  # also False for NaN
        failures += not ok
        seen.add(name)
        print(f"{name:64} {error:9.2e}  {'ok' if ok else f'ABOVE {limit:g}'}")
    unknown = [name for name in tensors if re.match(r"out\.|grad\.|sample\.\w+_guidance|loss\.value", name) and name not in seen]
    for name in unknown:
        print(f"{name:64}            NOT COMPARED")
    failures += len(unknown)
    print("all within the limits" if not failures else f"{failures} outside the limits")
    return 1 if failures else 0


def flow_of(objective: dict[str, Any]) -> Flow:
    """Return the objective of a fixture, whose floor holds in training and sampling alike. Raises UserError for one that we do not have."""
    if objective["prediction"] != "x":
        raise UserError(f"The fixture's network predicts {objective['prediction']!r}, and only 'x', the image, is compared.")
    floor = float(objective["a_min"])
    return Flow("image", noise_scale=float(objective["noise_scale"]), training_floor=floor, sampling_floor=floor)


def comparisons(model: MicroDiT, flow: Flow, tensors: dict[str, Tensor]) -> Iterator[Comparison]:
    """(name, ours, reference) for every out.*, loss.*, grad.* and sample.* that the fixture holds."""
    yield from _outputs(model, flow, tensors)
    yield from _loss_and_gradients(model, flow, tensors)
    yield from _samples(model, flow, tensors)


@torch.no_grad()
def _outputs(model: MicroDiT, flow: Flow, tensors: dict[str, Tensor]) -> Iterator[Comparison]:
    images_BCHW, sigma_B, mask_BL = _channels_first(tensors["in.images_BHWC"]), 1 - tensors["in.t"], tensors["in.mask_BL"] > 0.5
    for name in ("out.x", "out.x_no_caption", "out.velocity"):
        if name in tensors:
            seen_BL = torch.zeros_like(mask_BL) if name == "out.x_no_caption" else mask_BL
            caption = model.embed_caption(tensors["in.context_BLE"], seen_BL)
            found_BCHW = denoise(model, flow, images_BCHW, sigma_B, caption)
            if name == "out.velocity":
                found_BCHW = (found_BCHW - images_BCHW) / sigma_B.clamp(min=flow.sampling_floor).view(-1, 1, 1, 1)
            yield name, found_BCHW, _channels_first(tensors[name])


def _loss_and_gradients(model: MicroDiT, flow: Flow, tensors: dict[str, Tensor]) -> Iterator[Comparison]:
    if "loss.value" not in tensors:
        return
    images_BCHW, noise_BCHW = _channels_first(tensors["loss.clean"]), _channels_first(tensors["loss.noise"]) / flow.noise_scale
    caption = model.embed_caption(tensors["in.context_BLE"], tensors["in.mask_BL"] > 0.5)
    loss = denoising_loss(model, flow, images_BCHW, caption, 1 - tensors["loss.t"], noise_BCHW).mean()
    yield "loss.value", loss.detach(), tensors["loss.value"].squeeze()
    loss.backward()
    ours = {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}
    gradients = convert_to_minit2i(ours, model.config)
    for name, reference in tensors.items():
        if name.startswith("grad."):
            yield name, gradients[name.removeprefix("grad.")], reference


def _samples(model: MicroDiT, flow: Flow, tensors: dict[str, Tensor]) -> Iterator[Comparison]:
    for name, reference in tensors.items():
        if found := re.fullmatch(r"sample\.(euler|heun)(\d+)_guidance(\d+(?:\.\d+)?)", name):
            solver: Solver = "heun" if found[1] == "heun" else "euler"
            mask_BL, guidance_scale = tensors["in.mask_BL"] > 0.5, float(found[3])
            with torch.no_grad():
                denoiser = guided_denoiser(model, flow, tensors["in.context_BLE"], mask_BL, guidance_scale)
            noise_BCHW = _channels_first(tensors["sample.noise"]) / flow.noise_scale
            yield name, solve(solver, denoiser, noise_BCHW, flow, int(found[2])), _channels_first(reference)


def _channels_first(images_BHWC: Tensor) -> Tensor:
    return images_BHWC.permute(0, 3, 1, 2)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    try:
        sys.exit(main(Path(sys.argv[1])))
    except UserError as error:
        sys.exit(str(error))
