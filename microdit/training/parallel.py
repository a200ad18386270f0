"""The model and its loss as one module: the one thing that FSDP needs to wrap.

This process's own part of each weight, where the model is sharded: what is done number by number needs no other part.

Optimizers work on these parts as plain tensors. On sharded ones (DTensor) each of their operations costs the CPU several times as much, at
470 weights more than a GPU's whole step may take.

How the model is spread over processes: sharded (FSDP2) over all or over those of a machine, or whole on each (`gradients.py`);
compiled; recomputed.

Notable:
- "hybrid" keeps what FSDP says most often inside a machine: weights are gathered and gradients dealt out there, block by block, and
  machines only add up their shards of the gradients, once a step;
- FSDP shards the float32 weights block by block, computes in bfloat16 and sums gradients in float32; only the first module casts
  nothing, because noise levels must arrive in float32;
- where memory allows, FSDP keeps its bfloat16 copies from the forward to the backward pass, and sums gradients over processes once a
  step, not once a micro-batch;
- what is compiled are the functions between matrix products, with the number of tokens left open, so that another mask ratio compiles
  nothing again.
"""

import os
import tempfile
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from microdit.config.schema import EngineRecipe
from microdit.devices import choose_dtype
from microdit.diffusion.edm import EDM, edm_loss
from microdit.distributed import World
from microdit.errors import UserError
from microdit.models.blocks import compiled
from microdit.models.microdit import MicroDiT
from microdit.training.noise import TrainingBatch


class DenoisingLoss(nn.Module):
    """forward(batch) -> the loss of each sample, (B,), float32."""

    def __init__(self, model: MicroDiT, edm: EDM, mask_padding: bool):
        super().__init__()
        self.model, self.edm, self.mask_padding = model, edm, mask_padding

    def forward(self, batch: TrainingBatch) -> Tensor:
        mask_BL = batch.text_mask_BL if self.mask_padding else None
        text_BLE = batch.text_BLE * batch.caption_kept_B.view(-1, 1, 1)
        caption = self.model.embed_caption(text_BLE.to(self.model.patch_embed.weight.dtype), mask_BL)
        draws = batch.sigma_B, batch.noise_BCHW, batch.keep_ids_BK, batch.path_keep_mask_B
        return edm_loss(self.model, self.edm, batch.latents_BCHW, caption, *draws)


def local(tensor: Tensor) -> Tensor:
    """This process's part of a tensor; all of it, if it is not sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def rows_of(tensor: Tensor) -> tuple[int, int]:
    """From which row to which one this process holds it. FSDP deals out rows in equal numbers, the last processes get fewer or none."""
    rows = len(tensor) if tensor.dim() else 1
    if not isinstance(tensor, DTensor):
        return 0, rows
    mesh = tensor.device_mesh
    share = -(-rows // mesh.size(mesh.ndim - 1))
    first = min(rows, share * mesh.get_local_rank(mesh.ndim - 1))
    return first, min(rows, first + share)


def copies_of(tensor: Tensor, world: World) -> tuple[int, int]:
    """How many processes hold the same rows as this one, and as which of them it does: (number, copies)."""
    if not isinstance(tensor, DTensor):
        return world.rank, world.size
    mesh = tensor.device_mesh
    return (mesh.get_local_rank(0), mesh.size(0)) if mesh.ndim == 2 else (0, 1)


class Shard:
    """A weight, and as `leaf` this process's part of it, which an optimizer can change. They share their memory."""

    def __init__(self, name: str, weight: nn.Parameter):
        self.name, self.weight = name, weight
        self.leaf = nn.Parameter(local(weight.detach())) if isinstance(weight, DTensor) else weight

    def take_gradient(self) -> None:
        """Give the leaf its part of the weight's gradient."""
        if self.leaf is not self.weight:
            self.leaf.data = local(self.weight.detach())  # FSDP may have moved it since
            self.leaf.grad = None if self.weight.grad is None else local(self.weight.grad)

    def drop_gradient(self) -> None:
        self.leaf.grad = self.weight.grad = None

    def sharded(self, part: Tensor) -> Tensor:
        """A tensor sharded as the weight is, of which `part` is this process's own: with as many rows, of whatever shape."""
        weight = self.weight
        if not isinstance(weight, DTensor) or part.dim() == 0:
            return part
        shape = torch.Size([len(weight), *part.shape[1:]])
        stride = torch.empty(shape, device="meta").stride()
        return DTensor.from_local(part, weight.device_mesh, weight.placements, run_check=False, shape=shape, stride=stride)

    def whole(self, part: Tensor) -> Tensor:
        """All of the tensor of which `part` is this process's own. All processes must call this."""
        sharded = self.sharded(part)
        return sharded.full_tensor() if isinstance(sharded, DTensor) else sharded

    def own(self, whole: Tensor) -> Tensor:
        """This process's own part of a whole tensor."""
        if not isinstance(self.weight, DTensor):
            return whole
        first, end = rows_of(self.weight)
        return whole[first:end]


def shards_of(model: nn.Module) -> list[Shard]:
    """Of the model's parameters as they will be trained, so after sharding."""
    return [Shard(name, weight) for name, weight in model.named_parameters()]


def total_norm(gradients: list[Tensor], mesh: DeviceMesh | None) -> Tensor:
    """The norm of all gradients together, a scalar on their device. All processes of a `mesh` over which they are spread must call this."""
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
    """Whether PyTorch does many tensors in one operation there. It refuses to on the meta device, on which tests run steps."""
    return device.type != "meta"


Sharding = Literal["none", "ddp", "fsdp", "hybrid"]
LARGE = 500_000_000  # parameters from which "auto" shards where memory is not known to suffice
STATE_BYTES = 20  # a parameter of a model that is held whole: weights, gradients, two moments in float32, weights and gradients in bfloat16
WHOLE = 0.4  # of a GPU's memory, which these may take before "auto" shards them
ROOM = 1 << 20  # bytes, for which there must be room where compiled code is kept
SPARE = 0.1  # of a device's memory, which may be spent on speed


def sharding_of(engine: EngineRecipe, world: World, parameters: int) -> Sharding:
    """What `engine.sharding` comes to in this world: "none" alone, "ddp" where each of several processes holds the model whole, "fsdp"
    where they share it, or "hybrid" where those of each machine do.

    A model that is held whole can be replayed (`gradients.py`). FSDP works with one process too, but brings it nothing.
    Raises UserError if there are no several machines of as many processes each to be hybrid over.
    """
    if engine.sharding == "hybrid":
        _refuse_unlike_machines(world)
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
    """The processes as `fully_shard` takes them: all in a row, or one row for each machine. None where nothing is sharded.

    Raises UserError if machines of other sizes are to be hybrid. All processes must call this.
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


def _refuse_unlike_machines(world: World) -> None:
    fix = "take engine.sharding fsdp, or have torchrun start equally many processes, two or more, on each of several machines"
    if world.local_size == world.size:
        raise UserError(f"engine.sharding is hybrid, and there is one machine, with all {world.size} processes: {fix}.")
    if world.local_size == 1 or world.size % world.local_size:
        raise UserError(f"engine.sharding is hybrid, and of {world.size} processes {world.local_size} run on this machine: {fix}.")


def compute_dtype(engine: EngineRecipe, device: torch.device) -> torch.dtype:
    """bfloat16 on GPUs that have it and float32 on the CPU, where it is faster, unless the recipe says which."""
    return choose_dtype(engine.precision, device)


def prepare_blocks(model: MicroDiT, engine: EngineRecipe, mesh: DeviceMesh | None, device: torch.device) -> None:
    """Compile, mark for recomputing and shard the blocks over a `mesh`, in place. The weights may still be on the meta device."""
    model.recompute_first(engine.activation_checkpointing)
    blocks = model.all_blocks
    if engine.compile:
        compile_elementwise(model)
    if mesh is not None:
        policy = _policy(engine, device)
        parameters = sum(weight.numel() for weight in model.parameters())
        again = not spare(parameters * compute_dtype(engine, device).itemsize, device)
        for block in (model.caption, *blocks):
            fully_shard(block, mesh=mesh, mp_policy=policy, reshard_after_forward=again)


def shard_the_rest(loss: DenoisingLoss, engine: EngineRecipe, mesh: DeviceMesh, device: torch.device) -> None:
    """Shard what lies outside of the blocks. `loss` is then the module to call."""
    policy = _policy(engine, device)
    rest = MixedPrecisionPolicy(policy.param_dtype, policy.reduce_dtype, cast_forward_inputs=False)
    fully_shard(loss, mesh=mesh, mp_policy=rest)


def spare(wanted: int, device: torch.device, share: float = SPARE) -> bool:
    """Whether so many bytes are less than a `share` of the device's memory (of the machine's, without a GPU)."""
    if device.type == "cuda":
        return wanted < share * torch.cuda.get_device_properties(device).total_memory
    return wanted < share * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


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
