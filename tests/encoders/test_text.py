import pytest
import torch
import torch.nn.functional as F

from microdit.encoders.text import MINILM_TOKENS, load_text_encoder
from microdit.errors import UserError


def test_a_captions_embedding_does_not_depend_on_its_neighbours(text_encoder):
    alone, _ = text_encoder.encode(["red heart"])
    together, mask = text_encoder.encode(["red heart", "woman with headscarf riding a bicycle uphill"])
    length = alone.shape[1]
    assert mask[0].tolist() == [True] * length + [False] * (mask.shape[1] - length)
    assert torch.allclose(together[0, :length], alone[0], atol=1e-4)
    assert together[0, length:].abs().max() == 0


def test_meaning_is_in_the_vectors(text_encoder):
    text, mask = text_encoder.encode(["cat", "kitten", "fire engine"])
    mean = F.normalize(text.sum(dim=1) / mask.sum(dim=1, keepdim=True), dim=1)  # the sentence vector, as the model's card says
    assert mean[0] @ mean[1] > 0.6 > 0.4 > mean[0] @ mean[2]


def test_long_and_empty_captions_are_fine(text_encoder):
    text, mask = text_encoder.encode(["word " * 500, ""])
    assert text.shape == (2, MINILM_TOKENS, 384)
    assert mask[1].sum() == 2  # the start and the end
    assert text.isfinite().all()


def test_an_unknown_encoder_is_refused():
    with pytest.raises(UserError, match="Known: minilm"):
        load_text_encoder("clip-of-dreams")
