"""Parallelism, compilation and activation checkpointing of the model.

The model is sharded by FSDP2 over all processes or over those of each machine ("hybrid"), or replicated on each process (`gradients.py`).
Optimizers update this process's part of each weight as a plain tensor (`Shard`): operations on a DTensor cost the CPU several times as
much, which for 470 weights can exceed the time of a GPU's step.

Notable:
- hybrid sharding keeps the frequent messages inside a machine: weights are gathered and gradients reduced there, block by block, and
  machines only add up their shards of the gradients, once a step;
- FSDP shards float32 weights block by block, computes in bfloat16 and reduces gradients in float32; only the root module casts no inputs,
  because noise levels must arrive in float32;
- where memory allows, FSDP keeps its bfloat16 copies from the forward to the backward pass, and reduces gradients once a step instead of
  once a micro-batch;
- compiled are the functions between matrix products, with a dynamic number of tokens, so that another mask ratio compiles nothing again.
"""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from microdit.config.schema import EngineRecipe
from microdit.devices import choose_dtype, memory_of
from microdit.diffusion.objective import Objective, matching_loss
from microdit.distributed import World
from microdit.errors import UserError
from microdit.models.alignment import Alignment
from microdit.models.elementwise import compiled
from microdit.models.microdit import MicroDiT
from microdit.planning.memory import LARGE, SPARE, STATE_BYTES, WHOLE, Sharding
from microdit.training.noise import TrainingBatch


class SampleLosses(NamedTuple):
    """The losses of each sample, (B,), float32. `total_B` is what training minimises; the others have no gradient.

    `alignment_B`, the mean cosine similarity with the features, is None in steps without an alignment loss.
    """

    total_B: Tensor
    denoising_B: Tensor
    alignment_B: Tensor | None = None

    def detach(self) -> "SampleLosses":
        return SampleLosses(self.total_B.detach(), self.denoising_B, self.alignment_B)


class DenoisingLoss(nn.Module):
    """The model and its losses as one module, which FSDP can wrap: forward(batch) -> `SampleLosses`.

    With an `alignment`, which is trained too, the tokens of one block are aligned with the features of batches that have some.
    """

    def __init__(self, model: MicroDiT, objective: Objective, mask_padding: bool, alignment: Alignment | None = None):
        super().__init__()
        self.model, self.objective, self.mask_padding, self.alignment = model, objective, mask_padding, alignment

    def forward(self, batch: TrainingBatch) -> SampleLosses:
        if self.alignment is None or batch.features_BEYX is None:
            loss_B = self._denoising(batch)
            return SampleLosses(loss_B, loss_B.detach())
        config, block = self.model.config, self.alignment.block - 1
        with _output_of(self.model.blocks[block]) as outputs:
            loss_B = self._denoising(batch)
        rows, columns = (side // config.patch_size for side in batch.latents_BCHW.shape[-2:])
        keep_ids_BK = batch.keep_ids_BK if config.is_sparse(block) else None
        alignment_B = self.alignment(outputs[0], batch.features_BEYX, (rows, columns), keep_ids_BK)
        return SampleLosses(loss_B - self.alignment.weight * alignment_B, loss_B.detach(), alignment_B.detach())

    def _denoising(self, batch: TrainingBatch) -> Tensor:
        mask_BL = batch.text_mask_BL if self.mask_padding else None
        text_BLE = batch.text_BLE * batch.caption_kept_B.view(-1, 1, 1)
        caption = self.model.embed_caption(text_BLE.to(self.model.patch_embed.weight.dtype), mask_BL)
        noisy_BCHW = self.objective.add_noise(batch.latents_BCHW, batch.sigma_B, batch.noise_BCHW)
        target_BCHW = batch.latents_BCHW if batch.target_BCHW is None else batch.target_BCHW
        dropped = batch.keep_ids_BK, batch.path_keep_mask_B
        return matching_loss(self.model, self.objective, noisy_BCHW, target_BCHW, caption, batch.sigma_B, *dropped)


@contextmanager
def _output_of(block: nn.Module) -> Iterator[list[Tensor]]:
    """Collect the image tokens that a block returns: of a joint block the first of its two streams."""
    outputs: list[Tensor] = []

    def keep(module: nn.Module, inputs: tuple[object, ...], output: Tensor | tuple[Tensor, Tensor]) -> None:
        outputs.append(output if isinstance(output, Tensor) else output[0])

    handle = block.register_forward_hook(keep)
    try:
        yield outputs
    finally:
        handle.remove()  # before blocks are recomputed in the backward pass


def local(tensor: Tensor) -> Tensor:
    """Return this process's part of a tensor: all of it if it is not sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def rows_of(tensor: Tensor) -> tuple[int, int]:
    """Return the range of rows that this process holds. FSDP deals out equal numbers of rows; the last processes get fewer or none."""
    rows = len(tensor) if tensor.dim() else 1
    if not isinstance(tensor, DTensor):
        return 0, rows
    mesh = tensor.device_mesh
    share = -(-rows // mesh.size(mesh.ndim - 1))
    first = min(rows, share * mesh.get_local_rank(mesh.ndim - 1))
    return first, min(rows, first + share)


def copies_of(tensor: Tensor, world: World) -> tuple[int, int]:
    """Return (index, copies): how many processes hold the same rows as this one, and which of them it is."""
    if not isinstance(tensor, DTensor):
        return world.rank, world.size
    mesh = tensor.device_mesh
    return (mesh.get_local_rank(0), mesh.size(0)) if mesh.ndim == 2 else (0, 1)


class Shard:
    """A weight, and this process's part of it as `leaf`, a plain tensor that optimizers change. They share memory."""

    def __init__(self, name: str, weight: nn.Parameter):
        self.name, self.weight = name, weight
        self.leaf = nn.Parameter(local(weight.detach())) if isinstance(weight, DTensor) else weight

    def take_gradient(self) -> None:
        """Set the leaf's gradient to its part of the weight's."""
        if self.leaf is not self.weight:
            self.leaf.data = local(self.weight.detach())  # FSDP may have moved it since
            self.leaf.grad = None if self.weight.grad is None else local(self.weight.grad)

    def drop_gradient(self) -> None:
        self.leaf.grad = self.weight.grad = None

    def sharded(self, part: Tensor) -> Tensor:
        """Return a tensor sharded like the weight, with as many rows and any other shape, from this process's `part`."""
        weight = self.weight
        if not isinstance(weight, DTensor) or part.dim() == 0:
            return part
        shape = torch.Size([len(weight), *part.shape[1:]])
        stride = torch.empty(shape, device="meta").stride()
        return DTensor.from_local(part, weight.device_mesh, weight.placements, run_check=False, shape=shape, stride=stride)

    def whole(self, part: Tensor) -> Tensor:
        """Return the full tensor from this process's `part`. All processes must call this."""
        sharded = self.sharded(part)
        return sharded.full_tensor() if isinstance(sharded, DTensor) else sharded

    def own(self, whole: Tensor) -> Tensor:
        """Return this process's part of a full tensor."""
        if not isinstance(self.weight, DTensor):
            return whole
        first, end = rows_of(self.weight)
        return whole[first:end]


def shards_of(model: nn.Module) -> list[Shard]:
    """Return a `Shard` for each of the model's parameters, after sharding."""
    return [Shard(name, weight) for name, weight in model.named_parameters()]


def total_norm(gradients: list[Tensor], mesh: DeviceMesh | None) -> Tensor:
    """Return the norm of all gradients, a scalar on their device. All processes of a `mesh` over which they are spread must call this."""
    if gradients[0].dtype == torch.float32:
        norm = torch.nn.utils.get_total_norm(gradients, foreach=foreach_works(gradients[0].device))
    else:  # whose norm is not to be rounded to their few digits
        norms = [torch.linalg.vector_norm(gradient, dtype=torch.float32) for gradient in gradients]
        norm = torch.linalg.vector_norm(torch.stack(norms))
    if mesh is not None and mesh.size(mesh.ndim - 1) > 1:
        squared = norm.square()
        torch.distributed.all_reduce(squared, group=mesh.get_group(mesh.ndim - 1))
        norm = squared.sqrt()
    return norm


def foreach_works(device: torch.device) -> bool:
    """Return whether PyTorch has multi-tensor operations on the device. It has none on the meta device, on which tests run steps."""
    return device.type != "meta"


ROOM = 1 << 20  # bytes that must be free where compiled code is kept


def sharding_of(engine: EngineRecipe, world: World, parameters: int) -> Sharding:
    """Return how to hold the model: "none" with one process, "ddp" whole on each process, "fsdp" sharded over all, "hybrid" over each
    machine's.

    An unsharded model can be replayed as a CUDA graph (`gradients.py`). FSDP works with one process too, but gains nothing.
    Raises UserError if hybrid sharding is requested without several machines of equally many processes.
    """
    if engine.sharding == "hybrid":
        _check_machines(world)
    if engine.sharding in ("fsdp", "hybrid"):
        return engine.sharding
    if world.size == 1:
        return "none"
    fits = parameters < LARGE or (world.device.type == "cuda" and spare(STATE_BYTES * parameters, world.device, WHOLE))
    if engine.sharding == "ddp" or fits:
        return "ddp"
    machines = 1 < world.local_size < world.size and world.size % world.local_size == 0
    return "hybrid" if machines and spare(STATE_BYTES * parameters // world.local_size, world.device, WHOLE) else "fsdp"


def mesh_of(sharding: Sharding, world: World) -> DeviceMesh | None:
    """Return the device mesh for `fully_shard`: one row of all processes, or one row for each machine. None if nothing is sharded.

    Raises UserError if machines run different numbers of processes in hybrid sharding. All processes must call this.
    """
    if sharding == "hybrid":
        sizes = sorted(set(world.gather(world.local_size)))
        if len(sizes) > 1:
            raise UserError(
                f"Sharding is to be hybrid, and the machines run {' and '.join(map(str, sizes))} processes: start as many on each, "
                "or take engine.sharding fsdp."
            )
        machines = world.size // world.local_size
        return init_device_mesh(world.device.type, (machines, world.local_size), mesh_dim_names=("machine", "shard"))
    return init_device_mesh(world.device.type, (world.size,)) if sharding == "fsdp" else None


def _check_machines(world: World) -> None:
    fix = "take engine.sharding fsdp, or have torchrun start equally many processes, two or more, on each of several machines"
    if world.local_size == world.size:
        raise UserError(f"engine.sharding is hybrid, and there is one machine, with all {world.size} processes: {fix}.")
    if world.local_size == 1 or world.size % world.local_size:
        raise UserError(f"engine.sharding is hybrid, and of {world.size} processes {world.local_size} run on this machine: {fix}.")


def compute_dtype(engine: EngineRecipe, device: torch.device) -> torch.dtype:
    """Return the dtype of matrix products: bfloat16 on GPUs that have it, float32 on the CPU, unless the recipe says which."""
    return choose_dtype(engine.precision, device)


def prepare_blocks(model: MicroDiT, engine: EngineRecipe, mesh: DeviceMesh | None, device: torch.device) -> None:
    """Compile, mark for recomputing and shard the blocks over a `mesh`, in place. The weights may still be on the meta device."""
    model.recompute_first(engine.activation_checkpointing)
    if engine.compile:
        compile_elementwise(model)
    if mesh is not None:
        policy = _policy(engine, device)
        parameters = sum(weight.numel() for weight in model.parameters())
        again = not spare(parameters * compute_dtype(engine, device).itemsize, device)
        for part in model.inner_parts:
            fully_shard(part, mesh=mesh, mp_policy=policy, reshard_after_forward=again)


def shard_the_rest(loss: DenoisingLoss, engine: EngineRecipe, mesh: DeviceMesh, device: torch.device) -> None:
    """Shard what lies outside of the blocks. `loss` is then the module to call."""
    policy = _policy(engine, device)
    rest = MixedPrecisionPolicy(policy.param_dtype, policy.reduce_dtype, cast_forward_inputs=False)
    fully_shard(loss, mesh=mesh, mp_policy=rest)


def spare(wanted: int, device: torch.device, share: float = SPARE) -> bool:
    """Return whether `wanted` bytes are less than a `share` of the device's memory (the machine's, without a GPU)."""
    return wanted < share * memory_of(device)


def compile_elementwise(model: MicroDiT) -> None:
    """Have the model's blocks call compiled functions between their matrix products."""
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)  # widths, dtypes, with and without gradients
    for module in model.modules():
        if hasattr(module, "elementwise"):
            setattr(module, "elementwise", compiled())  # noqa: B010 (a submodule's attribute, which the checker takes for a module)


def keep_compiled(run: Path) -> None:
    """Keep what is compiled in a folder beside the run, unless TORCHINDUCTOR_CACHE_DIR names another, so that a run that is started again
    compiles nothing. Raises UserError if nothing can be written there.
    """
    folder = Path(os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str((run.parent / ".compiled").resolve())))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:  # a full disk takes names, but no content
            file.write(bytes(ROOM))
            file.flush()
    except OSError as error:
        raise UserError(
            f"engine.compile keeps what it compiled in {folder}, where nothing can be written ({error.strerror}): "
            "name another folder in TORCHINDUCTOR_CACHE_DIR, or take engine.compile=false."
        ) from error


def _policy(engine: EngineRecipe, device: torch.device) -> MixedPrecisionPolicy:
    return MixedPrecisionPolicy(param_dtype=compute_dtype(engine, device), reduce_dtype=torch.float32)
