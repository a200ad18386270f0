"""The arithmetic against what is really held."""

from dataclasses import replace
from typing import get_args

import pytest
import torch

from benchmarks.memory import SavedBytes
from microdit.diffusion.edm import EDM
from microdit.model.microdit import MicroDiT
from microdit.model.routing import Routing
from microdit.model.sizes import Size, resolve
from microdit.recipe import OptimizerRecipe
from microdit.training.draws import TrainingBatch
from microdit.training.footprint import footprint
from microdit.training.optim import Optimizers
from microdit.training.step import DenoisingLoss
from tests.conftest import routed

SIZE = Size(dim=128, depth=6, head_dim=32, mixer_dim=64, mixer_depth=2, num_experts=4, round_ffn_to=32)


def held(model: MicroDiT, side: int, kept: int | None, B: int = 4, L: int = 16) -> int:
    """Bytes that autograd keeps in a real forward pass, in float32."""
    latents = torch.randn(B, 4, side, side)
    keep_ids = None if kept is None else torch.stack([torch.randperm((side // 2) ** 2)[:kept] for _ in range(B)])
    text, ones = torch.randn(B, L, 96), torch.ones(B)
    saved = SavedBytes()
    with torch.autograd.graph.saved_tensors_hooks(saved.pack, lambda tensor: tensor):
        DenoisingLoss(model, EDM(), mask_padding=False)(TrainingBatch(latents, text, None, ones, latents, ones, keep_ids))
    return saved.total


@pytest.mark.parametrize(("side", "kept"), [(16, None), (32, None), (32, 64)])
@pytest.mark.parametrize(("experts", "gated"), [(0, True), (0, False), (4, True)])
def test_activations_are_within_a_tenth_of_what_is_kept(side, kept, experts, gated):
    model = MicroDiT(resolve(replace(SIZE, num_experts=experts, gated_ffn=gated), caption_channels=96)).train()
    tokens = (side // 2) ** 2
    reckoned = footprint(model, 4, tokens, kept or tokens, 16, element=4)
    assert reckoned.activations == pytest.approx(held(model, side, kept), rel=0.1)


@pytest.mark.parametrize("mixer_depth", [0, 2])
@pytest.mark.parametrize("routing", get_args(Routing))
def test_activations_of_every_routing_are_within_a_tenth(routing, mixer_depth):
    size = routed(replace(SIZE, depth=8, mixer_depth=mixer_depth), routing)
    model = MicroDiT(resolve(size, caption_channels=96)).train()
    for kept in (None,) if routing == "none" else (None, 64):
        reckoned = footprint(model, 4, 256, kept or 256, 16, element=4)
        assert reckoned.activations == pytest.approx(held(model, 32, kept), rel=0.1), kept


def test_weights_gradients_and_moments_are_exact_and_shared_out():
    model = MicroDiT(resolve(SIZE, caption_channels=96))
    optimizers = Optimizers(model, OptimizerRecipe())
    moments = sum(tensor.nbytes for name, tensor in optimizers.tensors().items() if not name.endswith("/step"))
    alone = footprint(model, 1, 64, 64, 16, ranks=1, emas=2, element=4)
    weights = sum(weight.nbytes for weight in model.parameters())
    assert (alone.parameters, alone.gradients, alone.moments, alone.averages) == (weights, weights, moments, 2 * weights)
    shared = footprint(model, 1, 64, 64, 16, ranks=2, emas=2)
    assert shared.parameters == weights // 2
    assert shared.total < alone.total


def test_four_experts_are_not_cut_into_more_than_four():
    model = MicroDiT(resolve(SIZE, caption_channels=96))
    as_fsdp_cuts = sum(weight.chunk(8)[0].nbytes for weight in model.parameters())
    assert footprint(model, 1, 64, 64, 16, ranks=8).parameters == as_fsdp_cuts
    assert as_fsdp_cuts > sum(weight.nbytes for weight in model.parameters()) // 8


def test_without_sharding_each_process_holds_all_weights_and_autocasts_copies_of_them():
    model = MicroDiT(resolve(SIZE, caption_channels=96))
    weights = sum(weight.nbytes for weight in model.parameters())
    whole = footprint(model, 1, 64, 64, 16, ranks=8, sharded=False)
    assert (whole.parameters, whole.gathered) == (weights, weights // 2)


def test_checkpointing_keeps_less():
    model = MicroDiT(resolve(SIZE, caption_channels=96))
    whole, less = (footprint(model, 4, 256, 64, 16, checkpointing=flag).activations for flag in (False, True))
    assert less < whole / 3
