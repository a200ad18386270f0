import json

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel

from microdit.distributed import start_world, stop_world
from microdit.errors import UserError
from microdit.evaluation.generators import Compute, DiffusersGenerator, DrawSettings, RunGenerator, draw_pictures, open_generator
from tests.encoders.tiny_models import save_clip_tokenizer

SETTINGS = DrawSettings(num_inference_steps=2, guidance_scale=3.0)


@pytest.fixture(scope="module")
def stable_diffusion(tmp_path_factory):
    """A Stable Diffusion of 16 x 16 pixels with random weights, as diffusers saves it."""
    folder = tmp_path_factory.mktemp("pipeline")
    tokenizer = save_clip_tokenizer(folder / "made")
    torch.manual_seed(0)
    text = CLIPTextConfig(vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    blocks = {"down_block_types": ("CrossAttnDownBlock2D",), "up_block_types": ("CrossAttnUpBlock2D",)}
    unet = UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        block_out_channels=(8,),
        layers_per_block=1,
        norm_num_groups=4,
        cross_attention_dim=16,
        attention_head_dim=4,
        **blocks,
    )
    ends = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    vae = AutoencoderKL(block_out_channels=(8, 8), latent_channels=4, norm_num_groups=4, sample_size=16, **ends)
    StableDiffusionPipeline(
        vae, CLIPTextModel(text), tokenizer, unet, DDIMScheduler(clip_sample=False), None, None, requires_safety_checker=False
    ).save_pretrained(folder / "tiny")
    return folder / "tiny"


def test_a_diffusers_pipeline_gives_each_image_its_own_seed(stable_diffusion):
    generator = open_generator(str(stable_diffusion), SETTINGS, pytest.fail)
    assert isinstance(generator, DiffusersGenerator)
    assert generator.about["class"] == "StableDiffusionPipeline"
    counted: list[int] = []
    prompts = ["red", "a", "b", "red", "c", "d", "e", "f", "red", "g"]
    images = generator(prompts, seed=5, on_step=counted.append)
    assert sum(counted) == 2 * len(prompts)
    alone = generator(prompts[8:9], seed=13)[0]
    assert images[8].mode == "RGB"
    assert np.abs(np.asarray(images[8], dtype=int) - np.asarray(alone, dtype=int)).max() <= 1
    assert np.asarray(images[0]).tolist() != np.asarray(images[3]).tolist()  # the same prompt, another seed


def test_a_run_is_opened_with_what_it_has_cost(workplace):
    generator = open_generator(str(workplace / "runs" / "tiny"), SETTINGS, pytest.fail)
    assert isinstance(generator, RunGenerator)
    assert generator.about["step"] == 6
    assert generator.about["images_seen"] == 4 * 8 + 2 * 6
    assert generator.about["gpu_hours"] > 0
    assert [image.size for image in generator(["red heart", "owl"], seed=0)] == [(64, 64)] * 2


def test_the_caller_chooses_dtype_and_batch_size(workplace, stable_diffusion, tmp_path):
    compute = Compute("cpu", torch.bfloat16, batch_size=1)
    for place in (str(workplace / "runs" / "tiny"), str(stable_diffusion)):
        exact, rounded = open_generator(place, SETTINGS, pytest.fail), open_generator(place, SETTINGS, pytest.fail, compute)
        assert (exact.about["dtype"], rounded.about["dtype"], rounded.batch) == ("float32", "bfloat16", 1)
        pictures = [np.asarray(generator(["red heart", "owl"], seed=0), dtype=int) for generator in (exact, rounded)]
        apart = np.abs(pictures[0] - pictures[1]).mean()
        assert apart > 0
        assert apart < 10 or place == str(stable_diffusion)  # whose noise in bfloat16 is another with some versions of torch
    world = start_world("cpu")
    draw_pictures(rounded, ["owl"], tmp_path, SETTINGS, world)
    with pytest.raises(UserError, match="generated with another dtype"):
        draw_pictures(exact, ["owl"], tmp_path, SETTINGS, world)
    stop_world()


def test_what_is_neither_is_refused(tmp_path, stable_diffusion):
    for place in (str(tmp_path), str(tmp_path / "nowhere" / "at all"), "no such thing"):
        with pytest.raises(UserError, match=r"neither a run folder .* nor a diffusers pipeline|There is no folder"):
            open_generator(place, SETTINGS, pytest.fail)
    with pytest.raises(UserError, match="is a diffusers pipeline: omit the option"):
        open_generator(str(stable_diffusion), DrawSettings(weights="ema"), pytest.fail)
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusionPipeline", "unet": ["os", "system"]}))
    with pytest.raises(UserError, match="cannot be loaded"):
        open_generator(str(tmp_path), SETTINGS, pytest.fail)
