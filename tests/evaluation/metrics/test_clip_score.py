import math

import pytest
import torch
from PIL import Image
from torch.nn.functional import normalize
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig

from microdit.errors import UserError
from microdit.evaluation.features import ClipFeatures, resize_cleanly
from microdit.evaluation.metrics.clip_score import ClipCaptions, clip_score, clip_scores
from tests.encoders.tiny_models import save_clip_tokenizer
from tests.evaluation.test_features import CLIP_DEVIATION, CLIP_MEAN, VISION


def save_clip(folder):
    """A whole CLIP with its tokenizer: pictures of 28 x 28, captions of 12 tokens, 24 dimensions for both."""
    tokenizer = save_clip_tokenizer(folder)
    torch.manual_seed(0)
    text = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=12,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = CLIPModel(CLIPConfig(text_config=text.to_dict(), vision_config=VISION, projection_dim=24)).eval()
    model.save_pretrained(folder)
    return model, tokenizer


def test_scores_are_a_hundred_times_the_cosine_of_the_hand_computation():
    """Angles of 0, 45, 60, 90 and 180 degrees; lengths do not count, and what points away counts as 0."""
    pictures = torch.tensor([[2.0, 0.0], [5.0, 0.0], [1.0, 0.0], [0.0, 3.0], [1.0, 1.0]])
    captions = torch.tensor([[7.0, 0.0], [1.0, 1.0], [0.5, math.sqrt(0.75)], [1.0, 0.0], [-2.0, -2.0]])
    expected = [100.0, 100 * math.sqrt(0.5), 50.0, 0.0, 0.0]
    assert clip_scores(pictures, captions).tolist() == pytest.approx(expected, abs=1e-5)
    assert clip_scores(pictures * 1e-6, captions).tolist() == pytest.approx(expected, abs=1e-5)
    assert clip_score(pictures, captions).value == pytest.approx(sum(expected) / 5, abs=1e-5)


def test_the_interval_of_the_mean_is_the_textbooks():
    generator = torch.Generator().manual_seed(0)
    pictures, captions = torch.randn(2, 500, 8, generator=generator) + 1
    scores = clip_scores(pictures, captions)
    interval = clip_score(pictures, captions)
    half = 1.96 * float(scores.std()) / math.sqrt(500)
    assert interval.value == pytest.approx(float(scores.mean()))
    assert interval.low == pytest.approx(interval.value - half, abs=0.2 * half)
    assert interval.high == pytest.approx(interval.value + half, abs=0.2 * half)
    assert interval == clip_score(pictures, captions)
    narrower = clip_score(pictures, captions, confidence=0.5)
    assert narrower.high - narrower.low < 0.5 * (interval.high - interval.low)


def test_what_cannot_be_compared_is_refused():
    with pytest.raises(UserError, match="Each image needs one caption"):
        clip_scores(torch.ones(3, 4), torch.ones(2, 4))
    with pytest.raises(UserError, match="Each image needs one caption"):
        clip_scores(torch.ones(3, 4), torch.ones(3, 5))
    with pytest.raises(UserError, match="embeddings of 2 captions are zero"):
        clip_scores(torch.ones(3, 4), torch.tensor([[0.0], [1.0], [0.0]]).expand(3, 4))
    with pytest.raises(UserError, match="not finite"):
        clip_scores(torch.full((3, 4), torch.nan), torch.ones(3, 4))


def test_a_whole_clip_scores_pictures_and_captions_as_transformers_does(tmp_path):
    """Its logits are the cosines, times a learnt scale."""
    model, tokenizer = save_clip(tmp_path)
    captions = ["a red cat", "red", "green " * 30]
    pictures = [Image.effect_mandelbrot((40, 40), (-2, -1, 1, 1), 10 * n).convert("RGB") for n in (1, 2, 3)]
    pixels = torch.stack([resize_cleanly(picture, 28) / 255 for picture in pictures])
    normalised = (pixels - torch.tensor(CLIP_MEAN).view(3, 1, 1)) / torch.tensor(CLIP_DEVIATION).view(3, 1, 1)
    tokens = tokenizer(captions, padding=True, truncation=True, max_length=12, return_tensors="pt")
    with torch.no_grad():
        cosines = model(**tokens, pixel_values=normalised).logits_per_image / model.logit_scale.exp()
    seen, said = ClipFeatures(str(tmp_path))(pictures), ClipCaptions(str(tmp_path))(captions)
    assert said.shape == (3, 24)
    torch.testing.assert_close(normalize(seen) @ normalize(said).T, cosines, rtol=1e-4, atol=1e-5)
    for sign in (1, -1):  # of fresh weights the cosines may all be of one sign
        expected = 100 * (sign * cosines.diagonal()).clamp(min=0).double()
        torch.testing.assert_close(clip_scores(sign * seen, said), expected, rtol=1e-3, atol=1e-3)


def test_a_captions_embedding_does_not_depend_on_its_neighbours(tmp_path):
    save_clip(tmp_path)
    embed = ClipCaptions(str(tmp_path))
    many = embed(["a red cat"] * 40 + ["red"])
    torch.testing.assert_close(many[-1:], embed(["red"]), rtol=1e-4, atol=1e-5)
    assert (many[0] - many[-1]).abs().max() > 1e-4
    assert embed.fingerprint == ClipFeatures(str(tmp_path)).fingerprint
    with pytest.raises(UserError, match="no captions"):
        embed([])


def test_a_clip_without_its_tokenizer_is_refused(tmp_path):
    save_clip(tmp_path)
    for name in ("tokenizer.json", "vocab.json"):
        (tmp_path / name).unlink(missing_ok=True)
    with pytest.raises(UserError, match="has no tokenizer"):
        ClipCaptions(str(tmp_path))
