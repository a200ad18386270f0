"""The endpoints: OpenAI's images API (POST /v1/images/generations, GET /v1/models), and the web page with the API of its script.

The page's API starts, shows and cancels jobs, and returns a run's report or a recipe's budget. The page loads nothing from other hosts.
"""

import asyncio
import base64
import json
import threading
import time
import uuid
from collections import OrderedDict
from dataclasses import asdict
from pathlib import Path
from typing import Any, get_args

from fastapi import APIRouter, Request, Response
from fastapi.responses import FileResponse
from PIL import Image
from torch import Tensor

from microdit import __version__
from microdit.devices import device_errors_explained
from microdit.diffusion.samplers import Solver
from microdit.pipelines.pipeline import MicroDiTPipeline
from microdit.pipelines.settings import DEFAULT_SETTINGS
from microdit.planning.hardware import CHIPS
from microdit.reports.grids import png_bytes
from microdit.reports.run_page import report_page
from microdit.serve.budget_api import Computations, bill_text
from microdit.serve.queue import LESS_MEMORY, Drawing, Job, WorkQueue
from microdit.serve.schemas import MAX_IMAGES, AskedWronglyError, BudgetRequest, ImageRequest, Limits, read_object

LOOK_EVERY = 0.05  # seconds between two looks at whether a job has ended, or its client gone


class ServerFailedError(Exception):
    """A failure of the server, with a sentence for the client. `status` is the HTTP status."""

    def __init__(self, sentence: str, status: int = 500):
        super().__init__(sentence)
        self.status = status


def images_api(queue: WorkQueue, limits: Limits) -> APIRouter:
    router = APIRouter()
    opened = int(time.time())

    @router.post("/v1/images/generations")
    async def generations(request: Request) -> dict[str, Any]:
        drawing = ImageRequest.read(await read_json(request, limits)).drawing(queue.models)
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
        data = [{"b64_json": base64.b64encode(file).decode()} for file in files]
        return {"created": int(time.time()), "data": data, **({"warnings": list(job.warnings)} if job.warnings else {})}

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
    """Return the JSON object in the body. Raises AskedWronglyError if there is none, or if the content type is not JSON."""
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise AskedWronglyError("Send JSON, with the header Content-Type: application/json.", status=415, code="not_json")
    return read_object(await _read_body(request, limits))


async def _read_body(request: Request, limits: Limits) -> bytes:
    """Return the body. Raises AskedWronglyError if it is too large or too slow."""
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
    """Raise the error that the client is told, unless the job succeeded."""
    if job.state == "failed":
        raise AskedWronglyError(job.error) if job.at_fault == "user" else ServerFailedError(job.error)
    if job.state != "done":
        raise ServerFailedError("The job was called off: the server is shutting down, or nobody waited for it.", 503)


def png_of(picture: Image.Image, drawing: Drawing, number: int) -> bytes:
    """Return a PNG file whose text chunks say how to draw it again."""
    about = {
        "prompt": drawing.prompt,
        "negative_prompt": drawing.negative_prompt,
        "seed": str(drawing.seed + number),
        "settings": json.dumps(asdict(drawing.settings)),
        "model": drawing.model,
        "software": f"microdit {__version__}",
    }
    return png_bytes(picture, about)


STATIC = Path(__file__).parent / "static"
FILES = {"": "page.html", "page.js": "page.js", "page.css": "page.css"}
POLICY = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src data:; connect-src 'self'; "
    "frame-src 'self'"
}
KEPT_JOBS = 64  # that a page may still ask for


class Watched:
    """The newest jobs of all pages, by names that cannot be guessed. The oldest are cancelled and dropped."""

    def __init__(self, queue: WorkQueue):
        self._queue = queue
        self._jobs: OrderedDict[str, Job] = OrderedDict()

    def add(self, job: Job) -> str:
        name = uuid.uuid4().hex
        self._jobs[name] = job
        while len(self._jobs) > KEPT_JOBS + self._queue.waiting:
            self._queue.cancel(self._jobs.popitem(last=False)[1])
        return name

    def __getitem__(self, name: str) -> Job:
        job = self._jobs.get(name)
        if job is None:
            raise AskedWronglyError("This job is not known here any more.", status=404)
        return job


def page_api(queue: WorkQueue, computations: Computations, limits: Limits, runs: dict[str, Path], recipes: Path) -> APIRouter:
    """Return the page's endpoints. `runs` are the folders of models that are runs; `recipes` is the folder of recipes to offer."""
    router = APIRouter()
    watched, decoding = Watched(queue), threading.Lock()

    @router.get("/api/about")
    def about() -> dict[str, Any]:
        """Return the choices and the defaults of the page's fields."""
        sides = {name: _side(pipeline) for name, pipeline in queue.models.items()}
        offered = sorted(str(path.relative_to(recipes)) for path in recipes.glob("*.yaml"))
        offered += sorted(path.name for path in recipes.iterdir() if any(path.glob("1-*.yaml"))) if recipes.is_dir() else []
        return {
            "models": sides,
            "solvers": get_args(Solver),
            "steps": DEFAULT_SETTINGS.num_inference_steps,
            "guidance": DEFAULT_SETTINGS.guidance_scale,
            "pictures": MAX_IMAGES,
            "runs": list(runs),
            "recipes": offered,
            "chips": [chip.name for chip in CHIPS],
        }

    @router.post("/api/jobs")
    async def begin(request: Request) -> dict[str, str]:
        drawing = ImageRequest.read(await read_json(request, limits)).drawing(queue.models)
        return {"id": watched.add(queue.add(drawing))}

    @router.get("/api/jobs/{name}")
    def look(name: str) -> dict[str, Any]:
        job = watched[name]
        told: dict[str, Any] = {"state": job.state, "place": queue.place(job), "done": job.done_steps, "all": job.all_steps}
        told["seed"], told["error"], told["warnings"] = job.drawing.seed, job.error, list(job.warnings)
        if job.state == "done":
            told["pictures"] = [_address(png_of(picture, job.drawing, number)) for number, picture in enumerate(job.pictures)]
        elif (latents_BCHW := job.latents_BCHW) is not None:
            told["pictures"] = [_address(png_bytes(picture)) for picture in _decode(queue.models[job.drawing.model], latents_BCHW)]
        return told

    @router.delete("/api/jobs/{name}")
    def cancel(name: str) -> dict[str, str]:
        queue.cancel(watched[name])
        return {"state": watched[name].state}

    @router.get("/api/runs/{name}")
    async def run(name: str, request: Request) -> Response:
        if name not in runs:
            raise AskedWronglyError("There is no such run here.", status=404)
        page = await computations.answer(request, lambda check: report_page(runs[name], check))
        return Response(page, media_type="text/html", headers={"X-Frame-Options": "SAMEORIGIN"})

    @router.post("/api/budget")
    async def budget(request: Request) -> dict[str, str]:
        wanted = BudgetRequest.read(await read_json(request, limits))
        return {"text": await computations.answer(request, lambda check: bill_text(wanted, recipes, check))}

    @router.get("/")
    @router.get("/page.js")
    @router.get("/page.css")
    def page(request: Request) -> Response:
        return FileResponse(STATIC / FILES[request.url.path[1:]], headers={**POLICY, "Cache-Control": "no-cache"})

    def _decode(pipeline: MicroDiTPipeline, latents_BCHW: Tensor) -> list[Image.Image]:
        with decoding, device_errors_explained(LESS_MEMORY):  # many pages that look at once take turns
            return pipeline.decode(latents_BCHW)

    return router


def _side(pipeline: MicroDiTPipeline) -> str:
    """Return the size of the training images as WIDTHxHEIGHT."""
    _, height, width = pipeline.latent_shape
    scale = pipeline.config.vae_scale_factor
    return f"{width * scale}x{height * scale}"


def _address(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"
