"""Names, sources and prompts of other people in a model card: text, and nothing else."""

import ast
import subprocess
from html.parser import HTMLParser
from typing import Any

import pytest
from markdown_it import MarkdownIt

from microdit.pipelines.model_card import card_of_official, card_of_run, usage

HOSTILE = "<img src=x onerror=alert(1)> [a](javascript:b) `c` | **d** $e$ \x1b[2J\u202e &lt;"
PROMPTS = [
    "red heart",
    '"$(touch x)"',
    "`touch x`; touch x",
    "it's $HOME\\",
    "two\nlines; touch x\n\n# title",
    "--out=/x",
    "-h",
    "!! <b>猫</b> \x1b \u202e",
    "",
]


class Tags(HTMLParser):
    """The tags of a page, and its text by the innermost tag."""

    def __init__(self, page: str):
        super().__init__()
        self.tags: list[str] = []
        self.open: list[str] = []
        self.text: dict[str, str] = {}
        self.feed(page)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.open += [tag] if tag not in ("hr", "br", "img") else []

    def handle_endtag(self, tag: str) -> None:
        self.open.pop()

    def handle_data(self, data: str) -> None:
        place = self.open[-1] if self.open else ""
        self.text[place] = self.text.get(place, "") + data


def shown(card: str) -> Tags:
    return Tags(MarkdownIt("commonmark", {"html": True}).enable("table").render(card.partition("\n---\n")[2]))


def record_of(text: str) -> dict[str, Any]:
    encoder = {"name": text}
    return {
        "name": text, "step": 6, "parameters": 10, "device": text, "weights": "ema", "dtype": "float32", "git_commit": text,
        "sets": {text: {"rows": 3, "source": text, "license": text}},
        "data": {"resolution": 64, "autoencoder": encoder, "text_encoder": encoder},
        "figures": {"reference": {"metrics": {text: {"value": 1.0, "network": text}}, "pictures": 3, "reference": {"source": text}}},
        "recipe": {"name": text, "record": {"sample_prompts": [text]}, "notes": f"```\n\n{text}\n~~~\n````\n"},
    }  # fmt: skip


@pytest.mark.parametrize("hostile", [HOSTILE, f"</code></pre>{HOSTILE}\n\n# {HOSTILE}\n```"])
def test_text_of_others_is_shown_as_it_is_and_is_no_markup(hostile):
    plain, found = shown(card_of_run("model", record_of("word"))), shown(card_of_run(hostile, record_of(hostile)))
    assert found.tags == plain.tags
    assert found.text["h1"].startswith(hostile[:28])
    assert found.text["td"].count(hostile[:28]) == plain.text["td"].count("word")
    assert "\x1b" not in str(found.text)
    assert "\u202e" not in str(found.text)


def test_the_card_of_the_authors_weights_shows_file_names_as_they_are():
    record = dict.fromkeys(
        ("file", "sha256", "parameters", "latent_channels", "latent_size", "dtype", "text_encoder", "autoencoder"), HOSTILE
    )
    found, plain = shown(card_of_official(HOSTILE, record)), shown(card_of_official("name", dict.fromkeys(record, "word")))
    assert found.tags == plain.tags
    assert found.text["td"].count("<img src=x") == 8


def argument_of(line: str, start: str) -> str:
    return ast.literal_eval(line.removeprefix(start).split(")  #")[0].split(", guidance_scale")[0])


@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize("name", ["my-model", "-$(touch x) it's"])
def test_the_lines_of_code_may_be_pasted_whatever_the_prompt(tmp_path, prompt, name):
    lines = [line.strip() for line in usage(name, prompt, 2.0).splitlines() if line.startswith("    ")]
    wanted = " ".join(prompt.split())
    _, load, draw, command = [line for line in lines if line]
    assert argument_of(load, "pipeline = MicroDiTPipeline.from_pretrained(") == name
    assert argument_of(draw, "pipeline(") == wanted
    listing = 'microdit() { printf "%s\\n" "$@"; }\n' + command
    done = subprocess.run(["sh", "-c", listing], cwd=tmp_path, capture_output=True, text=True, check=True)
    words = done.stdout.split("\n")[:-1]
    at = words.index(name)
    assert words[0] == "sample"
    assert words[at + 1] == wanted.replace("\x1b", "\\u001b").replace("\u202e", "\\u202e")
    assert at == 1 or words[at - 1] == "--"
    assert at > 1 or not words[at + 1].startswith("-")
    assert list(tmp_path.iterdir()) == []
