import os

import pytest
from PIL import Image

from microdit.distributed import start_world
from microdit.errors import UserError
from microdit.evaluation.generators import DrawSettings, draw_pictures, read_prompt_file
from microdit.io.locks import sole_writer

SETTINGS = DrawSettings(num_inference_steps=2)


class Grey:
    """A generator of one grey."""

    about, batch = {"run": "grey"}, 2

    def __call__(self, prompts, seed, on_step=None):
        return [Image.new("RGB", (2, 2), (seed, seed, seed)) for _ in prompts]


def test_a_folder_in_which_another_program_draws_is_refused(tmp_path):
    world = start_world("cpu")
    with sole_writer(tmp_path), pytest.raises(UserError, match=f"is in use by process {os.getpid()} on"):
        draw_pictures(Grey(), ["owl"], tmp_path, SETTINGS, world)
    assert not list(tmp_path.iterdir())
    draw_pictures(Grey(), ["owl", "cat", "dog"], tmp_path, SETTINGS, world)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0000.png", "0001.png", "0002.png", "prompts.jsonl", "settings.json"]


@pytest.mark.parametrize("content", [b"", b"{", b"3", b"\xff", b"[" * 100_000])
def test_damaged_settings_are_a_sentence(tmp_path, content):
    (tmp_path / "settings.json").write_bytes(content)
    with pytest.raises(UserError, match=r"settings.json is damaged, so it is unknown how the images beside it were generated"):
        draw_pictures(Grey(), ["owl"], tmp_path, SETTINGS, start_world("cpu"))


@pytest.mark.parametrize("line", ['{"prompt": 5}', '{"prompt": ["owl"]}', '{"prompt": null}', '["owl"]', "owl", "[" * 100_000])
def test_a_prompt_that_is_no_text_is_refused(tmp_path, line):
    file = tmp_path / "prompts.jsonl"
    file.write_text(f'{{"prompt": "owl"}}\n{line}\n')
    with pytest.raises(UserError, match=f'The line 2 of {file} must be a JSON object with a key "prompt"'):
        read_prompt_file(file)
