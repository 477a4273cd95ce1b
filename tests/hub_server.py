"""A stand-in for the Hugging Face hub: the endpoints that huggingface_hub calls to make a repository, commit to it and
read it, over HTTP, in a thread. What is committed stays in memory. Three tokens: may write, may read, is unknown."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest

WRITER, READER, UNKNOWN = "hf_writer", "hf_reader", "hf_nobody"


@dataclass
class Repository:
    """Branches and what is in them."""

    private: bool = False
    card: dict[str, Any] | None = None
    """Front matter of its card, as the hub tells it."""
    refs: dict[str, str] = field(default_factory=lambda: {"main": "0" * 40})
    commits: dict[str, dict[str, bytes]] = field(default_factory=lambda: {"0" * 40: {}})

    def at(self, revision: str) -> str | None:
        sha = self.refs.get(revision, revision)
        return sha if sha in self.commits else None

    def commit(self, branch: str, changed: dict[str, bytes]) -> str:
        files = {**self.commits[self.refs[branch]], **changed}
        sha = hashlib.sha1(json.dumps([branch, len(self.commits), sorted(files)]).encode()).hexdigest()
        self.refs[branch], self.commits[sha] = sha, files
        return sha


@dataclass
class Hub:
    """What the server knows, and what it was asked."""

    url: str = ""
    repositories: dict[str, Repository] = field(default_factory=dict)
    blobs: dict[str, bytes] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)
    bodies: list[bytes] = field(default_factory=list)
    messages: list[str] = field(default_factory=list)

    def put(self, name: str, files: dict[str, bytes], **about: Any) -> None:
        """A repository that somebody else made."""
        self.repositories[name] = Repository(**about)
        self.repositories[name].commit("main", files)

    def files(self, name: str, revision: str = "main") -> dict[str, bytes]:
        repository = self.repositories[name]
        return repository.commits[repository.refs[revision]]


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self._route("HEAD")

    def do_GET(self) -> None:
        self._route("GET")

    def do_POST(self) -> None:
        self._route("POST")

    def do_PUT(self) -> None:
        self._route("PUT")

    def _route(self, method: str) -> None:
        path = unquote(urlsplit(self.path).path)
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.hub.requests.append(f"{method} {path}")
        self.hub.bodies.append(self.body)
        self.token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if self.token == UNKNOWN:
            return self._error(401, "", "Invalid credentials in Authorization header")
        if path.startswith("/lfs/"):
            self.hub.blobs[path.removeprefix("/lfs/")] = self.body
            return self._json({})
        if path == "/api/validate-yaml":
            return self._json({"errors": [], "warnings": []})
        if method in ("POST", "PUT") and self.token != WRITER:
            return self._error(403 if self.token else 401, "", "You may not write here")
        if path == "/api/repos/create":
            return self._create(json.loads(self.body))
        if ".git/info/lfs/objects/batch" in path:
            return self._batch(json.loads(self.body))
        parts = path.strip("/").split("/")
        name = "/".join(parts[2:4] if parts[0] == "api" else parts[:2])
        repository = self.hub.repositories.get(name)
        if repository is None or (repository.private and not self.token):
            return self._error(404 if self.token else 401, "RepoNotFound", "Repository not found")
        if parts[0] == "api":
            return self._api(name, repository, parts[4:] or ["revision", "main"])
        return self._resolve(repository, parts[3], "/".join(parts[4:]), method)

    def _api(self, name: str, repository: Repository, parts: list[str]) -> None:
        action, revision = parts[0], "/".join(parts[1:])
        if action == "branch":
            if revision in repository.refs:
                return self._error(409, "", "exists")
            repository.refs[revision] = repository.refs["main"]
            return self._json({})
        sha = repository.at(revision)
        if sha is None:
            return self._error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        files = repository.commits[sha]
        if action == "revision":
            about = {"id": name, "sha": sha, "private": repository.private, "tags": [], "cardData": repository.card}
            return self._json({**about, "siblings": [{"rfilename": path} for path in files]})
        if action == "tree":
            return self._json([_entry(path, content) for path, content in files.items()])
        if action == "preupload":
            asked = json.loads(self.body)["files"]
            return self._json({"files": [_mode(one["path"]) for one in asked]})
        return self._commit(name, repository, revision)

    def _create(self, asked: dict[str, Any]) -> None:
        name = f"{asked['organization'] or 'ours'}/{asked['name']}"
        url = {"url": f"{self.hub.url}/{name}", "name": name}
        if name in self.hub.repositories:
            return self._json({**url, "error": "exists"}, 409)
        private = asked.get("visibility") == "private" or bool(asked.get("private"))
        self.hub.repositories[name] = Repository(private)
        return self._json(url)

    def _batch(self, asked: dict[str, Any]) -> None:
        objects = [
            {**one, "actions": {"upload": {"href": f"{self.hub.url}/lfs/{one['oid']}"}}} for one in asked["objects"]
        ]
        self._json({"transfer": "basic", "objects": objects})

    def _commit(self, name: str, repository: Repository, branch: str) -> None:
        changed: dict[str, bytes] = {}
        for line in map(json.loads, self.body.splitlines()):
            value = line["value"]
            if line["key"] == "header":
                self.hub.messages.append(value["summary"])
            elif line["key"] == "file":
                changed[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                changed[value["path"]] = self.hub.blobs[value["oid"]]
        sha = repository.commit(branch, changed)
        self._json({"success": True, "commitOid": sha, "commitUrl": f"{self.hub.url}/{name}/commit/{sha}"})

    def _resolve(self, repository: Repository, revision: str, path: str, method: str) -> None:
        sha = repository.at(revision)
        content = None if sha is None else repository.commits[sha].get(path)
        if sha is None or content is None:
            return self._error(404, "EntryNotFound", "Entry not found")
        headers = {"ETag": f'"{hashlib.sha256(content).hexdigest()}"', "X-Repo-Commit": sha}
        return self._answer(200, b"" if method == "HEAD" else content, headers, len(content))

    def _error(self, status: int, code: str, message: str) -> None:
        headers = {"X-Error-Message": message, **({"X-Error-Code": code} if code else {})}
        self._answer(status, json.dumps({"error": message}).encode(), headers)

    def _json(self, value: Any, status: int = 200) -> None:
        self._answer(status, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _answer(self, status: int, content: bytes, headers: dict[str, str], length: int | None = None) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content) if length is None else length)}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(b"" if self.command == "HEAD" else content)


def _entry(path: str, content: bytes) -> dict[str, Any]:
    oid = hashlib.sha1(content).hexdigest()
    return {"type": "file", "path": path, "size": len(content), "oid": oid}


def _mode(path: str) -> dict[str, Any]:
    return {"path": path, "uploadMode": "lfs" if path.endswith(".safetensors") else "regular", "shouldIgnore": False}


@contextmanager
def running() -> Iterator[Hub]:
    """The server while the block runs."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=[0.01], daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def use(hub: Hub, cache: Path, patch: pytest.MonkeyPatch, token: str | None = WRITER) -> None:
    """huggingface_hub as with HF_ENDPOINT, HF_HUB_CACHE and HF_TOKEN set, and nobody logged in."""
    from huggingface_hub import constants

    for name, value in {
        "ENDPOINT": hub.url,
        "HUGGINGFACE_CO_URL_TEMPLATE": hub.url + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_CACHE": str(cache),
        "HF_HUB_OFFLINE": False,
        "HF_HUB_DISABLE_XET": True,
        "HF_TOKEN_PATH": str(cache / "token"),
        "HF_STORED_TOKENS_PATH": str(cache / "tokens"),
    }.items():
        patch.setattr(constants, name, value)
    patch.delenv("HUGGING_FACE_HUB_TOKEN", raising=False)
    if token is None:
        patch.delenv("HF_TOKEN", raising=False)
    else:
        patch.setenv("HF_TOKEN", token)
