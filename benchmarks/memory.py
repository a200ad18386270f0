"""What a GPU must hold while it trains one of the paper's sizes: counted on fake tensors, beside the arithmetic of `footprint`.

    python benchmarks/memory.py
    python benchmarks/memory.py --size xl --resolution 512 --mask 0 --micro-batch 8 --checkpointing

The model is sharded by FSDP2 over 1 and 8 pretended processes, in bfloat16 over float32 weights, and runs a forward and a backward pass and
a step of AdamW on tensors that have shapes and no memory. Averages, and FSDP's gathered copies, are not counted there, only estimated.
Neither knows of what kernels need for a moment, nor of fragments: leave a tenth of the card free.
"""

import argparse

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from microdit.diffusion.edm import EDM
from microdit.models.config import SIZES, resolve
from microdit.models.microdit import MicroDiT
from microdit.models.routing import kept_tokens
from microdit.planning.memory import Footprint, Layout, footprint
from microdit.training.noise import TrainingBatch
from microdit.training.parallel import DenoisingLoss

NAMES = {"tiny": "MicroDiT_Tiny_2", "xl": "MicroDiT_XL_2"}
CAPTION = (77, 1024)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=NAMES, default="xl")
    parser.add_argument("--resolution", type=int, choices=(256, 512), default=256)
    parser.add_argument("--mask", type=float, default=0.75, help="share of the patches that is dropped")
    parser.add_argument("--micro-batch", type=int, default=32)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--checkpointing", action="store_true", help="compute blocks twice, keep only their inputs")
    args = parser.parse_args()
    side = args.resolution // 8
    tokens = (side // 2) ** 2
    kept = kept_tokens(tokens, args.mask)
    print(f"{NAMES[args.size]}, {args.resolution} px, mask {args.mask}, micro-batch {args.micro_batch}, bfloat16 over float32, GB")
    print(f"{'GPUs':6}{'':14}{'weights':>9}{'gradients':>11}{'moments':>9}{'average':>9}{'activations':>13}{'gathered':>10}{'total':>8}")
    for ranks in args.ranks:
        counted = count(args.size, ranks, args.micro_batch, side, kept if args.mask else None, args.checkpointing)
        with torch.device("meta"):
            model = MicroDiT(resolve(SIZES[NAMES[args.size]]))
        layout = Layout("fsdp", ranks, recomputed=float(args.checkpointing))
        estimated = footprint(model, args.micro_batch, tokens, kept, CAPTION[0], layout, emas=1)
        both = counted_and_reckoned(counted, estimated)
        for name, values in both.items():
            print(
                f"{ranks:<6}{name:14}" + "".join(f"{text:>{width}}" for text, width in zip(values, (9, 11, 9, 9, 13, 10, 8), strict=True))
            )


def counted_and_reckoned(counted: dict[str, int], estimated: Footprint) -> dict[str, list[str]]:
    parts = ("parameters", "gradients", "moments", "averages", "activations", "gathered", "total")
    numbers = {part: getattr(estimated, part) for part in parts}
    # What the counted one lacks is taken from the other, so that the totals are of the same things.
    filled = {**{part: numbers[part] for part in parts[:-1]}, **counted}
    filled["total"] = sum(filled.values())
    return {
        "counted": [f"{filled[part] / 1e9:.2f}" if part in counted or part == "total" else "" for part in parts],
        "estimated": [f"{numbers[part] / 1e9:.2f}" for part in parts],
        "difference": [f"{numbers[part] / filled[part] - 1:+.1%}" if part in counted or part == "total" else "" for part in parts],
    }


def count(size: str, ranks: int, batch: int, side: int, kept: int | None, checkpointing: bool) -> dict[str, int]:
    """Bytes of the fake tensors that one process of `ranks` holds after the forward pass, the backward pass and the step."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
    mesh = init_device_mesh("cpu", (ranks,))
    with torch.device("meta"):
        model = MicroDiT(resolve(SIZES[NAMES[size]]))
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = model.to_empty(device="cpu")
        model.recompute_first(float(checkpointing))
        loss = DenoisingLoss(model, EDM(), mask_padding=False)
        policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32)
        for block in (model.caption, *model.all_blocks):
            fully_shard(block, mesh=mesh, mp_policy=policy)
        fully_shard(loss, mesh=mesh, mp_policy=MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False))
        latents = torch.empty(batch, 4, side, side)
        keep_ids = None if kept is None else torch.zeros(batch, kept, dtype=torch.long)
        captions, ones = torch.empty(batch, *CAPTION), torch.ones(batch)
        drawn = TrainingBatch(latents, captions, None, ones, torch.empty_like(latents), ones, keep_ids)
        saved = SavedBytes()
        with torch.autograd.graph.saved_tensors_hooks(saved.pack, lambda tensor: tensor):
            value = loss(drawn).total_B.mean()
        value.backward()
        optimizer = torch.optim.AdamW(model.parameters(), fused=True)
        optimizer.step()
        weights = list(model.parameters())
        result = {
            "parameters": sum(local_bytes(weight) for weight in weights),
            "gradients": sum(local_bytes(weight.grad) for weight in weights if weight.grad is not None),
            "moments": sum(local_bytes(state[key]) for state in optimizer.state.values() for key in ("exp_avg", "exp_avg_sq")),
            "activations": saved.total + (largest_block(model, batch, side, kept) if checkpointing else 0),
        }
    dist.destroy_process_group()
    return result


def largest_block(model: MicroDiT, batch: int, side: int, kept: int | None) -> int:
    """What the largest block keeps when it is computed anew: it lies beside the others' inputs."""
    tokens = (side // 2) ** 2
    largest = 0
    for block, (_, width, n) in zip(model.all_blocks, model.config.tokens_by_block(tokens, kept or tokens), strict=True):
        x, caption, condition = (
            torch.empty(batch, *shape, dtype=torch.bfloat16, requires_grad=True)
            for shape in ((n, width), (CAPTION[0], width), (model.config.dim,))
        )
        saved = SavedBytes()
        with torch.autograd.graph.saved_tensors_hooks(saved.pack, lambda tensor: tensor):
            block(x, caption, None, condition)
        largest = max(largest, saved.total)
    return largest


class SavedBytes:
    """Adds up the memory behind what autograd saves, once for each piece; weights lie there anyway."""

    def __init__(self) -> None:
        self._storages: dict[int, tuple[int, object]] = {}

    def pack(self, tensor: Tensor) -> Tensor:
        base = tensor if tensor._base is None else tensor._base
        if not isinstance(base, torch.nn.Parameter):
            storage = tensor.untyped_storage()
            self._storages[storage._cdata] = (storage.nbytes(), storage)  # kept, so that no other can take its number
        return tensor.detach()  # an output that a node saves would hold that node, and its graph would never be freed

    @property
    def total(self) -> int:
        return sum(size for size, _ in self._storages.values())


def local_bytes(tensor: Tensor) -> int:
    return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).nbytes


if __name__ == "__main__":
    main()
