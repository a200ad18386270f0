"""The operations between XL's matrix products, one by one: ways to compute each, against the time that its bytes need on the card."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from gpu_measure import Place, Results, free_memory, time_of
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from microdit.models.elementwise import EAGER, _normalised_parts, _split_normalised_backward, _SplitNormalised, compiled

BYTES_PER_SECOND = 3.02e12  # what a copy reached (docs/gpu)
SECONDS = 0.12  # of timing for each way
SAMPLES, CAPTION, HEAD, EXPERTS = 256, 77, 64, 8


@dataclass(frozen=True)
class Case:
    """An operation on random inputs, the first `trained` of which get a gradient. `moved`: the fewest bytes of forward and backward."""

    name: str
    ways: dict[str, Callable[..., Any]]
    exact: Callable[..., Any]
    inputs: list[Any]
    trained: int
    moved: float
    calls: int  # in a training step of XL


def kernels(place: Place, results: Results) -> None:
    """Time and check every way of every case. The first way is today's."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    for make in cases(place.smoke):
        case = None
        with results.attempt(f"inputs of {make.args[0]}"):
            case = make(device)
        if case is None:
            continue
        exact: list[Tensor] = []
        with results.attempt(f"{case.name}, float64"):
            exact = gradients_of(case.exact, [as_double(value) for value in case.inputs], case.trained)
        for name, way in case.ways.items():
            with results.attempt(f"{case.name}, {name}"):
                results.put(f"{case.name}, {name}", measured(case, way, exact, place.smoke))
            free_memory()
    with results.attempt("optimizer"):
        optimizers(place, results, device)


def measured(case: Case, way: Callable[..., Any], exact: list[Tensor], smoke: bool) -> dict[str, Any]:
    found = gradients_of(way, case.inputs, case.trained)
    apart = max(distance(ours, truth) for ours, truth in zip(found, exact, strict=True)) if exact else float("nan")
    again = gradients_of(way, case.inputs, case.trained)
    same = all(torch.equal(one, two) for one, two in zip(found, again, strict=True))
    del found, again
    one, spread = time_of(recorded(lambda: gradients_of(way, case.inputs, case.trained)), 0.01 if smoke else SECONDS)
    floor = case.moved / BYTES_PER_SECOND
    return {
        "microseconds": 1e6 * one,
        "spread": spread,
        "share_of_floor": floor / one,
        "gb_per_second": case.moved / one / 1e9,
        "in_a_step_ms": 1e3 * case.calls * one,
        "distance": f"{apart:.1e}",
        "deterministic": same,
    }


def gradients_of(way: Callable[..., Any], inputs: list[Any], trained: int) -> list[Tensor]:
    """The outputs, and the gradients of the inputs, by random gradients of the outputs that are the same for all ways."""
    leaves = [value.detach().requires_grad_() for value in inputs[:trained]]
    outputs = way(*leaves, *inputs[trained:])
    outputs = list(outputs) if isinstance(outputs, tuple) else [outputs]
    pull = [pattern(output) for output in outputs]
    return [*(output.detach() for output in outputs), *torch.autograd.grad(outputs, leaves, pull)]


@cache
def _pattern(shape: torch.Size, dtype: torch.dtype, device: torch.device) -> Tensor:
    generator = torch.Generator(device).manual_seed(1)
    return torch.randn(shape, generator=generator, device=device, dtype=torch.bfloat16).to(dtype)


def pattern(output: Tensor) -> Tensor:
    return _pattern(output.shape, output.dtype, output.device)


def as_double(value: Any) -> Any:
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


def distance(ours: Tensor, truth: Tensor) -> float:
    return float((ours.double() - truth).norm() / truth.norm())


def recorded(work: Callable[[], object]) -> Callable[[], object]:
    """As a CUDA graph, as the trainer runs it: launching from Python would be what is timed."""
    if not torch.cuda.is_available():
        return work
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            work()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph.replay


def cases(smoke: bool) -> list["partial[Case]"]:
    """Blocks see 64 tokens of width 1024, the mixer 256 of 768. Numbers of calls are those of XL: 28 blocks, 6 in the mixer."""
    samples = 2 if smoke else SAMPLES
    width, mixer, tokens, all_tokens = (32, 16, 16, 32) if smoke else (1024, 768, 64, 256)
    head = 8 if smoke else HEAD
    found: list[partial[Case]] = [
        partial(split_case, "q, k, v of blocks", samples, tokens, 3, width * 3 // 4, 28),
        partial(experts_case, "experts of blocks", samples, tokens, width, 13),
        partial(attention_case, "attention of blocks", samples, tokens, tokens, width * 3 // 4, head, 28),
        partial(attention_case, "cross-attention of blocks", samples, tokens, CAPTION, width, head, 28),
        partial(split_case, "k, v of captions", samples, CAPTION, 2, width, 28),
        partial(norm_case, "q of cross-attention", samples, tokens, width, 28),
        partial(split_case, "q, k, v of the mixer", samples, all_tokens, 3, mixer, 6),
        partial(experts_case, "experts of the mixer", samples, all_tokens, mixer, 3),
        partial(attention_case, "attention of the mixer", samples, all_tokens, all_tokens, mixer, head, 6),
        partial(attention_case, "cross-attention of the mixer", samples, all_tokens, CAPTION, mixer, head, 6),
    ]
    return found[:4] if smoke else found  # the others repeat them at other sizes, and a CPU takes long to compile


def randn(device: torch.device, *shape: int) -> Tensor:
    return torch.randn(shape, device=device, dtype=torch.bfloat16)


@cache
def dynamic(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function, fullgraph=True, dynamic=True)


def chunked_norms(x_BTA: Tensor, parts: int) -> tuple[Tensor, ...]:
    """As it was before `split_normalised`: one dynamic kernel for all widths, and the gradients concatenated."""
    *others, last_BTA = x_BTA.chunk(parts, dim=-1)
    return *(dynamic(EAGER.normalised)(part) for part in others), last_BTA


@cache
def at_once(function: Callable[..., Any]) -> Callable[..., Any]:
    """Have the compiler hold a whole row in registers, which it does of its own accord only where rows lie side by side."""
    kernel = torch.compile(function, fullgraph=True, dynamic=True, options={"triton.multi_kernel": 2})

    def call(*inputs: Any) -> Any:
        for tensor in inputs:
            if isinstance(tensor, Tensor):
                torch._dynamo.mark_static(tensor, tensor.dim() - 1)
        return kernel(*inputs)

    return call


class SplitAtOnce(_SplitNormalised):
    @staticmethod
    def forward(ctx: Any, x_BTPA: Tensor, parts: int) -> tuple[Tensor, ...]:
        ctx.save_for_backward(x_BTPA)
        return *at_once(_normalised_parts)(x_BTPA, parts).unbind(-2), x_BTPA.chunk(parts, dim=-1)[-1]

    @staticmethod
    def backward(ctx: Any, *gradients_BTA: Tensor) -> tuple[Tensor, None]:
        return at_once(_split_normalised_backward)(*ctx.saved_tensors, *gradients_BTA), None


def split_case(name: str, samples: int, tokens: int, parts: int, width: int, calls: int, device: torch.device) -> Case:
    x = randn(device, samples, tokens, parts * width)
    one = x.nbytes / parts
    moved = 2 * (parts - 1) * one + 3 * (parts - 1) * one + 2 * one  # normed and written; x, gradients, written; the last part's copied
    ways = {"before": chunked_norms, "split_normalised": compiled().split_normalised, "rows at once": SplitAtOnce.apply}
    ways |= {"by hand": hand_module().split_normalised} if device.type == "cuda" else {}
    return Case(name, ways, EAGER.split_normalised, [x, parts], 1, moved, calls)


def norm_case(name: str, samples: int, tokens: int, width: int, calls: int, device: torch.device) -> Case:
    x = randn(device, samples, tokens, width)
    ways = {"before": dynamic(EAGER.normalised), "normalised": compiled().normalised}
    ways |= {"by hand": hand_module().normalised} if device.type == "cuda" else {}
    return Case(name, ways, EAGER.normalised, [x], 1, 5 * x.nbytes, calls)


def experts_case(name: str, samples: int, tokens: int, width: int, calls: int, device: torch.device) -> Case:
    """Tokens to the experts and back, without the experts' own products: 14 times the bytes of all tokens."""
    each = 2 * tokens // EXPERTS
    token_BEK = torch.rand(samples, EXPERTS, tokens, device=device).topk(each).indices
    token_EM = (token_BEK + torch.arange(0, samples * tokens, tokens, device=device).view(-1, 1, 1)).transpose(0, 1).flatten(1)
    x, weight = randn(device, samples * tokens, width), torch.rand(EXPERTS, samples * each, device=device)

    def through(ops: Any, x_ND: Tensor, weight_EM: Tensor, token_EM: Tensor) -> Tensor:
        found: Tensor = ops.add_weighted(ops.take_chosen(x_ND, token_EM), weight_EM, token_EM, len(x_ND))
        return found

    ways = {"before": partial(through, EAGER), "gathered": partial(through, compiled())}
    ways |= {"by hand": partial(through, hand_module())} if device.type == "cuda" else {}
    return Case(name, ways, partial(through, EAGER), [x, weight, token_EM], 2, (4 + 3 + 6 + 3) * x.nbytes, calls)


def hand_module() -> Any:
    """Triton is not on a machine without a GPU."""
    import gpu_triton

    return gpu_triton


def attention_case(name: str, samples: int, tokens: int, keys: int, width: int, head: int, calls: int, device: torch.device) -> Case:
    """Heads lie beside each other, as the products before leave them. Forward 4 tensors, backward 7."""
    q, kv = randn(device, samples, tokens, width), randn(device, samples, keys, 2 * width)

    def attend(backend: SDPBackend | None, q_BTA: Tensor, kv_BLA: Tensor) -> Tensor:
        heads = [part.unflatten(-1, (-1, head)).transpose(1, 2) for part in (q_BTA, *kv_BLA.chunk(2, dim=-1))]
        if backend is None:
            return F.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(-2)
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(-2)

    ways: dict[str, Callable[..., Any]] = {"as chosen": partial(attend, None)}
    if q.device.type == "cuda":
        gpu_triton = hand_module()
        ways |= {"flash": partial(attend, SDPBackend.FLASH_ATTENTION), "efficient": partial(attend, SDPBackend.EFFICIENT_ATTENTION)}
        if keys <= gpu_triton.MOST_KEYS:
            ways |= {"by hand": partial(gpu_triton.attend, head)}
    moved = 5 * q.nbytes + 3 * kv.nbytes  # q, o; k, v; then q, do, dq; k, v, dk, dv
    return Case(name, ways, partial(attend, SDPBackend.MATH), [q, kv], 2, moved, calls)


WEIGHTS = (*[(1024, 1024)] * 40, *[(4096, 1024)] * 20, *[(8, 1024, 2304)] * 5, *[(1024,)] * 60)  # as mixed as XL's, a fifth of them
BETAS, EPS, RATE, DECAY = (0.9, 0.999), 1e-8, 1e-4, 0.1


def optimizers(place: Place, results: Results, device: torch.device) -> None:
    """Everything that is done once a step, for one micro-batch: gradients in bfloat16 to new weights and their copy in bfloat16."""
    shapes = [(8, 8), (16,)] if place.smoke else WEIGHTS
    numbers = sum(torch.Size(shape).numel() for shape in shapes)
    floor = numbers * (2 + 2 + 24 + 2) / BYTES_PER_SECOND  # the norm reads gradients; the update, those and three tensors, which it writes
    start = [torch.randn(shape, device=device) for shape in shapes]
    gradients = [torch.randn(shape, device=device).to(torch.bfloat16) for shape in shapes]
    first: list[Tensor] = []
    for name, make in (("before", Fused), ("clipping in AdamW", FusedClipping), ("compiled", Compiled)):
        with results.attempt(f"optimizer, {name}"):
            way = make(start, gradients)
            way.step()
            first = first or [copy.clone() for copy in way.copies]
            apart = distance(torch.cat([copy.flatten() for copy in way.copies]), torch.cat([copy.flatten() for copy in first]).double())
            one, spread = time_of(recorded(way.step), 0.01 if place.smoke else 2 * SECONDS)
            found = {"microseconds": 1e6 * one, "spread": spread, "share_of_floor": floor / one}
            results.put(f"optimizer, {name}", {**found, "in_a_step_ms": 1e3 * one * 1.16e9 / numbers, "distance": f"{apart:.1e}"})
            del way
        free_memory()


class Fused:
    """Today's: the gradients' sums in float32, their norm, clipping, PyTorch's fused AdamW, and the weights' copy."""

    scaling = False

    def __init__(self, start: list[Tensor], gradients: list[Tensor]):
        self.weights, self.gradients = [weight.clone() for weight in start], gradients
        self.sums, self.means, self.squares = ([torch.zeros_like(weight) for weight in start] for _ in range(3))
        self.copies = [weight.to(torch.bfloat16) for weight in start]
        self.steps = [torch.zeros((), device=start[0].device) for _ in start]

    def step(self) -> None:
        torch._foreach_copy_(self.sums, self.gradients)
        norm = torch.nn.utils.get_total_norm(self.sums, foreach=True)
        scale = (1.0 / (norm + 1e-6)).clamp(max=1.0)
        if not self.scaling:
            torch._foreach_mul_(self.sums, scale)
        torch._foreach_add_(self.steps, 1.0)
        torch._fused_adamw_(
            self.weights,
            self.sums,
            self.means,
            self.squares,
            [],
            self.steps,
            lr=RATE,
            beta1=BETAS[0],
            beta2=BETAS[1],
            weight_decay=DECAY,
            eps=EPS,
            amsgrad=False,
            maximize=False,
            grad_scale=1 / scale if self.scaling else None,
        )
        torch._foreach_copy_(self.copies, self.weights)


class FusedClipping(Fused):
    scaling = True


class Compiled(Fused):
    """One kernel for each weight, from the gradient in bfloat16 to the copy in bfloat16."""

    def step(self) -> None:
        norms = torch._foreach_norm(self.gradients, dtype=torch.float32)
        scale = (1.0 / (torch.linalg.vector_norm(torch.stack(norms)) + 1e-6)).clamp(max=1.0)
        torch._foreach_add_(self.steps, 1.0)
        rate, root = RATE / (1 - BETAS[0] ** self.steps[0]), (1 - BETAS[1] ** self.steps[0]).sqrt()
        for tensors in zip(self.weights, self.gradients, self.means, self.squares, self.copies, strict=True):
            dynamic(updated)(*(tensor.view(-1) for tensor in tensors), rate, root, scale)


def updated(
    weight: Tensor, gradient: Tensor, mean: Tensor, square: Tensor, copy: Tensor, rate: Tensor, root: Tensor, scale: Tensor
) -> None:
    wide = gradient.float() * scale
    mean.lerp_(wide, 1 - BETAS[0])
    square.lerp_(wide.square(), 1 - BETAS[1])
    weight.copy_(weight * (1 - RATE * DECAY) - rate * mean / (square.sqrt() / root + EPS))
    copy.copy_(weight)
