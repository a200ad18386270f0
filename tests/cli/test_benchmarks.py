"""microdit dpg, and prompts rewritten for geneval and sample, as a person runs them, with an endpoint on this machine."""

import json

import numpy as np
import pytest
from PIL import Image

from tests.commands import microdit
from tests.evaluation.chat.chat_server import serving_chat
from tests.evaluation.dpg.bench_folder import write_bench

EVIL = "a heart \x1b[2J\u202e[/b]"


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "*")


def test_dpg_draws_asks_and_scores(workplace):
    write_bench(workplace / "bench")
    command = ["dpg", "runs/tiny", "--prompts", "bench", "--out", "dpg", "--steps", 2, "--judge", "eyes"]
    with serving_chat(lambda content: "yes" if "photo" in content[0]["text"] else "no") as server:
        refused = microdit(*command, "--judge-url", server.url, "--dollars-per-million", 2, cwd=workplace)
        assert "24 questions to eyes, about 9,720 tokens, about $0.02. Go on?" in refused.output
        assert server.messages == []
        done = microdit(*command, "--judge-url", server.url, "--yes", cwd=workplace)
        assert done.returncode == 0, done.output
        assert len(server.messages) == 24
    summary = json.loads((workplace / "dpg" / "summary.json").read_text())
    assert (summary["score"], summary["categories"]["global"]) == (25.0, 100.0)
    grid = Image.open(workplace / "dpg" / "grids" / "cats7.png")
    pictures = [Image.open(workplace / "dpg" / "pictures" / "cats7" / f"{number}.png") for number in range(4)]
    assert grid.size == (128, 128)
    assert [np.array_equal(grid.crop((x, y, x + 64, y + 64)), picture) for (x, y), picture in zip(
        ((0, 0), (64, 0), (0, 64), (64, 64)), pictures, strict=True
    )] == [True] * 4  # fmt: skip
    assert not np.array_equal(pictures[0], pictures[1])
    down = microdit(*command, "--judge-url", server.url, "--yes", cwd=workplace)
    assert down.returncode == 0  # everything is answered: nobody is asked
    unnamed = microdit(*command[:-2], "--judge-url", server.url, cwd=workplace)
    assert "name its model with --judge" in unnamed.output


def test_sample_says_what_it_asked_and_what_it_draws_instead(workplace):
    with serving_chat(lambda content: EVIL if content[0]["text"].endswith("red heart") else "an owl at night") as server:
        options = ["--rewrite", server.url, "--rewrite-model", "words", "--steps", 2, "-n", 2]
        done = microdit("sample", "runs/tiny", "red heart", "owl", *options, "--out", "drawn", cwd=workplace)
    assert done.returncode == 0, done.output
    assert len(server.messages) == 2
    assert "Asking words for each prompt: Rewrite this prompt" in done.output
    assert "red heart is drawn as: a heart [2J[/b]" in done.output
    assert "owl is drawn as: an owl at night" in done.output
    assert "\x1b" not in done.output
    about = Image.open(workplace / "drawn" / "0002.png").info
    assert (about["asked"], about["prompt"], about["rewritten_by"]) == ("owl", "an owl at night", "words")
    plain = microdit("sample", "runs/tiny", "an owl at night", "--steps", 2, "--seed", 2, "--out", "plain", cwd=workplace)
    assert plain.returncode == 0
    assert np.array_equal(Image.open(workplace / "plain" / "0000.png"), Image.open(workplace / "drawn" / "0002.png"))
    assert "asked" not in Image.open(workplace / "plain" / "0000.png").info


@pytest.mark.slow  # the emoji detector looks at 12 pictures
def test_geneval_of_rewritten_prompts_is_reported_apart(workplace):
    command = ["geneval", "runs/tiny", "--per-task", 1, "--per-prompt", 1, "--steps", 2, "--out", "geneval-both"]
    assert microdit(*command, cwd=workplace).returncode == 0
    with serving_chat(lambda content: "Nicely: " + content[0]["text"].rpartition("Prompt: ")[2]) as server:
        done = microdit(*command, "--rewrite", server.url, "--rewrite-model", "words", cwd=workplace)
    assert done.returncode == 0, done.output
    plain, rewritten = (json.loads((workplace / "geneval-both" / f / "summary.json").read_text()) for f in ("", "rewritten"))
    assert rewritten["prompts_rewritten_by"] == "words"
    assert "prompts_rewritten_by" not in plain
    lines = [json.loads(line) for line in (workplace / "geneval-both" / "rewritten" / "prompts.jsonl").read_text().splitlines()]
    drawn = [json.loads(line)["prompt"] for line in (workplace / "geneval-both" / "rewritten" / "pictures" / "prompts.jsonl").open()]
    judged = [json.loads(line)["prompt"] for line in (workplace / "geneval-both" / "rewritten" / "results.jsonl").open()]
    assert drawn == [f"Nicely: {prompt}" for prompt in judged] == [line["drawn"] for line in lines]
    assert judged == [line["asked"] for line in lines]
