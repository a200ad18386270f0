"""Muon on a CPU: torch.optim.Muon's update, in float32.

PyTorch's own works in bfloat16, which most CPUs only emulate: there one of its steps takes longer than ten training steps of
a small model (`python benchmarks/muon.py`).
"""

from collections import defaultdict
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor


class CPUMuon(torch.optim.Muon):
    """PyTorch's with `adjust_lr_fn="match_rms_adamw"`, and no other: the same state and, but for rounding, the same steps."""

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            alike: dict[Any, list[tuple[Tensor, Tensor]]] = defaultdict(list)
            for weight in group["params"]:
                if weight.grad is not None:
                    alike[_stackable(weight)].append((weight, self._direction(weight, group["momentum"])))
            for pairs in alike.values():
                updates = orthogonalized(torch.stack([direction for _, direction in pairs]), group["ns_coefficients"], group["ns_steps"])
                for index, (weight, _) in enumerate(pairs):
                    weight.mul_(1 - group["lr"] * group["weight_decay"])
                    weight.add_(updates[index], alpha=-0.2 * max(weight.shape) ** 0.5 * group["lr"])  # as large as AdamW's (2502.16982)

    def _direction(self, weight: Tensor, momentum: float) -> Tensor:
        """Nesterov's momentum."""
        assert weight.grad is not None
        state = self.state[weight]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(weight.grad)
        state["momentum_buffer"].lerp_(weight.grad, 1 - momentum)
        return weight.grad.lerp(state["momentum_buffer"], momentum)


def orthogonalized(matrices_NIO: Tensor, coefficients: tuple[float, float, float], steps: int, eps: float = 1e-7) -> Tensor:
    """Newton-Schulz: all singular values brought near 1 (arXiv 2502.16982, section 2.1)."""
    a, b, c = coefficients
    tall = matrices_NIO.shape[1] > matrices_NIO.shape[2]
    x = matrices_NIO.mT if tall else matrices_NIO
    x = x / torch.linalg.matrix_norm(x, keepdim=True).clamp(min=eps)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x


def _stackable(weight: Tensor) -> Any:
    """Sharded matrices go alone: those of one shape may be sharded in different ways."""
    return id(weight) if isinstance(weight, DTensor) else weight.shape
