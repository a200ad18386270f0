"""What is observed of a pass, compared with the model's own arithmetic."""

import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch

from microdit.models.blocks import KeysValues
from microdit.models.config import Size, resolve
from microdit.models.microdit import MicroDiT
from microdit.pipelines.observe import END, START, _watched, observe, tokens_by_word
from microdit.pipelines.pipeline import MicroDiTPipeline
from microdit.pipelines.settings import SamplerSettings

KINDS = [("cross", "sincos", "adaln"), ("joint", "both", "none")]


@pytest.fixture(params=KINDS, ids=lambda kind: kind[0])
def model(request):
    attention, positions, conditioning = request.param
    size = Size(32, 4, 8, 16, 1, num_experts=4, experts_every=2, round_ffn_to=8)
    size = replace(size, attention=attention, positions=positions, conditioning=conditioning)
    model = MicroDiT(resolve(size, caption_channels=12)).eval()
    draw = torch.Generator().manual_seed(0)
    for weight in model.parameters():
        weight.data = torch.randn(weight.shape, generator=draw) * 0.3
    return model


def run(model):
    draw = torch.Generator().manual_seed(1)
    mask_BL = torch.tensor([[True, True, True, False, False]])
    caption = model.embed_caption(torch.randn(1, 5, 12, generator=draw) * mask_BL[..., None], mask_BL)
    return lambda: model(torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(2)), torch.zeros(1), caption)


@torch.no_grad()
def test_attention_is_that_with_which_the_blocks_mix_values(model, monkeypatch):
    """PyTorch's attention, given the identity as values, returns the weights themselves."""
    import microdit.models.blocks as blocks

    own, seen = blocks._attend, []

    def attend(q_BNTH, keys_values, mask_BL):
        keys = keys_values.k_BNLH.shape[2]
        if q_BNTH.shape[2] != keys or model.config.joint:
            identity = torch.eye(keys).expand(*q_BNTH.shape[:2], keys, keys)
            mixed = own(q_BNTH, KeysValues(keys_values.k_BNLH, identity), mask_BL)
            if q_BNTH.shape[2] >= 16:  # the caption's own attention is not meant
                seen.append(mixed.unflatten(-1, (-1, keys)).mean(dim=2)[0])  # (T or L + T, keys), the mean of the heads
        return own(q_BNTH, keys_values, mask_BL)

    monkeypatch.setattr(blocks, "_attend", attend)
    with _watched(model) as observed:
        run(model)()
    assert list(observed.attention) == ["mixer 1", "block 1", "block 2", "block 3", "block 4"]
    for weights_TL, whole in zip(observed.attention.values(), seen, strict=True):
        assert weights_TL.shape == (16, 5)
        assert torch.allclose(weights_TL, whole[-16:, :5], atol=1e-5)
        assert (weights_TL[:, 3:] == 0).all()  # padding


@torch.no_grad()
def test_experts_are_those_that_the_output_depends_on(model):
    """An expert's weights change the outputs of the tokens that it takes, and of no others."""
    with _watched(model) as observed:
        run(model)()
    assert list(observed.experts) == ["block 2"]  # every second one, but never the last
    for name, taken_EK in observed.experts.items():
        layer = model.blocks[int(name.split()[1]) - 1].ffn
        x_BTD = []
        handle = layer.register_forward_pre_hook(lambda module, inputs, kept=x_BTD: kept.append(inputs[0]))
        run(model)()
        handle.remove()
        before = layer(x_BTD[0])
        for expert, taken_K in enumerate(taken_EK):
            saved = layer.w_out[expert].clone()
            layer.w_out[expert] += 1
            changed_T = (layer(x_BTD[0]) != before).any(dim=-1)[0]
            layer.w_out[expert] = saved
            assert changed_T.nonzero().flatten().tolist() == sorted(taken_K.tolist())


def test_a_watched_model_is_as_before(model):
    call = run(model)
    before = call()
    with _watched(model):
        assert call().equal(before)
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_a_pipeline_is_observed_while_another_thread_uses_it():
    pipeline, stop = MicroDiTPipeline.from_pretrained("demo"), threading.Event()
    latents_CHW = torch.zeros(pipeline.latent_shape)
    alone = observe(pipeline, "owl", latents_CHW, 1.0)

    def use() -> None:
        while not stop.is_set():
            pipeline.generate(["a red heart and an owl"], SamplerSettings(2), height=128)  # other captions, more patches

    with ThreadPoolExecutor(1) as threads:
        used = threads.submit(use)
        try:
            beside = [observe(pipeline, "owl", latents_CHW, 1.0) for _ in range(5)]
        finally:
            stop.set()
        used.result()
    for observed in beside:
        assert list(observed.attention) == list(alone.attention)
        assert all(torch.allclose(observed.attention[name], weights_TL, atol=1e-5) for name, weights_TL in alone.attention.items())


def test_each_word_has_its_tokens(text_encoder):
    caption = "a smiling unbelievableness, twice"
    parts = tokens_by_word(text_encoder.tokenize, caption)
    (ids,) = text_encoder.tokenize([caption])
    assert [name for name, _ in parts] == [START, *caption.split(), END]
    assert [number for _, numbers in parts for number in numbers] == list(range(len(ids)))
    words = dict(parts)
    for word in ("a", "smiling"):
        (alone,) = text_encoder.tokenize([word])
        assert [ids[number] for number in words[word]] == alone[1:-1]
    assert len(words["unbelievableness,"]) > 2


@pytest.mark.parametrize(
    ("start", "end", "expected"),
    [([1], [2], [(START, 1), ("xx", 2), ("y", 1), (END, 1)]), ([], [2], [("xx", 2), ("y", 1), (END, 1)]), ([], [], [("xx", 2), ("y", 1)])],
)
def test_text_encoders_add_tokens_at_either_end_or_none(start, end, expected):
    def tokenize(captions):
        return [[*start, *(ord(letter) for letter in caption.replace(" ", "")), *end] for caption in captions]

    assert [(name, len(numbers)) for name, numbers in tokens_by_word(tokenize, "xx y")] == expected
    assert [number for _, numbers in tokens_by_word(tokenize, "") for number in numbers] == list(range(len(start + end)))
