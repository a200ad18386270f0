"""Files of prompts as people have them."""

import json

import pytest

from microdit.errors import UserError
from microdit.evaluation.generators import read_prompt_file
from tests.data.pictures import write_file


@pytest.mark.parametrize(
    ("name", "content", "prompts"),
    [
        ("p.txt", b"red heart\r\nowl\n\n", ["red heart", "owl"]),
        ("p.txt", b"\xef\xbb\xbfred heart\nowl\n", ["red heart", "owl"]),
        ("p.txt", "red heart\nowl\n".encode("utf-16"), ["red heart", "owl"]),
        ("p.txt", "red\u2028heart\nowl\x85x\x0by\n".encode(), ["red\u2028heart", "owl\x85x\x0by"]),
        ("p.txt", b"[style] owl\n{curly}\n", ["[style] owl", "{curly}"]),
        ("p.txt", b'{"prompt": "red"}\n{"prompt": "owl"}\n', ["red", "owl"]),
        ("p.jsonl", b'\xef\xbb\xbf{"prompt": "red"}\n', ["red"]),
        ("p.JSONL", '{"prompt": "red\u2028heart"}\n{"prompt": "owl"}\n'.encode(), ["red\u2028heart", "owl"]),
        ("p.json", b'[\n"red heart",\n{"prompt": "owl"}\n]\n', ["red heart", "owl"]),
        ("p.json", b'{"prompt": "red"}\n{"prompt": "owl"}\n', ["red", "owl"]),
        ("p.ndjson", b'{"prompt": " red "}\n', ["red"]),
    ],
)
def test_prompts_are_read_as_what_they_are(tmp_path, name, content, prompts):
    assert read_prompt_file(write_file(tmp_path / name, content)) == prompts


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("p.jsonl", b'{"prompt": "red"}\n{"prompt": null}\n', r'line 2 of .*p.jsonl must be a JSON object with a key "prompt"'),
        ("p.jsonl", b'{"prompt": ["a"]}\n', "line 1 of"),
        ("p.jsonl", b'{"caption": "a"}\n', "line 1 of"),
        ("p.json", b'["red", 5]', "item 2 of"),
        ("p.json", b'{\n"prompt": "red"\n}\n', "line 1 of"),
        ("p.txt", "red\nowl\n".encode("utf-16-le"), "cannot be read: .*null characters, as UTF-16 does.* Save it as UTF-8"),
        ("p.txt", b"f\xfcr\n", "cannot be read"),
        ("p.csv", b"prompt,seed\nred heart,1\n", "p.csv is no file of prompts"),
        ("p.txt", b" \n", "contains no prompts"),
    ],
)
def test_what_is_no_prompt_is_refused_with_its_place(tmp_path, name, content, sentence):
    with pytest.raises(UserError, match=sentence):
        read_prompt_file(write_file(tmp_path / name, content))


def test_what_a_set_of_pictures_wrote_is_read_again(tmp_path):
    prompts = ["red heart", 'an "owl"', "für"]
    content = "".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts).encode()
    assert read_prompt_file(write_file(tmp_path / "prompts.jsonl", content)) == prompts
