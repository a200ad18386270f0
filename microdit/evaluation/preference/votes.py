"""People as judges of image pairs: a local web page that shows the images without the models' names and records votes.

The page is self-contained and stateless: after a reload or a restart of the server it shows the next pair without a vote.
"""

import json
import re
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from microdit.errors import UserError
from microdit.evaluation.preference.verdicts import Choice, Preference, Reply, Verdict, VerdictFile
from microdit.io.untrusted_text import parse_json

HUMAN = "human"  # the judge's name in verdicts.jsonl
LONGEST_BODY = 1000  # bytes of a vote
MOST_CONNECTIONS = 32  # at the same time: a browser opens six


def collect_votes(
    file: VerdictFile, port: int, on_ready: Callable[[str], None], on_vote: Callable[[Verdict], None] | None = None
) -> Preference:
    """Serve the page until the last vote or Ctrl-C, and return the summary. `on_ready(url)` is called once it is served.

    Raises UserError if the port is taken, or if there are no votes.
    """
    if file.waiting():
        with vote_server(file, port, on_vote) as server, suppress(KeyboardInterrupt):
            on_ready(url_of(server))
            server.serve_forever()
    return file.preference()


def vote_server(file: VerdictFile, port: int = 0, on_vote: Callable[[Verdict], None] | None = None) -> ThreadingHTTPServer:
    """Create a server on 127.0.0.1 for the questions of `file`; its `serve_forever()` returns after the last vote.

    Its address is `url_of(server)`; port 0 selects a free port. Raises UserError if the port is taken.
    """
    questions, lock = file.questions, threading.Lock()
    numbers = {(question.pair.index, question.order): number for number, question in enumerate(questions)}

    def state() -> dict[str, Any]:
        waiting = file.waiting()
        progress = {"done": len(questions) - len(waiting), "total": len(questions)}
        if not waiting:
            return progress
        question = waiting[0]
        return {**progress, "question": numbers[question.pair.index, question.order], "prompt": question.pair.prompt}

    def vote(number: int, choice: Choice) -> bool:
        with lock:
            verdict = file.add(questions[number], Reply(choice, choice))
            if verdict is not None and on_vote is not None:
                on_vote(verdict)
        return verdict is not None

    class Handler(_Handler):
        def get(self) -> None:
            if self.path == "/":
                self.answer(200, PAGE.encode(), "text/html; charset=utf-8")
            elif self.path == "/next":
                self.answer_json(state())
            elif (found := re.fullmatch(r"/picture/(\d{1,9})/(first|second)", self.path, re.ASCII)) and int(found[1]) < len(questions):
                picture = questions[int(found[1])].pictures()[0 if found[2] == "first" else 1]
                try:
                    self.answer(200, picture.read_bytes(), "image/png")
                except FileNotFoundError:
                    self.refuse(404, "The picture was removed since the server was started.")
            else:
                self.refuse(404, "There is nothing at this address: the page is at /.")

        def post(self, body: bytes) -> None:
            if self.path != "/vote":
                return self.refuse(404, "There is nothing to send to this address: votes go to /vote.")
            try:
                fields = parse_json(body)
                number, choice = fields["question"], fields["choice"]
            except (ValueError, LookupError, TypeError):
                return self.refuse(400, 'A vote must be JSON: {"question": 0, "choice": "first"}.')
            if type(number) is not int or not 0 <= number < len(questions):
                return self.refuse(400, f"There is no question {number!r:.50}: they go from 0 to {len(questions) - 1}.")
            if choice not in ("first", "second", "tie"):
                return self.refuse(400, f"A choice is first, second or tie, not {choice!r:.50}.")
            try:
                new = vote(number, choice)
            except UserError as error:
                return self.refuse(507, str(error))
            if not new:
                return self.refuse(409, f"Question {number} has its vote already: the first one counts.")
            self.answer_json(state())
            if not file.waiting():
                threading.Thread(target=self.server.shutdown).start()
            return None

    try:
        return _Server(("127.0.0.1", port), Handler)
    except (OSError, OverflowError):
        raise UserError(f"Port {port} of 127.0.0.1 cannot be had: choose another, or 0 for any free one.") from None


def url_of(server: ThreadingHTTPServer) -> str:
    """Return the address to open in a browser."""
    return f"http://127.0.0.1:{server.server_address[1]}/"


class _Server(ThreadingHTTPServer):
    """A threading server with at most MOST_CONNECTIONS connections, each a thread; further ones are closed at once."""

    def __init__(self, *settings: Any):
        self._places = threading.BoundedSemaphore(MOST_CONNECTIONS)
        super().__init__(*settings)

    def process_request(self, request: Any, client_address: Any) -> None:
        if self._places.acquire(blocking=False):
            super().process_request(request, client_address)
        else:
            self.shutdown_request(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._places.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Ignore connections that the browser closes early."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    """An HTTP handler that answers errors in sentences and serves its own pages only, since others could vote in the visitor's name."""

    protocol_version = "HTTP/1.1"
    server_version, sys_version = "microdit", ""
    timeout = 60

    def get(self) -> None:
        raise NotImplementedError

    def post(self, body: bytes) -> None:
        raise NotImplementedError

    def do_GET(self) -> None:
        if self._is_local():
            self.get()

    def do_POST(self) -> None:
        if not self._is_local():
            return None
        length = self.headers.get("Content-Length", "")
        if not re.fullmatch(r"\d{1,9}", length, re.ASCII):
            return self.refuse(411, "The length of the vote is missing.")
        if int(length) > LONGEST_BODY:
            return self.refuse(413, f"A vote has at most {LONGEST_BODY} bytes.")
        body = self.rfile.read(int(length))
        if self.headers.get_content_type() != "application/json":
            return self.refuse(415, "A vote must be sent as application/json.")
        return self.post(body)

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """Rephrase errors found by the standard library: methods without a do_METHOD (501) and malformed requests."""
        if code == 501:
            self.refuse(405, "Only GET and POST are answered here.")
        else:
            self.refuse(code if code < 500 else 400, f"This is no request that can be answered: {message or 'it is malformed'}.")

    def answer(self, status: int, content: bytes, kind: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("Cache-Control", "no-store")
        self.send_header("X-Content-Type-Options", "nosniff")
        self.send_header("Content-Security-Policy", "default-src 'self' 'unsafe-inline'; img-src 'self' data:; frame-ancestors 'none'")
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def answer_json(self, fields: dict[str, Any]) -> None:
        self.answer(200, json.dumps(fields).encode(), "application/json")

    def refuse(self, status: int, sentence: str) -> None:
        self.close_connection = True  # the rest of what was sent is not read
        self.answer(status, sentence.encode("utf-8", "replace"), "text/plain; charset=utf-8")

    def log_message(self, *_: Any) -> None:
        """Log nothing: the terminal shows the progress of the votes."""

    def _is_local(self) -> bool:
        if re.fullmatch(r"(127\.0\.0\.1|localhost)(:\d+)?", self.headers.get("Host", ""), re.ASCII):
            return True
        self.refuse(403, f"This page is for this machine only: open {url_of(self.server)}.")  # type: ignore[arg-type]
        return False


PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Which is better?</title>
<link rel="icon" href="data:,">
<style>
  body { margin: 0; min-height: 100dvh; display: flex; flex-direction: column; font: 1.1rem/1.4 system-ui, sans-serif;
         background: #777; color: #fff; text-align: center; }
  #prompt { padding: .8rem 1rem; font-weight: 600; overflow-wrap: anywhere; }
  #pictures { flex: 1; display: flex; gap: .6rem; padding: 0 .6rem; justify-content: center; align-items: center; min-height: 0; }
  #pictures button { flex: 0 1 min(70dvh, 100dvh - 13rem); padding: 0; border: 0; background: none; cursor: pointer; min-width: 0; }
  img { width: 100%; display: block; border-radius: .3rem; }
  button:focus-visible { outline: .2rem solid #fff; }
  #tie { margin: .8rem auto; padding: .7rem 2rem; font: inherit; border: 0; border-radius: .4rem; cursor: pointer; }
  #note { padding-bottom: .8rem; font-size: .9rem; }
  @media (orientation: portrait) and (max-width: 40rem) {
    #pictures { flex-direction: column; } #pictures button { flex: 0 1 auto; width: min(94vw, 36dvh); }
  }
</style>
<div id="prompt" role="heading" aria-level="1"></div>
<div id="pictures">
  <button id="first" aria-label="The first picture is better"><img alt="The first picture"></button>
  <button id="second" aria-label="The second picture is better"><img alt="The second picture"></button>
</div>
<button id="tie">Neither is better</button>
<div id="note" role="status"></div>
<script>
  const at = id => document.getElementById(id);
  const keys = { ArrowLeft: "first", ArrowRight: "second", " ": "tie" };
  let question = null;  // null while there is nothing to vote on

  async function show(state) {
    at("note").textContent = `${state.done} of ${state.total}. Which follows the words better and looks better? Keys: left, right, space.`;
    if (state.question === undefined) {
      at("prompt").textContent = "That was the last one. Thank you!";
      at("pictures").hidden = at("tie").hidden = true;
      at("pictures").style.display = "none";
      return;
    }
    for (const side of ["first", "second"]) {
      const image = at(side).firstElementChild;
      image.src = `/picture/${state.question}/${side}`;
      await image.decode();
    }
    at("prompt").textContent = state.prompt;
    question = state.question;
  }

  async function load() {
    await show(await (await fetch("/next")).json());
  }

  async function vote(choice) {
    if (question === null) return;
    const body = JSON.stringify({ question, choice });
    question = null;
    document.activeElement.blur();
    try {
      const answer = await fetch("/vote", { method: "POST", headers: { "Content-Type": "application/json" }, body });
      if (answer.ok) await show(await answer.json());
      else if (answer.status === 409) await load();
      else at("note").textContent = await answer.text();
    } catch {
      at("note").textContent = "The server does not answer. Start it again and reload this page: no vote is lost.";
    }
  }

  for (const choice of ["first", "second", "tie"]) at(choice).onclick = () => vote(choice);
  addEventListener("keydown", event => {
    if (event.repeat || event.ctrlKey || event.altKey || event.metaKey || !(event.key in keys)) return;
    event.preventDefault();
    vote(keys[event.key]);
  });
  load().catch(() => { at("note").textContent = "The server does not answer. Start it again and reload this page."; });
</script>
</html>
"""
