"""The part of the Hub's HTTP interface that pushing and loading use, on this machine."""

import base64
import hashlib
import json
import re
import socket
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

_COMMIT = "0" * 40
# Of models the kind is not in the address of a file.
_FILE = re.compile(r"/(?:(datasets)/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)")
_OF_REPOSITORY = re.compile(
    r"/api/(models|datasets)/([^/]+/[^/]+)(?:/(revision|tree|paths-info|preupload|commit|branch)/([^/]+).*)?"
)


class FakeHub:
    """
    Repositories in memory: `files["me/mine"]["config.json"]` is bytes; data sets are "datasets/me/mine", other
    branches and pull requests "me/mine@branch".
    """

    def __init__(self, port: int):
        self.endpoint = f"http://127.0.0.1:{port}"
        self.files: dict[str, dict[str, bytes]] = {}
        # What was asked for when repositories were made, by name; and the repository of each commit.
        self.created: dict[str, dict] = {}
        self.commits: list[str] = []
        # Statuses of the next answers to a commit, which is not made; 0 ends the connection without an answer.
        self.failures: list[int] = []

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
            kind, repository, revision, name = found.groups()
            repository = _stored(f"datasets/{repository}" if kind else repository, revision)
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
            kind, repository, what, revision = found.groups()
            name = _stored(repository if kind == "models" else f"datasets/{repository}", revision)
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
            hub.created.setdefault(name, asked)
            return self._answer({"url": f"{hub.endpoint}/{name}"})
        if path == "/api/validate-yaml":
            return self._answer({"errors": [], "warnings": []})
        _, repository, what, revision = _OF_REPOSITORY.fullmatch(path).groups()
        if what == "branch":
            hub.files.setdefault(_stored(repository, revision), dict(hub.files[repository]))
            return self._answer({})
        if what == "preupload":
            names = [file["path"] for file in json.loads(body)["files"]]
            files = [{"path": name, "uploadMode": "regular", "shouldIgnore": False} for name in names]
            return self._answer({"files": files})
        if what == "paths-info":
            files = hub.files[f"datasets/{repository}" if "/datasets/" in path else repository]
            wanted = json.loads(body)["paths"]
            return self._answer([_entry(name, files[name]) for name in wanted if name in files])
        if hub.failures:
            status = hub.failures.pop(0)
            if status:
                return self._answer({"error": "not now"}, status)
            return self.connection.shutdown(socket.SHUT_RDWR)
        answer = {"commitUrl": f"{hub.endpoint}/{repository}/commit/{_COMMIT}", "commitOid": _COMMIT}
        name, old = _stored(repository, revision), hub.files[_stored(repository, revision)]
        if "create_pr=1" in self.path:
            name = f"{repository}@refs/pr/1"
            answer["pullRequestUrl"] = f"{hub.endpoint}/{repository}/discussions/1"
        new = dict(old)
        for line in body.splitlines():
            part = json.loads(line)
            if part["key"] == "file":
                new[part["value"]["path"]] = base64.b64decode(part["value"]["content"])
            elif part["key"] == "deletedFile":
                del new[part["value"]["path"]]
        # All at once.
        hub.files[name] = new
        hub.commits.append(name)
        return self._answer(answer)


def _stored(repository: str, revision: str | None) -> str:
    return repository if revision in (None, "main", _COMMIT) else f"{repository}@{revision}"


def _entry(name: str, data: bytes) -> dict:
    return {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
