"""DPG-Bench on a folder of pictures: ask every question about every picture, and score the answers.

GRIDS/NAME.png              a prompt's four pictures as a 2 x 2 grid, as the authors' program reads them
OUT/answers-MODEL.jsonl     every question asked and every answer, as it arrives; a later call asks only what is open
OUT/results.jsonl           the score of each prompt and picture
OUT/summary.json            the scores
"""

import hashlib
import io
import json
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from microdit.errors import UserError
from microdit.evaluation.chat.request_log import Exchange, RequestLog
from microdit.evaluation.dpg.answerers import Answerer, read_yes_or_no
from microdit.evaluation.dpg.questions import DPGPrompt, picture_score, prompt_score, score
from microdit.io.files import sha256_of, to_checked_json, write_aside

PICTURES = 4  # of each prompt, as published
MOST_ASKED = 3  # how often a question is asked while answers are unreadable
MOST_UNREADABLE = 5  # questions in a row without a readable answer, after which the model is given up
ANOTHER = "another evaluation (other pictures or questions)"


def write_grids(pictures: Path, prompts: list[DPGPrompt], grids: Path) -> None:
    """Join the pictures NAME/0.png to NAME/3.png of each prompt to a grid, unless it exists."""
    for prompt in prompts:
        path = grids / f"{prompt.name}.png"
        if path.is_file():
            continue
        images = [Image.open(pictures / picture_name(prompt, number), formats=["PNG"]).convert("RGB") for number in range(PICTURES)]
        width, height = images[0].size
        grid = Image.new("RGB", (2 * width, 2 * height))
        for number, image in enumerate(images):
            grid.paste(image, (width * (number % 2), height * (number // 2)))
        write_aside(path, _png(grid))


def picture_name(prompt: DPGPrompt, number: int) -> str:
    """Return the name of a picture before it is part of a grid."""
    return f"{prompt.name}/{number}.png"


def cut_grid(path: Path) -> list[bytes]:
    """Return the four pictures of a grid, as PNG: upper left, upper right, lower left, lower right."""
    try:
        with Image.open(path, formats=["PNG"]) as opened:
            grid = opened.convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(f"{path} cannot be read as an image: {error}. Generate it again, or remove it.") from error
    width, height = (side // 2 for side in grid.size)
    corners = [(width * (number % 2), height * (number // 2)) for number in range(PICTURES)]
    return [_png(grid.crop((left, top, left + width, top + height))) for left, top in corners]


@dataclass(frozen=True)
class GridPicture:
    """One of the four pictures in the grid of a prompt."""

    prompt: DPGPrompt
    number: int
    grid: Path
    sha256: str  # of the grid

    def marks(self, model: str) -> list[dict[str, Any]]:
        """Return what identifies each question about this picture in the log."""
        about = {"prompt": self.prompt.name, "picture": self.number, "grid": self.sha256, "model": model}
        return [about | {"question": one.number, "text": one.question} for one in self.prompt.propositions]


def find_grid_pictures(grids: Path, prompts: list[DPGPrompt], warn: Callable[[str], None]) -> list[GridPicture]:
    """Return all pictures of the prompts that have a grid, and warn of the others. Raises UserError if there is no grid."""
    paths = {prompt: grids / f"{prompt.name}.png" for prompt in prompts}
    there = [prompt for prompt in prompts if paths[prompt].is_file()]
    if not there:
        raise UserError(f"There are no pictures in {grids}: it needs a 2 x 2 grid for each prompt, such as {prompts[0].name}.png.")
    if len(there) < len(prompts):
        warn(f"{len(prompts) - len(there)} of {len(prompts)} prompts have no pictures in {grids}: the scores leave them out.")
    digests = {prompt: sha256_of(paths[prompt]) for prompt in there}
    return [GridPicture(prompt, number, paths[prompt], digests[prompt]) for prompt in there for number in range(PICTURES)]


def count_open(pictures: list[GridPicture], model: str, out: Path) -> int:
    """Return the number of questions without a readable answer so far."""
    with _open_log(pictures, model, out) as log:
        return sum(_answer(log.exchange(mark)) is None for picture in pictures for mark in picture.marks(model))


def evaluate_dpg(
    pictures: list[GridPicture],
    answerer: Answerer,
    out: Path,
    warn: Callable[[str], None],
    on_answer: Callable[[int], None] = lambda count: None,
) -> dict[str, Any]:
    """Ask all questions that are open, write results.jsonl and summary.json to the folder `out`, and return the summary.

    `on_answer(n)` is called after n more questions. After a failure no new picture is begun, and all answers so far are kept. Raises
    what the answerer raises, and UserError if MOST_UNREADABLE questions in a row got no readable answer.
    """
    with _open_log(pictures, answerer.name, out) as log, ThreadPoolExecutor(answerer.concurrency) as threads:
        log.warn_of_lost(warn)
        patience = _Patience(answerer.name)
        futures = [threads.submit(_ask_about, picture, answerer, log, patience, on_answer) for picture in pictures]
        try:
            for future in as_completed(futures):
                future.result()
        except BaseException:
            patience.over.set()
            threads.shutdown(cancel_futures=True)
            raise
        exchanges = {picture: [log.exchange(mark) for mark in picture.marks(answerer.name)] for picture in pictures}
    answers: dict[DPGPrompt, list[dict[int, bool]]] = {}
    for picture in pictures:  # as published, whatever is not yes is no
        read = [_answer(exchange) is True for exchange in exchanges[picture]]
        yes = {one.number: answer for one, answer in zip(picture.prompt.propositions, read, strict=True)}
        answers.setdefault(picture.prompt, []).append(yes)
    lines = [
        {"prompt": prompt.name, "score": prompt_score(prompt, found), "pictures": [picture_score(prompt, one) for one in found]}
        for prompt, found in answers.items()
    ]
    write_aside(out / "results.jsonl", "".join(f"{json.dumps(line)}\n" for line in lines).encode())
    everything = [exchange for found in exchanges.values() for exchange in found]
    summary = asdict(score(list(answers.items()))) | {
        "prompts": len(answers),
        "pictures": len(pictures),
        "questions": len(everything),
        "unreadable": sum(_answer(exchange) is None for exchange in everything),
        "tokens": sum(answer.tokens for exchange in everything for answer in exchange.answers),
        "judge": answerer.name,
    }
    write_aside(out / "summary.json", to_checked_json(summary))
    return summary


@dataclass
class _Patience:
    """Counts questions in a row without a readable answer. `over` is set when no more questions shall be asked."""

    model: str
    over: threading.Event = field(default_factory=threading.Event)
    _in_a_row: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def count(self, exchange: Exchange) -> None:
        """Raise UserError at the last of MOST_UNREADABLE questions in a row without a readable answer."""
        with self._lock:
            self._in_a_row = 0 if _answer(exchange) is not None else self._in_a_row + 1
            if self._in_a_row < MOST_UNREADABLE:
                return
        said = exchange.answers[-1].answer[:100]
        raise UserError(
            f"{self.model} answered neither yes nor no to {MOST_UNREADABLE} questions in a row, the last time with {said!r}: choose "
            "another --judge, or repair it and run the same command again. The pictures and all answers so far are kept."
        )


def _ask_about(picture: GridPicture, answerer: Answerer, log: RequestLog, patience: _Patience, on_answer: Callable[[int], None]) -> None:
    """Ask all open questions about one picture, in the order of the file."""
    marks = picture.marks(answerer.name)
    waiting = [mark for mark in marks if _answer(log.exchange(mark)) is None]
    if not waiting:
        return
    png = cut_grid(picture.grid)[picture.number]
    for mark in waiting:
        exchange = log.exchange(mark)
        for _ in range(MOST_ASKED if answerer.concurrency > 1 else 1):  # a local model repeats itself
            if patience.over.is_set():
                return
            answerer(mark["text"], png, exchange)
            if _answer(exchange) is not None:
                break
        patience.count(exchange)
        on_answer(1)


def _answer(exchange: Exchange) -> bool | None:
    return read_yes_or_no(exchange.answers[-1].answer) if exchange.answers else None


def _open_log(pictures: list[GridPicture], model: str, out: Path) -> RequestLog:
    path = out / f"answers-{hashlib.sha256(model.encode()).hexdigest()[:8]}.jsonl"
    return RequestLog(path, (mark for picture in pictures for mark in picture.marks(model)), ANOTHER)


def _png(image: Image.Image) -> bytes:
    content = io.BytesIO()
    image.save(content, "PNG")
    return content.getvalue()
