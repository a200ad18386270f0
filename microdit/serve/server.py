"""The web server: endpoints put together, errors as sentences, and its start and end."""

import asyncio
import contextlib
import ipaddress
import logging
import socket
from collections.abc import AsyncIterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import uvicorn
from fastapi import Depends, FastAPI, Request, Response
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from microdit.config.recipes import RECIPES
from microdit.errors import UserError
from microdit.serve.budget_api import Computations
from microdit.serve.connections import LOGGING, Connection, possible_connections
from microdit.serve.endpoints import ServerFailedError, images_api, page_api
from microdit.serve.queue import OUR_MISTAKE, QueueClosedError, QueueFullError, WorkQueue
from microdit.serve.schemas import AskedWronglyError, Limits

LIMITS = Limits()
RETRY_SECONDS = 2
BACKLOG = 2048  # connections that wait to be taken: as many as uvicorn has by default
TAKEN_AT_ONCE = 8  # before any of them is looked at
LOCAL_NAMES = {"localhost", "127.0.0.1", "::1"}

log = logging.getLogger(__name__)


def web_app(
    queue: WorkQueue, limits: Limits = LIMITS, *, runs: dict[str, Path] | None = None, recipes: Path = RECIPES, local: bool = True
) -> FastAPI:
    """All that is served over `queue`, which is closed as the server ends: the endpoint, and the page with its `runs` and `recipes`.

    `local`: answer only to this machine's own names, so that no page from elsewhere reaches in under a name of its own.
    """
    computations = Computations(limits)

    @contextlib.asynccontextmanager
    async def life(_: FastAPI) -> AsyncIterator[None]:
        yield
        queue.close()
        computations.close()

    def own_names_only(request: Request) -> None:
        if local and request.url.hostname not in LOCAL_NAMES:
            raise AskedWronglyError("This server answers only as 127.0.0.1 or localhost.", status=403, code="wrong_host")

    # Without the pages of its own that FastAPI offers: they load scripts from elsewhere.
    app = FastAPI(
        lifespan=life, docs_url=None, redoc_url=None, openapi_url=None, dependencies=[Depends(own_names_only), Depends(own_pages_only)]
    )
    app.include_router(images_api(queue, limits))
    app.include_router(page_api(queue, computations, limits, runs or {}, recipes))
    _answer_errors(app)
    return app


def own_pages_only(request: Request) -> None:
    """Raises AskedWronglyError for what a browser asks because a page from elsewhere told it to. Programs say neither header, and pass."""
    if request.method in ("GET", "HEAD") and not request.url.path.startswith("/api/"):
        return
    origin, site = request.headers.get("origin"), request.headers.get("sec-fetch-site", "none")
    is_own = origin is None or origin.partition("://")[2] == request.headers.get("host")
    if not is_own or site not in ("none", "same-origin"):
        raise AskedWronglyError("This server answers only its own page, and programs.", status=403, code="wrong_origin")


def is_local(host: str) -> bool:
    """Whether only this machine reaches a server there."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def listen(host: str, port: int) -> socket.socket:
    """Port 0 takes a free one. Raises UserError if it is taken or not ours."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # Named as TCP, without which asyncio leaves small answers waiting for acknowledgements (40 ms each).
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        listener.listen(BACKLOG)  # so that whoever is told the address may connect, before the server is ready to answer
    except (OSError, OverflowError) as error:
        listener.close()
        raise UserError(f"Nothing can be served at {host}:{port} ({error}): choose another with --port or --host.") from error
    return listener


class Server(uvicorn.Server):
    """Calls off all jobs as soon as it is to end: their clients are answered, and nobody waits for a long drawing."""

    def __init__(self, app: FastAPI, queue: WorkQueue, limits: Limits = LIMITS):
        limits = replace(limits, connections=possible_connections(limits.connections))
        config = uvicorn.Config(
            app,
            http=cast(Any, partial(Connection, limits=limits)),
            ws="none",
            log_config=LOGGING,
            log_level="warning",
            access_log=False,
            backlog=TAKEN_AT_ONCE,
            timeout_keep_alive=limits.keep_alive_seconds,
            timeout_graceful_shutdown=5,
            server_header=False,
        )
        super().__init__(config)
        self._queue = queue

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        for listener in sockets or []:
            listener.listen(BACKLOG)  # asyncio takes one number for those that wait and for those that it takes at once

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        await asyncio.to_thread(self._queue.close)
        await super().shutdown(sockets)


def error_answer(status: int, sentence: str, param: str | None = None, code: str | None = None) -> JSONResponse:
    """In OpenAI's form."""
    kinds = {429: "rate_limit_error", 404: "not_found_error"}
    kind = kinds.get(status, "server_error" if status >= 500 else "invalid_request_error")
    headers = {"Retry-After": str(RETRY_SECONDS)} if status in (429, 503) else {}
    sentence = sentence.encode("utf-8", "replace").decode()  # JSON may say half a letter, as "\\ud800", and it cannot be sent back
    return JSONResponse({"error": {"message": sentence, "type": kind, "param": param, "code": code}}, status, headers)


def _answer_errors(app: FastAPI) -> None:
    """One sentence for each; what none of us expected is logged, and never shown."""

    async def answer(_: Request, error: Exception) -> Response:
        match error:
            case AskedWronglyError():
                return error_answer(error.status, str(error), error.param, error.code)
            case QueueFullError():
                return error_answer(429, str(error), code="queue_full")
            case QueueClosedError():
                return error_answer(503, str(error), code="shutting_down")
            case ServerFailedError():
                return error_answer(error.status, str(error))
            case HTTPException():
                return error_answer(error.status_code, _http_sentence(error.status_code))
            case ClientDisconnect():
                return Response(status_code=499)
        return error_answer(400, str(error))

    async def own_mistake(request: Request, error: Exception) -> Response:
        log.error("%s %r failed", request.method, request.url.path, exc_info=error)
        return error_answer(500, OUR_MISTAKE)

    for kind in (UserError, ServerFailedError, HTTPException, ClientDisconnect):
        app.add_exception_handler(kind, answer)
    app.add_exception_handler(Exception, own_mistake)


def _http_sentence(status: int) -> str:
    known = {404: "There is nothing at this address.", 405: "This address does not know that method."}
    return known.get(status, "The request cannot be answered.")
