"""How the model is spread over processes: sharded (FSDP2) over all or over those of a machine, or whole on each (`gradients.py`);
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
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from microdit.devices import choose_dtype
from microdit.distributed import World
from microdit.errors import UserError
from microdit.model.elementwise import compiled
from microdit.model.microdit import MicroDiT
from microdit.recipe import EngineRecipe
from microdit.training.step import DenoisingLoss

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
