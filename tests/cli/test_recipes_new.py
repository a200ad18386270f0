"""`microdit new`, and the commands that it prints, run as they are printed."""

import re
import shlex

import pytest

from tests.commands import microdit
from tests.python_examples import own_pictures


def test_the_printed_commands_lead_from_pictures_to_a_model(tmp_path):
    own_pictures(tmp_path / "my pictures", 12)
    done = microdit("new", "my pictures", "--hold-out", "3", "--chip", "rtx4090", cwd=tmp_path)
    assert done.returncode == 0, done.output
    encode, train, sample, evaluate = map(shlex.split, done.output.split("Next: microdit ")[1].split(" microdit "))
    encoded = microdit(*encode, cwd=tmp_path)
    assert encoded.returncode == 0, encoded.output
    assert "9 to train on + 3 held out + 0 rejected = 12 records" in encoded.output
    short = ["phases.0.steps=2", "phases.0.batch_size=4", "record.sample_steps=2", "record.held_out_every=1"]
    trained = microdit(*train, *short, cwd=tmp_path)
    assert trained.returncode == 0, trained.output
    assert "held_out_loss" in (tmp_path / "runs" / "my-pictures" / "metrics.jsonl").read_text()
    assert f"microdit {shlex.join(sample)}" in trained.output
    assert microdit(*sample, "--steps", "2", cwd=tmp_path).returncode == 0
    assert evaluate == ["evaluate", "runs/my-pictures"]
    again = microdit("new", "data/my-pictures", cwd=tmp_path)
    assert again.returncode == 1
    assert "my-pictures.yaml exists already: name another file with --out" in again.output


@pytest.mark.slow
def test_this_machine_is_measured_where_no_chip_is_named(tmp_path):
    own_pictures(tmp_path / "mine", 12)
    done = microdit("new", "mine", cwd=tmp_path)
    assert done.returncode == 0, done.output
    assert re.search(r"Training sees 102,400 pictures and takes about .* on this machine: .* pictures a second, measured for", done.output)


def test_a_named_chip_is_billed(tmp_path):
    own_pictures(tmp_path / "mine", 12)
    done = microdit("new", "mine", "--chip", "rtx4090", "--out", "recipes/x.yaml", cwd=tmp_path)
    assert done.returncode == 0, done.output
    assert "2.0 M parameters, on 1 x RTX 4090" in done.output
    assert "12 images take" in done.output
    assert "microdit train recipes/x.yaml" in done.output
