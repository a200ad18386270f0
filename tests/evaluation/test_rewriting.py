"""Prompts rewritten by a real endpoint on this machine, and by a tiny language model of transformers."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from microdit.errors import UserError
from microdit.evaluation.rewriting import INSTRUCTIONS, EndpointRewriter, open_rewriter, read_prompt, rewrite
from tests.encoders.tiny_models import save_bert, save_language_model
from tests.evaluation.chat.chat_server import serving_chat


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "*")


def longer(content: list[dict]) -> str:
    return f'Caption: "A detailed picture of {content[0]["text"].rpartition("Prompt: ")[2]},\nin soft light."'


def test_each_prompt_is_asked_once_and_never_paid_again(tmp_path):
    prompts, done = ["red heart", "owl", "", "red heart"], []
    heart, owl = ("A detailed picture of red heart, in soft light.", "A detailed picture of owl, in soft light.")
    with serving_chat(longer) as server:
        rewriter = open_rewriter(server.url, "words")
        for _ in range(2):
            assert rewrite(prompts, rewriter, tmp_path / "requests.jsonl", pytest.fail, done.append) == [heart, owl, "", heart]
        assert sorted(message[0]["text"] for message in server.messages) == [INSTRUCTIONS.format(prompt=p) for p in ("owl", "red heart")]
        assert len(done) == 4
        with pytest.raises(UserError, match="belongs to another rewriting"):
            rewrite(prompts[:1], rewriter, tmp_path / "requests.jsonl", pytest.fail, done.append)
        assert rewrite(["owl"], rewriter, None, pytest.fail, done.append) == [owl]


def test_an_endpoint_that_fails_or_writes_no_prompt_is_one_sentence(tmp_path):
    with serving_chat(lambda content: None) as server:
        broken = EndpointRewriter(server.url, "words", retries=1, backoff=0.001)
        with pytest.raises(UserError, match=r"The language model at http.* status 500"):
            rewrite(["owl"], broken, None, pytest.fail, lambda _: None)
        server.script, server.messages = lambda content: "<think>An owl.</think>...", []
        with pytest.raises(UserError, match=r"words made no prompt of 'owl', but answered '<think>An owl.</think>\.\.\.'"):
            rewrite(["owl"], broken, tmp_path / "log", pytest.fail, lambda _: None)
        assert len(server.messages) == 3
        server.script = longer
        assert rewrite(["owl"], broken, tmp_path / "log", pytest.fail, lambda _: None) == ["A detailed picture of owl, in soft light."]


@pytest.mark.parametrize("template", [None, "{{ messages[0]['content'] }} picture"])
def test_a_local_model_writes_the_most_probable_tokens(tmp_path, template):
    """The words, by a naive loop over whole forward passes."""
    save_language_model(tmp_path / "qwen3", "qwen3")
    settings = json.loads((tmp_path / "qwen3" / "tokenizer_config.json").read_text())
    if template:
        (tmp_path / "qwen3" / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": template}))
    new = rewrite(["red cat"], open_rewriter(str(tmp_path / "qwen3"), None), None, pytest.fail, lambda _: None)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "qwen3").eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "qwen3")
    request = INSTRUCTIONS.format(prompt="red cat") + (" picture" if template else "")
    ids = tokenizer(request)["input_ids"]
    start = len(ids)
    for _ in range(160):
        with torch.no_grad():
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    assert new == [read_prompt(tokenizer.decode(ids[start:]))]
    assert len(new[0].split()) > 10


def test_what_names_no_model_is_refused(tmp_path):
    save_bert(tmp_path / "bert")
    for place, model, sentence in (
        ("http://localhost:1/v1", None, "name its model with --rewrite-model"),
        (str(tmp_path / "bert"), "words", "is no address: leave one of the two out"),
        (str(tmp_path / "nowhere"), None, "There is no folder"),
        ("ftp://x", None, "There is no folder"),
        ("http://me:secret@x/v1", "words", "The language model's address must look like"),
    ):
        with pytest.raises(UserError, match=sentence):
            open_rewriter(place, model)


def test_a_model_that_writes_nothing_is_refused(tmp_path):
    from transformers import T5Config, T5EncoderModel

    T5EncoderModel(T5Config(vocab_size=8, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)).save_pretrained(tmp_path / "t5")
    with pytest.raises(UserError, match="of the type t5, which writes no text"):
        open_rewriter(str(tmp_path / "t5"), None)


@pytest.mark.parametrize(
    ("answer", "prompt"),
    [
        ("A cat.", "A cat."),
        ('<think>Hm.\n</think>\n"A cat\u200b,\x1b asleep."', "A cat, asleep."),
        ("Prompt: “Two 'red' cats”", "Two 'red' cats"),
        ("**", None),
        ("", None),
        ("cat " * 501, None),
    ],
)
def test_prompts_are_read_from_answers(answer, prompt):
    assert read_prompt(answer) == prompt
