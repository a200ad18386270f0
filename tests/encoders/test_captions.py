import sys
import unicodedata

import pytest

from microdit.data.sources.base import Part, Record, checked
from microdit.data.sources.builtin import emoji_source
from microdit.encoders.captions import MAX_CAPTION, clean_caption, clean_prompts, first_sentence, warn_of_unread
from microdit.errors import UserError


def as_training_data(caption: str) -> str:
    (record,) = checked([Record("1", {"caption": caption}, b"")], ["caption"])
    return record.captions.get("caption", "")


def test_control_characters_and_lone_surrogates_are_replaced():
    assert clean_caption(" red\theart\n") == "red heart"
    assert clean_caption("red\x00heart\x1b[31m") == "red heart [31m"
    assert clean_caption("caf\udce9") == "caf?"
    assert clean_caption("\x00 \n") == ""
    assert clean_caption("red \u2003\u2028 heart") == "red heart"
    assert clean_caption("x" * 10_000) == "x" * MAX_CAPTION
    with pytest.raises(UserError, match="There is no prompt"):
        clean_prompts([])


@pytest.mark.parametrize(
    ("caption", "cleaned"),
    [
        ("❤️ кот 猫 👩\u200d🚀", "❤️ кот 猫 👩\u200d🚀"),
        ("می\u200cخواهم", "می\u200cخواهم"),
        ("beau\u00adti\u200bful \u200fcat\ufeff", "beautiful cat"),
        ("\U0001fae9 face", "\U0001fae9 face"),  # an emoji of Unicode 16, which Python 3.11 to 3.13 call unassigned
        ("\ue000 \U000e0041", "\ue000 \U000e0041"),
    ],
)
def test_joiners_stay_and_invisible_characters_are_removed(caption, cleaned):
    assert clean_caption(caption) == as_training_data(caption) == cleaned


def test_unassigned_characters_are_all_cleaned_alike():
    """What one version of Python calls unassigned, a later one calls a letter: both keep it."""
    unassigned = [chr(code) for code in range(0x3000, sys.maxunicode + 1, 97) if unicodedata.category(chr(code)) == "Cn"]
    assert len(unassigned) > 100
    assert all(clean_caption(f"a{character}b") == f"a{character}b" for character in unassigned)


def test_every_caption_of_the_emoji_stays_as_it_is():
    captions = [caption for split in ("train", "held_out") for part in emoji_source(split).parts for caption in captions_of(part)]
    assert len(captions) > 1900
    assert [clean_caption(caption) for caption in captions] == captions


def captions_of(part: Part) -> list[str]:
    return [caption for record in part.records() for caption in record.captions.values()]


@pytest.mark.parametrize(
    ("prompt", "sentence"),
    [
        ("red heart", None),
        ("", None),
        ("one " * 30, None),  # with the start and the end just what MiniLM reads
        ("one " * 31, "is cut: the text encoder minilm reads 32 tokens"),
        ("red heart, " * 1000, 'The prompt "red heart, red heart, red heart, red ..." is cut'),
        ("❤️🍕", "knows no word of the prompt"),
        ("red ❤️", None),
        ("кот", None),
        ("x" * 10_000, "knows no word of the prompt"),  # a word that long is unknown as a whole
    ],
)
def test_what_the_encoder_does_not_read_is_said(text_encoder, prompt, sentence):
    told = []
    warn_of_unread([clean_caption(prompt)], text_encoder, told.append)
    assert len(told) == (sentence is not None)
    if sentence:
        assert sentence in told[0]


def test_many_prompts_that_are_cut_are_counted(text_encoder):
    told = []
    warn_of_unread([f"{number} " + "one " * 40 for number in range(12)], text_encoder, told.append)
    assert len(told) == 6
    assert told[-1] == "7 more of the 12 prompts are cut or unknown to it as well."


@pytest.mark.parametrize(
    ("caption", "sentence"),
    [
        ("A cat. It sleeps.", "A cat."),
        ("Is it a cat? No, an owl!", "Is it a cat?"),
        ('He says "stop!" Then he goes.', 'He says "stop!"'),
        ("Dr. Who and J. Smith meet on St. Mary's Mt. Hope. They talk.", "Dr. Who and J. Smith meet on St. Mary's Mt. Hope."),
        ("A cat, e.g. a red one, approx. 3.5 kg. It sleeps.", "A cat, e.g. a red one, approx. 3.5 kg."),
        ("Wait... what is it? An owl.", "Wait... what is it?"),
        ("一只猫。它在睡觉。", "一只猫。"),
        ("Кот спит. Сова нет.", "Кот спит."),
        ("A cat.", ""),
        ("red heart", ""),
        ("", ""),
        ("www.example.com shows a cat", ""),
    ],
)
def test_the_first_sentence_of_a_caption(caption, sentence):
    assert first_sentence(caption) == sentence
