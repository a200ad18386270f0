"""What a trained model does in one pass over one image: its attention to caption tokens, and the patches that its experts take.

Shape legend: B batch, T image tokens, L caption tokens, E experts, K tokens an expert takes.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from microdit.diffusion.objective import denoise
from microdit.models.blocks import CrossAttention, JointAttention
from microdit.models.microdit import MicroDiT
from microdit.models.moe import ExpertChoice
from microdit.pipelines.pipeline import MicroDiTPipeline
from microdit.pipelines.sampling import autocast_like, frozen_model, seeded

START, END = "(start)", "(end)"  # names of the text encoder's own tokens


@dataclass
class Observed:
    """The attention and the experts' choices of one pass, by the name of the block, such as "mixer 1" or "block 3".

    `attention` holds the mean attention of the heads from image tokens to caption tokens, (T, L); in joint attention the rest of it
    goes to image tokens. `experts` holds the tokens that each expert takes, (E, K).
    """

    attention: dict[str, Tensor] = field(default_factory=dict)
    experts: dict[str, Tensor] = field(default_factory=dict)


def observe(pipeline: MicroDiTPipeline, caption: str, latents_CHW: Tensor, sigma: float, seed: int = 0) -> Observed:
    """Return what the model does when it denoises one image, to which noise of level `sigma` is added, with all of its patches.

    The pipeline may be in use by other threads: blocks of its own, around the same weights, are observed.
    """
    model, objective = frozen_model(pipeline.model.config, pipeline.model.state_dict()), pipeline.objective
    device = model.patch_embed.weight.device
    text_BLE, mask_BL = pipeline.encode_prompt([caption])
    noise_BCHW = torch.randn(latents_CHW[None].shape, generator=seeded(seed)).to(device)
    sigma_B = torch.tensor([sigma], device=device)
    noisy_BCHW = objective.add_noise(latents_CHW[None].to(device), sigma_B, noise_BCHW)
    with torch.no_grad(), autocast_like(model), _watched(model) as observed:
        embedded = model.embed_caption(text_BLE.to(device), None if mask_BL is None else mask_BL.to(device))
        denoise(model, objective, noisy_BCHW, sigma_B, embedded)
    return observed


def tokens_by_word(tokenize: Callable[[list[str]], list[list[int]]], caption: str) -> list[tuple[str, range]]:
    """Return the caption tokens of each word, in order, and those that the text encoder adds at the start and the end.

    Works with any tokenizer that reads from left to right: the tokens of the first words begin those of the whole caption.
    """
    words = caption.split()
    empty, whole, *begun = tokenize(["", caption, *(" ".join(words[: count + 1]) for count in range(len(words) - 1))])
    start = _common(empty, whole)
    last = len(whole) - (len(empty) - start)
    ends = [start, *(min(last, _common(ids, whole)) for ids in begun), last] if words else [start]
    parts = [(START, range(start)), *((word, range(*ends[n : n + 2])) for n, word in enumerate(words)), (END, range(last, len(whole)))]
    return [(name, numbers) for name, numbers in parts if len(numbers)]


def _common(one: list[int], other: list[int]) -> int:
    """Return the length of the longest common beginning."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


@contextmanager
def _watched(model: MicroDiT) -> Iterator[Observed]:
    """Record what the blocks do, in order, until the block ends."""
    observed = Observed()
    stacks = (("mixer", model.mixer), ("block", model.blocks), ("decoder", model.decoder))
    handles = []
    for stack, blocks in stacks:
        for number, block in enumerate(blocks, start=1):
            for module in block.modules():
                if isinstance(module, CrossAttention | JointAttention | ExpertChoice):
                    handles.append(module.register_forward_pre_hook(_recorder(observed, f"{stack} {number}"), with_kwargs=True))
    try:
        yield observed
    finally:
        for handle in handles:
            handle.remove()


def _recorder(observed: Observed, name: str) -> Callable[..., None]:
    def record(module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
        if isinstance(module, ExpertChoice):
            (x_BTD,) = inputs
            scores_BET = module.router(x_BTD).float().softmax(dim=-1).transpose(1, 2)
            observed.experts[name] = scores_BET.topk(int(module.capacity * x_BTD.shape[1] / module.num_experts), dim=-1).indices[0].cpu()
        elif isinstance(module, CrossAttention):
            x_BTD, text, mask_BL = inputs
            (q_BNTH,) = module.heads(module.q(x_BTD), "q")
            observed.attention[name] = _weights(q_BNTH, module.keys_values(text).k_BNLH, mask_BL)
        else:
            x_BTD, text_BLD, mask_BL, rotary, text_rotary = inputs
            q_BNTH, k_BNTH, _ = module.heads(module.qkv(x_BTD), "qkv", rotary)  # type: ignore[operator]
            text_k_BNLH = _text_keys(module, text_BLD, text_rotary)
            mask_BK = None if mask_BL is None else torch.nn.functional.pad(mask_BL, (0, x_BTD.shape[1]), value=True)
            weights_TK = _weights(q_BNTH, torch.cat([text_k_BNLH, k_BNTH], dim=2), mask_BK)
            observed.attention[name] = weights_TK[:, : text_BLD.shape[1]]

    return record


def _text_keys(module: Any, text_BLD: Tensor, rotary: Any) -> Tensor:
    if module.updates_text:
        return module.heads(module.text_qkv(text_BLD), "qkv", rotary)[1]  # type: ignore[no-any-return]
    return module.heads(module.text_kv(text_BLD), "kv", rotary)[0]  # type: ignore[no-any-return]


def _weights(q_BNTH: Tensor, k_BNKH: Tensor, mask_BK: Tensor | None) -> Tensor:
    """Return softmax(q k / sqrt(H)) of the first sample, (T, K), as the mean over heads."""
    scores_BNTK = q_BNTH.float() @ k_BNKH.float().transpose(2, 3) * q_BNTH.shape[-1] ** -0.5
    if mask_BK is not None:
        scores_BNTK = scores_BNTK.masked_fill(~mask_BK[:, None, None, :], -torch.inf)
    return scores_BNTK.softmax(dim=-1)[0].mean(dim=0).cpu()
