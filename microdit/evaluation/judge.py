"""A vision-language model as the judge of two pictures, behind any endpoint that speaks OpenAI's chat completions.

- The key comes from MICRODIT_JUDGE_KEY or OPENAI_API_KEY and goes nowhere but into the request's header.
- What passes by itself (busy, broken or slow servers) is tried again; what does not is one sentence.
- The standard library's client does: one small request at a time and thread.
"""

import base64
import email.utils
import http.client
import json
import os
import random
import re
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from microdit.errors import UserError
from microdit.evaluation.preference import Choice, Preference, Question, Reply, Verdict, VerdictFile

INSTRUCTIONS = """Two pictures, A and B, were made for this prompt:

{prompt}

Which picture follows the prompt better and looks better? Following the prompt counts more. The order in which they are shown \
means nothing. If neither is better, it is a TIE. Answer with a single word: A, B or TIE."""
REMINDER = "\n\nWrite one of these three words and nothing else."
ASKS = 3  # times in all that a question is asked while the answer is nonsense
LONGEST_WAIT = 600.0  # seconds that a server may ask to wait before it is given up
TEXT_TOKENS = 150  # of the instructions with a prompt and the answer, for the estimate


def judge_all(
    file: VerdictFile,
    ask: Callable[[str, Path, Path], Reply],
    concurrency: int = 4,
    on_verdict: Callable[[Verdict], None] | None = None,
) -> Preference:
    """`ask` (such as a VisionJudge) all that is still open in `file`, `concurrency` questions at a time; say what it comes to.

    After a failure no question is begun, but the answers under way are awaited and kept. Raises what `ask` raises, and
    UserError if no pair got clear verdicts.
    """

    def answer(question: Question) -> Verdict | None:
        return file.add(question, ask(question.pair.prompt, *question.pictures()))

    with ThreadPoolExecutor(concurrency) as threads:
        futures = [threads.submit(answer, question) for question in file.waiting()]
        try:
            for future in as_completed(futures):
                verdict = future.result()
                if verdict is not None and on_verdict is not None:
                    on_verdict(verdict)
        except BaseException:
            threads.shutdown(cancel_futures=True)
            raise
    return file.preference()


@dataclass(frozen=True)
class Estimate:
    """What a comparison will ask for. `dollars` is None without a price."""

    requests: int
    images: int
    tokens: int
    dollars: float | None


def estimate(pairs: int, size: int, dollars_per_million: float | None = None) -> Estimate:
    """Of `pairs` with pictures of `size` x `size` pixels, in both orders, each answered at once.

    A picture counts 85 tokens and 170 for each tile of 512 pixels, after it is shrunk to 768, as many models count; others
    differ by a factor of two or so.
    """
    tiles = (-(-min(size, 768) // 512)) ** 2
    requests = 2 * pairs
    tokens = requests * (2 * (85 + 170 * tiles) + TEXT_TOKENS)
    return Estimate(requests, 2 * requests, tokens, None if dollars_per_million is None else tokens * dollars_per_million / 1e6)


def key_from_environment() -> str:
    """Empty if there is none, which is right for servers of one's own. Raises UserError for one that no header can carry."""
    key = (os.environ.get("MICRODIT_JUDGE_KEY") or os.environ.get("OPENAI_API_KEY") or "").strip()
    if not re.fullmatch(r"[!-~]*", key):
        raise UserError("The key in MICRODIT_JUDGE_KEY or OPENAI_API_KEY has spaces or odd characters in it: copy it again.")
    return key


@dataclass(frozen=True)
class VisionJudge:
    """`judge(prompt, first, second)` says which PNG file is better, by `model` at `base_url` (the API's root, such as .../v1).

    `timeout` is the seconds that a server may be silent. A request is tried again `retries` times: after `backoff` seconds, then
    twice as long each time, give or take a half; or after as long as the server asks. Raises UserError for an address that is none.
    """

    base_url: str
    model: str
    timeout: float = 120.0
    retries: int = 6
    backoff: float = 1.0
    _key: str = field(default_factory=key_from_environment, repr=False)

    def __post_init__(self) -> None:
        if not re.fullmatch(r"https?://([\w.-]+|\[[\da-f:.]+\])(:\d{1,5})?(/[!-~]*)?", self.base_url, re.ASCII | re.IGNORECASE):
            raise UserError("The judge's address must look like https://api.openai.com/v1 or http://localhost:8000/v1, without a password.")

    def __call__(self, prompt: str, first: Path, second: Path) -> Reply:
        """An answer that is none is asked for again, twice; then the choice is "unclear".

        Raises UserError if the endpoint is down, the key is wrong, the model is unknown, or the request is refused.
        """
        answer, tokens = "", 0
        for attempt in range(ASKS):
            text = INSTRUCTIONS.format(prompt=json.dumps(prompt, ensure_ascii=False)) + (REMINDER if attempt else "")
            answer, used = self._complete(text, first.read_bytes(), second.read_bytes())
            tokens += used
            choice = read_choice(answer)
            if choice is not None:
                return Reply(choice, answer, tokens)
        return Reply("unclear", answer, tokens)

    def _complete(self, text: str, first: bytes, second: bytes) -> tuple[str, int]:
        """The answer's words, and the tokens that it cost."""
        content = [_text(text), _text("Picture A:"), _image(first), _text("Picture B:"), _image(second)]
        body = json.dumps({"model": self.model, "messages": [{"role": "user", "content": content}]}).encode()
        trouble, wait = "", 0.0
        for attempt in range(self.retries + 1):
            if attempt:
                time.sleep(wait)
            wait = self.backoff * 2**attempt * random.uniform(0.5, 1.5)
            try:
                return self._read(self._post(body))
            except urllib.error.HTTPError as error:
                trouble = self._explain(error)
                if error.code not in (408, 429) and error.code < 500:
                    raise UserError(trouble) from None
                wait = _retry_after(error.headers.get("Retry-After"), wait)
                if wait > LONGEST_WAIT:
                    raise UserError(f"{trouble} It asks to wait {wait:.0f} seconds: run the same command again after that.") from None
            except (OSError, http.client.HTTPException, ValueError) as error:  # ValueError: an answer that is no completion
                trouble = f"The judge at {self.base_url} cannot be reached or breaks off: {self._cut(_reason(error))}."
        raise UserError(f"{trouble} Given up after {self.retries + 1} tries: run the same command again, it goes on where it was.")

    def _post(self, body: bytes) -> bytes:
        headers = {"Content-Type": "application/json", "User-Agent": "microdit"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        request = urllib.request.Request(self.base_url.rstrip("/") + "/chat/completions", body, headers)
        opener = urllib.request.build_opener(_NoRedirect)
        with opener.open(request, timeout=self.timeout) as response:
            content: bytes = response.read()
        return content

    def _read(self, content: bytes) -> tuple[str, int]:
        """Raises ValueError for what is no completion. The key, should a server repeat it, is blotted out."""
        try:
            completion = json.loads(content)
            answer = completion["choices"][0]["message"]["content"] or ""
            tokens = (completion.get("usage") or {}).get("total_tokens") or 0
        except (ValueError, LookupError, TypeError, AttributeError):
            raise ValueError("its answer is no chat completion") from None
        return self._blot(answer if isinstance(answer, str) else json.dumps(answer)), tokens if isinstance(tokens, int) else 0

    def _explain(self, error: urllib.error.HTTPError) -> str:
        if error.code in (401, 403):
            return f"The judge at {self.base_url} refuses the key ({error.code}): set MICRODIT_JUDGE_KEY or OPENAI_API_KEY to a valid one."
        words = self._cut(_server_words(error))
        if error.code == 404:
            return f"The judge at {self.base_url} has no model '{self.model}', or this is not its API's root (404): {words}"
        if 300 <= error.code < 400:
            return f"The judge at {self.base_url} has moved ({error.code}): give its new address."
        return f"The judge at {self.base_url} answers {error.code}: {words}"

    def _cut(self, words: str) -> str:
        words = " ".join(self._blot(words).split()).rstrip(".")
        return words if len(words) <= 200 else words[:200] + "..."

    def _blot(self, words: str) -> str:
        return words.replace(self._key, "***") if self._key else words


def read_choice(answer: str) -> Choice | None:
    """From a word, "Answer: A", JSON, or an answer with its reasons before or after it, on other lines. None for anything else."""
    answer = re.sub(r"<think>.*?</think>", "", answer, flags=re.DOTALL)
    for found in reversed(re.findall(r"\{[^{}]*\}", answer)):
        try:
            values = [value for value in json.loads(found).values() if isinstance(value, str)]
        except ValueError:
            continue
        choices = {choice for value in values if (choice := _choice_of_line(value)) is not None}
        return choices.pop() if len(choices) == 1 else None
    lines = [line for line in answer.splitlines() if re.search(r"\w", line)] or [""]
    return _choice_of_line(lines[-1]) or _choice_of_line(lines[0])


_LINE = re.compile(
    r"\W*(?:(?:the |my )?(?:final )?(?:answer|verdict|winner|choice)(?: is)?\W*)?(?:picture |image )?\W*(a|b|tie)\W*(?:is better|wins)?\W*",
    re.IGNORECASE,
)


def _choice_of_line(line: str) -> Choice | None:
    found = _LINE.fullmatch(line.strip()) if len(line) < 80 else None
    choices: dict[str, Choice] = {"a": "first", "b": "second", "tie": "tie"}
    return choices[found[1].lower()] if found else None


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """The standard library would send the key along to wherever it is sent."""

    def redirect_request(self, *_: Any) -> None:
        return None


def _text(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text}


def _image(png: bytes) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": "data:image/png;base64," + base64.b64encode(png).decode()}}


def _retry_after(header: str | None, default: float) -> float:
    """Seconds, from seconds or a date."""
    if header is None:
        return default
    try:
        return max(0.0, float(header))
    except ValueError:
        pass
    try:
        return max(0.0, email.utils.parsedate_to_datetime(header).timestamp() - time.time())
    except ValueError:
        return default


def _reason(error: Exception) -> str:
    reason = error.reason if isinstance(error, urllib.error.URLError) else error
    return str(getattr(reason, "strerror", None) or reason) or type(error).__name__


def _server_words(error: urllib.error.HTTPError) -> str:
    """The message of OpenAI's error form, or the text as it is."""
    try:
        body = error.read(10_000).decode("utf-8", "replace")
    except (OSError, http.client.HTTPException):
        return "no words"
    try:
        return str(json.loads(body)["error"]["message"])
    except (ValueError, LookupError, TypeError):
        return body or "no words"
