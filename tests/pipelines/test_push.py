"""push_to_hub, to a small server that speaks as much of the hub's protocol as that takes, and draws again from what it was given."""

import base64
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from huggingface_hub import constants, hf_api

from microdit.pipelines.export import export_run
from microdit.pipelines.pipeline import MicroDiTPipeline


class Hub(BaseHTTPRequestHandler):
    """Takes every file within the commit, and keeps it in `files`."""

    files: dict[str, bytes]
    asked: list[tuple[str, object]]

    def do_GET(self) -> None:
        self._answer(404, {"error": "there is nothing yet"})

    do_HEAD = do_GET

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.path == "/api/repos/create":
            self.asked.append(("create", json.loads(body)))
            self._answer(200, {"url": f"http://{self.headers['Host']}/someone/emoji"})
        elif self.path == "/api/validate-yaml":  # of the model card
            self._answer(200, {"warnings": [], "errors": []})
        elif self.path == "/api/models/someone/emoji/preupload/main":
            names = [file["path"] for file in json.loads(body)["files"]]
            self._answer(200, {"files": [{"path": name, "uploadMode": "regular", "shouldIgnore": False} for name in names]})
        elif self.path.startswith("/api/models/someone/emoji/commit/main"):
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    assert line["value"]["encoding"] == "base64"
                    self.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            self._answer(200, {"commitUrl": f"http://{self.headers['Host']}/someone/emoji/commit/1", "commitOid": "1" * 40})
        else:
            self._answer(404, {"error": f"{self.path} is not known here"})

    def log_message(self, *_: object) -> None:
        pass

    def _answer(self, status: int, content: object) -> None:
        answer = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(answer)


@pytest.fixture
def hub():
    handler = type("OneHub", (Hub,), {"files": {}, "asked": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()


def test_what_is_pushed_draws_the_same_picture(workplace, hub, tmp_path, monkeypatch):
    export_run(workplace / "runs" / "tiny", tmp_path / "exported", pytest.fail)
    address = f"http://127.0.0.1:{hub.server_port}"  # which users give by HF_ENDPOINT, before the import
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(hf_api.api, "endpoint", address)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True, raising=False)
    MicroDiTPipeline.from_pretrained(tmp_path / "exported").push_to_hub("someone/emoji", token="hf_none", private=True)
    ((_, created),) = hub.RequestHandlerClass.asked
    assert (created["name"], created["organization"]) == ("emoji", "someone"), created
    assert created.get("visibility") == "private" or created.get("private") is True, created  # as newer and older clients ask for it

    pushed = hub.RequestHandlerClass.files
    assert {"model_index.json", "README.md", "transformer/diffusion_pytorch_model.safetensors"} <= set(pushed)
    assert not [name for name in pushed if name.endswith((".bin", ".pt", ".pkl"))]
    for name, content in pushed.items():
        path = tmp_path / "pulled" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    drawn = []
    for folder in ("exported", "pulled"):
        pipeline = MicroDiTPipeline.from_pretrained(tmp_path / folder)
        generator = torch.Generator().manual_seed(5)
        drawn.append(pipeline("red heart", num_inference_steps=3, generator=generator, output_type="pt").images)
    assert torch.equal(*drawn)
