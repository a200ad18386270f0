import pytest

from microdit.errors import UserError
from microdit.pipelines.native import clean_prompt, clean_prompts, warn_of_unread


def test_control_characters_and_halves_of_characters_are_replaced():
    assert clean_prompt(" red\theart\n") == "red heart"
    assert clean_prompt("red\x00heart\x1b[31m") == "red heart [31m"
    assert clean_prompt("caf\udce9") == "caf?"
    assert clean_prompt("\x00 \n") == ""
    assert clean_prompt("❤️ кот 猫 👩‍🚀") == "❤️ кот 猫 👩‍🚀"  # joiners are no control characters
    with pytest.raises(UserError, match="There is no prompt"):
        clean_prompts([])


@pytest.mark.parametrize(
    ("prompt", "sentence"),
    [
        ("red heart", None),
        ("", None),
        ("one " * 30, None),  # with the start and the end just what MiniLM reads
        ("one " * 31, "is cut: the text encoder minilm reads 32 tokens"),
        ("red heart, " * 1000, 'The prompt "red heart, red heart, red heart, red ..." is cut'),
        ("❤️🍕", "knows nothing of the prompt"),
        ("red ❤️", None),
        ("кот", None),
        ("x" * 10_000, "knows nothing of the prompt"),  # a word that long is unknown as a whole
    ],
)
def test_what_the_encoder_does_not_read_is_said(text_encoder, prompt, sentence):
    told = []
    warn_of_unread([prompt.strip()], text_encoder, told.append)
    assert len(told) == (sentence is not None)
    if sentence:
        assert sentence in told[0]
