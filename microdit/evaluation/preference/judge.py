"""A vision-language model as the judge of image pairs, through any endpoint with OpenAI's chat completions API (chat/client.py)."""

import json
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from microdit.evaluation.chat.client import ChatClient, image_part, text_part
from microdit.evaluation.chat.request_log import REQUESTS, Answer, Exchange, RequestLog
from microdit.evaluation.preference.verdicts import Choice, Preference, Question, Reply, Verdict, VerdictFile
from microdit.io.untrusted_text import parse_json

INSTRUCTIONS = """Two pictures, A and B, were made for this prompt:

{prompt}

Which picture follows the prompt better and looks better? Following the prompt counts more. The order in which they are shown \
means nothing. If neither is better, it is a TIE. Answer with a single word: A, B or TIE."""
REMINDER = "\n\nWrite one of these three words and nothing else."
MAX_REQUESTS = 3  # per question, while answers are unreadable
COMPARISON = "another comparison (other images, prompts, orders, or judge)"


def judge_all(
    file: VerdictFile,
    ask: Callable[[str, Path, Path, Exchange], Reply],
    concurrency: int = 4,
    on_verdict: Callable[[Verdict], None] | None = None,
    warn: Callable[[str], None] | None = None,
) -> Preference:
    """Put all open questions of `file` to `ask` (such as a VisionJudge), `concurrency` at a time, and return the summary.

    Requests and answers are logged beside `file`; `warn` is called if an earlier process left requests without an answer. After a failure
    no new request is sent, but responses in flight are awaited and kept. Raises what `ask` raises, and UserError if no pair got clear
    verdicts.
    """
    marks = {question: _mark(question, file.model) for question in file.questions}
    with RequestLog(file.path.with_name(REQUESTS), marks.values(), COMPARISON) as log, ThreadPoolExecutor(concurrency) as threads:
        if warn is not None:
            log.warn_of_lost(warn)

        def answer(question: Question) -> Verdict | None:
            return file.add(question, ask(question.pair.prompt, *question.pictures(), log.exchange(marks[question])))

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


class VisionJudge(ChatClient):
    """A vision model that chooses the better of two PNG files."""

    who = "The judge"

    def __call__(self, prompt: str, first: Path, second: Path, exchange: Exchange) -> Reply:
        """Return the judge's reply. After an unreadable answer the request is repeated up to twice, then the choice is "unclear".

        Answers that an earlier process logged in `exchange` count. Raises UserError if the endpoint is down, the key is wrong, the model is
        unknown, or the request is rejected.
        """
        while (reply := reply_of(exchange.answers)) is None:
            text = INSTRUCTIONS.format(prompt=json.dumps(prompt, ensure_ascii=False)) + (REMINDER if exchange.answers else "")
            pictures = [text_part("Picture A:"), image_part(first.read_bytes()), text_part("Picture B:"), image_part(second.read_bytes())]
            self.complete([text_part(text), *pictures], exchange)
        return reply


def reply_of(answers: list[Answer]) -> Reply | None:
    """Return the reply that the answers to one question amount to, or None if the request must be repeated."""
    if not answers:
        return None
    choice = read_choice(answers[-1].answer)
    if choice is None and len(answers) < MAX_REQUESTS:
        return None
    return Reply(choice or "unclear", answers[-1].answer, sum(answer.tokens for answer in answers))


def read_choice(answer: str) -> Choice | None:
    """Read a choice from a single word, "Answer: A", JSON, or an answer with its reasons on other lines; None for anything else."""
    answer = answer.rpartition("</think>")[2]
    for found in reversed(re.findall(r"\{[^{}]*\}", answer)):
        try:
            values = [value for value in parse_json(found).values() if isinstance(value, str)]
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


def _mark(question: Question, model: str) -> dict[str, Any]:
    """Return the fields that identify a question in the log."""
    pair = question.pair
    return {"pair": pair.index, "order": question.order, "prompt": pair.prompt, "model": model, "pictures": list(pair.fingerprints)}
