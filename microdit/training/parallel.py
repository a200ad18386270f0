"""How the model is spread over processes: sharded (FSDP2), copied (DDP), or neither; compiled; recomputed.

Notable:
- FSDP shards the float32 weights block by block, computes in bfloat16 and sums gradients in float32; only the first module casts
  nothing, because noise levels must arrive in float32;
- where memory allows, FSDP keeps its bfloat16 copies from the forward to the backward pass, and sums gradients over processes once a
  step, not once a micro-batch;
- without FSDP, bfloat16 is autocast over float32 weights;
- blocks are compiled one by one, with the number of tokens left open, so that another mask ratio compiles nothing again.
"""

import os
import tempfile
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Literal

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

from microdit.distributed import World
from microdit.errors import UserError
from microdit.model.blocks import Block
from microdit.model.microdit import MicroDiT
from microdit.recipe import EngineRecipe
from microdit.training.step import DenoisingLoss

Sharding = Literal["none", "ddp", "fsdp"]
LARGE = 500_000_000  # parameters from which "auto" shards
SPARE = 0.1  # of a device's memory, which may be spent on speed


def sharding_of(engine: EngineRecipe, world: World, parameters: int) -> Sharding:
    """What `engine.sharding` comes to in this world.

    FSDP works with one process too: it turns a large model's weights into bfloat16 once a step, where autocast does so for each use.
    """
    if engine.sharding == "fsdp":
        return "fsdp"
    if world.size == 1:
        return "fsdp" if engine.sharding == "auto" and world.device.type == "cuda" and parameters >= LARGE else "none"
    return "ddp" if engine.sharding == "ddp" or parameters < LARGE else "fsdp"


def compute_dtype(engine: EngineRecipe, device: torch.device) -> torch.dtype:
    """bfloat16 on GPUs and float32 on the CPU, where it is faster, unless the recipe says which."""
    if engine.precision == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[engine.precision]


def prepare_blocks(model: MicroDiT, engine: EngineRecipe, sharding: Sharding, world: World) -> None:
    """Compile, mark for recomputing and shard the blocks, in place. The weights may still be on the meta device."""
    model.recompute_blocks = engine.activation_checkpointing
    blocks = model.all_blocks
    if engine.compile:
        compile_blocks(blocks)
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


class GradientSums:
    """Sums of gradients over processes: once a step, unless FSDP has no room to keep whole gradients from one micro-batch to the next."""

    def __init__(self, loss: nn.Module, parameters: int):
        self._loss, self._parameters = loss, parameters

    def over_processes(self, last: bool) -> AbstractContextManager[None]:
        """For the forward and backward pass of a micro-batch, of which the `last` one's sums are needed."""
        if isinstance(self._loss, FSDPModule):
            device = next(self._loss.parameters()).device
            self._loss.set_requires_gradient_sync(last or not spare(self._parameters * torch.float32.itemsize, device))
        return self._loss.no_sync() if isinstance(self._loss, DistributedDataParallel) and not last else nullcontext()


def spare(wanted: int, device: torch.device) -> bool:
    """Whether so many bytes are a small part of the device's memory (of the machine's, without a GPU)."""
    if device.type == "cuda":
        return wanted < SPARE * torch.cuda.get_device_properties(device).total_memory
    return wanted < SPARE * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def compile_blocks(blocks: list[Block]) -> None:
    """Each block as one full graph. Blocks differ in width, so each is a graph of its own; the limit on graphs is raised to fit them."""
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 4 * len(blocks))
    torch._dynamo.config.accumulated_recompile_limit = max(torch._dynamo.config.accumulated_recompile_limit, 16 * len(blocks))
    for block in blocks:
        block.compile(fullgraph=True, dynamic=True)


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
