"""Muon (arXiv 2502.16982) for matrices that may be sharded, in steps that the device can decide not to take.

PyTorch's own decides nothing on the device, and works one matrix at a time, in bfloat16, which most CPUs only emulate: there one of its
steps takes longer than ten training steps of a small model (`python benchmarks/muon.py`).
"""

from collections import defaultdict

import torch
from torch import Tensor
from torch.optim import Optimizer

from microdit.training.shards import Shard

MOMENTUM = 0.95
COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the Newton-Schulz iteration, as everywhere
STEPS = 5


class Muon(Optimizer):
    """What torch.optim.Muon does with Nesterov's momentum and `adjust_lr_fn="match_rms_adamw"`: the same state and, but for rounding, the
    same steps. Products are in float32 on a CPU and in bfloat16 elsewhere."""

    def __init__(self, shards: list[Shard], weight_decay: float, rate: float = 1.0):
        self._shards = shards
        super().__init__([{"params": [shard.leaf for shard in shards], "rate": rate}], {"lr": 0.0, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None, taken: Tensor | None = None) -> None:  # type: ignore[override]
        """`taken`: 0.0 leaves weights and momentum as they are; a scalar on the weights' device. All processes must call this."""
        (group,) = self.param_groups
        alike: dict[torch.Size, list[tuple[Shard, Tensor]]] = defaultdict(list)
        for shard in self._shards:
            if shard.leaf.grad is not None:
                alike[shard.weight.shape].append((shard, shard.whole(self._direction(shard.leaf, taken))))
        for pairs in alike.values():
            updates = orthogonalized(torch.stack([direction for _, direction in pairs]), COEFFICIENTS, STEPS)
            for (shard, _), update in zip(pairs, updates.unbind(), strict=True):
                rate = 0.2 * max(update.shape) ** 0.5 * group["lr"]  # as large as AdamW's
                moved = (shard.leaf * (1 - group["lr"] * group["weight_decay"])).add_(shard.own(update), alpha=-rate)
                _set(shard.leaf, moved, taken)

    def _direction(self, leaf: Tensor, taken: Tensor | None) -> Tensor:
        """Nesterov's momentum."""
        assert leaf.grad is not None
        state = self.state[leaf]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(leaf.grad)
        moved = state["momentum_buffer"].lerp(leaf.grad, 1 - MOMENTUM)
        _set(state["momentum_buffer"], moved, taken)
        return leaf.grad.lerp(moved, MOMENTUM)


def _set(tensor: Tensor, value: Tensor, taken: Tensor | None) -> None:
    """`value` may be no number where the step is not taken."""
    tensor.copy_(value if taken is None else torch.where(taken > 0, value, tensor))


def orthogonalized(matrices_NIO: Tensor, coefficients: tuple[float, float, float], steps: int, eps: float = 1e-7) -> Tensor:
    """Newton-Schulz: all singular values brought near 1 (arXiv 2502.16982, section 2.1)."""
    a, b, c = coefficients
    tall = matrices_NIO.shape[1] > matrices_NIO.shape[2]
    x = matrices_NIO.mT if tall else matrices_NIO
    x = x / torch.linalg.matrix_norm(x, keepdim=True).clamp(min=eps)
    if x.device.type == "cuda":
        x = x.bfloat16()
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x.mT if tall else x).to(matrices_NIO.dtype)
