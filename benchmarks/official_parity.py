"""Does our model compute what the authors' own code computed? Prints the relative error of every number in a fixture.

    python benchmarks/official_parity.py tests/fixtures/official_a.safetensors

A fixture holds `state.*` (the official state dict), `in.*`, `out.*`, `loss.*`, `grad.*`, `sample.*`, and in its metadata the
official model's config and EDM settings. Exits with 1 when an error exceeds 1e-4 (samples: 1e-3).
"""

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from microdit.diffusion.edm import EDM
from microdit.diffusion.guidance import guided_denoiser
from microdit.diffusion.objective import denoising_loss
from microdit.diffusion.samplers import heun
from microdit.errors import UserError
from microdit.models.microdit import MicroDiT
from microdit.models.official import convert_to_official, export_official, load_official
from microdit.models.patches import patchify, unpatchify
from microdit.models.routing import put_tokens

LIMIT = 1e-4
SAMPLE_LIMIT = 1e-3


def main(path: Path) -> int:
    tensors, metadata = read_fixture(path)
    config = json.loads(metadata["config"])
    edm = EDM(**json.loads(metadata["edm"]))
    state = {name.removeprefix("state."): t for name, t in tensors.items() if name.startswith("state.")}
    model = load_official(state, config["head_dim"], config["expert_capacity"])
    print(f"{path.name}: {sum(p.numel() for p in model.parameters()):,} parameters, {len(model.blocks)} blocks of {model.config.dim}")

    grid = config["input_size"] // config["patch_size"]
    exported = export_official(model, grid)
    exact = exported.keys() == state.keys() and all(torch.equal(exported[name], state[name]) for name in state)
    print(f"{'official -> ours -> official, bit for bit':44} {'yes' if exact else 'NO'}")

    failures = 0 if exact else 1
    for name, ours, reference in comparisons(model, edm, tensors):
        error = relative_error(ours, reference)
        limit = SAMPLE_LIMIT if name.startswith("sample.") else LIMIT
        ok = error <= limit  # also False for NaN
        failures += not ok
        print(f"{name:44} {error:9.2e}  {'ok' if ok else f'ABOVE {limit:g}'}")
    print("all within the limits" if not failures else f"{failures} outside the limits")
    return 1 if failures else 0


def read_fixture(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors by name, and the metadata."""
    if not path.is_file():
        raise UserError(f"There is no fixture at {path}.")
    with safe_open(path, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118


def relative_error(ours: Tensor, reference: Tensor) -> float:
    """Norm of the difference over the norm of the reference."""
    error = (ours.double() - reference.double()).norm() / reference.double().norm().clamp(min=1e-30)
    return float(error)


def comparisons(model: MicroDiT, edm: EDM, tensors: dict[str, Tensor]) -> Iterator[tuple[str, Tensor, Tensor]]:
    """(name, ours, reference) for every out.*, loss.*, grad.* and sample.* that the fixture holds."""
    yield from _outputs(model, tensors)
    yield from _losses_and_gradients(model, edm, tensors)
    text = tensors["in.caption"].squeeze(1)
    for name, reference in _named(tensors, r"sample\.heun\d+"):
        steps, guidance = _number(name, "heun", 8), _number(name, "cfg", 1)
        denoiser = guided_denoiser(model, edm, text, guidance_scale=guidance)
        yield name, heun(denoiser, tensors["sample.init"], edm.noise_schedule(int(steps))), reference


@torch.no_grad()
def _outputs(model: MicroDiT, tensors: dict[str, Tensor]) -> Iterator[tuple[str, Tensor, Tensor]]:
    x, c_noise = tensors["in.x"], tensors["in.c_noise"]
    text = tensors["in.caption"].squeeze(1)
    p, (height, width) = model.config.patch_size, x.shape[-2:]
    caption, empty = model.embed_caption(text), model.embed_caption(torch.zeros_like(text))

    for name, reference in _named(tensors, r"out\.full|out\.cfg"):
        patches = model(x, c_noise, caption)
        if guidance := _number(name, "cfg", 0):
            unconditional = model(x, c_noise, empty)
            patches = unconditional + guidance * (patches - unconditional)
        yield name, unpatchify(patches, p, height, width), reference
    for name, reference in _named(tensors, r"out\.masked"):
        keep_ids = tensors[name.replace("out.masked", "in.ids_keep")]
        kept = model(x, c_noise, caption, keep_ids)
        yield name, unpatchify(put_tokens(kept, keep_ids, torch.zeros_like(patchify(x, p))), p, height, width), reference
    for name, reference in _named(tensors, r"out\.mask\d"):
        keep_ids = tensors[name.replace("out.mask", "in.ids_keep")]
        yield name, torch.ones_like(reference).scatter(1, keep_ids, 0.0), reference


def _losses_and_gradients(model: MicroDiT, edm: EDM, tensors: dict[str, Tensor]) -> Iterator[tuple[str, Tensor, Tensor]]:
    latents, noise = tensors["loss.latents"], tensors["loss.noise"]
    sigma = (tensors["loss.rnd_normal"].flatten() * edm.P_std + edm.P_mean).exp()
    gradients: dict[str, dict[str, Tensor]] = {}
    for name, reference in _named(tensors, r"loss\.(full|masked)"):
        keep_ids = tensors[name.replace("loss.masked", "loss.ids_keep")] if "masked" in name else None
        caption = model.embed_caption(tensors["in.caption"].squeeze(1))
        loss = denoising_loss(model, edm, latents, caption, sigma, noise, keep_ids).mean()
        model.zero_grad()
        loss.backward()
        ours = {n: w.grad.clone() for n, w in model.named_parameters() if w.grad is not None}
        gradients[name] = convert_to_official(ours, model.config)
        yield name, loss.detach(), reference
    # The fixture does not say which loss its gradients belong to; all of them must belong to one and the same.
    references = dict(_named(tensors, r"grad\."))

    def worst(loss_name: str) -> float:
        return max(relative_error(gradients[loss_name][name.removeprefix("grad.")], ref) for name, ref in references.items())

    if references:
        best = min(gradients, key=worst)
        print(f"gradients are of {best}")
        for name, reference in references.items():
            yield name, gradients[best][name.removeprefix("grad.")], reference


def _named(tensors: dict[str, Tensor], pattern: str) -> list[tuple[str, Tensor]]:
    return [(name, tensor) for name, tensor in tensors.items() if re.match(pattern, name)]


def _number(name: str, key: str, otherwise: float) -> float:
    """The number behind `key` in a name such as sample.heun8_cfg3."""
    found = re.search(rf"{key}(\d+(?:\.\d+)?)", name)
    return float(found[1]) if found else otherwise


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    try:
        sys.exit(main(Path(sys.argv[1])))
    except UserError as error:
        sys.exit(str(error))
