import pytest
import torch

from microdit.diffusion.edm import EDM
from microdit.diffusion.guidance import Guide, Text, guided_denoiser
from microdit.diffusion.objective import denoise
from microdit.errors import UserError
from microdit.models.config import Size
from tests.conftest import busy_model

EDM_SETTINGS = EDM()
SPRINT = Size(dim=32, depth=5, head_dim=8, mixer_dim=32, mixer_depth=0, num_experts=0, routing="sprint")


def noisy_and_text(seed: int = 0):
    """Noisy latents, two noise levels, and two captions of which the second is shorter."""
    generator = torch.Generator().manual_seed(seed)
    noisy, text = (torch.randn(2, *shape, generator=generator, dtype=torch.float64) for shape in ((4, 8, 8), (3, 12)))
    sigma = torch.tensor([0.5, 4.0], dtype=torch.float64)
    return noisy, sigma, Text(text, torch.tensor([[True, True, True], [True, False, False]]))


@pytest.mark.parametrize("guidance_scale", [0.0, 1.0, 3.0])
def test_guidance_moves_away_from_the_empty_caption(tiny_model, guidance_scale):
    noisy, sigma = torch.randn(2, 4, 8, 8, dtype=torch.float64), torch.tensor([0.5, 4.0], dtype=torch.float64)
    text = torch.randn(2, 3, 12, dtype=torch.float64)
    mask = torch.tensor([[True, True, True], [True, False, False]])
    conditional = denoise(tiny_model, EDM_SETTINGS, noisy, sigma, tiny_model.embed_caption(text, mask))
    empty = denoise(tiny_model, EDM_SETTINGS, noisy, sigma, tiny_model.embed_caption(torch.zeros_like(text)))
    guided = guided_denoiser(tiny_model, EDM_SETTINGS, text, mask, guidance_scale)(noisy, sigma)
    assert torch.allclose(guided, empty + guidance_scale * (conditional - empty), atol=1e-9)


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_path_drop_guidance_extrapolates_from_the_shallow_model(guidance_scale):
    model = busy_model(Size(dim=32, depth=5, head_dim=8, mixer_dim=32, mixer_depth=0, num_experts=0, routing="sprint"))
    noisy, sigma = torch.randn(2, 4, 8, 8, dtype=torch.float64), torch.tensor([0.5, 4.0], dtype=torch.float64)
    text, mask = torch.randn(2, 3, 12, dtype=torch.float64), torch.tensor([[True, True, True], [True, False, False]])
    conditional = denoise(model, EDM_SETTINGS, noisy, sigma, model.embed_caption(text, mask))
    weak = denoise(model, EDM_SETTINGS, noisy, sigma, model.embed_caption(torch.zeros_like(text)), drop_path=True)
    guided = guided_denoiser(model, EDM_SETTINGS, text, mask, guidance_scale, "path-drop")
    assert torch.allclose(guided(noisy, sigma), weak + guidance_scale * (conditional - weak), atol=1e-9)
    assert torch.allclose(guided(noisy, sigma), guided_denoiser(model, EDM_SETTINGS, text, mask, guidance_scale)(noisy, sigma)) == (
        guidance_scale == 1
    )


def test_path_drop_guidance_needs_a_model_that_was_trained_for_it(tiny_model):
    with pytest.raises(UserError, match=r"with routing deferred cannot run without them: use a model trained with model\.routing sprint"):
        guided_denoiser(tiny_model, EDM_SETTINGS, torch.zeros(1, 3, 12, dtype=torch.float64), None, 3.0, "path-drop")


@pytest.mark.parametrize("negatives", [1, 2])
def test_a_negative_prompt_stands_in_the_place_of_the_empty_caption(tiny_model, negatives):
    noisy, sigma, text = noisy_and_text()
    unwanted = Text(*(x[:negatives] for x in noisy_and_text(1)[2]))
    away = tiny_model.embed_caption(*(x.expand(2, *x.shape[1:]) for x in unwanted))
    weak = denoise(tiny_model, EDM_SETTINGS, noisy, sigma, away)
    strong = denoise(tiny_model, EDM_SETTINGS, noisy, sigma, tiny_model.embed_caption(*text))
    guided = guided_denoiser(tiny_model, EDM_SETTINGS, *text, 3.0, negative=unwanted)(noisy, sigma)
    assert torch.allclose(guided, weak + 3 * (strong - weak), atol=1e-9)


def test_autoguidance_moves_away_from_a_weaker_model_with_the_same_caption(tiny_model):
    noisy, sigma, text = noisy_and_text()
    guide = Guide(busy_model(Size(dim=16, depth=2, head_dim=8, mixer_dim=16, mixer_depth=1, num_experts=0)), EDM(sigma_data=0.5))
    strong, weak = (denoise(model, edm, noisy, sigma, model.embed_caption(*text)) for model, edm in ((tiny_model, EDM_SETTINGS), guide))
    guided = guided_denoiser(tiny_model, EDM_SETTINGS, *text, 2.0, "autoguidance", guide=guide)
    assert torch.allclose(guided(noisy, sigma), weak + 2 * (strong - weak), atol=1e-9)
    with pytest.raises(UserError, match="needs a weak model"):
        guided_denoiser(tiny_model, EDM_SETTINGS, *text, 2.0, "autoguidance")
    with pytest.raises(UserError, match="takes no negative prompt"):
        guided_denoiser(tiny_model, EDM_SETTINGS, *text, 2.0, "autoguidance", guide=guide, negative=text)


def test_outside_the_interval_there_is_no_guidance_and_no_second_half(tiny_model):
    noisy, sigma, text = noisy_and_text()
    sizes = []
    tiny_model.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))
    plain = guided_denoiser(tiny_model, EDM_SETTINGS, *text)(noisy, sigma)
    everywhere = guided_denoiser(tiny_model, EDM_SETTINGS, *text, 3.0)(noisy, sigma)
    bounded = guided_denoiser(tiny_model, EDM_SETTINGS, *text, 3.0, interval=(0.5, 4.0))
    mixed = bounded(noisy, sigma)  # 0.5 is not above the lower end, 4 is the upper end
    assert torch.allclose(mixed[0], plain[0], atol=1e-9)
    assert torch.allclose(mixed[1], everywhere[1], atol=1e-9)
    sizes.clear()
    assert torch.allclose(bounded(noisy, sigma * 0.1), guided_denoiser(tiny_model, EDM_SETTINGS, *text)(noisy, sigma * 0.1), atol=1e-9)
    assert sizes == [2, 2]
    bounded(noisy, torch.ones_like(sigma))
    assert sizes == [2, 2, 4]


def test_rescaling_brings_back_the_deviation_of_each_picture(tiny_model):
    noisy, sigma, text = noisy_and_text()
    plain = guided_denoiser(tiny_model, EDM_SETTINGS, *text)(noisy, sigma)
    guided = guided_denoiser(tiny_model, EDM_SETTINGS, *text, 6.0)(noisy, sigma)
    whole = guided_denoiser(tiny_model, EDM_SETTINGS, *text, 6.0, rescale=1.0)(noisy, sigma)
    assert torch.allclose(whole.std(dim=(1, 2, 3)), plain.std(dim=(1, 2, 3)))
    assert not torch.allclose(guided.std(dim=(1, 2, 3)), plain.std(dim=(1, 2, 3)))
    part = guided_denoiser(tiny_model, EDM_SETTINGS, *text, 6.0, rescale=0.7)(noisy, sigma)
    assert torch.allclose(part, 0.7 * whole + 0.3 * guided)


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_captions_are_worked_on_once_and_not_at_every_step(tiny_model, guidance_scale):
    _, _, text = noisy_and_text()
    calls = {"kv": 0, "embed": 0}

    def count(name: str):
        def hook(*_):
            calls[name] += 1

        return hook

    for block in tiny_model.all_blocks:
        block.cross_attn.kv.register_forward_hook(count("kv"))
    tiny_model.caption.register_forward_hook(count("embed"))
    denoiser = guided_denoiser(tiny_model, EDM_SETTINGS, *text, guidance_scale)
    before = dict(calls)
    for _ in range(3):
        denoiser(*noisy_and_text()[:2])
    assert calls == before
