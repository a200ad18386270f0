"""A real server on this machine with OpenAI's chat completions API, whose answers a test writes."""

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class ChatServer(ThreadingHTTPServer):
    """Calls `script(content)` with the parts of each message. It returns the answer, or None for a broken server (status 500)."""

    def __init__(self, script: Callable[[list[dict[str, Any]]], str | None]):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.script, self.messages = script, list[list[dict[str, Any]]]()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"


class _Handler(BaseHTTPRequestHandler):
    server: ChatServer

    def do_POST(self) -> None:
        content = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["messages"][0]["content"]
        self.server.messages.append(content)
        words = self.server.script(content)
        body = json.dumps({"choices": [{"message": {"content": words}}], "usage": {"total_tokens": 10}}).encode()
        self.send_response(500 if words is None else 200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def serving_chat(script: Callable[[list[dict[str, Any]]], str | None]) -> Iterator[ChatServer]:
    with ChatServer(script) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield server
        server.shutdown()
