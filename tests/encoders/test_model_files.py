"""Find models of the hub without a network, in the cache of earlier downloads."""

import json
import shutil

import pytest
from huggingface_hub import constants

from microdit.encoders.autoencoder import load_autoencoder
from microdit.encoders.model_files import find_folder, weight_files
from microdit.encoders.text import load_text_encoder
from microdit.errors import UserError
from tests.encoders.tiny_models import save_kl, save_open_clip, save_t5


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """Add a folder to the hub's cache under an id."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)

    def put(folder, name):
        model = tmp_path / "cache" / f"models--{name.replace('/', '--')}"
        commit = "0" * 40
        (model / "refs").mkdir(parents=True)
        (model / "refs" / "main").write_text(commit)
        shutil.copytree(folder, model / "snapshots" / commit)

    return put


def test_a_downloaded_autoencoder_is_found_by_its_id_and_subfolder(tmp_path, hub):
    save_kl(tmp_path / "pipeline" / "vae")
    hub(tmp_path / "pipeline", "someone/pipeline")
    one, two = load_autoencoder("someone/pipeline"), load_autoencoder("someone/pipeline:vae")
    assert (one.name, two.name) == ("someone/pipeline", "someone/pipeline:vae")
    assert one.fingerprint == two.fingerprint == load_autoencoder(str(tmp_path / "pipeline")).fingerprint


def test_downloaded_text_encoders_are_found_by_their_ids(tmp_path, hub):
    save_t5(tmp_path / "t5")
    hub(tmp_path / "t5", "someone/t5")
    (tmp_path / "clip").mkdir()
    save_open_clip(tmp_path / "clip", as_bin=True)
    hub(tmp_path / "clip", "someone/clip.v1_0")
    assert load_text_encoder("someone/t5").fingerprint == load_text_encoder(str(tmp_path / "t5")).fingerprint
    assert load_text_encoder("someone/clip.v1_0").name == "someone/clip.v1_0"


def test_the_aliases_are_ids_of_the_hub(hub, tmp_path):
    save_kl(tmp_path / "pipeline" / "vae")
    hub(tmp_path / "pipeline", "stabilityai/stable-diffusion-xl-base-1.0")
    assert load_autoencoder("sdxl").name == "sdxl"
    for load, alias in ((load_autoencoder, "16ch"), (load_text_encoder, "dfn-clip-h")):
        with pytest.raises(UserError, match=r"[Tt]he model .* could not be downloaded"):
            load(alias)


def test_what_was_downloaded_in_part_is_refused(tmp_path, hub):
    save_t5(tmp_path / "t5")
    (tmp_path / "t5" / "model.safetensors").unlink()
    hub(tmp_path / "t5", "someone/t5")
    with pytest.raises(UserError, match=r"neither model\.safetensors nor pytorch_model\.bin"):
        load_text_encoder("someone/t5")


def test_a_cache_that_cannot_be_written_is_told_with_the_way_out(monkeypatch):
    def refuse(*_: object, **__: object) -> str:
        raise PermissionError(13, "Permission denied", "/cache/hub")

    monkeypatch.setattr("microdit.encoders.model_files.snapshot_download", refuse)
    with pytest.raises(UserError, match=r"owner/name cannot be stored .*/cache/hub.*set HF_HOME to a writable folder"):
        find_folder("owner/name", ["*"])


@pytest.mark.parametrize("name", ["../model.safetensors", "/dev/zero", "", ".", ["model.safetensors"], 7, None])
def test_an_index_names_files_of_its_own_folder_only(tmp_path, name):
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "model-1.safetensors", "b": name}}))
    with pytest.raises(UserError, match="lists no files of its folder"):
        weight_files(tmp_path, "model", ".safetensors")


@pytest.mark.parametrize("files", [["config.json"], {"/dev/zero": "0"}, {"../../config.json": "0"}, "config.json", 7])
def test_a_record_names_files_of_its_own_folder_only(tmp_path, files):
    """Not an endless device, whose checksum would never be computed."""
    save_kl(tmp_path)
    (tmp_path / "record.json").write_text(json.dumps({"files": files}))
    with pytest.raises(UserError, match=r"record\.json does not match the files beside it \(it lists no files of its folder\)"):
        load_autoencoder(str(tmp_path))


def test_a_class_that_is_no_word_is_refused(tmp_path):
    save_kl(tmp_path)
    (tmp_path / "config.json").write_text('{"_class_name": ["AutoencoderKL"]}')
    with pytest.raises(UserError, match="says _class_name"):
        load_autoencoder(str(tmp_path))
    (tmp_path / "config.json").write_text('{"model_type": {}}')
    with pytest.raises(UserError, match="says model_type"):
        load_text_encoder(str(tmp_path))
