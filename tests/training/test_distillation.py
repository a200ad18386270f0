"""Runs that are distilled from another one: their targets, a kill, several processes, and what draws their pictures by default."""

import json
from dataclasses import replace
from pathlib import Path
from shutil import copytree, rmtree

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from microdit.api import sample
from microdit.checkpoint import open_checkpoint
from microdit.config.load import load_recipe
from microdit.data.dataset import EncodedDataset
from microdit.diffusion.objective import denoise
from microdit.distributed import start_world
from microdit.errors import UserError
from microdit.evaluation.generators import DrawSettings
from microdit.pipelines.export import export_run
from microdit.pipelines.pipeline import MicroDiTPipeline
from microdit.pipelines.sampling import draw_latents, first_noise, recorded_objective
from microdit.pipelines.settings import SamplerSettings, suited_to
from microdit.planning.workload import FlopCounter
from microdit.training.distillation import open_teacher
from microdit.training.init_from import find_initial_weights
from microdit.training.noise import TrainingBatch
from microdit.training.setup import model_config
from microdit.training.stability import SpikeGuard
from microdit.training.state import TrainingState, _copy, read_step
from tests.training.processes import RECIPE, losses, start, tensors, train, wait_for
from tests.training.untrained import save_untrained

FEW = ("init_from=teacher", "init_weights=ema", "distillation={steps: 2, teacher_steps: 6, guidance_scale: 3.0}")
SHORT = ("phases.0.steps=8", "phases.1.steps=4", "phases.1.batch_size=8", "phases.0.warmup_steps=0", "record.checkpoint_every=4")


@pytest.fixture(scope="module")
def teacher(tmp_path_factory, encoded_emoji) -> Path:
    """A run whose weights are not those that a network begins with: its averages are random too."""
    draw = torch.Generator().manual_seed(0)
    return save_untrained(
        tmp_path_factory.mktemp("runs") / "teacher", encoded_emoji, 40, lambda w: w + 0.1 * torch.randn(w.shape, generator=draw)
    )


def distilled(run: Path, data: Path, *more: object, ranks: int = 1) -> Path:
    running = train(run, data, *FEW, *SHORT, *more, ranks=ranks)
    assert running.wait() == [0] * ranks, running.output
    return run


@pytest.fixture(scope="module")
def student(teacher, encoded_emoji) -> Path:
    return distilled(teacher.parent / "student", encoded_emoji)


@pytest.fixture
def opened(teacher, encoded_emoji):
    """A recipe, its teacher, and a batch of four emoji at the student's levels, one of them without its caption."""
    recipe, data = load_recipe(RECIPE, [f"data.path={encoded_emoji}", *FEW]), EncodedDataset(encoded_emoji, 16)
    config, world = model_config(recipe, data), start_world("cpu")
    weights = find_initial_weights(recipe, teacher.parent / "student", config, data, world, pytest.fail, None)
    rows = [data.read(0, number) for number in range(4)]
    latents, (text_BLE, mask_BL) = data.latents([row for row, _ in rows], 0), data.text([text for _, text in rows])
    sigma_B = recipe.objective.noise_schedule(2)[[0, 1, 1, 0]].float()
    noise = torch.stack([first_noise(latents.shape[1:], seed) for seed in range(4)])
    batch = TrainingBatch(latents, text_BLE, mask_BL, sigma_B, noise, torch.tensor([1.0, 1.0, 0.0, 1.0]), None)
    return recipe, open_teacher(recipe, weights, config, None, world), batch


def test_targets_are_the_teachers_guided_steps_one_by_one(opened):
    recipe, teacher, batch = opened
    target = teacher.with_target(batch).target_BCHW
    levels = recipe.objective.noise_schedule(6).tolist()
    for number in range(4):
        x = recipe.objective.add_noise(*(tensor[number : number + 1] for tensor in (batch.latents_BCHW, batch.sigma_B, batch.noise_BCHW)))
        text_BLE = batch.text_BLE[number : number + 1] * batch.caption_kept_B[number]
        caption, nothing = (teacher.model.embed_caption(t, batch.text_mask_BL[number : number + 1]) for t in (text_BLE, 0 * text_BLE))

        def slope(x, sigma, caption=caption, nothing=nothing):
            at = torch.tensor([sigma])
            strong, weak = (denoise(teacher.model, recipe.objective, x.float(), at, c).double() for c in (caption, nothing))
            return (x - (weak + 3.0 * (strong - weak))) / sigma

        first = 0 if batch.sigma_B[number] > 1 else 3
        start, y = x.double(), x.double()
        for sigma, after in zip(levels[first : first + 3], levels[first + 1 : first + 4], strict=True):
            here = slope(y, sigma)
            there = slope(y + (after - sigma) * here, after) if after else here
            y = y + (after - sigma) * (here + there) / 2
        expected = start - levels[first] * (y - start) / (levels[first + 3] - levels[first])
        assert torch.allclose(target[number], expected[0].float(), rtol=1e-3, atol=1e-3)


def test_the_flops_of_a_target_are_those_that_pytorch_counts(opened):
    recipe, teacher, batch = opened
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        teacher.with_target(batch)
    work = FlopCounter(recipe, teacher.model.config)
    counted = counter.get_total_flops() / len(batch)
    assert work._of_teacher(16, batch.text_BLE.shape[1]) == pytest.approx(counted, rel=0.03)  # which counts the empty caption
    plain, phase = FlopCounter(replace(recipe, distillation=None), teacher.model.config), recipe.phases[0]
    of_teacher = work.of_step(phase, 0, 16, 8) - plain.of_step(phase, 0, 16, 8)
    assert of_teacher == phase.batch_size * work._of_teacher(16, 8)
    assert work.remaining(0, 16, 8) - plain.remaining(0, 16, 8) == pytest.approx((25 * 8 + 15 * 6) * work._of_teacher(16, 8))


def test_a_student_learns_its_targets(opened):
    """Those of one batch by heart, and not the latents."""
    recipe, teacher, batch = opened
    world = start_world("cpu")
    state = TrainingState(recipe, teacher.model.config, world, lambda model: _copy(teacher.model, model), fresh=True, teacher=teacher)
    guard, found = SpikeGuard(recipe.guard, world.device), []
    for step in range(40):
        found.append(read_step(state.train_step([batch], step, 3e-3, 1.0, guard).values())[0].loss)
    assert found[-1] < 0.3 * found[0]


def test_killed_and_resumed_has_the_same_losses_bit_for_bit(teacher, tmp_path, encoded_emoji, student):
    copytree(teacher, tmp_path / "teacher")
    run = tmp_path / "student"
    running = train(run, encoded_emoji, *FEW, *SHORT)
    wait_for((run / "checkpoints" / "step-00000004" / "state.json").exists, running)
    running.kill()
    distilled(run, encoded_emoji, "--resume")
    assert losses(run) == losses(student)
    ours, theirs = tensors(run, 12), tensors(student, 12)
    assert all(ours[name].equal(theirs[name]) for name in theirs)


@pytest.mark.parametrize("sharding", ["ddp", "fsdp"])
def test_two_processes_distil_as_one_does(teacher, tmp_path, encoded_emoji, student, sharding):
    copytree(teacher, tmp_path / "teacher")
    run = distilled(tmp_path / "student", encoded_emoji, f"engine.sharding={sharding}", "engine.micro_batch=2", ranks=2)
    ours, theirs = losses(run), losses(student)
    assert ours[1] == pytest.approx(theirs[1], rel=1e-5)
    assert ours == pytest.approx(theirs, rel=1e-2)


def test_a_run_goes_on_only_with_the_teacher_it_began_with(teacher, tmp_path, encoded_emoji, student):
    copytree(student, tmp_path / "student")
    rmtree(tmp_path / "student" / "checkpoints" / "step-00000012")
    save_untrained(tmp_path / "teacher", encoded_emoji, 40)
    running = train(tmp_path / "student", encoded_emoji, *FEW, *SHORT, "--resume")
    assert running.wait() == [1], running.output
    assert "no longer holds the weights ema that" in running.output
    assert "was distilled from: bring them back, or start a new run." in running.output


def test_pictures_are_drawn_in_its_few_steps_by_default(student, tmp_path):
    """From the run, an export of it, Python and the command line, and by `evaluate`; other steps are warned of."""
    objective = recorded_objective(open_checkpoint(student / "checkpoints" / "step-00000012").state)
    few = SamplerSettings(2, 1.0, "euler")
    assert suited_to(objective) == few
    export_run(student, tmp_path / "exported", lambda sentence: None)
    pipeline = MicroDiTPipeline.from_pretrained(tmp_path / "exported")
    assert pipeline.objective == objective
    noise = first_noise(pipeline.latent_shape, 3)[None]
    text_BLE, mask_BL = pipeline.encode_prompt(["red heart"])
    expected = pipeline.decode(draw_latents(pipeline.model, objective, noise, text_BLE, mask_BL, few))[0]
    for model in (student, tmp_path / "exported"):
        assert sample(model, "red heart", seed=3)[0].tobytes() == expected.tobytes()
        assert DrawSettings.suited_to(str(model), None, None, 0).sampler == few
        assert DrawSettings.suited_to(str(model), 5, 2.0, 0).sampler == SamplerSettings(5, 2.0, "euler")
    assert pipeline("red heart", generator=[torch.Generator().manual_seed(3)]).images[0].tobytes() == expected.tobytes()
    running = start(tmp_path / "logs", ["sample", student, "red heart", "--seed", 3, "--out", tmp_path / "drawn"])
    assert running.wait() == [0], running.output
    assert "steps of euler" not in running.output
    running = start(tmp_path / "logs", ["sample", student, "red heart", "--steps", 5, "--out", tmp_path / "other.png"])
    assert running.wait() == [0], running.output
    assert "was distilled to 2 steps of euler, and knows no noise levels between them." in running.output


def test_a_model_that_is_not_distilled_is_drawn_as_before(teacher):
    assert DrawSettings.suited_to(str(teacher), None, None, 7, "model") == DrawSettings(seed=7, weights="model")
    assert DrawSettings.suited_to("nowhere", None, 3.0, 0) == DrawSettings(guidance_scale=3.0)
    assert "student_steps" not in json.dumps(open_checkpoint(teacher / "checkpoints" / "step-00000040").state["edm"])


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (["init_from=null"], "distillation needs a trained model to start from: name it in init_from"),
        (["distillation.teacher_steps=7"], "distillation.teacher_steps is 7, and must be a multiple of distillation.steps, 2: try 8"),
        (["distillation.teacher_steps=2"], "must be a multiple of distillation.steps, 2: try 4"),
        (["alignment={encoder: efficientnet, block: 1}"], "distillation has targets of its own: leave alignment out"),
    ],
)
def test_settings_that_do_not_fit_are_refused(changes, sentence):
    with pytest.raises(UserError, match=sentence):
        load_recipe(RECIPE, ["data.path=x", "init_from=teacher", "distillation={steps: 2, teacher_steps: 6}", *changes])


def test_a_teacher_of_another_objective_is_refused(teacher, encoded_emoji):
    running = train(teacher.parent / "flow", encoded_emoji, *FEW, "diffusion={objective: flow}")
    assert running.wait() == [1]
    assert "was trained with objective edm, and the recipe asks for objective flow" in running.output
