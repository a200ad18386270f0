"""Questions about pictures put to a real endpoint on this machine: what is asked of which picture, and what failures leave."""

import base64
import io
import json
import threading

import pytest
from PIL import Image

from microdit.errors import UserError
from microdit.evaluation.dpg.answerers import EndpointAnswerer
from microdit.evaluation.dpg.answers import count_open, cut_grid, evaluate_dpg, find_grid_pictures
from microdit.evaluation.dpg.questions import read_dpg_prompts
from tests.evaluation.chat.chat_server import serving_chat
from tests.evaluation.dpg.bench_folder import write_bench, write_pictures


@pytest.fixture
def bench(tmp_path, monkeypatch):
    monkeypatch.setenv("NO_PROXY", "*")
    prompts = read_dpg_prompts(write_bench(tmp_path / "bench"), pytest.fail)
    return find_grid_pictures(write_pictures(tmp_path, prompts), prompts, pytest.fail)


def blue_of(content: list[dict]) -> int:
    """Which picture a request shows."""
    data = content[1]["image_url"]["url"].partition(",")[2]
    image = Image.open(io.BytesIO(base64.b64decode(data)))
    assert (image.size, image.getcolors()) == ((12, 8), [(96, image.getpixel((0, 0)))])  # one whole picture, and nothing of others
    return image.getpixel((0, 0))[2]


def sees(content: list[dict]) -> str:
    """No cats in picture 1, not two in picture 2, none side by side in picture 3; no room anywhere, and picture 7 is no photo."""
    wrong = {(1, "Are there cats?"), (2, "Are there two cats?"), (3, "Do two black cats sit side by side, close?"), (7, "Is this a photo?")}
    question = content[0]["text"].removesuffix(" Answer with one word: yes or no.")
    if (blue_of(content), question) in wrong or question == "Is there a room?":
        return "No, I see none."
    return "Yes."


def answerer(url: str, **settings: float) -> EndpointAnswerer:
    return EndpointAnswerer(url, "eyes", **{"backoff": 0.001, **settings})


def test_every_question_is_asked_once_of_every_picture(bench, tmp_path):
    with serving_chat(sees) as server:
        summary = evaluate_dpg(bench, answerer(server.url), tmp_path, pytest.fail)
        again = evaluate_dpg(bench, answerer(server.url), tmp_path, pytest.fail)
    assert len(server.messages) == 4 * (4 + 2)
    assert again == summary
    assert summary["score"] == 46.875  # worked out in test_questions.py
    assert (summary["prompts"], summary["pictures"], summary["questions"], summary["unreadable"]) == (2, 8, 24, 0)
    assert (summary["tokens"], summary["judge"]) == (240, "eyes")
    lines = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert lines[0] == {"prompt": "cats7", "score": 0.5625, "pictures": [1.0, 0.0, 0.5, 0.75]}
    assert lines[1] == {"prompt": "room", "score": 0.375, "pictures": [0.5, 0.5, 0.5, 0.0]}


def test_an_endpoint_that_goes_down_leaves_its_answers(bench, tmp_path):
    lock, asked = threading.Lock(), []

    def dies_after_ten(content):
        with lock:
            asked.append(content)
            return sees(content) if len(asked) <= 10 else None

    with serving_chat(dies_after_ten) as server:
        with pytest.raises(UserError, match=r"^The vision model at http.* status 500: .* run the same command again to resume\.$"):
            evaluate_dpg(bench, answerer(server.url, retries=1), tmp_path, pytest.fail)
        assert count_open(bench, "eyes", tmp_path) == 24 - 10
        assert not (tmp_path / "summary.json").exists()
        server.script, server.messages = sees, []
        assert evaluate_dpg(bench, answerer(server.url), tmp_path, pytest.fail)["score"] == 46.875
    assert len(server.messages) == 24 - 10  # what was answered is not paid again


def test_an_endpoint_that_talks_nonsense_is_given_up(bench, tmp_path):
    with serving_chat(lambda content: "Bananas \x1b[2J") as server:
        with pytest.raises(UserError, match=r"eyes answered neither yes nor no to 5 questions in a row, the last time with 'Bananas"):
            evaluate_dpg(bench, answerer(server.url), tmp_path, pytest.fail)
        assert 15 <= len(server.messages) <= 15 + 4 * 3
        server.script, server.messages = sees, []
        assert evaluate_dpg(bench, answerer(server.url), tmp_path, pytest.fail)["score"] == 46.875


def test_now_and_then_nonsense_counts_as_no_and_is_counted(bench, tmp_path):
    with serving_chat(lambda content: "Hm." if "side" in content[0]["text"] else sees(content)) as server:
        summary = evaluate_dpg(bench, answerer(server.url), tmp_path, pytest.fail)
    assert summary["unreadable"] == 4
    assert summary["score"] == 100 * ((0.75 + 0 + 0.5 + 0.75) / 4 + 0.375) / 2


def test_other_pictures_are_another_evaluation(bench, tmp_path):
    with serving_chat(sees) as server:
        evaluate_dpg(bench[:4], answerer(server.url), tmp_path, pytest.fail)
    Image.new("RGB", (24, 16), "green").save(bench[0].grid)
    others = find_grid_pictures(bench[0].grid.parent, [bench[0].prompt], pytest.fail)
    with pytest.raises(UserError, match=r"Line 1 of .* belongs to another evaluation"):
        count_open(others, "eyes", tmp_path)
    assert count_open(others, "other eyes", tmp_path) == 16


def test_grids_without_prompts_and_damaged_ones_are_named(bench, tmp_path):
    prompts = [picture.prompt for picture in bench[::4]]
    bench[4].grid.unlink()
    said: list[str] = []
    assert len(find_grid_pictures(tmp_path / "grids", prompts, said.append)) == 4
    assert said[0].startswith("1 of 2 prompts have no pictures")
    with pytest.raises(UserError, match=r"it needs a 2 x 2 grid for each prompt, such as cats7\.png"):
        find_grid_pictures(tmp_path, prompts, pytest.fail)
    bench[0].grid.write_bytes(b"no PNG")
    with pytest.raises(UserError, match=r"cats7\.png cannot be read as an image"):
        cut_grid(bench[0].grid)
