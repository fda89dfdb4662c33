"""The part of the Hub's HTTP interface that pushing and loading use, on this machine."""

import base64
import hashlib
import json
import re
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

_COMMIT = "0" * 40
# Of models the kind is not in the address of a file.
_FILE = re.compile(r"/(?:(datasets)/)?([^/]+/[^/]+)/resolve/[^/]+/(.+)")
_OF_REPOSITORY = re.compile(
    r"/api/(models|datasets)/([^/]+/[^/]+)(?:/(revision|tree|paths-info|preupload|commit)/.*)?"
)


class FakeHub:
    """Repositories in memory: `files["me/mine"]["config.json"]` is bytes; data sets are "datasets/me/mine"."""

    def __init__(self, port: int):
        self.endpoint = f"http://127.0.0.1:{port}"
        self.files: dict[str, dict[str, bytes]] = {}

    def environment(self, home) -> dict[str, str]:
        """What makes a process take this for the Hub, with a cache of its own."""
        there = {"HF_ENDPOINT": self.endpoint, "HF_HUB_OFFLINE": "0", "HF_HOME": str(home), "HF_TOKEN": "hf_nobody"}
        return there | {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "NO_PROXY": "127.0.0.1"}


@contextmanager
def fake_hub():
    """Serves a [`FakeHub`] on loopback while it is open."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    server.hub = FakeHub(server.server_port)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server.hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args) -> None:
        pass

    def _answer(self, value, status: int = 200, headers: dict[str, str] | None = None) -> None:
        body = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(status)
        for name, text in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, text)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _missing(self, what: str) -> None:
        self._answer({"error": f"{what} not found"}, 404, {"X-Error-Code": f"{what}NotFound"})

    def do_GET(self) -> None:
        files, path = self.server.hub.files, unquote(urlsplit(self.path).path)
        if found := _FILE.fullmatch(path):
            kind, repository, name = found.groups()
            repository = f"datasets/{repository}" if kind else repository
            if repository not in files:
                return self._missing("Repo")
            if name not in files[repository]:
                return self._missing("Entry")
            data = files[repository][name]
            headers = {"ETag": f'"{hashlib.sha1(data).hexdigest()}"', "X-Repo-Commit": _COMMIT}
            if wanted := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
                first, last = int(wanted[1]), int(wanted[2] or len(data) - 1)
                headers["Content-Range"] = f"bytes {first}-{min(last, len(data) - 1)}/{len(data)}"
                return self._answer(data[first : last + 1], 206, headers)
            return self._answer(data, 200, headers)
        if found := _OF_REPOSITORY.fullmatch(path):
            kind, repository, what = found.groups()
            name = repository if kind == "models" else f"datasets/{repository}"
            if name not in files:
                return self._missing("Repo")
            entries = [_entry(file, data) for file, data in files[name].items()]
            if what == "tree":
                return self._answer(entries)
            siblings = [{"rfilename": entry["path"]} for entry in entries]
            about = {"id": repository, "sha": _COMMIT, "private": False, "siblings": siblings, "tags": []}
            return self._answer(about | {"downloads": 0, "likes": 0, "gated": False, "disabled": False})
        return self._missing("Entry")

    do_HEAD = do_GET

    def do_POST(self) -> None:
        hub, path = self.server.hub, unquote(urlsplit(self.path).path)
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}"
            hub.files.setdefault(name, {})
            return self._answer({"url": f"{hub.endpoint}/{name}"})
        if path == "/api/validate-yaml":
            return self._answer({"errors": [], "warnings": []})
        _, repository, what = _OF_REPOSITORY.fullmatch(path).groups()
        if what == "preupload":
            names = [file["path"] for file in json.loads(body)["files"]]
            files = [{"path": name, "uploadMode": "regular", "shouldIgnore": False} for name in names]
            return self._answer({"files": files})
        if what == "paths-info":
            files = hub.files[f"datasets/{repository}" if "/datasets/" in path else repository]
            wanted = json.loads(body)["paths"]
            return self._answer([_entry(name, files[name]) for name in wanted if name in files])
        for line in body.splitlines():
            part = json.loads(line)
            if part["key"] == "file":
                hub.files[repository][part["value"]["path"]] = base64.b64decode(part["value"]["content"])
        return self._answer({"commitUrl": f"{hub.endpoint}/{repository}/commit/{_COMMIT}", "commitOid": _COMMIT})


def _entry(name: str, data: bytes) -> dict:
    return {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
