import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from microdit.encoders.text import load_text_encoder
from microdit.errors import UserError
from tests.encoders.test_text_text_models import Bomb
from tests.encoders.tiny_models import CONTEXT, save_open_clip

CAPTIONS = ["a red cat", "", "dog " * 30]


@pytest.mark.parametrize("quick_gelu", [False, True])
@pytest.mark.parametrize(("prefix", "as_bin"), [("", False), ("text.", False), ("", True), ("text.", True)])
@torch.no_grad()
def test_it_is_the_network_that_open_clip_describes(tmp_path, quick_gelu, prefix, as_bin):
    reference = save_open_clip(tmp_path, quick_gelu, prefix, as_bin)
    encoder = load_text_encoder(str(tmp_path))
    ids = encoder.tokenize(CAPTIONS)
    padded = torch.tensor([tokens + [0] * (CONTEXT - len(tokens)) for tokens in ids])
    assert encoder.max_tokens == CONTEXT
    assert torch.allclose(encoder.embed_full(ids), reference(padded), atol=1e-5)
    text, mask = encoder.embed(ids)
    assert torch.allclose(text[mask], reference(padded)[mask], atol=1e-5)
    reference.transformer.resblocks[0].quick_gelu = not quick_gelu
    assert not torch.allclose(encoder.embed_full(ids), reference(padded), atol=1e-3)


def test_the_bin_may_go_once_it_is_read(tmp_path):
    save_open_clip(tmp_path, as_bin=True)
    encoder = load_text_encoder(str(tmp_path))
    before = encoder.encode(CAPTIONS)[0]
    (tmp_path / "open_clip_pytorch_model.bin").write_bytes(b"")
    assert torch.equal(encoder.encode(CAPTIONS)[0], before)


@pytest.mark.parametrize(("zipped", "reason"), [(True, "could then run code"), (False, "since 2020")])
def test_a_bin_that_would_run_code_is_refused_and_does_not_run(tmp_path, zipped, reason):
    model = save_open_clip(tmp_path, as_bin=True)
    content = {**model.state_dict(), "extra": Bomb(tmp_path / "boom")}
    torch.save(content, tmp_path / "open_clip_pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    with pytest.raises(UserError, match=rf"open_clip_pytorch_model\.bin .*{reason}"):
        load_text_encoder(str(tmp_path))
    assert not (tmp_path / "boom").exists()


def test_what_does_not_fit_is_named(tmp_path):
    save_open_clip(tmp_path)
    path = tmp_path / "open_clip_model.safetensors"
    weights = load_file(path)
    save_file({name: tensor for name, tensor in weights.items() if "blocks.1.attn.in_proj" not in name}, path)
    with pytest.raises(UserError, match=r"lacks .*resblocks\.1\.attn\.in_proj_bias, transformer\.resblocks\.1\.attn\.in_proj_weight, "):
        load_text_encoder(str(tmp_path))
    save_file({**weights, "transformer.resblocks.3.ln_1.weight": torch.ones(16)}, path)
    with pytest.raises(
        UserError, match=r"weights that open_clip_config.json does not describe \(transformer\.resblocks\.3\.ln_1\.weight\)"
    ):
        load_text_encoder(str(tmp_path))
    save_file({**weights, "positional_embedding": torch.ones(CONTEXT + 1, 16)}, path)
    with pytest.raises(UserError, match="cannot be loaded"):
        load_text_encoder(str(tmp_path))


def test_other_networks_and_missing_files_are_refused(tmp_path):
    save_open_clip(tmp_path)
    path = tmp_path / "open_clip_config.json"
    config = json.loads(path.read_text())
    config["model_cfg"]["text_cfg"]["hf_model_name"] = "roberta-base"
    path.write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"not a plain CLIP model \(text_cfg\.hf_model_name\)"):
        load_text_encoder(str(tmp_path))
    path.write_text("{}")
    with pytest.raises(UserError, match=r"model_cfg\.text_cfg"):
        load_text_encoder(str(tmp_path))
    (tmp_path / "open_clip_model.safetensors").unlink()
    with pytest.raises(UserError, match=r"neither open_clip_model\.safetensors nor open_clip_pytorch_model\.bin"):
        load_text_encoder(str(tmp_path))
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(UserError, match="no tokenizer"):
        load_text_encoder(str(tmp_path))
