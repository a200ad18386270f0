"""Latents and caption vectors as the paper's precompute.py stores them, imported: the same numbers as encoding would have stored."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from microdit.data.dataset import EncodedDataset
from microdit.data.import_latents import import_latents
from microdit.data.sources.open import open_source
from microdit.encoders.autoencoder import load_autoencoder
from microdit.encoders.text import load_text_encoder
from microdit.errors import UserError
from tests.data.mds_files import write_mds
from tests.encoders.tiny_models import save_clip, save_clip_tokenizer
from tests.training.processes import RECIPE, start

COLUMNS = {"caption": ("str", None), "caption_latents": ("bytes", None), "latents_64": ("bytes", None), "latents_128": ("bytes", None)}


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("clip")
    save_clip(folder)
    save_clip_tokenizer(folder)
    return str(folder)


@pytest.fixture(scope="module")
def encoders(clip):
    return load_autoencoder("icon"), load_text_encoder(clip)


def samples(encoders, count: int, dtype: str = "<f2", first: int = 0) -> list[list[bytes]]:
    """Random latents with the vectors of their captions, as the authors store them."""
    autoencoder, text_encoder = encoders
    generator = np.random.default_rng(first)
    captions = [f"a picture of number {first + number}" for number in range(count)]
    vectors_BLE = text_encoder.embed_full(text_encoder.tokenize(captions)).numpy()
    found = []
    for caption, vectors_LE in zip(captions, vectors_BLE, strict=True):
        latents = [generator.normal(size=(autoencoder.channels, side, side)) for side in (8, 16)]
        found.append([caption.encode(), vectors_LE.astype(dtype).tobytes(), *(numbers.astype(dtype).tobytes() for numbers in latents)])
    return found


@pytest.mark.parametrize("dtype", ["<f2", "<f4"])
def test_the_numbers_are_those_that_were_stored(tmp_path, encoders, dtype):
    stored = [samples(encoders, 5, dtype), samples(encoders, 300, dtype, first=5)]
    write_mds(tmp_path / "theirs", COLUMNS, stored)
    manifest = import_latents(tmp_path / "theirs", tmp_path / "ours", *encoders)
    assert (manifest["rows"], manifest["seen"], manifest["rejected"]) == (305, 305, {})
    assert manifest["settings"]["resolutions"] == [64, 128]
    data = EncodedDataset(tmp_path / "ours", 128)
    captions = data.column("captions")
    rows = {caption: row for row, (caption,) in enumerate(captions)}
    for caption, vectors, _, latents in (stored[0][3], stored[1][7], stored[1][299]):
        row = rows[caption.decode()]
        latents_blob, text_blob = data.read(0, row)
        found_CHW = data.latents([latents_blob], 0)[0].numpy()
        np.testing.assert_array_equal(found_CHW, np.frombuffer(latents, dtype).reshape(found_CHW.shape).astype(np.float16))
        found_LE = data.text([text_blob])[0][0].numpy()
        np.testing.assert_array_equal(found_LE, np.frombuffer(vectors, dtype).reshape(found_LE.shape).astype(np.float16))


def test_an_imported_set_is_trained_on(tmp_path, encoders):
    write_mds(tmp_path / "theirs", COLUMNS, [samples(encoders, 24)])
    import_latents(tmp_path / "theirs", tmp_path / "ours", *encoders)
    steps = ["phases.0.steps=2", "phases.1.steps=1", "data.resolution=64", "model.patch_size=2", "record.samples_every=100"]
    running = start(tmp_path / "logs", ["train", RECIPE, f"data.path={tmp_path / 'ours'}", "--out", tmp_path / "run", *steps])
    assert running.wait() == [0], running.output


def test_damaged_samples_are_rejected_by_name_and_counted(tmp_path, encoders):
    stored = samples(encoders, 8)
    stored[1][2] = stored[1][2][:-2]
    stored[2][3] = np.full(8 * 16 * 16, np.nan, "<f2").tobytes()
    stored[3][0] = b"\xff\xfe"
    stored[4][0] = b""
    write_mds(tmp_path / "theirs", COLUMNS, [stored])
    manifest = import_latents(tmp_path / "theirs", tmp_path / "ours", *encoders)
    assert (manifest["rows"], manifest["seen"]) == (4, 8)
    assert manifest["rejected"] == {
        "latents or caption vectors of another size": 1,
        "latents or caption vectors that are not finite": 1,
        "no caption": 2,
    }
    lines = [json.loads(line) for path in (tmp_path / "ours").glob("*.rejected.jsonl") for line in path.read_text().splitlines()]
    assert {line["key"] for line in lines} == {f"shard.00000.mds/{number}" for number in (1, 2, 3, 4)}


def test_a_cut_shard_gives_what_it_holds_and_a_named_end(tmp_path, encoders):
    write_mds(tmp_path / "theirs", COLUMNS, [samples(encoders, 8)])
    path = tmp_path / "theirs" / "shard.00000.mds"
    path.write_bytes(path.read_bytes()[:-100])
    manifest = import_latents(tmp_path / "theirs", tmp_path / "ours", *encoders)
    assert (manifest["rows"], manifest["rejected"]) == (7, {"shard is damaged from here on": 1})


def test_encoders_that_did_not_make_the_numbers_are_refused(tmp_path, encoders, tmp_path_factory):
    autoencoder, text_encoder = encoders
    write_mds(tmp_path / "theirs", COLUMNS, [samples(encoders, 3)])
    other = save_clip(tmp_path / "other")
    with torch.no_grad():
        for weight in other.parameters():
            weight.copy_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(5)))
    other.save_pretrained(tmp_path / "other")
    save_clip_tokenizer(tmp_path / "other")
    with pytest.raises(UserError, match=r"are not those of .*other: of 3 captions embedded again, one has a cosine of -?0\.\d\d with"):
        import_latents(tmp_path / "theirs", tmp_path / "ours", autoencoder, load_text_encoder(str(tmp_path / "other")))
    with pytest.raises(UserError, match=r"of another size than those of minilm, \(tokens, channels\) = \(32, 384\)"):
        import_latents(tmp_path / "theirs", tmp_path / "ours", autoencoder, load_text_encoder("minilm"))
    with pytest.raises(UserError, match=r"\(channels, height, width\) = \(3, 64, 64\): name the encoders"):
        import_latents(tmp_path / "theirs", tmp_path / "ours", load_autoencoder("pixels"), text_encoder)
    assert not (tmp_path / "ours").exists()


def test_what_is_no_folder_of_latents_is_refused_in_a_sentence(tmp_path, encoders):
    with pytest.raises(UserError, match=r"There is no index\.json in"):
        import_latents(tmp_path, tmp_path / "ours", *encoders)
    write_mds(tmp_path / "pictures", {"caption": ("str", None), "jpg": ("jpeg", None)}, [[[b"a", b"b"]]])
    with pytest.raises(UserError, match="has no column caption_latents, latents_256; it has caption, jpg"):
        import_latents(tmp_path / "pictures", tmp_path / "ours", *encoders)
    write_mds(tmp_path / "latents", COLUMNS, [samples(encoders, 1)])
    with pytest.raises(UserError, match=r"columns of pictures: .*imported by 'microdit data import-latents'"):
        open_source(str(tmp_path / "latents"))


def test_the_command_imports_and_continues_where_it_was_stopped(tmp_path, encoders, clip):
    write_mds(tmp_path / "theirs", COLUMNS, [samples(encoders, 4, first=10 * part) for part in range(3)])
    command = ["data", "import-latents", "theirs", "--out", "ours", "--autoencoder", "icon", "--text-encoder", clip]
    (tmp_path / "theirs" / "shard.00002.mds").rename(tmp_path / "away.mds")
    source = Path(tmp_path / "theirs" / "shard.00002.mds")
    source.mkdir()
    first = start(tmp_path / "logs", command, cwd=tmp_path)
    assert first.wait() == [0], first.output
    assert "8 of 9" in first.output
    source.rmdir()
    (tmp_path / "away.mds").rename(source)
    again = start(tmp_path / "logs", [*command[:4], "whole", *command[5:]], cwd=tmp_path)
    assert again.wait() == [0], again.output
    assert "12 of 12" in again.output
