"""The web server of both applications, the image server and the vote page.

It answers each error in one JSON sentence, and only programs and its own pages.
"""

import asyncio
import ipaddress
import logging
import socket
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import uvicorn
from fastapi import APIRouter, Depends, FastAPI, Request, Response
from fastapi.responses import FileResponse, JSONResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from microdit.errors import UserError
from microdit.serve.connections import LIMITS, LOGGING, Connection, Limits, possible_connections
from microdit.serve.json_requests import APIError, encodable

RETRY_SECONDS = 2
BACKLOG = 2048  # connections that wait to be accepted: uvicorn's default
ACCEPTED_AT_ONCE = 8  # before any of them is served
LOCAL_NAMES = {"localhost", "127.0.0.1", "::1"}
INTERNAL_ERROR = "The request failed because of an internal error. The server's log has the details."
STATIC = Path(__file__).parent / "static"
PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
    "frame-src 'self'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-cache",
}

log = logging.getLogger(__name__)


class WebApp(FastAPI):
    """An application for `Server`: the endpoints of `routers`, behind the checks and with the error responses that all share.

    With `local` it answers only to this machine's own names, so that no other site can reach it under a name of its own (DNS rebinding).
    `close` releases what the endpoints hold; the server calls it as soon as it is to end.
    """

    def __init__(self, *routers: APIRouter, local: bool = True, close: Callable[[], None] = lambda: None):
        checks = [Depends(check_host), Depends(check_origin)] if local else [Depends(check_origin)]
        # Without FastAPI's documentation pages, which load scripts from other hosts.
        super().__init__(docs_url=None, redoc_url=None, openapi_url=None, dependencies=checks)
        self.close = close
        for router in routers:
            self.include_router(router)
        for kind in (UserError, HTTPException, ClientDisconnect):
            self.add_exception_handler(kind, _respond_to_error)
        self.add_exception_handler(Exception, _respond_to_internal_error)


class Server(uvicorn.Server):
    """Serves a `WebApp`, and closes it before waiting for responses in progress, so that none waits for a long computation."""

    def __init__(self, app: WebApp, limits: Limits = LIMITS):
        limits = replace(limits, connections=possible_connections(limits.connections))
        config = uvicorn.Config(
            app,
            http=cast(Any, partial(Connection, limits=limits)),
            ws="none",
            lifespan="off",
            log_config=LOGGING,
            log_level="warning",
            access_log=False,
            backlog=ACCEPTED_AT_ONCE,
            timeout_keep_alive=limits.keep_alive_seconds,
            timeout_graceful_shutdown=5,
            server_header=False,
        )
        super().__init__(config)
        self._app = app

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        for listener in sockets or []:
            listener.listen(BACKLOG)  # asyncio takes one number for waiting connections and for those accepted at once

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        await asyncio.to_thread(self._app.close)
        await super().shutdown(sockets)


def listen(host: str, port: int) -> socket.socket:
    """Return a listening socket; port 0 selects a free port. Raises UserError if the port is taken or not permitted."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # Declared as TCP, without which asyncio leaves small responses waiting for acknowledgements (40 ms each).
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        listener.listen(BACKLOG)  # so that clients can connect to the printed address before the server is ready
    except (OSError, OverflowError) as error:
        listener.close()
        options = "--port" if host == "127.0.0.1" else "--port or --host"
        raise UserError(f"Cannot listen on {host}:{port} ({error}): choose another {options}.") from error
    return listener


def url_of(listener: socket.socket) -> str:
    """Return the address to open in a browser."""
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def is_local(host: str) -> bool:
    """Return whether a server at this address can be reached from this machine only."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def page_router(page: str, *files: str) -> APIRouter:
    """Return the endpoints of a page of the folder static, which is at the root, and of the scripts and style sheets that it loads."""
    router = APIRouter()

    def static(request: Request) -> Response:
        return FileResponse(STATIC / (request.url.path[1:] or page), headers=PAGE_HEADERS)

    for file in ("", *files):
        router.add_api_route(f"/{file}", static, methods=["GET"])
    return router


def check_host(request: Request) -> None:
    """Raises APIError if the server is addressed by another name than this machine's own."""
    if request.url.hostname not in LOCAL_NAMES:
        raise APIError("This server answers only as 127.0.0.1 or localhost.", status=403, code="wrong_host")


def check_origin(request: Request) -> None:
    """Raises APIError for what a browser requests on behalf of another site. Programs send neither header, and pass."""
    if request.method in ("GET", "HEAD") and not request.url.path.startswith("/api/"):
        return
    origin, site = request.headers.get("origin"), request.headers.get("sec-fetch-site", "none")
    is_own = origin is None or origin.partition("://")[2] == request.headers.get("host")
    if not is_own or site not in ("none", "same-origin"):
        raise APIError("This server answers only programs and its own page.", status=403, code="wrong_origin")


def error_response(status: int, sentence: str, param: str | None = None, code: str | None = None) -> JSONResponse:
    """Return an error in the format of OpenAI's API."""
    types = {429: "rate_limit_error", 404: "not_found_error"}
    error_type = types.get(status, "server_error" if status >= 500 else "invalid_request_error")
    headers = {"Retry-After": str(RETRY_SECONDS)} if status in (429, 503) else {}
    return JSONResponse({"error": {"message": encodable(sentence), "type": error_type, "param": param, "code": code}}, status, headers)


async def _respond_to_error(_: Request, error: Exception) -> Response:
    match error:
        case APIError():
            return error_response(error.status, str(error), error.param, error.code)
        case HTTPException():
            sentences = {404: "There is nothing at this address.", 405: "This address does not support that method."}
            return error_response(error.status_code, sentences.get(error.status_code, "The request cannot be answered."))
        case ClientDisconnect():
            return Response(status_code=499)
    return error_response(400, str(error))


async def _respond_to_internal_error(request: Request, error: Exception) -> Response:
    """Log an unexpected error; the client gets no details."""
    log.error("%s %r failed", request.method, request.url.path, exc_info=error)
    return error_response(500, INTERNAL_ERROR)
