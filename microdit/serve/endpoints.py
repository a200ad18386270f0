"""The image server: OpenAI's images API (POST /v1/images/generations, GET /v1/models), and the web page with the API of its script.

The page's API starts, shows and cancels jobs, and returns budgets; `reports_api.py` adds its reports. The page loads nothing from other
hosts.
"""

import asyncio
import base64
import json
import logging
import threading
import time
import uuid
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, get_args

from fastapi import APIRouter, Request
from PIL import Image
from torch import Tensor

from microdit import __version__
from microdit.config.recipes import RECIPES
from microdit.devices import device_errors_explained
from microdit.diffusion.samplers import Solver
from microdit.errors import UserError
from microdit.pipelines.pipeline import MicroDiTPipeline
from microdit.pipelines.settings import suited_to
from microdit.planning.hardware import CHIPS
from microdit.planning.phases import PROMPTS
from microdit.reports.grids import png_bytes
from microdit.serve.budget_api import Computations, estimate_text
from microdit.serve.connections import LIMITS, Limits
from microdit.serve.json_requests import APIError, read_json
from microdit.serve.queue import LESS_MEMORY, Job, JobSpec, QueueClosedError, QueueFullError, WorkQueue
from microdit.serve.reports_api import reports_api
from microdit.serve.schemas import MAX_IMAGES, BudgetRequest, ImageRequest
from microdit.serve.server import WebApp, page_router

POLL_SECONDS = 0.05  # between two checks whether a job has ended or its client has disconnected
PAGE = ("page.css", "page.js", "elements.js", "requests.js", "forms.js", "pictures.js", "generate.js", "reports.js")
EXAMPLES = 8  # prompts that the page offers for a model

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class PageContent:
    """Content of the page besides the models. `runs` are the folders of those models that are runs, `prompts` the examples of models that
    have some of their own, and `recipes` is the folder of the recipes whose cost the page estimates."""

    runs: Mapping[str, Path] = field(default_factory=dict)
    prompts: Mapping[str, list[str]] = field(default_factory=dict)
    recipes: Path = RECIPES


def web_app(queue: WorkQueue, limits: Limits = LIMITS, content: PageContent | None = None, *, local: bool = True) -> WebApp:
    """Return the image server over `queue`, which is closed with it. For `local` see WebApp."""
    computations, content = Computations(), content or PageContent()

    def close() -> None:
        queue.close()
        computations.close()

    page = page_api(queue, computations, limits, content)
    reports = reports_api(queue.models, computations, limits, content.runs)
    return WebApp(images_api(queue, limits), page, reports, page_router("page.html", *PAGE), local=local, close=close)


def images_api(queue: WorkQueue, limits: Limits) -> APIRouter:
    router = APIRouter()
    created = int(time.time())

    @router.post("/v1/images/generations")
    async def generations(request: Request) -> dict[str, Any]:
        job = await _queue_job(request, queue, limits)
        try:
            while not job.ended.is_set():
                if await request.is_disconnected():
                    break
                await asyncio.sleep(POLL_SECONDS)
        finally:
            queue.cancel(job)  # if the client has disconnected; without effect on a job that has ended
        raise_for_failure(job)
        files = await asyncio.to_thread(lambda: [png_of(image, job.spec, i) for i, image in enumerate(job.images)])
        data = [{"b64_json": base64.b64encode(file).decode()} for file in files]
        return {"created": int(time.time()), "data": data, **({"warnings": list(job.warnings)} if job.warnings else {})}

    @router.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {
            "object": "list",
            "data": [{"id": name, "object": "model", "created": created, "owned_by": "microdit"} for name in queue.models],
        }

    @router.get("/health")
    async def health() -> dict[str, Any]:
        if queue.is_closed:
            raise APIError("The server is shutting down.", status=503, code="shutting_down")
        return {"status": "ok", "waiting": len(queue), "queue": queue.capacity}

    return router


async def _queue_job(request: Request, queue: WorkQueue, limits: Limits) -> Job:
    """Queue the job of an image request. Raises APIError if the request is invalid, or the queue is full or closed."""
    spec = ImageRequest.parse(await read_json(request, limits)).job_spec(queue.models)
    try:
        return queue.add(spec)
    except QueueFullError as error:
        raise APIError(str(error), status=429, code="queue_full") from error
    except QueueClosedError as error:
        raise APIError(str(error), status=503, code="shutting_down") from error


def raise_for_failure(job: Job) -> None:
    """Raises APIError unless the job succeeded."""
    if job.state == "failed":
        raise APIError(job.error, status=400 if job.fault == "client" else 500)
    if job.state != "done":
        raise APIError("The job was cancelled: the server is shutting down, or the client has disconnected.", status=503)


def png_of(image: Image.Image, spec: JobSpec, number: int) -> bytes:
    """Return image `number` of a job as a PNG file whose text chunks hold everything that is needed to generate it again."""
    about = {
        "prompt": spec.prompt,
        "negative_prompt": spec.negative_prompt,
        "seed": str(spec.seed + number),
        "settings": json.dumps(asdict(spec.settings)),
        "model": spec.model,
        "software": f"microdit {__version__}",
    }
    return png_bytes(image, about)


KEPT_JOBS = 64  # that a page may still ask for


class PageJobs:
    """The newest jobs of all pages, by names that cannot be guessed. The oldest are cancelled and forgotten."""

    def __init__(self, queue: WorkQueue):
        self._queue = queue
        self._jobs: OrderedDict[str, Job] = OrderedDict()

    def add(self, job: Job) -> str:
        name = uuid.uuid4().hex
        self._jobs[name] = job
        while len(self._jobs) > KEPT_JOBS + self._queue.capacity:
            self._queue.cancel(self._jobs.popitem(last=False)[1])
        return name

    def __getitem__(self, name: str) -> Job:
        job = self._jobs.get(name)
        if job is None:
            raise APIError("This job is not known here any more.", status=404)
        return job


def page_api(queue: WorkQueue, computations: Computations, limits: Limits, content: PageContent) -> APIRouter:
    """Return the endpoints of the page's script, without those of reports."""
    router = APIRouter()
    jobs, decoding, recipes = PageJobs(queue), threading.Lock(), content.recipes

    @router.get("/api/about")
    def about() -> dict[str, Any]:
        """Return the choices and the defaults of the page's fields."""
        sizes = {name: _training_size(pipeline) for name, pipeline in queue.models.items()}
        offered = sorted(str(path.relative_to(recipes)) for path in recipes.glob("*.yaml"))
        offered += sorted(path.name for path in recipes.iterdir() if any(path.glob("1-*.yaml"))) if recipes.is_dir() else []
        return {
            "models": sizes,
            "solvers": get_args(Solver),
            "usual": {name: _usual(pipeline) for name, pipeline in queue.models.items()},
            "pictures": MAX_IMAGES,
            "examples": {name: (content.prompts.get(name) or PROMPTS)[:EXAMPLES] for name in queue.models},
            "runs": list(content.runs),
            "recipes": offered,
            "chips": [chip.name for chip in CHIPS],
        }

    @router.post("/api/jobs")
    async def start_job(request: Request) -> dict[str, str]:
        return {"id": jobs.add(await _queue_job(request, queue, limits))}

    @router.get("/api/jobs/{name}")
    def job_status(name: str) -> dict[str, Any]:
        job = jobs[name]
        status: dict[str, Any] = {"state": job.state, "place": queue.place(job), "done": job.done_steps, "all": job.all_steps}
        status["seed"], status["error"], status["warnings"] = job.spec.seed, job.error, list(job.warnings)
        if job.state == "done":
            status["pictures"] = [_data_url(png_of(image, job.spec, number)) for number, image in enumerate(job.images)]
        elif (latents_BCHW := job.latents_BCHW) is not None and decoding.acquire(blocking=False):
            try:  # one preview at a time, for which no other status waits
                status["pictures"] = _preview(queue.models[job.spec.model], latents_BCHW)
            except UserError as error:  # no reason to end the job
                log.warning("A preview could not be decoded: %s", error)
            finally:
                decoding.release()
        return status

    @router.delete("/api/jobs/{name}")
    def cancel_job(name: str) -> dict[str, str]:
        queue.cancel(jobs[name])
        return {"state": jobs[name].state}

    @router.post("/api/budget")
    async def budget(request: Request) -> dict[str, str]:
        wanted = BudgetRequest.parse(await read_json(request, limits))
        return {"text": await computations.run(request, lambda check: estimate_text(wanted, recipes, check))}

    return router


def _preview(pipeline: MicroDiTPipeline, latents_BCHW: Tensor) -> list[str]:
    """Return images of latents as data URLs. Raises UserError if memory runs out."""
    with device_errors_explained(LESS_MEMORY):
        return [_data_url(png_bytes(image)) for image in pipeline.decode(latents_BCHW)]


def _usual(pipeline: MicroDiTPipeline) -> dict[str, Any]:
    """Return the values that the page's fields have at first, by the names of `ImageRequest`."""
    usual = suited_to(pipeline.objective)
    return {"steps": usual.num_inference_steps, "guidance_scale": usual.guidance_scale, "solver": usual.solver}


def _training_size(pipeline: MicroDiTPipeline) -> str:
    """Return the size of the training images as WIDTHxHEIGHT."""
    _, height, width = pipeline.latent_shape
    scale = pipeline.config.vae_scale_factor
    return f"{width * scale}x{height * scale}"


def _data_url(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"
