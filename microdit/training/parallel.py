"""How the model is spread over processes: sharded (FSDP2), copied (DDP), or neither; compiled; recomputed.

Notable:
- FSDP shards the float32 weights block by block, computes in bfloat16 and sums gradients in float32; only the first module casts
  nothing, because noise levels must arrive in float32;
- without FSDP, bfloat16 is autocast over float32 weights;
- blocks are compiled one by one, with the number of tokens left open, so that another mask ratio compiles nothing again.
"""

from typing import Literal, cast

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

from microdit.distributed import World
from microdit.model.blocks import Block
from microdit.model.microdit import MicroDiT
from microdit.recipe import EngineRecipe
from microdit.training.step import DenoisingLoss

Sharding = Literal["none", "ddp", "fsdp"]
LARGE = 500_000_000  # parameters from which "auto" shards


def sharding_of(engine: EngineRecipe, world: World, parameters: int) -> Sharding:
    """What `engine.sharding` comes to in this world. FSDP works with one process too, for its bfloat16 weights."""
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
    model.recompute_blocks = engine.activation_checkpointing
    blocks = cast(list[Block], [*model.mixer, *model.blocks])
    if engine.compile:
        compile_blocks(blocks)
    if sharding == "fsdp":
        mesh = init_device_mesh(world.device.type, (world.size,))
        policy = _policy(engine, world)
        for block in (model.caption, *blocks):
            fully_shard(block, mesh=mesh, mp_policy=policy)


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


def compile_blocks(blocks: list[Block]) -> None:
    """Each block as one full graph. Blocks differ in width, so each is a graph of its own; the limit on graphs is raised to fit them."""
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 4 * len(blocks))
    torch._dynamo.config.accumulated_recompile_limit = max(torch._dynamo.config.accumulated_recompile_limit, 16 * len(blocks))
    for block in blocks:
        block.compile(fullgraph=True, dynamic=True)


def _policy(engine: EngineRecipe, world: World) -> MixedPrecisionPolicy:
    dtype = compute_dtype(engine, world.device)
    return MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
