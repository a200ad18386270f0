import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from microdit.diffusion.flow import Flow
from microdit.errors import UserError
from microdit.models.minit2i import load_minit2i
from microdit.pipelines.components import MicroDiTTransformer2DModel
from microdit.pipelines.import_minit2i import MiniT2ISettings, import_minit2i
from microdit.pipelines.pipeline import MicroDiTPipeline
from tests.commands import microdit
from tests.encoders.tiny_models import save_t5
from tests.io.msgpack_writer import nested, packed
from tests.models.test_minit2i import FIXTURE, as_torch, state_of

SETTINGS = MiniT2ISettings(resolution=32, caption_length=10)


def save_parameters(theirs: dict[str, Tensor], path: Path) -> None:
    """The released form: the parameters alone."""
    path.write_bytes(packed({"params": {"net": nested(theirs)}}))


def save_training_state(theirs: dict[str, Tensor], path: Path) -> None:
    """The state of their trainer: the trained weights, two averages of which the slower counts, and moments of the optimizer."""
    tree, other = nested(theirs), nested({name: torch.zeros_like(tensor) for name, tensor in theirs.items()})
    state: dict[str, Any] = {
        "step": 250_000,
        "params": {"net": other},
        "ema_params_dict": {"0.9999": {"net": other}, "0.99995": {"net": tree}},
    }
    path.write_bytes(packed({**state, "opt_state": {"0": {"mu": {"net": other}, "nu": {"net": other}}}}))


def save_copy(theirs: dict[str, Tensor], path: Path) -> None:
    """The weights of the PyTorch copy, as its pipeline of diffusers stores them."""
    save_file({f"model.net.{name}": tensor.contiguous() for name, tensor in as_torch(theirs).items()}, path)


def save_pickle(theirs: dict[str, Tensor], path: Path) -> None:
    torch.save({"config": {"patch_size": 4}, "state_dict": {f"net.{name}": tensor for name, tensor in as_torch(theirs).items()}}, path)


LAYOUTS: dict[str, Callable[[dict[str, Tensor], Path], None]] = {
    "parameters.msgpack": save_parameters,
    "state.msgpack": save_training_state,
    "copy.safetensors": save_copy,
    "copy.pt": save_pickle,
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_what_the_authors_code_computed(tmp_path, layout):
    LAYOUTS[layout](state_of(), tmp_path / layout)
    import_minit2i(tmp_path / layout, tmp_path / "out", SETTINGS)
    model = MicroDiTTransformer2DModel.from_pretrained(tmp_path / "out", subfolder="transformer")
    numbers = load_file(FIXTURE)
    images, mask = numbers["in.images_BHWC"].permute(0, 3, 1, 2), numbers["in.mask_BL"] > 0.5
    with torch.no_grad():
        found = model(images, torch.zeros(3), numbers["in.context_BLE"], mask).sample
        nothing = model(images, torch.zeros(3), torch.zeros_like(numbers["in.context_BLE"])).sample
    assert torch.allclose(found.permute(0, 2, 3, 1), numbers["out.x"], atol=1e-5, rtol=1e-4)
    assert torch.allclose(nothing.permute(0, 2, 3, 1), numbers["out.x_no_caption"], atol=1e-5, rtol=1e-4)
    assert model.denoiser.config == load_minit2i(state_of(), caption_length=10).config


def test_the_imported_pipeline_samples_as_the_authors_code_does(tmp_path):
    save_parameters(state_of(), tmp_path / "x.msgpack")
    import_minit2i(tmp_path / "x.msgpack", tmp_path / "out", SETTINGS)
    pipeline, numbers = MicroDiTPipeline.from_pretrained(tmp_path / "out", text_encoder=None), load_file(FIXTURE)
    assert pipeline.objective == Flow("image", -0.8, 0.8, 1.0, 2.0, 0.01, 0.05)
    for name, solver in (("euler8", "euler"), ("heun8", "heun")):
        drawn = pipeline(
            prompt_embeds=numbers["in.context_BLE"],
            prompt_attention_mask=numbers["in.mask_BL"] > 0.5,
            latents=numbers["sample.noise"].permute(0, 3, 1, 2) / 2,
            num_inference_steps=8,
            guidance_scale=3.0,
            solver=solver,
            output_type="latent",
        ).images
        reference = numbers[f"sample.{name}_guidance3"].permute(0, 3, 1, 2)
        assert (drawn - reference).norm() < 1e-4 * reference.norm()
    assert json.loads((tmp_path / "out" / "text_encoder" / "config.json").read_text())["name"] == "google/flan-t5-large"
    assert "license: mit" in (tmp_path / "out" / "README.md").read_text()


def small_model(tmp_path: Path) -> Path:
    """The fixture's network for a text encoder of 16 channels, by the command."""
    save_t5(tmp_path / "t5")
    state = state_of()
    for name in ("txt_embedder._flax_linear.kernel", "mask_token._flax_param.param_tensor"):
        state[name] = state[name][..., :16, :] if name.startswith("txt") else state[name][..., :16]
    save_parameters(state, tmp_path / "small.msgpack")
    done = microdit(
        "import-minit2i", "small.msgpack", "out", "--text-encoder", "t5", "--resolution", 32, "--caption-length", 10, cwd=tmp_path
    )
    assert done.returncode == 0, done.output
    assert "0.2 M parameters, 32 px" in done.output
    return tmp_path / "out"


def test_a_text_encoder_in_a_folder_is_copied_and_pictures_are_sampled(tmp_path):
    small_model(tmp_path)
    (tmp_path / "t5").rename(tmp_path / "elsewhere")
    drawn = microdit("sample", "out", "red", "--steps", 2, "--guidance", 6, "--solver", "euler", "--out", "red.png", cwd=tmp_path)
    assert drawn.returncode == 0, drawn.output
    again = microdit("import-minit2i", "small.msgpack", "out", cwd=tmp_path)
    assert "out exists already and is not empty" in again.output


def test_what_does_not_fit_is_refused(tmp_path):
    save_parameters(state_of(), tmp_path / "x.msgpack")
    save_t5(tmp_path / "t5")
    with pytest.raises(UserError, match="has 16 channels, and the checkpoint's model wants 24"):
        import_minit2i(tmp_path / "x.msgpack", tmp_path / "out", MiniT2ISettings(str(tmp_path / "t5"), 32, 10))
    with pytest.raises(UserError, match="30 x 30 cannot be cut into patches of 4"):
        import_minit2i(tmp_path / "x.msgpack", tmp_path / "out", MiniT2ISettings(resolution=30))
    with pytest.raises(UserError, match="is a folder, and a checkpoint is one file"):
        import_minit2i(tmp_path, tmp_path / "out")
    with pytest.raises(UserError, match="no checkpoint at"):
        import_minit2i(tmp_path / "none.pt", tmp_path / "out")
    (tmp_path / "cut.msgpack").write_bytes((tmp_path / "x.msgpack").read_bytes()[:-100])
    with pytest.raises(UserError, match="damaged"):
        import_minit2i(tmp_path / "cut.msgpack", tmp_path / "out")
    (tmp_path / "other.msgpack").write_bytes(packed({"params": {"dense": torch.ones(2)}}))
    with pytest.raises(UserError, match=r"other\.msgpack: This is not a checkpoint of MiniT2I: it has no layer"):
        import_minit2i(tmp_path / "other.msgpack", tmp_path / "out")
    state = state_of()
    del state["double_blocks.layers_1.img_norm2._flax_rmsnorm.kernel"]
    save_parameters(state, tmp_path / "partial.msgpack")
    with pytest.raises(UserError, match=r"double_blocks\.1\.img_norm2 is missing"):
        import_minit2i(tmp_path / "partial.msgpack", tmp_path / "out", SETTINGS)
    assert not (tmp_path / "out").exists()
