import os
import pickle

import pytest
import torch
from safetensors.torch import load_file

from microdit.diffusion.guidance import Text
from microdit.errors import UserError
from microdit.models.config import Size
from microdit.models.official import export_official
from microdit.pipelines.components import MicroDiTTransformer2DModel
from microdit.pipelines.import_official import ImportSettings, import_official, read_checkpoint
from microdit.pipelines.pipeline import MicroDiTPipeline
from microdit.pipelines.sampling import draw_latents
from microdit.pipelines.settings import SamplerSettings
from tests.commands import microdit
from tests.conftest import busy_model
from tests.encoders.tiny_models import CONTEXT, save_clip, save_kl
from tests.pipelines.official_layouts import HEAD_DIM, LAYOUTS, official_weights, save_bare

SETTINGS = ImportSettings(head_dim=HEAD_DIM)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_what_the_authors_code_computed(official_fixture, tmp_path, layout):
    LAYOUTS[layout](official_weights(official_fixture), tmp_path / layout)
    import_official(tmp_path / layout, tmp_path / "out", SETTINGS)
    model = MicroDiTTransformer2DModel.from_pretrained(tmp_path / "out", subfolder="transformer")
    numbers = load_file(official_fixture)
    x, c_noise, text = numbers["in.x"], numbers["in.c_noise"], numbers["in.caption"].squeeze(1)
    with torch.no_grad():
        full = model(x, c_noise, text).sample
        (empty,) = model(x, c_noise, torch.zeros_like(text), return_dict=False)
    assert torch.allclose(full, numbers["out.full"], atol=1e-5, rtol=1e-5)
    assert torch.allclose(empty + 3 * (full - empty), numbers["out.cfg3"], atol=1e-5, rtol=1e-5)
    assert model.config.sample_size == [8, 8]


def test_the_imported_pipeline_samples_as_the_authors_code_does(official_fixture, tmp_path):
    save_bare(official_weights(official_fixture), tmp_path / "bare.pt")
    import_official(tmp_path / "bare.pt", tmp_path / "out", SETTINGS)
    pipeline = MicroDiTPipeline.from_pretrained(tmp_path / "out", text_encoder=None, vae=None)
    numbers = load_file(official_fixture)
    drawn = pipeline(
        prompt_embeds=numbers["in.caption"].squeeze(1),
        latents=numbers["sample.init"],
        num_inference_steps=8,
        guidance_scale=3.0,
        output_type="latent",
    ).images
    assert torch.allclose(drawn, numbers["sample.heun8_cfg3"], atol=1e-5, rtol=1e-5)
    for part, name in (("text_encoder", "dfn-clip-h"), ("vae", "sdxl")):
        assert f'"name": "{name}"' in (tmp_path / "out" / part / "config.json").read_text()
    assert "apache-2.0" in (tmp_path / "out" / "README.md").read_text()


def test_encoders_in_folders_are_copied_and_the_folder_needs_nothing_else(tmp_path):
    """16 channels, through a small CLIP and a small autoencoder, whole from prompt to picture."""
    save_clip(tmp_path / "clip")
    save_kl(tmp_path / "vae", channels=16)
    size = Size(dim=64, depth=2, head_dim=16, mixer_dim=32, mixer_depth=1, num_experts=2, round_ffn_to=8)
    model = busy_model(size, in_channels=16, caption_channels=16, position_scale=2.0).float()
    save_bare(export_official(model, grid_size=4), tmp_path / "wide.pt")
    settings = ImportSettings(str(tmp_path / "clip"), str(tmp_path / "vae"), head_dim=16)
    import_official(tmp_path / "wide.pt", tmp_path / "out", settings)
    for folder in ("clip", "vae"):
        (tmp_path / folder).rename(tmp_path / f"{folder}-is-elsewhere")
    pipeline = MicroDiTPipeline.from_pretrained(tmp_path / "out")
    assert pipeline.transformer.config.position_scale == 2.0
    assert pipeline("red", num_inference_steps=2).images[0].size == (32, 32)
    text_BLE, mask_BL = pipeline.encode_prompt(["red"])
    assert text_BLE.shape == (1, CONTEXT, 16)
    assert mask_BL is None
    drawn = microdit("sample", "out", "red", "--steps", 2, "--guidance", 5, cwd=tmp_path)
    assert drawn.returncode == 0, drawn.output


def test_encoders_that_do_not_fit_are_refused(official_fixture, tmp_path):
    save_clip(tmp_path / "clip")
    save_bare(official_weights(official_fixture), tmp_path / "bare.pt")
    with pytest.raises(UserError, match="has 16 channels, and the checkpoint's model wants 48"):
        import_official(tmp_path / "bare.pt", tmp_path / "out", ImportSettings(str(tmp_path / "clip"), head_dim=HEAD_DIM))
    assert not (tmp_path / "out").exists()


class Malicious:
    """Unpickled, it would make a file."""

    def __init__(self, mark: str):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (self.mark,)


@pytest.mark.parametrize("protocol", ["torch", "pickle"])
def test_a_checkpoint_that_would_run_code_is_refused_and_nothing_runs(official_fixture, tmp_path, protocol):
    weights, mark, path = official_weights(official_fixture), tmp_path / "it ran", tmp_path / "evil.pt"
    content = {"state": {"model": {**{f"dit.{name}": tensor for name, tensor in weights.items()}, "x": Malicious(str(mark))}}}
    if protocol == "torch":
        torch.save(content, path)
    else:
        path.write_bytes(pickle.dumps(content))
    done = microdit("import-official", path, "out", "--head-dim", HEAD_DIM, cwd=tmp_path)
    assert done.returncode == 1
    assert "evil.pt is" in done.output
    assert "Traceback" not in done.output
    assert not mark.exists()
    assert not (tmp_path / "out").exists()
    torch.load(path, weights_only=False) if protocol == "torch" else pickle.loads(path.read_bytes())
    assert mark.exists()  # the file was a real danger


def test_what_is_damaged_or_something_else_is_refused(official_fixture, tmp_path):
    weights = official_weights(official_fixture)
    for layout, save in LAYOUTS.items():
        path = tmp_path / layout
        save(weights, path)
        path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])
        with pytest.raises(UserError, match=layout):
            read_checkpoint(path)
    with pytest.raises(UserError, match="no checkpoint at"):
        read_checkpoint(tmp_path / "none.pt")
    for content in ([1, 2], {"unet.conv_in.weight": torch.zeros(2)}, {}):
        torch.save(content, tmp_path / "other.pt")
        with pytest.raises(UserError, match=r"other\.pt"):
            import_official(tmp_path / "other.pt", tmp_path / "out", SETTINGS)
    del weights["blocks.2.norm2.weight"]
    save_bare(weights, tmp_path / "partial.pt")
    with pytest.raises(UserError, match=r"blocks\.2\.norm2\.weight is missing"):
        import_official(tmp_path / "partial.pt", tmp_path / "out", SETTINGS)
    assert not (tmp_path / "out").exists()


def test_the_command_asks_for_what_the_weights_do_not_say(official_fixture, tmp_path):
    save_bare(official_weights(official_fixture), tmp_path / "bare.pt")
    asked = microdit("import-official", "bare.pt", "out", cwd=tmp_path)
    assert "pass head_dim" in asked.output
    done = microdit("import-official", "bare.pt", "out", "--head-dim", HEAD_DIM, cwd=tmp_path)
    assert done.returncode == 0, done.output
    assert "4 channels" in done.output
    again = microdit("import-official", "bare.pt", "out", "--head-dim", HEAD_DIM, cwd=tmp_path)
    assert "out exists already and is not empty" in again.output


def test_a_negative_prompt_of_zeros_is_no_negative_prompt(official_fixture, tmp_path):
    """Guidance away from the empty caption is what the sampler does by itself."""
    save_bare(official_weights(official_fixture), tmp_path / "bare.pt")
    denoiser = import_official(tmp_path / "bare.pt", tmp_path / "out", SETTINGS).denoiser
    numbers = load_file(official_fixture)
    text = numbers["in.caption"].squeeze(1)
    edm = MicroDiTPipeline.from_pretrained(tmp_path / "out", text_encoder=None, vae=None).scheduler.objective
    one_for_all, one_each = [
        draw_latents(denoiser, edm, numbers["sample.init"], text, None, SamplerSettings(4, 3.0), negative)
        for negative in (None, Text(torch.zeros_like(text), None))
    ]
    # The empty caption is computed once for all pictures: other batch sizes round otherwise.
    assert (one_each - one_for_all).norm() <= 1e-5 * one_for_all.norm()
