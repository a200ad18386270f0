"""The requests that the server reads, the limits that apply to them, and the sentence for each that is invalid."""

import json
import random
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from pydantic_core import ErrorDetails

from microdit.encoders.captions import clean_caption
from microdit.errors import UserError
from microdit.pipelines.pipeline import MicroDiTPipeline
from microdit.pipelines.settings import DEFAULT_SETTINGS
from microdit.serve.queue import Drawing

MAX_CHARACTERS = 2000  # of a prompt, or of another text in an image request
MAX_IMAGES = 16  # per request
MAX_SIDE = 1024  # pixels
MAX_PIXELS = 4 * 1024 * 1024  # of all images of a request together
MAX_SEED = 2**53 - 2  # the largest seed of an image whose successor JavaScript still represents exactly
IGNORED = {"quality", "style", "background", "moderation"}  # OpenAI's clients send these fields; they have no effect here


@dataclass(frozen=True)
class Limits:
    """Bounds on connections, on bodies, and on the time that a client may take."""

    connections: int = 512  # open at the same time, or half of the files that the process may open, if those are fewer
    keep_alive_seconds: int = 5  # between two requests of a connection
    header_seconds: float = 10  # until all headers of a request have arrived
    body_bytes: int = 64 * 1024
    body_seconds: float = 10  # until the whole body has arrived
    answer_seconds: float = 60  # until a client has read what is sent to it
    computations: int = 8  # budgets and reports that may wait at the same time
    computation_seconds: float = 20


class AskedWronglyError(UserError):
    """An invalid request. `param` is the invalid field, if there is one; `status` is the HTTP status; `code` is for programs."""

    def __init__(self, sentence: str, param: str | None = None, status: int = 400, code: str | None = None):
        super().__init__(sentence)
        self.param, self.status, self.code = param, status, code


def read_object(body: bytes) -> dict[str, Any]:
    """Parse the JSON object in `body`. Raises AskedWronglyError if it is not one."""
    try:
        value = json.loads(body, parse_constant=_reject_constant)
    except (ValueError, RecursionError) as error:
        raise AskedWronglyError('The body is not JSON: send an object, such as {"prompt": "red heart"}.') from error
    if not isinstance(value, dict):
        raise AskedWronglyError('The body must be a JSON object, such as {"prompt": "red heart"}.')
    return value


class JSONRequest(BaseModel):
    """The fields of a request, with the types of JSON: nothing is converted but integers to floats.

    `sentences` has the message for an invalid value of a field, if the general one would not do.
    """

    model_config = ConfigDict(strict=True, frozen=True, allow_inf_nan=False)
    sentences: ClassVar[Mapping[str, str]] = {}

    @classmethod
    def read(cls, fields: dict[str, Any]) -> Self:
        """Validate `fields`. Raises AskedWronglyError, which names the first invalid field."""
        try:
            return cls.model_validate(fields)
        except ValidationError as error:
            found = error.errors()[0]
            name = str(found["loc"][0])
            raise AskedWronglyError(cls.sentences.get(name) or cls._sentence(name, found), name[:60]) from error

    @model_validator(mode="before")
    @classmethod
    def _replace_lone_surrogates(cls, fields: dict[str, Any]) -> dict[str, Any]:
        """Replace halves of characters, which JSON can express as "\\ud800" and nothing can encode, by question marks."""
        return {_encodable(name): _encodable(value) if isinstance(value, str) else value for name, value in fields.items()}

    @classmethod
    def _sentence(cls, name: str, error: ErrorDetails) -> str:
        value, kind = error["input"], error["type"]
        match kind:
            case "missing":
                return f"{name} is missing: it is required."
            case "string_type":
                return f"{name} must be text, not {_kind(value)}."
            case "int_type":
                return f"{name} must be a whole number, not {_kind(value)}."
            case "string_too_long":
                return f"{name} has {len(value):,} characters, and may have {error['ctx']['max_length']:,}."
            case "greater_than_equal" | "less_than_equal":
                bounds = cls.model_fields[name].metadata
                low, high = (next(getattr(bound, key) for bound in bounds if hasattr(bound, key)) for key in ("ge", "le"))
                return f"{name} must be between {low} and {high}."
            case "float_type" | "finite_number":
                is_number = isinstance(value, int | float) and not isinstance(value, bool)
                return f"{name} must be a number{' that is not as large as that' if is_number else f', not {_kind(value)}'}."
            case "value_error":
                return str(error["ctx"]["error"])
            case "extra_forbidden":
                known = sorted(cls.model_fields)
                return f"There is no field {name!r:.60}. Known: {', '.join(known)}."
        return f"{name} is invalid."


Text = Annotated[str, Field(max_length=MAX_CHARACTERS), AfterValidator(clean_caption)]


class ImageRequest(JSONRequest):
    """The fields of OpenAI's images API that have a meaning here, and our own. Null counts as absent.

    An empty prompt is the empty caption that models are trained with. Without a seed, a random one is used.
    """

    model_config = ConfigDict(extra="forbid")

    prompt: Text
    negative_prompt: Text = ""
    n: int = Field(1, ge=1, le=MAX_IMAGES)
    size: Text = "auto"
    model: Text | None = None
    response_format: Text = "b64_json"
    user: Text = ""
    seed: int = Field(default_factory=lambda: random.randrange(2**31), ge=0, le=MAX_SEED)
    steps: int = Field(DEFAULT_SETTINGS.num_inference_steps, ge=2, le=1000)
    guidance_scale: float = DEFAULT_SETTINGS.guidance_scale
    solver: Text = DEFAULT_SETTINGS.solver

    @model_validator(mode="before")
    @classmethod
    def _drop_absent(cls, fields: dict[str, Any]) -> dict[str, Any]:
        return {k: v for k, v in fields.items() if k not in IGNORED and (v is not None or k not in cls.model_fields)}

    @field_validator("response_format")
    @classmethod
    def _check_response_format(cls, value: str) -> str:
        if value != "b64_json":
            raise ValueError("response_format must be b64_json: pictures are not kept here, so there is no url.")
        return value

    @field_validator("size")
    @classmethod
    def _check_size(cls, value: str) -> str:
        if value != "auto" and not re.fullmatch(r"[0-9]{1,6}x[0-9]{1,6}", value):
            raise ValueError('size must be WIDTHxHEIGHT in pixels, such as "64x64", or "auto": as in training.')
        return value

    def drawing(self, models: Mapping[str, MicroDiTPipeline]) -> Drawing:
        """Return the job for one of `models`, the first one by default. Raises AskedWronglyError if that model cannot draw it."""
        model = next(iter(models)) if self.model is None else self.model
        if model not in models:
            raise AskedWronglyError(f"There is no model {model!r:.60}. Known: {', '.join(models)}.", "model", 404, "model_not_found")
        if self.seed + self.n - 1 > MAX_SEED:
            raise AskedWronglyError(f"seed must be between 0 and {MAX_SEED + 1 - self.n}.", "seed")
        height, width = self._sides(models[model])
        settings = DEFAULT_SETTINGS
        for field, name in (("steps", "num_inference_steps"), ("guidance_scale", "guidance_scale"), ("solver", "solver")):
            try:  # one by one, to name the invalid one
                settings = replace(settings, **{name: getattr(self, field)})
            except UserError as error:
                raise AskedWronglyError(str(error), field) from error
        return Drawing(model, self.prompt, settings, self.seed, self.n, height, width, self.negative_prompt)

    def _sides(self, pipeline: MicroDiTPipeline) -> tuple[int | None, int | None]:
        """Return height and width in pixels, or None for those of training."""
        if self.size == "auto":
            return None, None
        width, height = map(int, self.size.split("x"))
        if max(width, height) > MAX_SIDE:
            raise AskedWronglyError(f"size {self.size} is too large: no side may have more than {MAX_SIDE} pixels.", "size")
        try:
            pipeline.latent_shape_of(height, width)
        except UserError as error:
            raise AskedWronglyError(str(error), "size") from error
        if self.n * width * height > MAX_PIXELS:
            raise AskedWronglyError(
                f"{self.n} pictures of {self.size} are too many pixels for one request: ask for fewer or smaller ones.", "n"
            )
        return height, width


class BudgetRequest(JSONRequest):
    """What the budget tab asks: the cost of `recipe` or of a recipe's `text`, or what `dollars` buy. Other fields are ignored."""

    sentences: ClassVar[Mapping[str, str]] = {
        "count": "The number of GPUs must be a whole number from 1 to 100,000.",
        "images": "The number of images must be a whole number from 1 to 1,000,000,000,000.",
        "price": "The price must be dollars of a GPU-hour, or left empty.",
        "mfu": "The utilisation must be the share of the chip's peak that is used, such as 0.45, or left empty.",
        "dollars": "The sum must be dollars, or left empty.",
    }

    recipe: str | None = None
    text: str | None = None
    dollars: float | None = None
    chip: str = "h100"
    count: int = Field(1, ge=1, le=100_000)
    images: int | None = Field(None, ge=1, le=10**12)
    price: float | None = None
    mfu: float | None = None


def _reject_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _encodable(text: str) -> str:
    return text.encode("utf-8", "replace").decode()


def _kind(value: object) -> str:
    kinds = {bool: "a truth value", str: "text", list: "a list", dict: "an object", float: "a fraction", int: "a number"}
    return kinds.get(type(value), "null")
