"""Prompts as people type them, made fit for a text encoder.

- Control characters, which no caption has, become spaces; halves of characters, from a terminal in another encoding, question marks.
- An empty prompt stands for the empty caption that models are trained with: the picture may be of anything.
- What is longer than the text encoder reads is cut, and said so; so is a prompt of which it knows no word.
"""

import unicodedata
from collections.abc import Callable

from microdit.encoders.text import TextEncoder
from microdit.errors import UserError

RARE = "\U0002a6d4"  # a letter that no vocabulary has: what an encoder makes of it, it makes of all that it does not know


def clean_prompt(prompt: str) -> str:
    """`prompt` without control characters and halves of characters, and without space around it."""
    whole = prompt.encode("utf-8", "replace").decode("utf-8")
    return "".join(" " if unicodedata.category(c) == "Cc" else c for c in whole).strip()


def clean_prompts(prompts: list[str]) -> list[str]:
    """Each of them cleaned. Raises UserError if there is none."""
    if not prompts:
        raise UserError('There is no prompt: write at least one, for example "red heart".')
    return [clean_prompt(prompt) for prompt in prompts]


def warn_of_unread(prompts: list[str], encoder: TextEncoder, warn: Callable[[str], None]) -> None:
    """A sentence to `warn` for each cleaned prompt that the encoder does not read to its end, or of which it knows no word."""
    unknown = set(encoder.tokenize([RARE])[0])
    for prompt in dict.fromkeys(filter(None, prompts)):
        (ids,) = encoder.tokenize([prompt])
        if len(ids) >= encoder.max_tokens and encoder.tokenize([prompt[:-1]]) == [ids]:
            warn(f"The prompt {_short(prompt)} is cut: the text encoder {encoder.name} reads {encoder.max_tokens} tokens.")
        elif set(ids) <= unknown:
            warn(f"The text encoder {encoder.name} knows nothing of the prompt {_short(prompt)}: write it in words that captions use.")


def _short(prompt: str) -> str:
    return f'"{prompt}"' if len(prompt) <= 40 else f'"{prompt[:37]}..."'
