"""The arithmetic against what is really held."""

import json
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
import torch

from benchmarks.memory import SavedBytes
from microdit.config.schema import AlignmentRecipe, OptimizerRecipe, architecture
from microdit.diffusion.edm import EDM
from microdit.distributed import World
from microdit.models.alignment import Alignment, ProjectorShape
from microdit.models.config import SIZES, Size, resolve
from microdit.models.microdit import MicroDiT
from microdit.models.routing import METHODS
from microdit.planning.memory import SPARE, Layout, _block, footprint
from microdit.training.noise import TrainingBatch
from microdit.training.optim import Optimizers
from microdit.training.parallel import DenoisingLoss
from microdit.training.state import TrainingState
from tests.conftest import routed
from tests.training.test_state import CPU, parts, recipe

SIZE = Size(dim=128, depth=6, head_dim=32, mixer_dim=64, mixer_depth=2, num_experts=4, round_ffn_to=32)


def held(model: MicroDiT, side: int, kept: int | None, B: int = 4, L: int = 16, alignment: Alignment | None = None) -> int:
    """Bytes that autograd keeps in a real forward pass, in float32."""
    latents = torch.randn(B, 4, side, side)
    keep_ids = None if kept is None else torch.stack([torch.randperm((side // 2) ** 2)[:kept] for _ in range(B)])
    text, ones = torch.randn(B, L, 96), torch.ones(B)
    features = None if alignment is None else torch.randn(B, alignment.shape.channels, side // 2, side // 2)
    saved = SavedBytes()
    batch = TrainingBatch(latents, text, None, ones, latents, ones, keep_ids, features_BEYX=features)
    with torch.autograd.graph.saved_tensors_hooks(saved.pack, lambda tensor: tensor):
        DenoisingLoss(model, EDM(), False, alignment)(batch)
    return saved.total


@pytest.mark.parametrize(("side", "kept"), [(16, None), (32, None), (32, 64)])
@pytest.mark.parametrize(("experts", "gated"), [(0, True), (0, False), (4, True)])
def test_activations_are_within_a_tenth_of_what_is_kept(side, kept, experts, gated):
    model = MicroDiT(resolve(replace(SIZE, num_experts=experts, gated_ffn=gated), caption_channels=96)).train()
    tokens = (side // 2) ** 2
    estimated = footprint(model, 4, tokens, kept or tokens, 16, Layout(element=4))
    assert estimated.activations == pytest.approx(held(model, side, kept), rel=0.1)


@pytest.mark.parametrize("mixer_depth", [0, 2])
@pytest.mark.parametrize("routing", METHODS)
def test_activations_of_every_routing_are_within_a_tenth(routing, mixer_depth):
    size = routed(replace(SIZE, depth=8, mixer_depth=mixer_depth), routing)
    model = MicroDiT(resolve(size, caption_channels=96)).train()
    for kept in (None,) if routing == "none" else (None, 64):
        estimated = footprint(model, 4, 256, kept or 256, 16, Layout(element=4))
        assert estimated.activations == pytest.approx(held(model, 32, kept), rel=0.1), kept


@pytest.mark.parametrize("routing", ["deferred", "sprint"])
@pytest.mark.parametrize(
    "settings",
    [
        {"attention": "joint"},
        {"attention": "joint", "unread_text": True, "preamble_depth": 2, "conditioning": "shared", "num_experts": 0},
        {"attention": "joint", "conditioning": "none", "norm": "rms", "qk_norm": "per_head", "caption_length": 24},
        {"norm": "rms", "qk_norm": "per_head", "positions": "rotary", "caption_embedding": "linear", "patch_channels": 8},
        {"conditioning": "none", "positions": "both", "preamble_depth": 1},
    ],
)
def test_activations_of_every_kind_of_network_are_within_a_tenth(settings, routing):
    model = MicroDiT(resolve(routed(replace(SIZE, depth=8, **settings), routing), caption_channels=96)).train()
    for kept in (None, 64):
        estimated = footprint(model, 4, 256, kept or 256, 16, Layout(element=4))
        assert estimated.activations == pytest.approx(held(model, 32, kept), rel=0.1), kept
    model.recompute_first(1.0)
    inside = [_block(model.config, shape, width, n, 24) for shape, width, n in model.config.tokens_by_block(256, 64)]
    estimated = footprint(model, 4, 256, 64, 16, Layout(element=4, recomputed=1.0)).activations - 4 * 4 * max(inside)
    assert estimated == pytest.approx(held(model, 32, 64), rel=0.15)


@pytest.mark.parametrize("kind", ["mlp", "conv"])
@pytest.mark.parametrize("kept", [None, 64])
@pytest.mark.parametrize("block", [1, 4])
def test_what_an_alignment_keeps_is_within_a_tenth(kind, kept, block):
    """Of a wide one, at a dense and at a sparse block: what it adds to what is kept without it."""
    model = MicroDiT(resolve(routed(replace(SIZE, depth=8), "sprint"), caption_channels=96)).train()
    alignment = Alignment(ProjectorShape(kind, 128, 256, 768), block)
    added = held(model, 32, kept, alignment=alignment) - held(model, 32, kept)
    plain, whole = (footprint(model, 4, 256, kept or 256, 16, Layout(element=4), alignment=one) for one in (None, alignment))
    assert whole.activations - plain.activations == pytest.approx(added, rel=0.1)


@pytest.mark.parametrize("layout", [Layout("fsdp", 2), Layout(), Layout(moments="int8"), Layout(averages_on_cpu=True)])
def test_a_projector_has_weights_gradients_and_moments_and_no_average(layout):
    made = replace(recipe("deferred", "adamw"), optimizer=OptimizerRecipe(moments=layout.moments))
    made = replace(made, alignment=AlignmentRecipe("efficientnet", 1, width=64))
    state = TrainingState(made, architecture(made.model, 4, 12), World(0, 1, CPU, None), None, fresh=True, feature_channels=32)
    plain, whole = (footprint(state.model, 1, 64, 64, 5, layout, alignment=one) for one in (None, state.alignment))
    weights = sum(weight.nbytes for weight in state.alignment.parameters()) // (layout.owners or 1)
    stored = {name: tensor.nbytes for name, tensor in state.optimizers.tensors().items() if not name.endswith("/step")}
    moments = sum(size for name, size in stored.items() if name.startswith("alignment."))
    assert whole.parameters - plain.parameters == weights
    assert whole.moments - plain.moments == moments // (layout.owners or 1)
    assert whole.averages == plain.averages
    assert whole.total > plain.total


def small() -> MicroDiT:
    return MicroDiT(resolve(SIZE, caption_channels=96))


@pytest.mark.parametrize("moments", ["float32", "int8"])
def test_weights_gradients_and_moments_are_exact_and_shared_out(moments):
    model = small()
    optimizers = Optimizers(model, OptimizerRecipe(moments=moments))
    held = sum(tensor.nbytes for name, tensor in optimizers.tensors().items() if not name.endswith("/step"))
    alone = footprint(model, 1, 64, 64, 16, Layout("fsdp", element=4, moments=moments), emas=2)
    weights = sum(weight.nbytes for weight in model.parameters())
    assert (alone.parameters, alone.gradients, alone.moments, alone.averages) == (weights, weights, held, 2 * weights)
    assert held == 2 * weights or held < 0.6 * weights
    shared = footprint(model, 1, 64, 64, 16, Layout("fsdp", 2, moments=moments), emas=2)
    assert shared.parameters == weights // 2
    assert shared.moments == pytest.approx(held / 2, rel=0.001)
    assert shared.total < alone.total


def test_four_experts_are_not_cut_into_more_than_four():
    model = small()
    as_fsdp_cuts = sum(weight.chunk(8)[0].nbytes for weight in model.parameters())
    assert footprint(model, 1, 64, 64, 16, Layout("fsdp", 8)).parameters == as_fsdp_cuts
    assert as_fsdp_cuts > sum(weight.nbytes for weight in model.parameters()) // 8


def test_hybrid_sharding_holds_what_fsdp_does_in_one_machine():
    model = small()
    hybrid, fsdp = (footprint(model, 1, 64, 64, 16, layout) for layout in (Layout("hybrid", 64, machine=8), Layout("fsdp", 8)))
    assert hybrid == fsdp
    assert hybrid.parameters > footprint(model, 1, 64, 64, 16, Layout("fsdp", 64)).parameters


@pytest.mark.parametrize("sharding", ["none", "ddp"])
def test_without_sharding_each_process_holds_all_weights_and_copies(sharding):
    model = small()
    weights = sum(weight.nbytes for weight in model.parameters())
    whole = footprint(model, 1, 64, 64, 16, Layout(sharding, ranks=8))
    assert (whole.parameters, whole.gathered) == (weights, weights // 2)


def test_checkpointing_keeps_less_the_more_blocks_are_recomputed():
    model = small()
    kept = [footprint(model, 4, 256, 64, 16, Layout(recomputed=share)).activations for share in (0.0, 0.25, 0.5, 1.0)]
    assert kept == sorted(kept, reverse=True)
    assert kept[-1] < kept[0] / 3


@pytest.mark.parametrize("share", [0.3, 0.6, 1.0])
def test_what_recomputed_blocks_keep_is_counted(share):
    """Their inputs, that is; what one of them has while it computes anew lies beside no later block's."""
    model = small().train()
    model.recompute_first(share)
    again = model.config.recomputed(share)
    assert 0 < again <= len(model.all_blocks)
    by_block = model.config.tokens_by_block(256, 64)
    inside = [_block(model.config, shape, width, n, 16) for shape, width, n in by_block]
    while_computing_anew = max(0, max(inside[:again]) - sum(inside[again:]))
    estimated = footprint(model, 4, 256, 64, 16, Layout(element=4, recomputed=share)).activations - 4 * 4 * while_computing_anew
    assert estimated == pytest.approx(held(model, 32, 64), rel=0.1)


@pytest.mark.parametrize(("micro_batches", "release"), [*product((1, 2), (False, True))])
def test_gradients_are_those_that_are_there(micro_batches, release):
    """Of a model held whole, in bfloat16: those that lie there when the optimizer begins."""
    made = recipe("deferred", "adamw", "bfloat16", release_gradients=release)
    state = TrainingState(made, architecture(made.model, 4, 12), World(0, 1, CPU, None), None, fresh=True)
    state.gradients.begin()
    batches = parts(made, 0, True)[:micro_batches]
    for number, part in enumerate(batches, start=1):
        state.gradients.add(part.to(CPU), 8, last=number == micro_batches)
    sums = [weight.grad for weight in state.model.parameters() if weight.grad is not None]
    lasting, passing = sum(tensor.nbytes for tensor in sums), sum(tensor.nbytes for tensor in state.gradients.held or [])
    estimated = footprint(state.model, 1, 64, 64, 5, Layout(release_gradients=release, accumulates=micro_batches > 1))
    assert lasting == estimated.gradients
    assert passing == (estimated.passing if release else 0)  # else they pass into the sums, and go


def test_gradients_that_come_while_activations_go_are_not_counted_twice():
    one = footprint(small(), 1, 256, 64, 16, Layout("fsdp", accumulates=False))
    many = one.of(1000)
    assert many.total == many.lasting + many.activations
    assert one.total < one.lasting + one.passing + one.activations
    for room in (one.total - 1, one.total, one.of(7).total, many.total + 5):
        samples = one.samples_in(room)
        assert one.of(samples).total <= room < one.of(samples + 1).total


def test_averages_on_the_cpu_take_the_room_of_the_largest():
    model = small()
    weights = sum(weight.nbytes for weight in model.parameters())
    there, here = (footprint(model, 1, 64, 64, 16, Layout(averages_on_cpu=flag), emas=2).averages for flag in (True, False))
    assert (there, here) == (max(weight.nbytes for weight in model.parameters()), 2 * weights)


def test_the_steps_measured_on_an_h100_are_reckoned_within_two_percent():
    """docs/gpu/h100/results.json: XL_2, sharded, one micro-batch a step; samples at 512 px with an average."""
    measured = json.loads((Path(__file__).parents[2] / "docs" / "gpu" / "h100" / "1" / "results.json").read_text())["found"]["xl"]
    with torch.device("meta"):
        model = MicroDiT(resolve(SIZES["MicroDiT_XL_2"]))
    layout = Layout("fsdp", accumulates=False, spare=SPARE * 85e9)
    for name, samples, tokens, emas in (("FSDP 128", 128, 256, 0), ("FSDP 256", 256, 256, 0), ("512 px, FSDP 64", 64, 1024, 1)):
        estimated = footprint(model, samples, tokens, tokens // 4, 77, layout, emas).total
        assert estimated / 1e9 == pytest.approx(measured[name]["memory_gb"], rel=0.02)
