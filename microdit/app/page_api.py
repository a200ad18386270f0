"""The web page and what its script asks: jobs that are watched and called off, a run's report, a recipe's budget.

Nothing of it comes from elsewhere, and the browser is told to load nothing from elsewhere.
"""

import base64
import threading
import uuid
from collections import OrderedDict
from pathlib import Path
from typing import Any, get_args

from fastapi import APIRouter, Request, Response
from fastapi.responses import FileResponse
from PIL import Image
from torch import Tensor

from microdit.app.asking import AskedWronglyError, read_drawing
from microdit.app.bills import bill_text
from microdit.app.computations import Computations
from microdit.app.images_api import png_of, read_json
from microdit.app.jobs import LESS_MEMORY, Job, WorkQueue
from microdit.app.limits import Limits
from microdit.devices import device_errors_explained
from microdit.diffusion.solvers import Solver
from microdit.grids import png_bytes
from microdit.pipeline import USUAL, Pipeline
from microdit.report import report_page
from microdit.training.chips import CHIPS

STATIC = Path(__file__).parent / "static"
FILES = {"": "page.html", "page.js": "page.js", "page.css": "page.css"}
POLICY = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src data:; connect-src 'self'; "
    "frame-src 'self'"
}
KEPT_JOBS = 64  # that a page may still ask for


class Watched:
    """The newest jobs of all pages by a name that cannot be guessed. A forgotten one is called off."""

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
    """`runs`: of the models that are runs. `recipes`: the folder whose recipes the page offers."""
    router = APIRouter()
    watched, decoding = Watched(queue), threading.Lock()

    @router.get("/api/about")
    def about() -> dict[str, Any]:
        """What the page's fields offer."""
        sides = {name: _side(pipeline) for name, pipeline in queue.models.items()}
        offered = sorted(str(path.relative_to(recipes)) for path in recipes.glob("*.yaml"))
        offered += sorted(path.name for path in recipes.iterdir() if any(path.glob("1-*.yaml"))) if recipes.is_dir() else []
        return {
            "models": sides,
            "solvers": get_args(Solver),
            "steps": USUAL.num_inference_steps,
            "guidance": USUAL.guidance_scale,
            "pictures": limits.pictures,
            "runs": list(runs),
            "recipes": offered,
            "chips": [chip.name for chip in CHIPS],
        }

    @router.post("/api/jobs")
    async def begin(request: Request) -> dict[str, str]:
        drawing = read_drawing(await read_json(request, limits), queue.models, limits)
        return {"id": watched.add(queue.add(drawing))}

    @router.get("/api/jobs/{name}")
    def look(name: str) -> dict[str, Any]:
        job = watched[name]
        told: dict[str, Any] = {"state": job.state, "place": queue.place(job), "done": job.done_steps, "all": job.all_steps}
        told["seed"], told["error"] = job.drawing.seed, job.error
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
        fields = await read_json(request, limits)
        return {"text": await computations.answer(request, lambda check: bill_text(fields, recipes, check))}

    @router.get("/")
    @router.get("/page.js")
    @router.get("/page.css")
    def page(request: Request) -> Response:
        return FileResponse(STATIC / FILES[request.url.path[1:]], headers={**POLICY, "Cache-Control": "no-cache"})

    def _decode(pipeline: Pipeline, latents_BCHW: Tensor) -> list[Image.Image]:
        with decoding, device_errors_explained(LESS_MEMORY):  # many pages that look at once take turns
            return pipeline.decode(latents_BCHW)

    return router


def _side(pipeline: Pipeline) -> str:
    """Of training, as WIDTHxHEIGHT."""
    _, height, width = pipeline.latent_shape
    scale = pipeline.autoencoder.downsampling
    return f"{width * scale}x{height * scale}"


def _address(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"
