"""OpenAI's images API (POST /v1/images/generations, GET /v1/models) in front of the work queue, for programs that know it already."""

import asyncio
import base64
import json
import time
from dataclasses import asdict
from typing import Any

from fastapi import APIRouter, Request
from PIL import Image

from microdit import __version__
from microdit.app.asking import AskedWronglyError, read_drawing, read_object
from microdit.app.jobs import Drawing, Job, WorkQueue
from microdit.app.limits import Limits
from microdit.grids import png_bytes

LOOK_EVERY = 0.05  # seconds between two looks at whether a job has ended, or its client gone


class ServerFailedError(Exception):
    """Ours, with a sentence for the client. `status`: of HTTP."""

    def __init__(self, sentence: str, status: int = 500):
        super().__init__(sentence)
        self.status = status


def images_api(queue: WorkQueue, limits: Limits) -> APIRouter:
    router = APIRouter()
    opened = int(time.time())

    @router.post("/v1/images/generations")
    async def generations(request: Request) -> dict[str, Any]:
        drawing = read_drawing(await read_json(request, limits), queue.models, limits)
        job = queue.add(drawing)
        try:
            while not job.ended.is_set():
                if await request.is_disconnected():
                    break
                await asyncio.sleep(LOOK_EVERY)
        finally:
            queue.cancel(job)  # whoever does not wait for it any more gets none of the machine; without effect on one that has ended
        answer_for_failure(job)
        files = await asyncio.to_thread(lambda: [png_of(picture, drawing, i) for i, picture in enumerate(job.pictures)])
        return {"created": int(time.time()), "data": [{"b64_json": base64.b64encode(file).decode()} for file in files]}

    @router.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {
            "object": "list",
            "data": [{"id": name, "object": "model", "created": opened, "owned_by": "microdit"} for name in queue.models],
        }

    @router.get("/health")
    async def health() -> dict[str, Any]:
        if queue.is_closed:
            raise ServerFailedError("The server is shutting down.", 503)
        return {"status": "ok", "waiting": len(queue), "queue": queue.waiting}

    return router


async def read_json(request: Request, limits: Limits) -> dict[str, Any]:
    """The object that a request brings. Raises AskedWronglyError if it is none, or is not said to be JSON (a form of any page is not)."""
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise AskedWronglyError("Send JSON, with the header Content-Type: application/json.", status=415, code="not_json")
    return read_object(await _read_body(request, limits))


async def _read_body(request: Request, limits: Limits) -> bytes:
    """No more of it than may be. Raises AskedWronglyError if it is larger, or too slow."""
    too_large = AskedWronglyError(f"The body is larger than {limits.body_bytes:,} bytes.", status=413, code="too_large")
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
        raise AskedWronglyError(f"The body did not come within {limits.body_seconds:g} seconds.", status=408, code="timeout") from error
    return bytes(body)


def answer_for_failure(job: Job) -> None:
    """Raises what the client is told, unless the job has ended well."""
    if job.state == "failed":
        raise AskedWronglyError(job.error) if job.at_fault == "user" else ServerFailedError(job.error)
    if job.state != "done":
        raise ServerFailedError("The job was called off: the server is shutting down, or nobody waited for it.", 503)


def png_of(picture: Image.Image, drawing: Drawing, number: int) -> bytes:
    """A file that says of itself, as text, how to draw it again."""
    about = {
        "prompt": drawing.prompt,
        "negative_prompt": drawing.negative_prompt,
        "seed": str(drawing.seed + number),
        "settings": json.dumps(asdict(drawing.settings)),
        "model": drawing.model,
        "software": f"microdit {__version__}",
    }
    return png_bytes(picture, about)
