"""Find models of the hub without a network, in the cache of earlier downloads."""

import shutil

import pytest
from huggingface_hub import constants

from microdit.encoders.autoencoder import load_autoencoder
from microdit.encoders.model_files import find_folder
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
        with pytest.raises(UserError, match=r"the model .* could not be downloaded"):
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
