"""How the model is spread over processes: sharded (FSDP2), copied (DDP), or neither; compiled; recomputed.

Notable:
- FSDP shards the float32 weights block by block, computes in bfloat16 and sums gradients in float32; only the first module casts
  nothing, because noise levels must arrive in float32;
- where memory allows, FSDP keeps its bfloat16 copies from the forward to the backward pass, and sums gradients over processes once a
  step, not once a micro-batch;
- with DDP, bfloat16 is autocast over float32 weights; alone, one process computes with a copy of them (`gradients.py`);
- what is compiled are the functions between matrix products, with the number of tokens left open, so that another mask ratio compiles
  nothing again.
"""

import os
import tempfile
from pathlib import Path
from typing import Literal

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

from microdit.distributed import World
from microdit.errors import UserError
from microdit.model.elementwise import compiled
from microdit.model.microdit import MicroDiT
from microdit.recipe import EngineRecipe
from microdit.training.step import DenoisingLoss

Sharding = Literal["none", "ddp", "fsdp"]
LARGE = 500_000_000  # parameters from which "auto" shards
SPARE = 0.1  # of a device's memory, which may be spent on speed


def sharding_of(engine: EngineRecipe, world: World, parameters: int) -> Sharding:
    """What `engine.sharding` comes to in this world. FSDP works with one process too, but brings it nothing."""
    if engine.sharding == "fsdp":
        return "fsdp"
    if world.size == 1:
        return "none"
    return "ddp" if engine.sharding == "ddp" or parameters < LARGE else "fsdp"


def compute_dtype(engine: EngineRecipe, device: torch.device) -> torch.dtype:
    """bfloat16 on GPUs and float32 on the CPU, where it is faster, unless the recipe says which."""
    if engine.precision == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[engine.precision]


def prepare_blocks(model: MicroDiT, engine: EngineRecipe, sharding: Sharding, world: World) -> None:
    """Compile, mark for recomputing and shard the blocks, in place. The weights may still be on the meta device."""
    model.recompute_first(engine.activation_checkpointing)
    blocks = model.all_blocks
    if engine.compile:
        compile_elementwise(model)
    if sharding == "fsdp":
        mesh = init_device_mesh(world.device.type, (world.size,))
        policy = _policy(engine, world)
        parameters = sum(weight.numel() for weight in model.parameters())
        again = not spare(parameters * compute_dtype(engine, world.device).itemsize, world.device)
        for block in (model.caption, *blocks):
            fully_shard(block, mesh=mesh, mp_policy=policy, reshard_after_forward=again)


def wrap(loss: DenoisingLoss, engine: EngineRecipe, sharding: Sharding, world: World) -> nn.Module:
    """The module to call. FSDP: `loss` itself, the rest of its weights sharded too; DDP: a wrapper around it."""
    if sharding == "fsdp":
        policy = _policy(engine, world)
        rest = MixedPrecisionPolicy(policy.param_dtype, policy.reduce_dtype, cast_forward_inputs=False)
        fully_shard(loss, mesh=init_device_mesh(world.device.type, (world.size,)), mp_policy=rest)
    if sharding == "ddp":
        devices = [world.device.index] if world.device.type == "cuda" else None
        return DistributedDataParallel(loss, device_ids=devices, gradient_as_bucket_view=True)
    return loss


def spare(wanted: int, device: torch.device) -> bool:
    """Whether so many bytes are a small part of the device's memory (of the machine's, without a GPU)."""
    if device.type == "cuda":
        return wanted < SPARE * torch.cuda.get_device_properties(device).total_memory
    return wanted < SPARE * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


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
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(
            f"engine.compile keeps what it compiled in {folder}, where nothing can be written ({error.strerror}): "
            "name another folder in TORCHINDUCTOR_CACHE_DIR, or take engine.compile=false."
        ) from error


def _policy(engine: EngineRecipe, world: World) -> MixedPrecisionPolicy:
    dtype = compute_dtype(engine, world.device)
    return MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
