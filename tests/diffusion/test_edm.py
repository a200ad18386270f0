import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from microdit.diffusion.edm import EDM
from microdit.diffusion.objective import denoise, denoise_patches, denoising_loss, draw_sigma
from microdit.models.config import Size
from microdit.models.patches import patchify, unpatchify
from microdit.models.routing import METHODS, put_tokens, take_tokens
from tests.conftest import busy_model, routed

EDM_SETTINGS = EDM()


@given(sigma=st.floats(0.002, 80), sigma_data=st.floats(0.1, 2))
def test_preconditioning_is_table_1_of_the_edm_paper(sigma, sigma_data):
    c_skip, c_out, c_in, c_noise = (c.item() for c in EDM(sigma_data=sigma_data).preconditioning(torch.tensor(sigma, dtype=torch.float64)))
    assert c_skip == pytest.approx(sigma_data**2 / (sigma**2 + sigma_data**2))
    assert c_out == pytest.approx(sigma * sigma_data / math.sqrt(sigma**2 + sigma_data**2))
    assert c_in == pytest.approx(1 / math.sqrt(sigma**2 + sigma_data**2))
    assert c_noise == pytest.approx(math.log(sigma) / 4)


@pytest.mark.parametrize("sigma", [0.01, 0.9, 20.0])
def test_preconditioning_gives_the_network_unit_variance_in_and_out(sigma):
    """Where the scalings come from (2206.00364, appendix B.6)."""
    clean = torch.randn(400_000, dtype=torch.float64) * EDM_SETTINGS.sigma_data
    noisy = clean + torch.randn_like(clean) * sigma
    c_skip, c_out, c_in, _ = EDM_SETTINGS.preconditioning(torch.tensor(sigma, dtype=torch.float64))
    assert (c_in * noisy).var().item() == pytest.approx(1, rel=0.02)
    assert ((clean - c_skip * noisy) / c_out).var().item() == pytest.approx(1, rel=0.02)


def test_noise_levels_are_log_normal_and_seeded():
    edm = EDM(P_mean=-0.6, P_std=1.2)
    sigma = draw_sigma(edm, 100_000, torch.Generator().manual_seed(0))
    assert sigma.log().mean().item() == pytest.approx(-0.6, abs=0.02)
    assert sigma.log().std().item() == pytest.approx(1.2, abs=0.02)
    assert torch.equal(sigma, draw_sigma(edm, 100_000, torch.Generator().manual_seed(0)))


@pytest.mark.parametrize("masked", [False, True])
def test_loss_equals_the_definition_on_whole_pictures(tiny_model, masked):
    generator = torch.Generator().manual_seed(0)
    latents, noise = torch.randn(2, 2, 4, 8, 8, generator=generator, dtype=torch.float64)
    sigma = torch.tensor([0.4, 3.0], dtype=torch.float64)
    caption = tiny_model.embed_caption(torch.randn(2, 3, 12, generator=generator, dtype=torch.float64))
    keep_ids = torch.tensor([[0, 5, 10, 15], [1, 2, 7, 8]]) if masked else None
    loss = denoising_loss(tiny_model, EDM_SETTINGS, latents, caption, sigma, noise, keep_ids)
    for sample in range(2):
        s, sd = sigma[sample].item(), EDM_SETTINGS.sigma_data
        noisy = latents + sigma.view(2, 1, 1, 1) * noise
        patches = denoise_patches(tiny_model, EDM_SETTINGS, noisy, sigma, caption, keep_ids)
        keep = torch.ones(2, 16) if keep_ids is None else torch.zeros(2, 16).scatter(1, keep_ids, 1.0)
        if keep_ids is not None:
            patches = put_tokens(patches, keep_ids, torch.zeros(2, 16, 16, dtype=torch.float64))
        picture = unpatchify(patches, 2, 8, 8)
        pixel_keep = keep[sample].view(4, 4).repeat_interleave(2, 0).repeat_interleave(2, 1)
        error = ((picture[sample] - latents[sample]) ** 2 * pixel_keep).sum() / (pixel_keep.sum() * 4)
        expected = (s**2 + sd**2) / (s * sd) ** 2 * error
        assert loss[sample].item() == pytest.approx(expected.item(), rel=1e-6)


LEVELS = [0.002, 0.005, 0.02, 0.1, 0.9, 5.0, 30.0, 80.0]


@pytest.mark.parametrize("sigma_data", [0.5, 0.9])
def test_the_loss_is_the_networks_error_at_every_noise_level(tiny_model, sigma_data):
    """2206.00364, eq. 8: the weight is one over c_out squared, so F's error counts alike from the least noise to the most."""
    edm, generator = EDM(sigma_data=sigma_data), torch.Generator().manual_seed(0)
    sigma = torch.tensor(LEVELS, dtype=torch.float64)
    latents, noise = torch.randn(2, len(LEVELS), 4, 8, 8, generator=generator, dtype=torch.float64)
    caption = tiny_model.embed_caption(torch.randn(len(LEVELS), 3, 12, generator=generator, dtype=torch.float64))
    loss = denoising_loss(tiny_model, edm, latents, caption, sigma, noise)
    s = sigma.view(-1, 1, 1, 1)
    root = (s**2 + sigma_data**2).sqrt()
    noisy = latents + s * noise
    target = (latents - sigma_data**2 / root**2 * noisy) * root / (s * sigma_data)
    out = tiny_model(noisy / root, sigma.log() / 4, caption)
    assert torch.allclose(loss, (out - patchify(target, 2)).square().mean(dim=(1, 2)), rtol=1e-4)


def test_the_loss_of_a_zero_network_matches_the_formula():
    """D = c_skip x, so that the loss needs no network: near 1 / sigma_data^2 times the noise's square where there is little."""
    model, sigma_data = busy_model(Size(dim=16, depth=1, head_dim=8, mixer_dim=16, mixer_depth=0, num_experts=0)), EDM_SETTINGS.sigma_data
    torch.nn.init.zeros_(model.head.linear.weight), torch.nn.init.zeros_(model.head.linear.bias)
    latents, noise = torch.randn(2, 1, 4, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    caption = model.embed_caption(torch.zeros(1, 3, 12, dtype=torch.float64))
    for level in LEVELS:
        found = denoising_loss(model, EDM_SETTINGS, latents, caption, torch.tensor([level], dtype=torch.float64), noise).item()
        error = (sigma_data**2 * level * noise - level**2 * latents) / (level**2 + sigma_data**2)
        weight = 1 / level**2 + 1 / sigma_data**2
        assert found == pytest.approx(weight * error.square().mean().item(), rel=1e-9), level


@pytest.mark.parametrize("routing", [routing for routing, method in METHODS.items() if method.drop])
def test_each_rows_loss_equals_its_definition_patch_by_patch(routing):
    size = Size(dim=32, depth=7, head_dim=8, mixer_dim=16, mixer_depth=1, num_experts=0)
    model, generator = busy_model(routed(size, routing)), torch.Generator().manual_seed(0)
    latents, noise = torch.randn(2, 2, 4, 8, 8, generator=generator, dtype=torch.float64)
    sigma, sigma_data = torch.tensor([0.4, 3.0], dtype=torch.float64), EDM_SETTINGS.sigma_data
    caption = model.embed_caption(torch.randn(2, 3, 12, generator=generator, dtype=torch.float64))
    keep_ids = torch.tensor([[0, 5, 10, 15], [1, 2, 7, 8]])
    loss = denoising_loss(model, EDM_SETTINGS, latents, caption, sigma, noise, keep_ids)

    c_skip, c_out, c_in, c_noise = EDM_SETTINGS.preconditioning(sigma)
    noisy = latents + sigma.view(2, 1, 1, 1) * noise
    out = model(c_in.view(2, 1, 1, 1) * noisy, c_noise, caption, keep_ids)
    clean, noisy = patchify(latents, 2), patchify(noisy, 2)
    for sample in range(2):
        kept = keep_ids[sample].tolist()
        row_of = {token: row for row, token in enumerate(kept if out.shape[1] == 4 else range(16))}
        errors, reconstructions = [], []
        for token in range(16):
            if token in row_of:
                denoised = c_skip[sample] * noisy[sample, token] + c_out[sample] * out[sample, row_of[token]]
                if token in kept or routing in ("tread", "sprint"):
                    weight = (sigma[sample] ** 2 + sigma_data**2) / (sigma[sample] * sigma_data) ** 2
                    errors.append(weight.item() * (denoised - clean[sample, token]).square().mean().item())
                else:
                    target = (noisy[sample, token] - noisy[sample, token].mean()) / (noisy[sample, token].var() + 1e-6).sqrt()
                    reconstructions.append((denoised - target).square().mean().item())
        expected = sum(errors) / len(errors)
        if routing == "maskdit":
            assert (len(errors), len(reconstructions)) == (4, 12)
            expected += 0.1 * sum(reconstructions) / 12
        assert loss[sample].item() == pytest.approx(expected, rel=1e-6)


def test_maskdits_decoder_learns_from_the_reconstruction():
    """The gradient of the reconstruction alone: that of the loss less that of its denoising part."""
    model = busy_model(Size(dim=32, depth=2, head_dim=8, mixer_dim=16, mixer_depth=0, num_experts=0, routing="maskdit", decoder_depth=2))
    latents, noise = torch.randn(2, 1, 4, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    sigma, keep_ids = torch.tensor([0.7], dtype=torch.float64), torch.tensor([[0, 5, 10, 15]])
    caption = model.embed_caption(torch.randn(1, 3, 12, generator=torch.Generator().manual_seed(1), dtype=torch.float64))
    weights = [*model.decoder.parameters(), model.restore.mask_token]
    loss = denoising_loss(model, EDM_SETTINGS, latents, caption, sigma, noise, keep_ids)
    denoised = denoise_patches(model, EDM_SETTINGS, latents + sigma.view(1, 1, 1, 1) * noise, sigma, caption, keep_ids)
    error = (take_tokens(denoised, keep_ids) - take_tokens(patchify(latents, 2), keep_ids)).square().mean()
    denoising = (sigma**2 + EDM_SETTINGS.sigma_data**2) / (sigma * EDM_SETTINGS.sigma_data) ** 2 * error
    for gradient in torch.autograd.grad((loss - denoising).sum(), weights):
        assert gradient.abs().max() > 1e-6


def test_denoising_whole_latents_is_denoising_their_patches(tiny_model):
    noisy, sigma = torch.randn(1, 4, 8, 8, dtype=torch.float64), torch.tensor([0.7], dtype=torch.float64)
    caption = tiny_model.embed_caption(torch.randn(1, 3, 12, dtype=torch.float64))
    whole = denoise(tiny_model, EDM_SETTINGS, noisy, sigma, caption)
    assert torch.equal(patchify(whole, 2), denoise_patches(tiny_model, EDM_SETTINGS, noisy, sigma, caption))
