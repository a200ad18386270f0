import pytest
import torch

from microdit.diffusion.edm import EDM
from microdit.encoders.autoencoder import load_autoencoder
from microdit.encoders.text import load_text_encoder
from microdit.models.config import Size
from microdit.pipelines.pipeline import MicroDiTPipeline
from microdit.pipelines.settings import SamplerSettings
from tests.conftest import busy_model
from tests.encoders.tiny_models import (
    save_bert,
    save_clip,
    save_dc,
    save_flux2,
    save_kl,
    save_language_model,
    save_open_clip,
    save_qwen_image,
    save_t5,
    save_tiny,
)

SIZE = Size(dim=32, depth=2, head_dim=8, mixer_dim=16, mixer_depth=1, num_experts=2, round_ffn_to=8)
PROMPTS = ["red", "red cat", "a red cat and then a dog"]


@pytest.mark.parametrize("full", [True, False])
@pytest.mark.parametrize("save_text", [save_clip, save_t5, save_bert, save_open_clip])
def test_every_text_encoder_reads_captions_as_before(tmp_path, save_text, full):
    check(tmp_path, save_text, save_kl, full)


@pytest.mark.parametrize("save_vae", [save_tiny, save_dc, save_flux2, save_qwen_image])
def test_every_autoencoder_decodes_as_before(tmp_path, save_vae):
    check(tmp_path, save_clip, save_vae, full=False)


def test_a_language_model_is_named_with_its_options_and_not_copied(tmp_path):
    (tmp_path / "text").mkdir()
    save_language_model(tmp_path / "text", "qwen3")
    save_tiny(tmp_path / "vae")
    text, autoencoder = load_text_encoder(f"{tmp_path}/text?layer=-2&tokens=40"), load_autoencoder(str(tmp_path / "vae"))
    model = busy_model(SIZE, in_channels=autoencoder.channels, caption_channels=text.channels).float()
    ours = MicroDiTPipeline.of_parts(model, EDM(), autoencoder, text, (4, 6), mask_padding=True)
    images = ours.generate(PROMPTS, SamplerSettings(2), seed=1)
    ours.save_pretrained(tmp_path / "out")
    assert not list((tmp_path / "out" / "text_encoder").glob("*.safetensors"))
    loaded = MicroDiTPipeline.from_pretrained(tmp_path / "out")
    assert loaded.caption_encoder.name == f"{tmp_path}/text?layer=-2&tokens=40"
    assert [image.tobytes() for image in loaded.generate(PROMPTS, SamplerSettings(2), seed=1)] == [image.tobytes() for image in images]


def check(tmp_path, save_text, save_vae, full):
    """A pipeline of parts, saved, and loaded with its own folder alone."""
    save_text(tmp_path / "text")
    save_vae(tmp_path / "vae")
    text, autoencoder = load_text_encoder(str(tmp_path / "text")), load_autoencoder(str(tmp_path / "vae"))
    model = busy_model(SIZE, in_channels=autoencoder.channels, caption_channels=text.channels).float()
    ours = MicroDiTPipeline.of_parts(model, EDM(P_mean=0.3), autoencoder, text, (4, 6), mask_padding=not full, full_captions=full)
    images = ours.generate(PROMPTS, SamplerSettings(2), seed=1)
    vectors, mask = ours.encode_prompt(PROMPTS)
    assert torch.equal(vectors, text.embed_full(text.tokenize(PROMPTS)) if full else text.encode(PROMPTS)[0])

    ours.save_pretrained(tmp_path / "out")
    for folder in ("text", "vae"):
        (tmp_path / folder).rename(tmp_path / f"{folder}-is-elsewhere")
    loaded = MicroDiTPipeline.from_pretrained(tmp_path / "out")
    again, mask_again = loaded.encode_prompt(PROMPTS)
    assert torch.equal(again, vectors)
    assert (mask is None) == (mask_again is None) == full
    assert full or torch.equal(mask_again, mask)
    drawn = loaded(PROMPTS, num_inference_steps=2, generator=[torch.Generator().manual_seed(1 + i) for i in range(3)]).images
    for pictures in (drawn, loaded.generate(PROMPTS, SamplerSettings(2), seed=1)):
        assert [image.tobytes() for image in pictures] == [image.tobytes() for image in images]
    assert (loaded.objective, loaded.latent_shape) == (ours.objective, ours.latent_shape)
