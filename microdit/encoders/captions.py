"""Captions and prompts: one cleaning for training and for sampling, and what a text encoder leaves unread.

The cleaning names its characters itself, instead of asking Unicode's tables, which grow with every version of Python: what was encoded
for training years ago and what is typed today are cleaned alike.
"""

import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from microdit.errors import UserError

if TYPE_CHECKING:
    from microdit.encoders.text import TextEncoder  # slow to import

MAX_CAPTION = 4000  # characters that are kept; text encoders read 32 to 512 tokens
NAMED_UNREAD = 5  # prompts that are named in warnings of one call

_SPACES = re.compile(r"[\x00-\x20\x7f-\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000]+")  # control characters included
# Soft hyphen, zero-width space, word joiner, byte order mark, marks of the reading direction: they show nothing, but split words into
# other tokens. The joiners U+200C and U+200D stay, since Persian words and composed emoji need them.
_INVISIBLE = re.compile(r"[\xad\u061c\u200b\u200e\u200f\u202a-\u202e\u2060\u2066-\u2069\ufeff]")
_END = re.compile(r"""[.!?\u2026]+["'\u201d\u2019)\]]*(?= )|[\u3002\uff01\uff1f]+[\u300d\u300f\u201d\u2019)]*""")  # of a sentence
_ABBREVIATION = re.compile(
    r"(?:^|[ (\"'])(?:[A-Za-z]|Mr|Mrs|Ms|Dr|Prof|St|Sr|Jr|Mt|No|vs|etc|approx|ca|fig|e\.g|i\.e|U\.S|a\.m|p\.m)\.$", re.IGNORECASE
)
_UNKNOWN = "\U0002a6d4"  # a letter in no vocabulary: its tokens are those of whatever an encoder does not know


def clean_caption(text: str) -> str:
    """Return `text` as one line of at most `MAX_CAPTION` characters.

    Runs of white space and control characters become one space, invisible characters are removed, and lone surrogates, which come from
    terminals and files in another encoding, become question marks.
    """
    whole = text[:MAX_CAPTION].encode("utf-8", "replace").decode("utf-8")
    return _SPACES.sub(" ", _INVISIBLE.sub("", whole)).strip(" ")


def clean_prompts(prompts: Sequence[str]) -> list[str]:
    """Clean every prompt. Raises UserError if there is none."""
    if not prompts:
        raise UserError('There is no prompt: write at least one, for example "red heart".')
    return [clean_caption(prompt) for prompt in prompts]


def first_sentence(caption: str) -> str:
    """Return the first sentence of a cleaned caption; empty if the caption is a single sentence.

    A sentence ends at a full stop, question or exclamation mark that is followed by a space and no small letter, unless it belongs to an
    abbreviation or initial; or at the marks of Chinese and Japanese.
    """
    for match in _END.finditer(caption):
        rest = caption[match.end() :].lstrip(" ")
        if not rest:
            return ""
        if not rest[0].islower() and not _ABBREVIATION.search(caption[: match.end()]):
            return caption[: match.end()]
    return ""


def warn_of_unread(prompts: Sequence[str], encoder: "TextEncoder", warn: Callable[[str], None]) -> None:
    """Pass `warn` a sentence for each cleaned prompt that the encoder cuts, or of which it knows no word; beyond five, their number."""
    unknown = set(encoder.tokenize([_UNKNOWN])[0])
    sentences = [sentence for prompt in dict.fromkeys(filter(None, prompts)) if (sentence := _unread(prompt, encoder, unknown))]
    for sentence in sentences[:NAMED_UNREAD]:
        warn(sentence)
    if len(sentences) > NAMED_UNREAD:
        warn(f"{len(sentences) - NAMED_UNREAD} more of the {len(prompts)} prompts are cut or unknown to it as well.")


def _unread(prompt: str, encoder: "TextEncoder", unknown: set[int]) -> str:
    (ids,) = encoder.tokenize([prompt])
    if len(ids) >= encoder.max_tokens and encoder.tokenize([prompt[:-1]]) == [ids]:
        return f"The prompt {_short(prompt)} is cut: the text encoder {encoder.name} reads {encoder.max_tokens} tokens."
    if set(ids) <= unknown:
        return f"The text encoder {encoder.name} knows no word of the prompt {_short(prompt)}: use words that captions use."
    return ""


def _short(prompt: str) -> str:
    return f'"{prompt}"' if len(prompt) <= 40 else f'"{prompt[:37]}..."'
