import json

import pytest
import torch
from diffusers import AutoencoderOobleck, AutoencoderTiny, Flux2Pipeline
from safetensors.torch import load_file, save_file

from microdit.encoders.autoencoder import BUNDLED_ICON, DiffusersAutoencoder, load_autoencoder
from microdit.errors import UserError
from tests.encoders.tiny_models import save_dc, save_flux2, save_kl, save_qwen_image, save_tiny

WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture
def images():
    return torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1


def check_latents(autoencoder, images, z, scale, shift, decode):
    """Compare with the raw model: latents by the formula, and back."""
    latents = autoencoder.encode(images)
    assert torch.allclose(latents, (z - shift) * scale, atol=1e-5)
    assert torch.equal(latents, autoencoder.encode(images))
    assert latents.shape[1:] == (autoencoder.channels, 32 // autoencoder.downsampling, 32 // autoencoder.downsampling)
    assert torch.allclose(autoencoder.decode(latents), decode(z).sample, atol=1e-4)


@pytest.mark.parametrize(("channels", "shift"), [(4, None), (16, 0.3)])
@torch.no_grad()
def test_a_kl_autoencoder_gives_its_mean_shifted_and_scaled(tmp_path, images, channels, shift):
    raw = save_kl(tmp_path, channels, shift)
    autoencoder = load_autoencoder(str(tmp_path))
    assert (autoencoder.channels, autoencoder.downsampling) == (channels, 4)
    check_latents(autoencoder, images, raw.encode(images).latent_dist.mean, 0.4, shift or 0.0, raw.decode)


@torch.no_grad()
def test_a_tiny_and_a_dc_autoencoder(tmp_path, images):
    raw = save_tiny(tmp_path / "tiny")
    check_latents(load_autoencoder(str(tmp_path / "tiny")), images, raw.encode(images).latents, 0.7, 0.0, raw.decode)
    raw = save_dc(tmp_path / "dc")
    autoencoder = load_autoencoder(str(tmp_path / "dc"))
    assert (autoencoder.channels, autoencoder.downsampling) == (8, 4)
    check_latents(autoencoder, images, raw.encode(images).latent, 0.41, 0.0, raw.decode)


@torch.no_grad()
def test_flux2_latents_are_patches_normalised_as_its_pipeline_does(tmp_path, images):
    raw = save_flux2(tmp_path)
    autoencoder = load_autoencoder(str(tmp_path))
    assert (autoencoder.channels, autoencoder.downsampling) == (16, 8)
    z = raw.encode(images).latent_dist.mode()
    mean, std = raw.bn.running_mean.view(1, -1, 1, 1), torch.sqrt(raw.bn.running_var.view(1, -1, 1, 1) + raw.config.batch_norm_eps)
    expected = (Flux2Pipeline._patchify_latents(z) - mean) / std
    assert torch.allclose(autoencoder.encode(images), expected, atol=1e-5)
    assert expected.shape == (2, 16, 4, 4)
    unpatched = Flux2Pipeline._unpatchify_latents(expected * std + mean)
    assert torch.allclose(autoencoder.decode(expected), raw.decode(unpatched).sample, atol=1e-4)
    rough = load_autoencoder(str(tmp_path)).to("cpu", torch.bfloat16)
    assert torch.allclose(rough.decode(expected), autoencoder.decode(expected), atol=0.1)


@torch.no_grad()
def test_an_autoencoder_of_videos_takes_an_image_as_one_frame(tmp_path, images):
    raw = save_qwen_image(tmp_path)
    autoencoder = load_autoencoder(str(tmp_path))
    z = raw.encode(images.unsqueeze(2)).latent_dist.mode()[:, :, 0]
    mean, std = (torch.tensor(raw.config[name]).view(1, -1, 1, 1) for name in ("latents_mean", "latents_std"))
    assert torch.allclose(autoencoder.encode(images), (z - mean) / std, atol=1e-5)
    assert autoencoder.encode(images).shape == (2, autoencoder.channels, 8, 8)
    decoded = autoencoder.decode((z - mean) / std)
    assert torch.allclose(decoded, raw.decode(z.unsqueeze(2)).sample[:, :, 0], atol=1e-4)
    assert decoded.shape == images.shape


def test_one_that_encodes_no_images_is_refused(tmp_path):
    AutoencoderOobleck(encoder_hidden_size=8, downsampling_ratios=[2, 2], decoder_channels=8, decoder_input_channels=4).save_pretrained(
        tmp_path
    )
    with pytest.raises(UserError, match=r"AutoencoderOobleck in .* does not encode images|cannot be loaded"):
        load_autoencoder(str(tmp_path))


@torch.no_grad()
def test_the_bundled_one_gives_the_very_numbers_it_always_gave(images):
    raw = AutoencoderTiny.from_pretrained(BUNDLED_ICON, torch_dtype=torch.float32, low_cpu_mem_usage=False).eval()
    raw.to(memory_format=torch.channels_last)
    icon = load_autoencoder("icon")
    latents = raw.encode(images).latents.contiguous() * raw.config.scaling_factor
    assert torch.equal(icon.encode(images), latents)
    assert torch.equal(icon.decode(latents), raw.decode(latents / raw.config.scaling_factor).sample)
    assert (icon.channels, icon.downsampling) == (8, 8)


def test_a_pipelines_folder_is_enough_and_the_name_finds_it_from_anywhere(tmp_path, images, monkeypatch):
    save_kl(tmp_path / "pipeline" / "vae")
    monkeypatch.chdir(tmp_path)
    autoencoder = load_autoencoder("pipeline")
    monkeypatch.chdir("/")
    again = load_autoencoder(autoencoder.name)
    assert again.fingerprint == autoencoder.fingerprint == load_autoencoder(str(tmp_path / "pipeline" / "vae")).fingerprint
    assert torch.equal(again.encode(images), autoencoder.encode(images))


def test_weights_in_many_files_count_as_one(tmp_path, images):
    raw = save_kl(tmp_path / "one")
    raw.save_pretrained(tmp_path / "many", max_shard_size="40KB")
    one, many = load_autoencoder(str(tmp_path / "one")), load_autoencoder(str(tmp_path / "many"))
    assert torch.equal(one.encode(images), many.encode(images))
    part = sorted((tmp_path / "many").glob("*-of-*.safetensors"))[1]
    save_file({name: tensor + 1 for name, tensor in load_file(part).items()}, part)
    assert load_autoencoder(str(tmp_path / "many")).fingerprint != many.fingerprint
    part.unlink()
    with pytest.raises(UserError, match=f"lacks {part.name}"):
        load_autoencoder(str(tmp_path / "many"))


def test_it_moves_and_still_gives_float32(tmp_path, images):
    save_kl(tmp_path)
    autoencoder = load_autoencoder(str(tmp_path))
    exact = autoencoder.encode(images)
    rough = autoencoder.to("cpu", torch.bfloat16).encode(images)
    assert rough.dtype == autoencoder.decode(rough).dtype == torch.float32
    assert 0 < (rough - exact).abs().max() < 0.1
    assert load_autoencoder("pixels").to("cpu").channels == 3


def test_what_overflows_in_float16_stays_out_of_it(tmp_path):
    save_kl(tmp_path / "kl")
    assert load_autoencoder(str(tmp_path / "kl")).to("cpu", torch.float16).dtype == torch.float32  # diffusers' own default: force_upcast
    assert load_autoencoder(str(tmp_path / "kl")).to("cpu", torch.bfloat16).dtype == torch.bfloat16
    config = json.loads((tmp_path / "kl" / "config.json").read_text())
    (tmp_path / "kl" / "config.json").write_text(json.dumps({**config, "force_upcast": False}))
    assert load_autoencoder(str(tmp_path / "kl")).to("cpu", torch.float16).dtype == torch.float16


@torch.no_grad()
def test_one_that_overflows_in_float16_is_kept_out_of_it(tmp_path):
    save_kl(tmp_path)
    autoencoder = load_autoencoder(str(tmp_path))
    autoencoder.model.decoder.conv_in.weight.mul_(1e5)  # sums of more than 65,504, which the next norm takes back
    latents = torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    exact = autoencoder.decode(latents)
    assert torch.equal(autoencoder.to("cpu", torch.float16).decode(latents), exact)
    assert autoencoder.model.dtype == torch.float32

    autoencoder.model.half()  # as diffusers would load it
    assert DiffusersAutoencoder("half", autoencoder.model, "").decode(latents).isfinite().all()
    autoencoder.model.register_to_config(force_upcast=False)  # which is not true of this one
    assert not autoencoder.to("cpu", torch.float16).decode(latents).isfinite().all()
    assert autoencoder.model.dtype == torch.float16


def test_other_classes_are_refused_with_the_ones_that_can_be_used(tmp_path):
    save_tiny(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "_class_name": "VQModel"}))
    with pytest.raises(UserError, match="VQModel; only autoencoders of diffusers can be used, such as AutoencoderKL"):
        load_autoencoder(str(tmp_path))


def test_a_pickle_is_not_read(tmp_path):
    raw = save_kl(tmp_path)
    (tmp_path / WEIGHTS).unlink()
    torch.save(raw.state_dict(), tmp_path / "diffusion_pytorch_model.bin")
    with pytest.raises(UserError, match=r"only as .*\.bin, a pickle .* convert it"):
        load_autoencoder(str(tmp_path))


def test_what_is_damaged_is_refused_by_name(tmp_path):
    save_kl(tmp_path)
    weights = load_file(tmp_path / WEIGHTS)
    save_file({name: tensor for name, tensor in weights.items() if name != "quant_conv.bias"}, tmp_path / WEIGHTS)
    with pytest.raises(UserError, match=r"lacks the weights quant_conv\.bias"):
        load_autoencoder(str(tmp_path))
    save_file({**weights, "quant_conv.bias": torch.zeros(3)}, tmp_path / WEIGHTS)
    with pytest.raises(UserError, match=r"cannot be loaded: .*quant_conv\.bias"):
        load_autoencoder(str(tmp_path))
    (tmp_path / WEIGHTS).write_bytes(b"half a file")
    with pytest.raises(UserError, match="cannot be loaded"):
        load_autoencoder(str(tmp_path))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config\.json cannot be read: Expecting"):
        load_autoencoder(str(tmp_path))
    (tmp_path / "config.json").unlink()
    with pytest.raises(UserError, match=r"no config\.json"):
        load_autoencoder(str(tmp_path))


def test_what_is_neither_a_folder_nor_on_the_hub_is_refused():
    with pytest.raises(UserError, match="Known names: pixels, icon, sdxl, 16ch"):
        load_autoencoder("imaginary")
    with pytest.raises(UserError, match="download the model's folder on another computer"):
        load_autoencoder("microdit-tests/there-is-no-such-model:vae")
