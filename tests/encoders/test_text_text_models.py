import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig

from microdit.encoders.text import MINILM_TOKENS, T5_TOKENS, load_text_encoder
from microdit.errors import UserError
from tests.encoders.tiny_models import CONTEXT, save_bert, save_clip, save_open_clip, save_t5

SAVE = {"clip": save_clip, "t5": save_t5, "bert": save_bert, "open_clip": save_open_clip}


class Bomb:
    """Creates a file when its pickle is loaded."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


@pytest.fixture(params=list(SAVE))
def encoder(request, tmp_path):
    SAVE[request.param](tmp_path)
    return load_text_encoder(str(tmp_path))


def test_a_captions_embedding_does_not_depend_on_its_neighbours(encoder):
    alone, _ = encoder.encode(["red"])
    together, mask = encoder.encode(["red", "a red cat"])
    length = alone.shape[1]
    assert mask[0].tolist() == [True] * length + [False] * (mask.shape[1] - length)
    assert torch.allclose(together[0, :length], alone[0], atol=1e-5)
    assert together[0, length:].abs().max() == 0
    assert together.dtype == torch.float32
    assert together.shape[2] == encoder.channels == 16


def test_long_captions_keep_their_end(encoder):
    short, long, empty = encoder.tokenize(["red", "a red cat " * 300, ""])
    assert len(long) == encoder.max_tokens
    assert long[-1] == short[-1] == empty[-1]
    assert encoder.embed([long, empty])[0].isfinite().all()
    assert encoder.tokenize([]) == []


def test_full_embeddings_hold_the_same_vectors(encoder):
    ids = encoder.tokenize(["red", "a red cat"])
    full = encoder.embed_full(ids)
    text, mask = encoder.embed(ids)
    assert full.shape == (2, encoder.max_tokens, encoder.channels)
    assert torch.allclose(full[:, : text.shape[1]][mask], text[mask], atol=1e-5)


def test_it_moves_and_still_gives_float32(encoder):
    exact, _ = encoder.encode(["a red cat"])
    rough, _ = encoder.to("cpu", torch.bfloat16).encode(["a red cat"])
    assert rough.dtype == torch.float32
    assert 0 < (rough - exact).abs().max() < 0.3


@torch.no_grad()
def test_clip_is_what_transformers_gives_with_its_padding(tmp_path):
    raw = save_clip(tmp_path)
    encoder = load_text_encoder(str(tmp_path))
    ids = encoder.tokenize(["a red cat"])
    assert ids == [[54, 26, 53, 2, 0, 45, 55]]
    assert encoder.max_tokens == CONTEXT  # the tokenizer would allow 77
    full = encoder.embed_full(ids)
    assert torch.allclose(full, raw(torch.tensor([ids[0] + [55] * (CONTEXT - 7)])).last_hidden_state, atol=1e-5)
    assert full[0, 7:].abs().min() > 0


@torch.no_grad()
def test_the_text_half_of_a_whole_clip_is_found(tmp_path):
    raw = save_clip(tmp_path)
    weights = {f"text_model.{name}": tensor for name, tensor in raw.state_dict().items()}
    save_file({**weights, "logit_scale": torch.ones(()), "text_projection.weight": torch.ones(16, 16)}, tmp_path / "model.safetensors")
    text_config = CLIPTextConfig.from_pretrained(tmp_path).to_dict()
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "clip", "text_config": text_config, "vision_config": {}}))
    encoder = load_text_encoder(str(tmp_path))
    ids = encoder.tokenize(["a red cat"])
    assert torch.allclose(encoder.embed(ids)[0], raw(torch.tensor(ids)).last_hidden_state, atol=1e-5)


@torch.no_grad()
def test_t5_is_what_transformers_gives_and_long(tmp_path):
    raw = save_t5(tmp_path)
    encoder = load_text_encoder(str(tmp_path))
    assert encoder.max_tokens == T5_TOKENS
    ids = encoder.tokenize(["red cat"])
    text, _ = encoder.embed(ids)
    assert torch.allclose(text, raw(torch.tensor(ids)).last_hidden_state, atol=1e-5)
    assert encoder.embed_full(ids)[0, len(ids[0]) :].abs().max() == 0


def test_minilm_stays_short(text_encoder):
    assert text_encoder.max_tokens == MINILM_TOKENS
    ids = text_encoder.tokenize(["red heart " * 50])
    assert len(ids[0]) == MINILM_TOKENS
    assert text_encoder.embed_full(text_encoder.tokenize(["red heart"])).shape == (1, MINILM_TOKENS, 384)


def test_a_relative_name_finds_it_from_anywhere(tmp_path, monkeypatch):
    save_clip(tmp_path / "clip")
    monkeypatch.chdir(tmp_path)
    encoder = load_text_encoder("clip")
    monkeypatch.chdir("/")
    assert load_text_encoder(encoder.name).fingerprint == encoder.fingerprint


@torch.no_grad()
def test_a_bin_of_tensors_is_read_and_one_that_would_run_code_is_not(tmp_path):
    raw = save_t5(tmp_path)
    ids = torch.tensor([[3, 4, 1]])
    (tmp_path / "model.safetensors").unlink()
    torch.save(raw.state_dict(), tmp_path / "pytorch_model.bin")
    text, _ = load_text_encoder(str(tmp_path)).embed(ids.tolist())
    assert torch.allclose(text, raw(ids).last_hidden_state, atol=1e-5)
    torch.save({**raw.state_dict(), "shared.weight": Bomb(tmp_path / "boom")}, tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match="could then run code"):
        load_text_encoder(str(tmp_path))
    assert not (tmp_path / "boom").exists()


def test_what_cannot_be_used_is_refused_with_the_reason(tmp_path):
    with pytest.raises(UserError, match=r"neither config\.json nor open_clip_config\.json"):
        load_text_encoder(str(tmp_path))
    save_clip(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    save_file({name: tensor for name, tensor in weights.items() if "final_layer_norm" not in name}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=r"lacks the weights .*final_layer_norm\.bias, .*final_layer_norm\.weight"):
        load_text_encoder(str(tmp_path))
    name = next(name for name in weights if name.endswith("final_layer_norm.bias"))
    save_file({**weights, name: torch.ones(3)}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=r"final_layer_norm\.bias, or has them in other shapes"):
        load_text_encoder(str(tmp_path))
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"no weights .* neither model\.safetensors nor pytorch_model\.bin"):
        load_text_encoder(str(tmp_path))
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(UserError, match=r"no tokenizer: copy tokenizer\.json, or vocab\.json and merges\.txt"):
        load_text_encoder(str(tmp_path))
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(UserError, match="model_type gpt2; only clip, "):
        load_text_encoder(str(tmp_path))


def test_a_strange_tokenizer_is_refused(tmp_path):
    save_clip(tmp_path / "clip")
    save_t5(tmp_path / "t5")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "clip" / name).replace(tmp_path / "t5" / name)
    with pytest.raises(UserError, match="do not belong together"):
        load_text_encoder(str(tmp_path / "t5"))


def test_the_hub_without_a_network_says_what_to_do():
    with pytest.raises(UserError, match="download the model's folder on another computer"):
        load_text_encoder("microdit-tests/there-is-no-such-model")


def test_a_t5_stays_out_of_float16_where_it_overflows(tmp_path):
    save_t5(tmp_path / "t5")
    save_clip(tmp_path / "clip")
    assert load_text_encoder(str(tmp_path / "t5")).to("cpu", torch.float16).dtype == torch.float32
    assert load_text_encoder(str(tmp_path / "clip")).to("cpu", torch.float16).dtype == torch.float16
