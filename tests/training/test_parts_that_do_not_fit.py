"""Recipes whose parts are fine alone and do not fit together: each ends in one sentence, before anything is computed."""

import pytest

from microdit.config.load import load_recipe
from microdit.encoders.captions import warn_of_unread
from microdit.errors import UserError
from microdit.training.setup import open_dataset

DRY = "micro-2026-dry/1-falling-mask"


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (["data.autoencoder=icon"], "data.autoencoder is icon, but .* was encoded with pixels"),
        (["data.text_encoder=dfn-clip-h"], "data.text_encoder is dfn-clip-h, but .* was encoded with minilm"),
        (["data.resolution=32"], "holds the resolutions 16"),
        (["alignment={encoder: efficientnet, block: 1}"], "alignment.encoder is efficientnet, and .* holds no features of images"),
        (["distillation={steps: 4}"], "distillation needs a trained model to start from"),
        (["model.attention=cross", "model.unread_text=true"], "model.unread_text is for model.attention joint"),
        (["model.mask_padding=false"], "model.caption_length puts a learnt token in the place of padding"),
        (["diffusion.sigma_data=0.5"], "diffusion.sigma_data is a setting of diffusion.objective edm, and the objective is flow"),
    ],
)
def test_parts_of_a_recipe(encoded_emoji, changes, sentence):
    fitting = [f"data.path={encoded_emoji}", "data.resolution=16"]
    open_dataset(load_recipe(DRY, fitting), pytest.fail)
    with pytest.raises(UserError, match=sentence):
        open_dataset(load_recipe(DRY, [*fitting, *changes]), pytest.fail)


def test_a_prompt_longer_than_the_encoder_reads(text_encoder):
    said = []
    warn_of_unread(["red heart", "red heart " * text_encoder.max_tokens], text_encoder, said.append)
    assert len(said) == 1
    assert f"is cut: the text encoder minilm reads {text_encoder.max_tokens} tokens" in said[0]
