"""What `microdit doctor` says of this machine, compared with other ways of asking it."""

import getpass
import importlib.metadata
import platform
import resource
import shutil
import socket
from pathlib import Path

import pytest
import torch

import microdit
from microdit.planning.doctor import TRIED, Finding, examine


@pytest.fixture
def found(tmp_path, monkeypatch):
    """The findings, with caches of our own of 3 and 2 MB and without two optional packages."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path / "hub"))
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    for folder, size in (("cache/microdit/features", 300_000_000), ("hub/models", 2_000_000_000)):
        (tmp_path / folder).mkdir(parents=True)
        with (tmp_path / folder / "file").open("wb") as file:
            file.truncate(size)  # a hole, which takes no room
    there = importlib.metadata.version

    def version(name: str) -> str:
        if name in ("s3fs", "wandb"):
            raise importlib.metadata.PackageNotFoundError(name)
        return there(name)

    monkeypatch.setattr("microdit.planning.doctor.version", version)
    return {finding.topic: finding for finding in examine(tmp_path)}


def test_versions_and_the_build_of_torch_are_those_of_this_process(found):
    assert found["microdit"].fact == microdit.__version__
    assert found["Python"].fact.startswith(platform.python_version())
    assert torch.__version__ in found["torch"].fact
    assert f"diffusers {importlib.metadata.version('diffusers')}" in found["libraries"].fact


def test_disks_caches_and_limits_are_measured(found, tmp_path):
    free = shutil.disk_usage(tmp_path).free / 1e9
    said = float(found["disk here"].fact.partition(" ")[0].replace(",", ""))
    assert said == pytest.approx(free, rel=0.1, abs=1.5)
    assert found["caches"].fact == "microdit 0.3 GB, Hugging Face 2.0 GB"
    soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    assert found["open files"].fact.startswith(f"{soft:,} ")


def test_packages_that_are_missing_are_named_with_their_extra(found):
    assert "s3 (s3fs)" in found["not installed"].fact
    assert "wandb (wandb)" in found["not installed"].fact
    assert "app" in found["extras"].fact.split(", ")
    assert "s3" not in found["extras"].fact.split(", ")


def test_recipes_that_fit_are_those_of_the_memory(found):
    memory = float(found["processors"].fact.rpartition(", ")[2].split()[0])
    fitting = found["fits into memory"].fact.split("; ")
    assert [text.partition(" ")[0] for text in fitting] == [name for name in TRIED if any(text.startswith(name) for text in fitting)]
    assert fitting[0].startswith("emoji-fast (128 at a time")
    assert all(float(text.rpartition(", ")[2].split()[0]) <= memory for text in fitting)
    assert "not yet" in found["measured speed"].fact


def test_nothing_names_the_user_the_machine_a_path_or_a_key(found, tmp_path):
    text = " ".join(f"{finding.topic} {finding.fact} {finding.advice}" for finding in found.values())
    for private in ("hf_secret", str(tmp_path), str(Path.home()), socket.gethostname(), getpass.getuser() + "@"):
        assert private not in text


def test_a_damaged_measurement_is_said_and_ends_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    (tmp_path / "microdit").mkdir()
    (tmp_path / "microdit" / "bench.json").write_text("{")
    last = examine(tmp_path)[-1]
    assert isinstance(last, Finding)
    assert (last.topic, last.fact) == ("measured speed", "unreadable")
    assert "run microdit bench again" in last.advice
