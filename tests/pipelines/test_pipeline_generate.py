from dataclasses import replace

import pytest
import torch
from PIL import Image
from torch._subclasses.fake_tensor import FakeTensorMode

from microdit.data.pixels import to_image
from microdit.diffusion.edm import EDM
from microdit.diffusion.guidance import Text, guided_denoiser
from microdit.diffusion.samplers import solve
from microdit.encoders.autoencoder import Pixels
from microdit.errors import UserError
from microdit.models.config import Size, resolve
from microdit.models.microdit import MicroDiT
from microdit.pipelines.pipeline import BATCH, MicroDiTPipeline
from microdit.pipelines.sampling import draw_latents
from microdit.pipelines.settings import SamplerSettings
from tests.conftest import busy_model

QUICK = SamplerSettings(num_inference_steps=3)


def small_pipeline(text_encoder, dim: int = 32, latent_size: tuple[int, int] = (8, 8), mask_padding: bool = True) -> MicroDiTPipeline:
    """Pictures of 8 x 8 pixels, by weights that learnt nothing."""
    size = Size(dim=dim, depth=2, head_dim=8, mixer_dim=16, mixer_depth=1, num_experts=0, round_ffn_to=8)
    model = busy_model(size, caption_channels=384, in_channels=3).float().requires_grad_(False)
    return MicroDiTPipeline.of_parts(model, EDM(), Pixels(), text_encoder, latent_size, mask_padding)


@pytest.fixture(scope="module")
def pipeline(text_encoder) -> MicroDiTPipeline:
    return small_pipeline(text_encoder)


def bytes_of(images: list[Image.Image]) -> list[bytes]:
    return [image.tobytes() for image in images]


def far_apart(images: list[Image.Image], others: list[Image.Image]) -> bool:
    """By more than rounding, which the size of a batch changes."""
    pairs = zip(images, others, strict=True)
    return any(abs(a - b) > 1 for one, other in pairs for a, b in zip(one.tobytes(), other.tobytes(), strict=True))


@pytest.mark.parametrize(
    "changes",
    [
        {"solver": "dpm"},
        {"solver": "euler"},
        {"guidance_scale": 4.0},
        {"guidance_interval": (0.2, 5.0)},
        {"guidance_rescale": 0.7},
        {"noise_range": (0.03, 30.0)},
        {"noise_range": (0.03, 30.0), "solver": "dpm"},
        {"churn": 2.0},
        {"churn": 2.0, "churn_noise": 1.1},
        {"churn": 2.0, "churn_interval": (0.05, 50.0)},
    ],
)
def test_every_setting_changes_the_picture_and_repeats_it(pipeline, changes):
    settings = replace(QUICK, num_inference_steps=5)
    plain = pipeline.generate(["red heart", "owl"], replace(settings, churn=2.0) if "churn" in changes and len(changes) > 1 else settings)
    drawn = pipeline.generate(["red heart", "owl"], replace(settings, **changes))
    assert far_apart(drawn, plain)
    assert bytes_of(pipeline.generate(["red heart", "owl"], replace(settings, **changes))) == bytes_of(drawn)


@pytest.mark.parametrize("settings", [QUICK, replace(QUICK, churn=2.0), replace(QUICK, solver="dpm")])
def test_a_picture_depends_on_its_own_seed_alone(pipeline, settings):
    together = pipeline.generate(["red heart", "owl", "pizza"], settings, seed=5)
    assert not far_apart(pipeline.generate(["pizza"], settings, seed=7), together[2:])


@pytest.mark.parametrize("mask_padding", [True, False])
def test_negative_prompts_are_for_all_or_one_each(text_encoder, mask_padding):
    pipeline = small_pipeline(text_encoder, mask_padding=mask_padding)
    prompts = ["red heart", "owl"]
    none = pipeline.generate(prompts, QUICK)
    one = pipeline.generate(prompts, QUICK, negative_prompts=["blue"])
    assert far_apart(one, none)
    assert not far_apart(pipeline.generate(prompts, QUICK, negative_prompts=["blue", "blue"]), one)
    assert bytes_of(pipeline.generate(prompts, QUICK, negative_prompts=["", " "])) == bytes_of(none)
    with pytest.raises(UserError, match="There are 3 negative prompts for 2 prompts"):
        pipeline.generate(prompts, QUICK, negative_prompts=["a", "b", "c"])


def test_each_of_many_prompts_meets_its_own_negative(pipeline):
    prompts = ["owl"] * (BATCH + 2)
    negatives = ["blue"] * BATCH + ["green", "blue"]
    drawn = pipeline.generate(prompts, replace(QUICK, num_inference_steps=2), negative_prompts=negatives)
    for index, negative in ((BATCH, "green"), (BATCH + 1, "blue")):
        alone = pipeline.generate(["owl"], replace(QUICK, num_inference_steps=2), seed=index, negative_prompts=[negative])
        assert not far_apart(alone, drawn[index : index + 1])


def test_an_empty_prompt_is_the_empty_caption(pipeline):
    """Which guidance cannot change, since it leads away from the same."""
    weak, strong = (pipeline.generate(["", " \n"], replace(QUICK, guidance_scale=scale)) for scale in (1.0, 6.0))
    assert not far_apart(weak, strong)
    assert far_apart(pipeline.generate(["heart"], QUICK), weak[:1])


@pytest.mark.parametrize(
    "prompt", ["", "   ", "x" * 10_000, "red heart " * 1_000, "❤️🍕", "красное сердце", "赤いハート", "a\x00b\x1b\n", "\udcff"]
)
def test_whatever_is_typed_gives_a_picture(pipeline, prompt):
    told = []
    (image,) = pipeline.generate([prompt], QUICK, warn=told.append)
    assert image.size == (8, 8)
    assert all(sentence.endswith(".") for sentence in told)


def test_autoguidance_needs_a_weak_model_of_the_same_data(pipeline, text_encoder):
    settings = replace(QUICK, guidance="autoguidance")
    with pytest.raises(UserError, match="name a run with --autoguide"):
        pipeline.generate(["owl"], settings)
    guided = pipeline.guided_by(small_pipeline(text_encoder, dim=16))
    assert far_apart(guided.generate(["owl"], settings), pipeline.generate(["owl"], QUICK))
    assert not far_apart(guided.generate(["owl"], QUICK), pipeline.generate(["owl"], QUICK))  # other guidance has no use for it
    itself = pipeline.guided_by(pipeline).generate(["owl"], settings)
    assert not far_apart(itself, pipeline.generate(["owl"], replace(QUICK, guidance_scale=1.0)))
    for changes in ({"latent_size": (16, 16)}, {"mask_padding": False}):
        with pytest.raises(UserError, match="trained with another objective, other encoders, sizes or caption padding"):
            pipeline.guided_by(small_pipeline(text_encoder, **changes))


def test_sprint_models_are_guided_by_leaving_out_their_sparse_blocks(pipeline, text_encoder):
    size = Size(dim=32, depth=5, head_dim=8, mixer_dim=32, mixer_depth=0, num_experts=0, routing="sprint")
    model = busy_model(size, caption_channels=384, in_channels=3).float()
    sprint = MicroDiTPipeline.of_parts(model, EDM(), Pixels(), text_encoder, (8, 8), mask_padding=True)
    path_drop = replace(QUICK, guidance="path-drop")
    assert far_apart(sprint.generate(["owl"], path_drop), sprint.generate(["owl"], QUICK))
    assert far_apart(sprint.generate(["owl"], path_drop, negative_prompts=["blue"]), sprint.generate(["owl"], path_drop))
    with pytest.raises(UserError, match="with routing deferred cannot run without them"):
        pipeline.generate(["owl"], path_drop)


def test_latents_are_seen_on_the_way(pipeline):
    steps, counts = [], []
    drawn = pipeline.generate(["owl", "cat"], QUICK, on_step=counts.append, on_denoised=steps.append)
    assert counts == [2, 2, 2]
    assert [step.index for step in steps] == [0, 1, 2]
    assert bytes_of(pipeline.decode(steps[-1].denoised_BCHW)) == bytes_of(drawn)
    assert pipeline.decode(torch.zeros(1, 3, 8, 8))[0].tobytes() == to_image(torch.zeros(3, 8, 8)).tobytes()


def test_drawing_can_be_ended_from_outside_and_done_again(pipeline):
    class EnoughError(Exception):
        pass

    def stop(step):
        raise EnoughError

    whole = pipeline.generate(["owl"], QUICK)
    with pytest.raises(EnoughError):
        pipeline.generate(["owl"], QUICK, on_denoised=stop)
    assert bytes_of(pipeline.generate(["owl"], QUICK)) == bytes_of(whole)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"num_inference_steps": 0}, "from 2 to 1000 steps, not 0"),
        ({"num_inference_steps": 10**6}, "from 2 to 1000 steps"),
        ({"guidance_scale": float("nan")}, "guidance_scale must be a number between -100 and 100, not nan"),
        ({"guidance_scale": float("inf")}, "guidance_scale must be a number"),
        ({"solver": "rk4"}, "There is no solver 'rk4'. Known: heun, dpm, euler."),
        ({"guidance": "none"}, "There is no guidance 'none'. Known: classifier-free, path-drop, autoguidance."),
        ({"guidance_interval": (5.0, 0.2)}, "the lower one first, such as 0.2 5, not 5.0 0.2"),
        ({"guidance_interval": (-1.0, 5.0)}, "guidance_interval must be two noise levels"),
        ({"guidance_interval": (float("nan"), 5.0)}, "guidance_interval must be two noise levels"),
        ({"guidance_rescale": 1.5}, "guidance_rescale must be a number between 0 and 1"),
        ({"churn": -1.0}, "churn must be a number between 0 and 1000"),
        ({"churn_interval": (2.0, 1.0)}, "churn_interval must be two noise levels"),
        ({"noise_range": (30.0, 0.03)}, "noise_range must be two noise levels, the lower one first"),
        ({"noise_range": (0.0, 30.0)}, "noise_range must lie above 0"),
        ({"noise_range": (0.1, float("inf"))}, "noise_range must lie above 0 and end somewhere"),
        ({"churn_noise": 3.0}, "churn_noise must be a number between 0 and 2"),
        ({"churn": 10.0, "solver": "dpm"}, "Only the solver heun can churn, not dpm"),
    ],
)
def test_settings_that_make_no_picture_are_refused_in_a_sentence(settings, sentence):
    with pytest.raises(UserError) as error:
        SamplerSettings(**settings)
    assert sentence in str(error.value)


SMALL = Size(dim=32, depth=4, head_dim=8, mixer_dim=16, mixer_depth=2, num_experts=4, round_ffn_to=8)
ALL_SOLVERS = [
    QUICK,
    replace(QUICK, churn=2.0),
    replace(QUICK, guidance_rescale=0.7),
    *(replace(QUICK, solver=s) for s in ("dpm", "euler")),
]


def text_and_noise(count: int = 2) -> tuple[Text, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    text = Text(torch.randn(count, 5, 12, generator=generator), torch.ones(count, 5, dtype=torch.bool))
    return text, torch.randn(count, 3, 8, 8, generator=generator)


@pytest.mark.parametrize("settings", ALL_SOLVERS)
def test_no_step_mixes_devices_or_waits_for_one(settings):
    """Tensors of the meta device have no values: whoever asks for one, or mixes them with the CPU's, raises."""
    model = busy_model(SMALL, in_channels=3).float().to("meta")
    text, noise_BCHW = text_and_noise()
    sigmas = []
    drawn_BCHW = draw_latents(
        model, EDM(), noise_BCHW, *text, settings, on_step=lambda step: sigmas.append(step.sigma), draw=lambda: noise_BCHW
    )
    assert (drawn_BCHW.device.type, drawn_BCHW.dtype, drawn_BCHW.shape) == ("meta", torch.float32, noise_BCHW.shape)
    assert sigmas == sorted(sigmas, reverse=True)
    assert len(sigmas) == settings.num_inference_steps


@pytest.mark.skipif(not torch.backends.cuda.is_built(), reason="torch is built without CUDA")
@pytest.mark.skipif(torch.__version__ < "2.11" and not torch.cuda.is_available(), reason="torch 2.9 looks for a driver even then")
@pytest.mark.parametrize("solver", ["heun", "dpm", "euler"])
def test_fake_cuda_tensors_stay_on_their_device(solver):
    """Fake tensors know the rules of CUDA's operations and have no values; noise levels are real numbers on the CPU."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with mode, torch.device("cuda"):
        model = MicroDiT(resolve(SMALL, caption_channels=12, in_channels=3)).eval().requires_grad_(False)
        text_BLE, mask_BL = torch.randn(2, 5, 12), torch.ones(2, 5, dtype=torch.bool)
        noise_BCHW = torch.randn(2, 3, 8, 8)
        guided = guided_denoiser(model, EDM(), text_BLE, mask_BL, 2.0, rescale=0.5)

    def denoiser(noisy_BCHW: torch.Tensor, sigma_B: torch.Tensor) -> torch.Tensor:
        with mode:
            return guided(noisy_BCHW, sigma_B)

    drawn_BCHW = solve(solver, denoiser, noise_BCHW, EDM(), 4)
    assert (drawn_BCHW.device, drawn_BCHW.dtype, drawn_BCHW.shape) == (torch.device("cuda", 0), torch.float32, (2, 3, 8, 8))


def test_half_precision_rounds_matrices_and_nothing_else():
    exact, text_and = busy_model(SMALL, in_channels=3).float().requires_grad_(False), text_and_noise()
    text, noise_BCHW = text_and
    small_steps = replace(QUICK, num_inference_steps=8, guidance_scale=1.5)
    wanted_BCHW = draw_latents(exact, EDM(), noise_BCHW, *text, small_steps)
    with torch.autocast("cpu", torch.bfloat16):  # over float32 weights
        autocast_BCHW = draw_latents(exact, EDM(), noise_BCHW, *text, small_steps)
    pipeline = MicroDiTPipeline.of_parts(exact, EDM(), Pixels(), None, (8, 8), mask_padding=True).to("cpu", torch.bfloat16)
    assert {weight.dtype for weight in pipeline.model.parameters() if weight.dim() < 2} == {torch.float32}
    assert pipeline.model.patch_embed.weight.dtype == torch.float32
    assert pipeline.model.head.linear.weight.dtype == torch.bfloat16
    drawn_BCHW = draw_latents(pipeline.model, pipeline.objective, noise_BCHW, *text, small_steps)
    assert drawn_BCHW.dtype == torch.float32
    assert torch.equal(drawn_BCHW, autocast_BCHW)
    error = (drawn_BCHW - wanted_BCHW).norm() / wanted_BCHW.norm()
    assert 0 < error < 0.05


def test_a_seed_begins_with_the_same_noise_in_all_numbers_and_batches(pipeline, text_encoder):
    """Behind the first noise level, 80, all is noise: what is drawn there differs by the denoiser's rounding alone."""

    def first_steps(pipeline: MicroDiTPipeline, **settings: int) -> torch.Tensor:
        steps = []
        pipeline.generate(["owl", "cat", "pizza"], replace(QUICK, solver="euler"), seed=5, on_denoised=steps.append, **settings)
        return torch.cat([step.denoised_BCHW for step in steps if step.index == 0])

    wanted = first_steps(pipeline)
    rounded = small_pipeline(text_encoder).to("cpu", torch.bfloat16)
    assert torch.allclose(first_steps(rounded), wanted, atol=0.05 * wanted.abs().max().item())
    assert torch.allclose(first_steps(pipeline, batch_size=1), wanted, atol=1e-4)
    assert not torch.allclose(first_steps(pipeline).roll(1, 0), wanted, atol=0.05 * wanted.abs().max().item())


def test_batches_of_any_size_make_the_same_pictures(pipeline):
    prompts, negatives = ["owl", "cat", "pizza"], ["blue", "green", ""]
    together = pipeline.generate(prompts, QUICK, negative_prompts=negatives)
    for size in (1, 2):
        assert not far_apart(pipeline.generate(prompts, QUICK, negative_prompts=negatives, batch_size=size), together)


def test_latents_are_decoded_some_at_a_time_and_pictures_are_the_same(pipeline, monkeypatch):
    latents_BCHW = torch.randn(5, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    whole = bytes_of(pipeline.decode(latents_BCHW))
    monkeypatch.setattr("microdit.pipelines.pipeline.DECODED_PIXELS", 2 * 8 * 8)
    sizes = []

    decode = Pixels.decode

    def counted(self, latents_BCHW: torch.Tensor) -> torch.Tensor:
        sizes.append(len(latents_BCHW))
        return decode(self, latents_BCHW)

    monkeypatch.setattr(Pixels, "decode", counted)
    assert bytes_of(pipeline.decode(latents_BCHW)) == whole
    assert sizes == [2, 2, 1]
