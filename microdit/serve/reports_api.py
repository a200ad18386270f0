"""The pages that the web page shows in frames: the report of a run, also while it trains, and the explanation of a model and a prompt."""

import uuid
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from fastapi import APIRouter, Request, Response

from microdit.devices import device_errors_explained
from microdit.pipelines.explain_page import explain_page
from microdit.pipelines.pipeline import MicroDiTPipeline
from microdit.reports.run_folder import RunFolder, state_of
from microdit.reports.run_page import report_page
from microdit.serve.budget_api import Computations
from microdit.serve.connections import Limits
from microdit.serve.json_requests import APIError, encodable, read_json
from microdit.serve.schemas import ExplainRequest, chosen_model

KEPT_PAGES = 8  # explanations, each of up to a few megabytes


def reports_api(models: Mapping[str, MicroDiTPipeline], computations: Computations, limits: Limits, runs: Mapping[str, Path]) -> APIRouter:
    """Return the endpoints of the tabs Run and Explain. `runs` are the folders of those models that are runs; names may hold slashes."""
    router = APIRouter()
    pages: OrderedDict[str, bytes] = OrderedDict()  # the newest explanations, by names that cannot be guessed

    @router.get("/api/runs/{name:path}")
    async def run(name: str, request: Request) -> Response:
        folder = _known(runs, name)
        return _framed(await computations.run(request, lambda check: report_page(folder, check)))

    @router.get("/api/run-states/{name:path}")
    def run_state(name: str) -> dict[str, Any]:
        """Return whether the run is still training, and when it last wrote something that its report shows."""
        folder = RunFolder(_known(runs, name))
        return {"state": encodable(state_of(folder.status)), "modified": folder.modified}

    @router.post("/api/explanations")
    async def explain(request: Request) -> dict[str, str]:
        wanted = ExplainRequest.parse(await read_json(request, limits))
        model = chosen_model(wanted.model, models)

        def compute(check: Callable[[], None]) -> bytes:
            with device_errors_explained("try again when no image is being generated"):
                return explain_page(models[model], model, wanted.prompt, wanted.seed, lambda steps: check())

        page = await computations.run(request, compute)
        name = uuid.uuid4().hex
        pages[name] = page
        while len(pages) > KEPT_PAGES:
            pages.popitem(last=False)
        return {"id": name}

    @router.get("/api/explanations/{name}")
    def explanation(name: str) -> Response:
        if (page := pages.get(name)) is None:
            raise APIError("This explanation is not kept any more: ask for it again.", status=404)
        return _framed(page)

    return router


def _known(runs: Mapping[str, Path], name: str) -> Path:
    if name not in runs:
        raise APIError("There is no such run here.", status=404)
    return runs[name]


def _framed(page: bytes) -> Response:
    """Return a page that only this server's own page may show in a frame."""
    return Response(page, media_type="text/html", headers={"X-Frame-Options": "SAMEORIGIN"})
