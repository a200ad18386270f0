"""The requests of the image server: images, explanations and budgets, with the error for each invalid field."""

import random
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Annotated, Any, ClassVar

from pydantic import AfterValidator, ConfigDict, Field, field_validator, model_validator

from microdit.encoders.captions import clean_caption
from microdit.errors import UserError
from microdit.pipelines.pipeline import MicroDiTPipeline
from microdit.pipelines.settings import suited_to
from microdit.serve.json_requests import APIError, JSONRequest
from microdit.serve.queue import JobSpec

MAX_CHARACTERS = 2000  # of a prompt, or of another text in an image request
MAX_IMAGES = 16  # per request
MAX_SIDE = 1024  # pixels
MAX_PIXELS = 4 * 1024 * 1024  # of all images of a request together
MAX_SEED = 2**53 - 2  # the largest seed of an image whose successor JavaScript still represents exactly
IGNORED = {"quality", "style", "background", "moderation"}  # OpenAI's clients send these fields; they have no effect here


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
    steps: int | None = Field(None, ge=2, le=1000)  # these three by default as suits the model
    guidance_scale: float | None = None
    solver: Text | None = None

    @model_validator(mode="before")
    @classmethod
    def _drop_absent(cls, fields: dict[str, Any]) -> dict[str, Any]:
        return {k: v for k, v in fields.items() if k not in IGNORED and (v is not None or k not in cls.model_fields)}

    @field_validator("response_format")
    @classmethod
    def _check_response_format(cls, value: str) -> str:
        if value != "b64_json":
            raise ValueError("response_format must be b64_json: the server keeps no images, so there is no url.")
        return value

    @field_validator("size")
    @classmethod
    def _check_size(cls, value: str) -> str:
        if value != "auto" and not re.fullmatch(r"[0-9]{1,6}x[0-9]{1,6}", value):
            raise ValueError('size must be WIDTHxHEIGHT in pixels, such as "64x64", or "auto" for the training size.')
        return value

    def job_spec(self, models: Mapping[str, MicroDiTPipeline]) -> JobSpec:
        """Return the job for one of `models`, by default the first. Raises APIError if that model cannot generate it."""
        model = chosen_model(self.model, models)
        if self.seed + self.n - 1 > MAX_SEED:
            raise APIError(f"seed must be between 0 and {MAX_SEED + 1 - self.n}.", "seed")
        height, width = self._sides(models[model])
        settings = suited_to(models[model].objective)
        for field, name in (("steps", "num_inference_steps"), ("guidance_scale", "guidance_scale"), ("solver", "solver")):
            if getattr(self, field) is None:
                continue
            try:  # one by one, so that the error names the invalid field
                settings = replace(settings, **{name: getattr(self, field)})
            except UserError as error:
                raise APIError(str(error), field) from error
        return JobSpec(model, self.prompt, settings, self.seed, self.n, height, width, self.negative_prompt)

    def _sides(self, pipeline: MicroDiTPipeline) -> tuple[int | None, int | None]:
        """Return height and width in pixels, or None for the training size."""
        if self.size == "auto":
            return None, None
        width, height = map(int, self.size.split("x"))
        if max(width, height) > MAX_SIDE:
            raise APIError(f"size {self.size} is too large: no side may have more than {MAX_SIDE} pixels.", "size")
        try:
            pipeline.latent_shape_of(height, width)
        except UserError as error:
            raise APIError(str(error), "size") from error
        if self.n * width * height > MAX_PIXELS:
            raise APIError(f"{self.n} images of {self.size} are too many pixels for one request: request fewer or smaller images.", "n")
        return height, width


class ExplainRequest(JSONRequest):
    """A request of the tab Explain: what a model, by default the first, does with a prompt."""

    model_config = ConfigDict(extra="forbid")

    prompt: Text
    model: Text | None = None
    seed: int = Field(0, ge=0, le=MAX_SEED)


def chosen_model(name: str | None, models: Mapping[str, MicroDiTPipeline]) -> str:
    """Return the name of a model, by default the first's. Raises APIError if there is none of that name."""
    model = next(iter(models)) if name is None else name
    if model not in models:
        raise APIError(f"There is no model {model!r:.60}. Known: {', '.join(models)}.", "model", 404, "model_not_found")
    return model


class BudgetRequest(JSONRequest):
    """A request of the budget tab: the cost of `recipe` or of a recipe's `text`, or what `dollars` buy. Other fields are ignored."""

    sentences: ClassVar[Mapping[str, str]] = {
        "count": "The number of GPUs must be a whole number from 1 to 100,000.",
        "images": "The number of images must be a whole number from 1 to 1,000,000,000,000.",
        "price": "The price must be in dollars per GPU-hour, or left empty.",
        "mfu": "The utilisation must be a share of the chip's peak, such as 0.45, or left empty.",
        "dollars": "The budget must be in dollars, or left empty.",
    }

    recipe: str | None = None
    text: str | None = None
    dollars: float | None = None
    chip: str = "h100"
    count: int = Field(1, ge=1, le=100_000)
    images: int | None = Field(None, ge=1, le=10**12)
    price: float | None = None
    mfu: float | None = None
