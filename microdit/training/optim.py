"""The optimizers: AdamW, and Muon (arXiv 2502.16982) for matrices that may be sharded, in steps that the device can decide to skip.

PyTorch's own Muon cannot skip on the device, and works on one matrix at a time in bfloat16, which most CPUs only emulate: there one of its
steps takes longer than ten training steps of a small model (`python benchmarks/muon.py`).
"""

import math
from collections import defaultdict

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from microdit.config.schema import OptimizerRecipe, PhaseRecipe
from microdit.models.microdit import MicroDiT
from microdit.models.moe import ExpertChoice
from microdit.training.adamw8 import AdamW8
from microdit.training.parallel import Shard, foreach_works, shards_of

MOMENTUM = 0.95
COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the Newton-Schulz iteration, as everywhere
STEPS = 5


class Muon(Optimizer):
    """torch.optim.Muon with Nesterov momentum and `adjust_lr_fn="match_rms_adamw"`: the same state and, up to rounding, the same steps.

    Products are in float32 on a CPU and in bfloat16 elsewhere.
    """

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
    """Copy `value`, which may be NaN if the step is skipped, to `tensor` unless it is."""
    tensor.copy_(value if taken is None else torch.where(taken > 0, value, tensor))


def orthogonalized(matrices_NIO: Tensor, coefficients: tuple[float, float, float], steps: int, eps: float = 1e-7) -> Tensor:
    """Bring all singular values near 1 by Newton-Schulz iterations (arXiv 2502.16982, section 2.1)."""
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


BUNDLE = 64_000_000  # numbers, of which gradients are brought into float32 at a time


class Optimizers:
    """AdamW; with `method` muon, Muon for the matrices of the caption embedder and of all blocks.

    Muon leaves out adaLN's matrices, which are tall, so expensive, and gain nothing, and the first and the last layer. Parameter groups
    carry `rate`, their multiple of the learning rate: 1, or the experts' own (2407.15811, appendix). Weight decay is on matrices only, or,
    where `decay` is all as in the released code, on norms and biases too. A projector of representation alignment is AdamW's.
    """

    def __init__(self, model: MicroDiT, recipe: OptimizerRecipe, compile: bool = False, alignment: nn.Module | None = None):
        """Group the parameters of the model, and behind them those of `alignment`, after sharding.

        `compile` compiles the update of 8-bit moments.
        """
        self.shards = shards_of(model)
        if alignment is not None:
            self.shards += [Shard(f"alignment.{name}", weight) for name, weight in alignment.named_parameters()]
        self._held: list[Tensor] | None = None  # gradients of whatever precision, and what to multiply them by
        self._scale: Tensor | None = None
        experts = {id(weight) for module in model.modules() if isinstance(module, ExpertChoice) for weight in (module.w_in, module.w_out)}
        muon: set[int] = set()
        if recipe.method == "muon":
            adaln = {id(weight) for name, weight in model.named_parameters() if "modulation" in name}
            inner = [weight for part in model.inner_parts for weight in part.parameters() if weight.dim() == 2]
            muon = {id(weight) for weight in inner} - adaln
        rest = [shard for shard in self.shards if id(shard.weight) not in muon]

        def group(shards: list[Shard], rate: float, decay: float) -> dict[str, object]:
            return {"params": [shard.leaf for shard in shards], "rate": rate, "weight_decay": decay}

        groups = [
            group([s for s in rest if s.weight.dim() >= 2 and id(s.weight) not in experts], 1.0, recipe.weight_decay),
            group([s for s in rest if id(s.weight) in experts], recipe.expert_learning_rate, recipe.weight_decay),
            group([s for s in rest if s.weight.dim() < 2], 1.0, recipe.weight_decay if recipe.decay == "all" else 0.0),
        ]
        # The learning rate here is a placeholder: `set_rate` sets the real one before every step.
        groups = [g for g in groups if g["params"]]
        self._fused = foreach_works(rest[0].leaf.device)
        self.adamw: torch.optim.AdamW | AdamW8
        if recipe.moments == "int8":
            self.adamw = AdamW8(groups, recipe.betas, recipe.eps, compile)
        else:
            self.adamw = torch.optim.AdamW(groups, lr=0.0, betas=recipe.betas, eps=recipe.eps, fused=self._fused, foreach=False)
        self.muon = Muon([s for s in self.shards if id(s.weight) in muon], recipe.weight_decay) if muon else None

    @property
    def all(self) -> list[torch.optim.Optimizer]:
        return [self.adamw, *([self.muon] if self.muon else [])]

    def set_rate(self, learning_rate: float) -> None:
        for optimizer in self.all:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate * group["rate"]

    def take_gradients(self, held: list[Tensor] | None = None) -> list[Tensor]:
        """Take this process's part of each gradient from the weights' `grad`, or from `held`, one for each weight. Returns them."""
        self._held = held
        if held is not None:
            return held
        for shard in self.shards:
            shard.take_gradient()
        return [shard.leaf.grad for shard in self.shards if shard.leaf.grad is not None]

    def clip(self, largest_norm: float, norm: Tensor) -> None:
        """Scale the gradients, whose norm is `norm`, down to `largest_norm` if it is larger."""
        if self._held is not None:
            self._scale = (largest_norm / (norm + 1e-6)).clamp(max=1.0)
            return
        leaves = [shard.leaf for shard in self.shards if shard.leaf.grad is not None]
        torch.nn.utils.clip_grads_with_norm_(leaves, largest_norm, norm, foreach=foreach_works(norm.device))

    def step(self, taken: Tensor | None = None) -> None:
        """Update the weights. If `taken`, a scalar on their device, is 0.0, nothing changes, and the program need not know."""
        if self._held is None:
            self._step(taken)
            return
        # No copy of all gradients in float32 is ever there: a bundle of them at a time is made, taken and freed.
        for first, end in _bundles([gradient.numel() for gradient in self._held]):
            for shard, gradient in zip(self.shards[first:end], self._held[first:end], strict=True):
                shard.leaf.grad = gradient.float() if self._scale is None else gradient.float() * self._scale
            self._step(taken)
            for shard in self.shards[first:end]:
                shard.leaf.grad = None

    def _step(self, taken: Tensor | None) -> None:
        """Update the weights that have a gradient."""
        if isinstance(self.adamw, AdamW8):
            self.adamw.step(taken=taken)
        else:
            if self._fused:  # what PyTorch's loss scaling uses to the same end
                self.adamw.found_inf = None if taken is None else 1 - taken  # type: ignore[attr-defined]
            self.adamw.step()
        if self.muon:
            self.muon.step(taken=taken)

    def zero_grad(self) -> None:
        self._held = self._scale = None
        for shard in self.shards:
            shard.drop_gradient()

    def tensors(self) -> dict[str, Tensor]:
        """Return the state as {parameter}/{key} -> tensor, sharded like the weights, zeros where no step was taken yet."""
        if any(not optimizer.state for optimizer in self.all):
            self._make_state()
        of = {id(shard.leaf): shard for shard in self.shards}
        return {
            f"{of[id(leaf)].name}/{key}": of[id(leaf)].sharded(value)
            for optimizer in self.all
            for leaf, state in optimizer.state.items()
            for key, value in state.items()
        }

    def _make_state(self) -> None:
        """Create the state by a step that changes nothing: no gradient, no rate."""
        for shard in self.shards:
            shard.leaf.grad = torch.zeros_like(shard.leaf)
        self.set_rate(0.0)
        self.step()
        self.zero_grad()
        for optimizer in self.all:
            for state in optimizer.state.values():
                for value in state.values():
                    value.zero_()


def _bundles(sizes: list[int]) -> list[tuple[int, int]]:
    """Return runs of neighbours as (first, end), each of up to `BUNDLE` numbers, or of one weight that is larger."""
    bundles, first, total = [], 0, 0
    for number, size in enumerate(sizes):
        if total + size > BUNDLE and number > first:
            bundles.append((first, number))
            first, total = number, 0
        total += size
    return [*bundles, (first, len(sizes))]


def learning_rate(phase: PhaseRecipe, step: int) -> float:
    """Return the learning rate at step number `step` (from 0) of a phase: linear warm-up from 0, then a cosine to `final_learning_rate`.

    As in Composer's schedules, which the released code uses, the first step of a warm-up has rate 0 and updates moments only.
    """
    if step < phase.warmup_steps:
        return phase.learning_rate * step / phase.warmup_steps
    progress = (step - phase.warmup_steps) / max(1, phase.steps - phase.warmup_steps)
    low = phase.final_learning_rate
    return phase.learning_rate * (low + (1 - low) * (1 + math.cos(math.pi * progress)) / 2)
