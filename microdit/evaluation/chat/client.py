"""A client of models behind any endpoint with OpenAI's chat completions API.

- The key is read from MICRODIT_JUDGE_KEY or OPENAI_API_KEY and sent in the request's header only.
- Transient failures (busy, broken or slow servers) are retried; all others raise UserError.
- Every request and answer is logged (request_log.py), so only requests in flight when a process dies may be billed twice.
- The standard library's HTTP client suffices: each thread sends one small request at a time.
"""

import base64
import email.utils
import http.client
import json
import os
import random
import re
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar, TypeVar

from microdit.errors import UserError
from microdit.evaluation.chat.request_log import Answer, Exchange
from microdit.io.untrusted_text import one_line, parse_json

T = TypeVar("T")

LONGEST_WAIT = 600.0  # seconds that a server may ask to wait before the client gives up
TEXT_TOKENS = 150  # estimated tokens of the instructions, a prompt or question, and the answer
LONGEST_ANSWER, LONGEST_WORDS = 1_000_000, 10_000  # bytes read of an answer, and of an error
MOST_TOKENS = 10**9  # of one answer; a larger number is none


def key_from_environment() -> str:
    """Return the API key, or an empty string if none is set, as for local servers. Raises UserError if it cannot be sent in a header."""
    key = (os.environ.get("MICRODIT_JUDGE_KEY") or os.environ.get("OPENAI_API_KEY") or "").strip()
    if not re.fullmatch(r"[!-~]*", key):
        raise UserError("The key in MICRODIT_JUDGE_KEY or OPENAI_API_KEY contains spaces or odd characters: copy it again.")
    return key


@dataclass(frozen=True)
class Estimate:
    """Expected size and price of an evaluation. `dollars` is None without a price."""

    requests: int
    images: int
    tokens: int
    dollars: float | None


def estimate(requests: int, images: int, size: int, dollars_per_million: float | None = None) -> Estimate:
    """Estimate the cost of requests with `images` images of `size` x `size` pixels each, without repeated ones.

    An image counts 85 tokens plus 170 per tile of 512 pixels, after it is shrunk to 768, as for many models; others differ by a factor of
    about two.
    """
    tiles = (-(-min(size, 768) // 512)) ** 2
    tokens = requests * (images * (85 + 170 * tiles) + TEXT_TOKENS)
    return Estimate(requests, images * requests, tokens, None if dollars_per_million is None else tokens * dollars_per_million / 1e6)


@dataclass(frozen=True)
class ChatClient:
    """The model `model` at `base_url` (the API's root, such as .../v1).

    A server may be silent for `timeout` seconds and take `longest` seconds for one response. A request is retried `retries` times, with
    exponential backoff from `backoff` seconds and 50% jitter, or after the time in the server's Retry-After header. Raises UserError if
    `base_url` is not a valid address.
    """

    who: ClassVar[str] = "The model"  # what error messages call it

    base_url: str
    model: str
    timeout: float = 120.0
    longest: float = 600.0
    retries: int = 6
    backoff: float = 1.0
    _key: str = field(default_factory=key_from_environment, repr=False)

    def __post_init__(self) -> None:
        if not re.fullmatch(r"https?://([\w.-]+|\[[\da-f:.]+\])(:\d{1,5})?(/[!\"$->@-~]*)?", self.base_url, re.ASCII | re.IGNORECASE):
            raise UserError(
                f"{self.who}'s address must look like https://api.openai.com/v1 or http://localhost:8000/v1, without a password or query."
            )

    def complete(self, content: list[dict[str, Any]], exchange: Exchange) -> None:
        """Send one message, made of `text_part` and `image_part`, with retries, and add the answer to the exchange.

        Raises UserError if the endpoint is down, the key is wrong, the model is unknown, or the request is rejected.
        """
        body = json.dumps({"model": self.model, "messages": [{"role": "user", "content": content}]}).encode()
        trouble, wait = "", 0.0
        for attempt in range(self.retries + 1):
            if attempt:
                time.sleep(wait)
            wait, lasting = self.backoff * 2**attempt * random.uniform(0.5, 1.5), False
            exchange.sending()
            try:
                answer = self._read(_within(self.longest, partial(self._post, body)))
            except _RefusedError as refused:
                trouble, lasting = self._explain(refused), refused.status not in (408, 429) and refused.status < 500
                wait = _retry_after(refused.retry_after, wait)
            except (OSError, http.client.HTTPException, ValueError) as error:  # ValueError: not a completion
                trouble = f"{self.who} at {self.base_url} cannot be reached or breaks off: {self._cut(_reason(error))}."
            else:
                return exchange.answered(answer)
            exchange.failed(trouble)
            if lasting:
                raise UserError(trouble)
            if wait > LONGEST_WAIT:
                raise UserError(f"{trouble} It asks to wait {wait:.0f} seconds: run the same command again after that.")
        raise UserError(f"{trouble} Given up after {self.retries + 1} tries: run the same command again to resume.")

    def _post(self, body: bytes) -> bytes:
        headers = {"Content-Type": "application/json", "User-Agent": "microdit"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        request = urllib.request.Request(self.base_url.rstrip("/") + "/chat/completions", body, headers)
        opener = urllib.request.build_opener(_NoRedirect)
        try:
            with opener.open(request, timeout=self.timeout) as response:
                content = _read_at_most(response, LONGEST_ANSWER + 1)
        except urllib.error.HTTPError as error:
            raise _RefusedError(error.code, _server_words(error), error.headers.get("Retry-After")) from None
        if len(content) > LONGEST_ANSWER:
            raise _RefusedError(200, f"more than {LONGEST_ANSWER:,} bytes, which is no chat completion")
        return content

    def _read(self, content: bytes) -> Answer:
        """Parse a completion. Raises ValueError if it is none. The key is redacted, should a server repeat it."""
        try:
            completion = parse_json(content)
            answer = completion["choices"][0]["message"]["content"] or ""
            tokens = (completion.get("usage") or {}).get("total_tokens") or 0
            words = answer if isinstance(answer, str) else json.dumps(answer)
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
            raise ValueError("its answer is no chat completion") from None
        return Answer(self._redact(words), tokens if type(tokens) is int and 0 <= tokens <= MOST_TOKENS else 0)

    def _explain(self, refused: "_RefusedError") -> str:
        if refused.status in (401, 403):
            keys = "MICRODIT_JUDGE_KEY or OPENAI_API_KEY"
            return f"{self.who} at {self.base_url} refuses the key ({refused.status}): set {keys} to a valid one."
        words = self._cut(refused.words)
        if refused.status == 404:
            return f"{self.who} at {self.base_url} has no model '{self.model}', or this is not its API's root (404): {words}"
        if 300 <= refused.status < 400:
            return f"{self.who} at {self.base_url} has moved ({refused.status}): use its new address."
        return f"{self.who} at {self.base_url} responds with status {refused.status}: {words}"

    def _cut(self, words: str) -> str:
        words = one_line(self._redact(words)).rstrip(".")
        return words if len(words) <= 200 else words[:200] + "..."

    def _redact(self, words: str) -> str:
        return words.replace(self._key, "***") if self._key else words


@dataclass
class _RefusedError(Exception):
    """The server's answer is not a completion: its status is not 200, or it is too long."""

    status: int
    words: str
    retry_after: str | None = None


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """Refuses redirects: the standard library would forward the key to the new address."""

    def redirect_request(self, *_: Any) -> None:
        return None


def _within(seconds: float, work: Callable[[], T]) -> T:
    """Return the result of `work`, or raise TimeoutError after `seconds` and leave `work` running in a daemon thread.

    A socket's timeout is not enough, since it restarts with each byte, and a server may send one byte a minute.
    """
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    try:
        return future.result(seconds)
    except TimeoutError:
        if future.done():  # `work` itself timed out
            raise
        raise TimeoutError(f"no whole answer within {seconds:g} seconds") from None


def text_part(text: str) -> dict[str, Any]:
    """Return a text as a part of a message."""
    return {"type": "text", "text": text}


def image_part(png: bytes) -> dict[str, Any]:
    """Return an image as a part of a message."""
    return {"type": "image_url", "image_url": {"url": "data:image/png;base64," + base64.b64encode(png).decode()}}


def _retry_after(header: str | None, default: float) -> float:
    """Return the seconds to wait from a Retry-After header, which holds seconds or a date."""
    if header is None:
        return default
    try:
        return max(0.0, float(header))
    except ValueError:
        pass
    try:
        return max(0.0, email.utils.parsedate_to_datetime(header).timestamp() - time.time())
    except (ValueError, OverflowError):  # OverflowError: a year or an offset that no date has
        return default


def _read_at_most(response: http.client.HTTPResponse | urllib.error.HTTPError, count: int) -> bytes:
    """Return the body, or its first `count` bytes if it is longer. Raises HTTPException if the connection ends before the body does.

    `read(count)` is not enough: http.client takes chunks of negative sizes, and reads those to the end of the connection.
    """
    content = bytearray()
    while len(content) < count and (more := response.read1(count - len(content))):
        content += more
    left = getattr(response, "length", None)
    if left and len(content) < count:
        raise http.client.IncompleteRead(bytes(content), left)
    return bytes(content[:count])


def _reason(error: Exception) -> str:
    reason = error.reason if isinstance(error, urllib.error.URLError) else error
    return str(getattr(reason, "strerror", None) or reason) or type(error).__name__


def _server_words(error: urllib.error.HTTPError) -> str:
    """Return the message of an OpenAI-style error, or else the body's text."""
    try:
        body = _read_at_most(error, LONGEST_WORDS).decode("utf-8", "replace")
    except (OSError, http.client.HTTPException):
        return "no message"
    try:
        return str(parse_json(body)["error"]["message"])
    except (ValueError, LookupError, TypeError):
        return body or "no message"
