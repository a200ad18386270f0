"""What one request may ask for: a bound on the time and the memory that anybody can take.

What people ask for over HTTP, read field by field: a `Drawing`, or one sentence that says which field is wrong and how to mend it.
"""

import json
import random
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from microdit.encoders.captions import clean_caption
from microdit.errors import UserError
from microdit.pipelines.pipeline import MicroDiTPipeline
from microdit.pipelines.settings import DEFAULT_SETTINGS
from microdit.serve.queue import Drawing


@dataclass(frozen=True)
class Limits:
    """`pixels` are of all pictures of a request together. How many steps a sampler takes is bounded by `SamplerSettings`."""

    connections: int = 512  # open at the same time, or half of the files that the process may open, if those are fewer
    keep_alive_seconds: int = 5  # between two requests of a connection
    header_seconds: float = 10  # until all headers of a request have come
    body_bytes: int = 64 * 1024
    body_seconds: float = 10  # until the whole of it has come
    answer_seconds: float = 60  # until a client takes what is sent to it
    computations: int = 8  # that wait at the same time, for a budget or a report
    computation_seconds: float = 20
    prompt_letters: int = 2000
    pictures: int = 16
    side: int = 1024
    pixels: int = 4 * 1024 * 1024
    last_seed: int = 2**53 - 1  # the largest that JavaScript counts exactly


class AskedWronglyError(UserError):
    """`param`: the field that is wrong, if it is one. `status`: of HTTP. `code`: for programs."""

    def __init__(self, sentence: str, param: str | None = None, status: int = 400, code: str | None = None):
        super().__init__(sentence)
        self.param, self.status, self.code = param, status, code


def read_object(body: bytes) -> dict[str, Any]:
    """Of JSON. Raises AskedWronglyError."""
    try:
        value = json.loads(body, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise AskedWronglyError('The body is not JSON: send an object, such as {"prompt": "red heart"}.') from error
    if not isinstance(value, dict):
        raise AskedWronglyError('The body must be a JSON object, such as {"prompt": "red heart"}.')
    return value


def read_drawing(fields: dict[str, Any], models: Mapping[str, MicroDiTPipeline], limits: Limits) -> Drawing:
    """The fields of OpenAI's images API that mean something here, and our own; null counts as left out. Raises AskedWronglyError.

    An empty prompt is the empty caption that models are trained with. Without a seed, one is thrown.
    """
    unknown = sorted(set(fields) - KNOWN - IGNORED)
    if unknown:
        raise AskedWronglyError(f"There is no field {unknown[0]!r:.60}. Known: {', '.join(sorted(KNOWN))}.", unknown[0][:60])
    given = {key: value for key, value in fields.items() if value is not None}
    if "prompt" not in given:
        raise AskedWronglyError("prompt is missing: say what to draw.", "prompt")
    _text(given, "user", "", limits)
    if _text(given, "response_format", "b64_json", limits) != "b64_json":
        raise AskedWronglyError("response_format must be b64_json: pictures are not kept here, so there is no url.", "response_format")
    model = _model(given, models, limits)
    count = _whole(given, "n", 1, 1, limits.pictures)
    height, width = _size(given, count, models[model], limits)
    asked: dict[str, Any] = {
        "num_inference_steps": _whole(given, "steps", DEFAULT_SETTINGS.num_inference_steps, 2, 1000),
        "guidance_scale": _number(given, "guidance_scale", DEFAULT_SETTINGS.guidance_scale),
        "solver": _text(given, "solver", DEFAULT_SETTINGS.solver, limits),
    }
    settings = DEFAULT_SETTINGS
    for name, value in asked.items():  # one by one, to say which is wrong
        try:
            settings = replace(settings, **{name: value})
        except UserError as error:
            raise AskedWronglyError(str(error), "steps" if name == "num_inference_steps" else name) from error
    last_seed = limits.last_seed - count
    return Drawing(
        model,
        _text(given, "prompt", "", limits),
        settings,
        _whole(given, "seed", random.randrange(2**31), 0, last_seed),
        count,
        height,
        width,
        _text(given, "negative_prompt", "", limits),
    )


OWN = {"seed", "steps", "guidance_scale", "negative_prompt", "solver"}
IGNORED = {"quality", "style", "background", "moderation"}  # of OpenAI's: clients send them, and they change nothing here
KNOWN = {"prompt", "n", "size", "response_format", "model", "user"} | OWN


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


def _model(given: dict[str, Any], models: Mapping[str, MicroDiTPipeline], limits: Limits) -> str:
    name = _text(given, "model", next(iter(models)), limits)
    if name not in models:
        raise AskedWronglyError(f"There is no model {name!r:.60}. Known: {', '.join(models)}.", "model", 404, "model_not_found")
    return name


def _size(given: dict[str, Any], count: int, pipeline: MicroDiTPipeline, limits: Limits) -> tuple[int | None, int | None]:
    """Height and width; OpenAI's size is WIDTHxHEIGHT."""
    size = _text(given, "size", "auto", limits)
    if size == "auto":
        return None, None
    match = re.fullmatch(r"([0-9]{1,6})x([0-9]{1,6})", size)
    if not match:
        raise AskedWronglyError('size must be WIDTHxHEIGHT in pixels, such as "64x64", or "auto": as in training.', "size")
    width, height = int(match[1]), int(match[2])
    if max(width, height) > limits.side:
        raise AskedWronglyError(f"size {size} is too large: no side may have more than {limits.side} pixels.", "size")
    try:
        pipeline.latent_shape_of(height, width)
    except UserError as error:
        raise AskedWronglyError(str(error), "size") from error
    if count * width * height > limits.pixels:
        raise AskedWronglyError(f"{count} pictures of {size} are too many pixels for one request: ask for fewer or smaller ones.", "n")
    return height, width


def _text(given: dict[str, Any], name: str, default: str, limits: Limits) -> str:
    """Cleaned of control characters."""
    value = given.get(name, default)
    if not isinstance(value, str):
        raise AskedWronglyError(f"{name} must be text, not {_kind(value)}.", name)
    if len(value) > limits.prompt_letters:
        raise AskedWronglyError(f"{name} has {len(value):,} characters, and may have {limits.prompt_letters:,}.", name)
    return clean_caption(value)


def _whole(given: dict[str, Any], name: str, default: int, low: int, high: int) -> int:
    value = given.get(name, default)
    if isinstance(value, bool) or not isinstance(value, int):
        raise AskedWronglyError(f"{name} must be a whole number, not {_kind(value)}.", name)
    if not low <= value <= high:
        raise AskedWronglyError(f"{name} must be between {low} and {high}.", name)
    return value


def _number(given: dict[str, Any], name: str, default: float) -> float:
    value = given.get(name, default)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise AskedWronglyError(f"{name} must be a number, not {_kind(value)}.", name)
    if abs(value) > 1e6:
        raise AskedWronglyError(f"{name} must be a number that is not as large as that.", name)
    return float(value)


def _kind(value: object) -> str:
    kinds = {bool: "a truth value", str: "text", list: "a list", dict: "an object", float: "a fraction", int: "a number"}
    return kinds[type(value)]
