"""Rewrite short prompts as detailed ones, by a language model of transformers or behind an endpoint with OpenAI's chat API.

A model that was trained on long captions draws short prompts badly. A rewritten prompt is another question, so whoever draws or measures
with it says so.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

import torch

from microdit.encoders.captions import clean_caption
from microdit.encoders.model_files import DOWNLOAD_AGAIN, find_folder, lasting_name, load_network
from microdit.errors import UserError
from microdit.evaluation.chat.client import ChatClient, text_part
from microdit.evaluation.chat.request_log import Answer, Exchange, RequestLog
from microdit.evaluation.features import load_beside
from microdit.io.files import read_json

INSTRUCTIONS = """Rewrite this prompt of a text-to-image model as one caption of two to four sentences that describes the finished \
picture. Keep every object, number, colour and position that it names; add only plausible details of appearance, setting and light. \
Answer with the caption and nothing else.

Prompt: {prompt}"""
LONGEST = 2000  # characters of a rewritten prompt
LONGEST_REPLY = 160  # tokens that a local model may write
MOST_ASKED = 3  # how often a prompt is asked while answers are no prompts
ANOTHER = "another rewriting (other prompts, model or instructions)"


class Rewriter(Protocol):
    """Rewrites prompts. `name` is what records call it; `concurrency` prompts may be asked at a time."""

    concurrency: int

    @property
    def name(self) -> str: ...

    def __call__(self, request: str, exchange: Exchange) -> None:
        """Ask once, and add the answer to the exchange."""
        ...


def open_rewriter(place: str, model: str | None, device: torch.device | str = "cpu") -> Rewriter:
    """Open the model named `model` at the endpoint `place`, an address, or else the language model in the folder or hub id `place`.

    Raises UserError if there is none, or `model` is missing or has no meaning.
    """
    if place.startswith(("http://", "https://")):
        if not model:
            raise UserError(f"--rewrite {place} is an endpoint: name its model with --rewrite-model.")
        return EndpointRewriter(place, model)
    if model:
        raise UserError(f"--rewrite-model names the model of an endpoint, but --rewrite {place} is no address: leave one of the two out.")
    return LocalRewriter(place, device)


def rewrite(
    prompts: Sequence[str], rewriter: Rewriter, log: Path | None, warn: Callable[[str], None], on_prompt: Callable[[int], None]
) -> list[str]:
    """Return what the model makes of each prompt; equal prompts are asked once, and an empty one stays.

    With a `log`, requests and answers are kept in that file, and what it answers is not asked again. Raises what the rewriter raises, and
    UserError if a model's answers are no prompts.
    """
    distinct = [prompt for prompt in dict.fromkeys(prompts) if prompt]
    marks = {prompt: {"request": INSTRUCTIONS.format(prompt=prompt), "model": rewriter.name} for prompt in distinct}

    def answer(prompt: str, exchange: Exchange) -> str:
        new = _rewritten(prompt, marks[prompt]["request"], rewriter, exchange)
        on_prompt(1)
        return new

    if log is None:
        new = _in_threads(answer, {prompt: Exchange(lambda *_, **__: None) for prompt in distinct}, rewriter.concurrency)
    else:
        with RequestLog(log, marks.values(), ANOTHER) as kept:
            kept.warn_of_lost(warn)
            new = _in_threads(answer, {prompt: kept.exchange(mark) for prompt, mark in marks.items()}, rewriter.concurrency)
    return [new.get(prompt, prompt) for prompt in prompts]


class EndpointRewriter(ChatClient):
    """A language model behind an endpoint."""

    who = "The language model"
    concurrency = 4

    @property
    def name(self) -> str:
        return self.model

    def __call__(self, request: str, exchange: Exchange) -> None:
        self.complete([text_part(request)], exchange)


class LocalRewriter:
    """A causal language model of transformers, which writes the most probable tokens."""

    concurrency = 1

    def __init__(self, place: str, device: torch.device | str = "cpu") -> None:
        """Load from a folder or hub id. Raises UserError if there is no such model, or its settings, tokenizer and weights do not match."""
        from transformers import AutoTokenizer

        model_type = str(read_json(find_folder(place, ["*.json", "*.txt", "*.jinja"]) / "config.json", DOWNLOAD_AGAIN).get("model_type"))
        self._model, folder, fingerprint = load_network(place, (model_type,), _model_class(model_type, place))
        self._model.to(device)
        self._tokenizer = load_beside(folder, "tokenizer.json", AutoTokenizer)
        self.name = f"{lasting_name(place)} {fingerprint}"

    @torch.no_grad()
    def __call__(self, request: str, exchange: Exchange) -> None:
        if self._tokenizer.chat_template:
            messages = [{"role": "user", "content": request}]
            request = self._tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        inputs = self._tokenizer(request, return_tensors="pt", return_token_type_ids=False).to(self._model.device)
        ids_1L = self._model.generate(**inputs, do_sample=False, num_beams=1, max_new_tokens=LONGEST_REPLY)
        written = self._tokenizer.decode(ids_1L[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        exchange.sending()
        exchange.answered(Answer(str(written), 0))


def read_prompt(answer: str) -> str | None:
    """Return the prompt in an answer, without thoughts, quotes and "Caption:" around it; None if none is left, or it is too long."""
    text = clean_caption(answer.rpartition("</think>")[2])
    for label in ("caption:", "prompt:"):
        if text.lower().startswith(label):
            text = text[len(label) :].strip()
    for first, last in ('""', "''", "“”", "**"):
        if len(text) > 1 and text[0] == first and text[-1] == last:
            text = text[1:-1].strip()
    return text if any(map(str.isalnum, text)) and len(text) <= LONGEST else None


def _rewritten(prompt: str, request: str, rewriter: Rewriter, exchange: Exchange) -> str:
    for number in range(MOST_ASKED):
        if exchange.answers and (new := read_prompt(exchange.answers[-1].answer)) is not None:
            return new
        if number == 0 or rewriter.concurrency > 1:  # a local model repeats itself
            rewriter(request, exchange)
    if (new := read_prompt(exchange.answers[-1].answer)) is not None:
        return new
    raise UserError(
        f"{rewriter.name} made no prompt of {prompt[:100]!r}, but answered {exchange.answers[-1].answer[:100]!r}: choose another model, or "
        "leave --rewrite out."
    )


def _in_threads(answer: Callable[[str, Exchange], str], exchanges: dict[str, Exchange], concurrency: int) -> dict[str, str]:
    """Return the new prompts by the old ones. After a failure no further prompt is asked; requests in flight are awaited."""
    with ThreadPoolExecutor(concurrency) as threads:
        futures = {prompt: threads.submit(answer, prompt, exchange) for prompt, exchange in exchanges.items()}
        try:
            return {prompt: future.result() for prompt, future in futures.items()}
        except BaseException:
            threads.shutdown(cancel_futures=True)
            raise


def _model_class(model_type: str, place: str) -> Any:
    """Return the class for models of this type. Raises UserError if they do not write text."""
    import transformers
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    name = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(model_type)
    if name is None:
        raise UserError(f"{place} is a model of the type {model_type}, which writes no text: name a language model, or an endpoint.")
    return getattr(transformers, name)
