"""`evaluate --watch` looks at a folder from which a training deletes."""

import pytest

from microdit.distributed import start_world
from microdit.evaluation.generators import ON_CPU, DrawSettings
from microdit.evaluation.watch import next_checkpoint, open_watched
from tests.test_checkpoint import write, write_in_haste
from tests.training.untrained import save_untrained


def test_vanished_checkpoints_are_no_error_and_damaged_ones_are_named(tmp_path):
    said = []
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    (folder / "step-00000001").symlink_to(tmp_path / "gone")  # listed, and not there any more
    assert next_checkpoint(tmp_path, tmp_path, None, pytest.fail) is None
    (write(tmp_path, 2) / "state.json").write_text("{")
    (write(tmp_path, 3) / "ema.safetensors").write_bytes(b"")
    assert next_checkpoint(tmp_path, tmp_path, None, said.append) is None
    assert [sentence.partition(" (")[0].rpartition("/")[2] for sentence in said] == ["step-00000002 is damaged", "step-00000003 is damaged"]
    write_in_haste(tmp_path, 4)
    assert next_checkpoint(tmp_path, tmp_path, None, said.append).step == 4


def test_a_checkpoint_that_vanishes_before_it_is_opened_is_passed_over(tmp_path, encoded_emoji):
    save_untrained(tmp_path, encoded_emoji, 1)
    checkpoint = next_checkpoint(tmp_path, tmp_path, None, pytest.fail)
    checkpoint.folder.rename(tmp_path / "gone")
    assert open_watched(tmp_path, checkpoint, DrawSettings(), start_world("cpu"), ON_CPU) is None


@pytest.mark.parametrize("content", ["", "{", "[]", '{"metrics": 3}', "[" * 100_000])
def test_a_damaged_evaluation_counts_as_none(tmp_path, content):
    write(tmp_path, 1)
    (tmp_path / "step-00000001").mkdir()
    result = tmp_path / "step-00000001" / "metrics.json"
    result.write_text('{"metrics": {}}')
    assert next_checkpoint(tmp_path, tmp_path, None, pytest.fail) is None
    result.write_text(content)
    assert next_checkpoint(tmp_path, tmp_path, None, pytest.fail).step == 1
