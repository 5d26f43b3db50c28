"""A hub of one's own: the few answers of the model hub's HTTP interface that resolving and fetching a model needs."""

from __future__ import annotations

import hashlib
import json
import threading
import urllib.parse
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class FakeHub:
    """Model id -> folder; every revision is COMMIT."""

    models: dict[str, Path]
    gated: set[str] = field(default_factory=set)
    asked: list[str] = field(default_factory=list)
    url: str = ""

    @contextmanager
    def serving(self) -> Iterator[FakeHub]:
        """Serves on a free port of the loopback interface."""
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                hub.answer(self, body=True)

            def do_HEAD(self) -> None:
                hub.answer(self, body=False)

            def log_message(self, *arguments: object) -> None:
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{server.server_port}"
        try:
            yield self
        finally:
            server.shutdown()
            server.server_close()

    def answer(self, request: BaseHTTPRequestHandler, *, body: bool) -> None:
        path = urllib.parse.unquote(urllib.parse.urlsplit(request.path).path)
        self.asked.append(f"{request.command} {path}")
        name, rest = self._model(path.removeprefix("/api/models/").lstrip("/"))
        if name is None:
            self._send(request, 401, b"{}", {"X-Error-Code": "RepoNotFound"}, body)
        elif name in self.gated:
            self._send(request, 403, b"{}", {"X-Error-Code": "GatedRepo"}, body)
        elif path.startswith("/api/models/"):
            kind, _, revision = rest.partition("/")
            if kind == "revision" and revision not in ("main", COMMIT):
                self._send(request, 404, b"{}", {"X-Error-Code": "RevisionNotFound"}, body)
                return
            files = sorted(file for file in self.models[name].iterdir() if file.is_file())
            facts: object = {"id": name, "sha": COMMIT, "siblings": [{"rfilename": file.name} for file in files]}
            if kind == "tree":
                facts = [
                    {"type": "file", "path": file.name, "size": file.stat().st_size, "oid": _digest(file.read_bytes())}
                    for file in files
                ]
            self._send(request, 200, json.dumps(facts).encode(), {"Content-Type": "application/json"}, body)
        else:
            file = self.models[name] / rest.split("/", 2)[-1]
            if not file.is_file():
                self._send(request, 404, b"", {"X-Error-Code": "EntryNotFound"}, body)
                return
            content = file.read_bytes()
            self._send(request, 200, content, {"ETag": f'"{_digest(content)}"', "X-Repo-Commit": COMMIT}, body)

    def _model(self, path: str) -> tuple[str | None, str]:
        name = next((name for name in self.models if path == name or path.startswith(f"{name}/")), None)
        return name, path[len(name) + 1 :] if name else ""

    @staticmethod
    def _send(request: BaseHTTPRequestHandler, status: int, content: bytes, headers: dict[str, str], body: bool) -> None:
        request.send_response(status)
        for key, value in headers.items():
            request.send_header(key, value)
        request.send_header("Content-Length", str(len(content)))
        request.end_headers()
        if body:
            request.wfile.write(content)


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
