"""The vote page of `microdit prefer --vote` and the API of its script. For this machine only, since there is no password."""

import asyncio
from collections.abc import Callable
from contextlib import suppress
from typing import Any, ClassVar

from fastapi import APIRouter, Request, Response

from microdit.errors import UserError
from microdit.evaluation.preference.verdicts import Preference, VerdictFile
from microdit.evaluation.preference.votes import Vote, VotingSession
from microdit.serve.connections import LIMITS, Limits
from microdit.serve.json_requests import APIError, JSONRequest, encodable, read_json
from microdit.serve.server import Server, WebApp, listen, page_router, url_of

HOST = "127.0.0.1"


def collect_votes(file: VerdictFile, port: int, on_ready: Callable[[str], None]) -> Preference:
    """Serve the page until the last vote or Ctrl-C, and return the summary. `on_ready(url)` is called once clients can connect.

    Without an open question nothing is served. Raises UserError if the port is taken, or if there are no votes.
    """
    session = VotingSession(file)
    if not session.is_over:
        listener = listen(HOST, port)
        server = vote_server(session)
        on_ready(url_of(listener))
        with suppress(KeyboardInterrupt):
            server.run([listener])
    return file.preference()


def vote_server(session: VotingSession, limits: Limits = LIMITS) -> Server:
    """Return a server of the page, which ends after the last vote."""

    def stop() -> None:
        server.should_exit = True

    server = Server(WebApp(votes_api(session, stop, limits), page_router("votes.html", "votes.css", "votes.js")), limits)
    return server


class VoteRequest(JSONRequest):
    """A vote on a question."""

    sentences: ClassVar[dict[str, str]] = {"choice": 'choice must be "first", "second" or "tie".'}

    question: int
    choice: Vote


def votes_api(session: VotingSession, on_last_vote: Callable[[], None], limits: Limits) -> APIRouter:
    """Return the endpoints of the page's script."""
    router = APIRouter()

    @router.get("/api/state")
    def state() -> dict[str, Any]:
        return _encodable(session.state())

    @router.get("/api/images/{number}/{side}")
    def image(number: str, side: str) -> Response:
        path = session.image(number, side)
        if path is None:
            raise APIError("There is no such image.", status=404)
        try:
            content = path.read_bytes()
        except OSError as error:
            raise APIError("The image was removed, or cannot be read any more, since the server was started.", status=404) from error
        # Not kept: another comparison on the same port shows other images. Neither a file name nor a date reveals the model.
        return Response(content, media_type="image/png", headers={"Cache-Control": "no-store", "X-Content-Type-Options": "nosniff"})

    @router.post("/api/votes")
    async def vote(request: Request) -> dict[str, Any]:
        wanted = VoteRequest.parse(await read_json(request, limits))
        if not 0 <= wanted.question < len(session):
            raise APIError(f"There is no question {wanted.question}: they go from 0 to {len(session) - 1}.", "question")
        try:
            is_new = await asyncio.to_thread(session.add, wanted.question, wanted.choice)
        except UserError as error:
            raise APIError(str(error), status=507) from error
        if not is_new:
            raise APIError(f"Question {wanted.question} has its vote already: the first one counts.", status=409)
        if session.is_over:
            on_last_vote()
        return _encodable(session.state())

    return router


def _encodable(state: dict[str, Any]) -> dict[str, Any]:
    """Return the state with a prompt that can be sent: a file's JSON can hold halves of characters."""
    return {key: encodable(value) if isinstance(value, str) else value for key, value in state.items()}
