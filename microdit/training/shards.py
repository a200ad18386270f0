"""This process's own part of each weight, where the model is sharded: what is done number by number needs no other part.

Optimizers work on these parts as plain tensors. On sharded ones (DTensor) each of their operations costs the CPU several times as much, at
470 weights more than a GPU's whole step may take.
"""

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from microdit.distributed import World


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
