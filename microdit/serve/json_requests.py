"""JSON requests: the body, read within limits; its fields, validated by pydantic; and the error response for each invalid one."""

import asyncio
import json
from collections.abc import Mapping
from typing import Any, ClassVar, Self

from fastapi import Request
from pydantic import BaseModel, ConfigDict, ValidationError, model_validator
from pydantic_core import ErrorDetails

from microdit.errors import UserError
from microdit.serve.connections import Limits


class APIError(UserError):
    """An error response: a sentence, and the HTTP status.

    `param` is the invalid field, if there is one, and `code` a word by which programs recognise the error.
    """

    def __init__(self, sentence: str, param: str | None = None, status: int = 400, code: str | None = None):
        super().__init__(sentence)
        self.param, self.status, self.code = param, status, code


async def read_json(request: Request, limits: Limits) -> dict[str, Any]:
    """Return the JSON object in the body. Raises APIError if it is none, too large or too slow, or has another content type."""
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise APIError("Send JSON, with the header Content-Type: application/json.", status=415, code="not_json")
    body = await _read_body(request, limits)
    try:
        value = json.loads(body, parse_constant=_reject_constant)
    except (ValueError, RecursionError) as error:
        raise APIError("The body is not valid JSON.") from error
    if not isinstance(value, dict):
        raise APIError("The body must be a JSON object.")
    return value


async def _read_body(request: Request, limits: Limits) -> bytes:
    too_large = APIError(f"The body is larger than {limits.body_bytes:,} bytes.", status=413, code="too_large")
    announced = request.headers.get("content-length", "0")
    if announced.isdecimal() and int(announced[:12]) > limits.body_bytes:
        raise too_large
    body = bytearray()
    try:
        async with asyncio.timeout(limits.body_seconds):
            async for piece in request.stream():
                body += piece
                if len(body) > limits.body_bytes:
                    raise too_large
    except TimeoutError as error:
        raise APIError(f"The body did not arrive within {limits.body_seconds:g} seconds.", status=408, code="timeout") from error
    return bytes(body)


class JSONRequest(BaseModel):
    """The fields of a request, with the types of JSON: nothing is converted but integers to floats.

    `sentences` holds error messages for fields whose general message would not do.
    """

    model_config = ConfigDict(strict=True, frozen=True, allow_inf_nan=False)
    sentences: ClassVar[Mapping[str, str]] = {}

    @classmethod
    def parse(cls, fields: dict[str, Any]) -> Self:
        """Validate `fields`. Raises APIError, which names the first invalid field."""
        try:
            return cls.model_validate(fields)
        except ValidationError as error:
            found = error.errors()[0]
            name = str(found["loc"][0])
            raise APIError(cls.sentences.get(name) or cls._sentence(name, found), name[:60]) from error

    @model_validator(mode="before")
    @classmethod
    def _replace_lone_surrogates(cls, fields: dict[str, Any]) -> dict[str, Any]:
        """Replace halves of characters, which JSON can express as "\\ud800" and nothing can encode, by question marks."""
        return {encodable(name): encodable(value) if isinstance(value, str) else value for name, value in fields.items()}

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
                return f"{name} is too large a number." if is_number else f"{name} must be a number, not {_kind(value)}."
            case "value_error":
                return str(error["ctx"]["error"])
            case "extra_forbidden":
                known = sorted(cls.model_fields)
                return f"There is no field {name!r:.60}. Known: {', '.join(known)}."
        return f"{name} is invalid."


def encodable(text: str) -> str:
    """Replace lone surrogates by question marks."""
    return text.encode("utf-8", "replace").decode()


def _reject_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _kind(value: object) -> str:
    kinds = {bool: "a boolean", str: "text", list: "a list", dict: "an object", float: "a fraction", int: "a number"}
    return kinds.get(type(value), "null")
