"""Language models as text encoders, tiny ones with random weights in the formats of the real ones."""

import json

import pytest
import torch

from microdit.data.dataset import EncodedDataset
from microdit.data.encode import EncodeSettings, encode_source
from microdit.encoders.autoencoder import Pixels
from microdit.encoders.language_models import TextOptions, parse_options
from microdit.encoders.text import load_text_encoder
from microdit.errors import UserError
from tests.data.test_latent_statistics import records, source_of
from tests.encoders.tiny_models import LANGUAGE_MODELS, save_language_model, save_t5

CAPTIONS = ["red cat", "cat : red red a b c", "x"]


def hidden_states(model, ids: list[int]) -> tuple[torch.Tensor, ...]:
    inner = model.get_encoder() if model.config.model_type == "t5gemma" else model.model
    return inner(input_ids=torch.tensor([ids]), attention_mask=torch.ones(1, len(ids)), output_hidden_states=True).hidden_states


@pytest.mark.parametrize("model_type", LANGUAGE_MODELS)
@torch.no_grad()
def test_vectors_are_the_hidden_states_of_each_caption_alone(tmp_path, model_type):
    raw = save_language_model(tmp_path, model_type)
    for layer in (-1, -2, 0):
        encoder = load_text_encoder(f"{tmp_path}?layer={layer}")
        assert (encoder.channels, encoder.max_tokens) == (16, 256)
        text, mask = encoder.encode(CAPTIONS)
        for number, ids in enumerate(encoder.tokenize(CAPTIONS)):
            expected = hidden_states(raw, ids)[layer][0]
            assert mask[number].tolist() == [True] * len(ids) + [False] * (text.shape[1] - len(ids))
            assert torch.allclose(text[number, : len(ids)], expected, atol=1e-4)
            assert (text[number, len(ids) :] == 0).all()
        full = encoder.embed_full(encoder.tokenize(CAPTIONS))
        assert full.shape == (3, 256, 16)
        assert torch.allclose(full[:, : text.shape[1]], text, atol=1e-4)


@pytest.mark.parametrize("with_start", [False, True])
def test_a_template_surrounds_the_caption_and_long_captions_lose_their_end(tmp_path, with_start):
    save_language_model(tmp_path, "qwen3", with_start)
    start = [1] if with_start else []
    encoder = load_text_encoder(f"{tmp_path}?template=picture : {{caption}} <|end|>&tokens=8")
    assert encoder.tokenize(["red cat"]) == [[*start, 6, 7, 4, 5, 3]]
    [cut] = encoder.tokenize(["red " * 20])
    assert len(cut) == 8
    assert cut == [*start, 6, 7, *[4] * (5 - len(start)), 3]
    assert load_text_encoder(encoder.name).tokenize(["red cat"]) == encoder.tokenize(["red cat"])
    assert load_text_encoder(str(tmp_path)).encode([""])[0].shape == (1, 1, 16)  # there is at least one token
    assert load_text_encoder(f"{tmp_path}?tokens=512").embed_full([[4]]).shape == (1, 512, 16)


def test_a_data_set_keeps_the_options_in_the_encoders_name(tmp_path):
    (tmp_path / "model").mkdir()
    save_language_model(tmp_path / "model", "gemma3_text")
    for captions in ("fp16", "ids"):
        encoder = load_text_encoder(f"{tmp_path}/model?layer=-2&template=picture : {{caption}}")
        settings = EncodeSettings((16,), "fp16", captions, min_side=8)
        encode_source(source_of(records(0, 1)), tmp_path / captions, settings, Pixels(), encoder)
        data = EncodedDataset(tmp_path / captions)
        text, mask = data.text([data.read(0, row)[1] for row in (0, 1)]) if captions == "fp16" else _embedded(data)
        expected, lengths = encoder.encode(["picture 0", "picture 1"])
        assert torch.equal(mask, lengths)
        assert torch.allclose(text, expected, atol=2e-2)
        assert data.manifest["text_encoder"]["name"] == encoder.name


def _embedded(data):
    stored, lengths_B = data.stored_text([data.read(0, row)[1] for row in (0, 1)])
    text = stored.expand()
    return text, torch.arange(text.shape[1]) < lengths_B[:, None]


def test_half_precision_keeps_its_range(tmp_path):
    save_language_model(tmp_path, "llama")
    assert load_text_encoder(str(tmp_path)).to("cpu", torch.float16).dtype == torch.float32
    assert load_text_encoder(str(tmp_path)).to("cpu", torch.bfloat16).dtype == torch.bfloat16


def test_t5_reads_512_tokens_where_it_is_asked_to(tmp_path):
    save_t5(tmp_path)
    assert load_text_encoder(f"{tmp_path}?tokens=512").embed_full([[5]]).shape == (1, 512, 16)
    assert load_text_encoder(str(tmp_path)).max_tokens == 256
    with pytest.raises(UserError, match="is no language model, and has no layer or template to choose"):
        load_text_encoder(f"{tmp_path}?layer=-2")


def test_options_are_parsed_or_refused():
    assert parse_options("a/b?layer=-2&tokens=512&template=Say: {caption}%26") == TextOptions(-2, "Say: {caption}&", 512)
    assert parse_options("a/b") == TextOptions()
    for name, sentence in (
        ("a/b?depth=3", "has the option depth=3: known are"),
        ("a/b?layer=1&layer=2", "has the option layer=2: known are"),
        ("a/b?layer=last", "no whole number"),
        ("a/b?template=Say it", r"must hold \{caption\} once"),
        ("a/b?tokens=513", "from 1 to 512 are possible"),
    ):
        with pytest.raises(UserError, match=sentence):
            parse_options(name)


def test_what_cannot_be_used_is_a_sentence(tmp_path):
    save_language_model(tmp_path, "qwen2")
    with pytest.raises(UserError, match="has no hidden states 4: they are 0 to 3"):
        load_text_encoder(f"{tmp_path}?layer=4")
    with pytest.raises(UserError, match="leaves no room for a caption in 2 tokens"):
        load_text_encoder(f"{tmp_path}?tokens=2&template={{caption}} red red")
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "model_type": "mamba"}))
    with pytest.raises(UserError, match=r"says model_type mamba; only clip, .*qwen3"):
        load_text_encoder(str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(UserError, match="There are no weights in"):
        load_text_encoder(str(tmp_path))
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(UserError, match="has no tokenizer"):
        load_text_encoder(str(tmp_path))
