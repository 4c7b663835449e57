"""A test double of the Hugging Face Hub: the part of its HTTP protocol that a download needs, on 127.0.0.1.

Folders stand for revisions. It is not the Hub: no LFS, no Xet, no uploads, and one page holds any listing.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import socket
import struct
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from functools import cached_property
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Literal
from urllib.parse import unquote, urlsplit

Fault = Literal["close", "reset", "pause"]

_PAUSE_S = 0.5
_API = re.compile(r"/api/models/(?P<repo>.+?)(?:/(?P<what>revision|tree)/(?P<revision>[^/]+).*)?")
_FILE = re.compile(r"/(?P<repo>.+?)/resolve/(?P<revision>[^/]+)/(?P<file>.+)")


@dataclass(frozen=True)
class Snapshot:
    """One commit of a repository: a folder that does not change."""

    folder: Path

    @cached_property
    def files(self) -> dict[str, Path]:
        paths = sorted(path for path in self.folder.rglob("*") if path.is_file())
        return {path.relative_to(self.folder).as_posix(): path for path in paths}

    @cached_property
    def commit(self) -> str:
        """40 hex digits, as git's."""
        return hashlib.sha1(repr([(name, self.etag(name)) for name in self.files]).encode()).hexdigest()

    def etag(self, name: str) -> str:
        return hashlib.sha1(self.files[name].read_bytes()).hexdigest()


@dataclass
class Repo:
    """A repository: its branches and tags, and the token that it wants where it is private."""

    revisions: dict[str, Snapshot]
    token: str | None = None
    is_gated: bool = False
    faults: dict[str, list[Fault]] = field(default_factory=dict)  # file -> what befalls its next GETs

    def find(self, revision: str) -> Snapshot | None:
        commits = {snapshot.commit: snapshot for snapshot in self.revisions.values()}
        return self.revisions.get(revision) or commits.get(revision)


class Hub:
    """The double, which listens while the `with` block runs.

    `requests` counts "METHOD /path"; `ranges` has the Range header of every GET of a file that sent one;
    `status` replaces every answer where it is set.
    """

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.moved: dict[str, str] = {}  # old id -> new id, as gpt2 -> openai-community/gpt2
        self.requests: Counter[str] = Counter()
        self.ranges: list[str] = []
        self.status: int | None = None
        self.lock = threading.Lock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
        self._server.hub = self  # type: ignore[attr-defined]
        self._server.daemon_threads = True
        self._server.handle_error = lambda request, client_address: None  # clients may go away
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"

    def add(self, repo_id: str, folder: Path, token: str | None = None, is_gated: bool = False, **tags: Path) -> Repo:
        """A repository whose main branch is `folder`; `tags` are more revisions."""
        revisions = {name: Snapshot(path) for name, path in {"main": folder, **tags}.items()}
        self.repos[repo_id] = Repo(revisions, token, is_gated)
        return self.repos[repo_id]

    def downloads(self) -> Counter[str]:
        """File names -> how often each was got, over all repositories and revisions."""
        counts: Counter[str] = Counter()
        for request, count in self.requests.items():
            method, path = request.split(" ", 1)
            if method == "GET" and (found := _FILE.fullmatch(path)):
                counts[found["file"]] += count
        return counts

    def __enter__(self) -> Hub:
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()


class _Refusal(Exception):
    """An answer other than 200: status, the Hub's error code, its message."""

    def __init__(self, status: int, code: str | None, message: str, **headers: str) -> None:
        self.status, self.message = status, message
        self.headers = {"X-Error-Message": message} | headers | ({"X-Error-Code": code} if code else {})


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    @property
    def hub(self) -> Hub:
        return self.server.hub  # type: ignore[attr-defined]

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        with self.hub.lock:
            self.hub.requests[f"{self.command} {path}"] += 1
        try:
            if self.hub.status:
                raise _Refusal(self.hub.status, None, "this is how the test wants it")
            raw = urlsplit(self.path).path
            if found := _API.fullmatch(raw):
                self._send_json(self._api(found["repo"], found["what"], unquote(found["revision"] or "main")))
            elif found := _FILE.fullmatch(raw):
                self._send_file(found["repo"], unquote(found["revision"]), unquote(found["file"]))
            else:
                raise _Refusal(404, None, "Not Found")
        except _Refusal as refusal:
            self._send_json({"error": refusal.message}, refusal.status, refusal.headers)

    def _repo(self, repo_id: str) -> Repo:
        if new_id := self.hub.moved.get(repo_id):
            raise _Refusal(307, None, "moved", Location=self.path.replace(repo_id, new_id, 1))
        repo, authorization = self.hub.repos.get(repo_id), self.headers["Authorization"]
        known = {f"Bearer {repo.token}" for repo in self.hub.repos.values() if repo.token}
        if authorization is not None and authorization not in known:
            raise _Refusal(401, None, "Invalid credentials in Authorization header")
        if repo is not None and (repo.token is None or repo.is_gated or authorization == f"Bearer {repo.token}"):
            return repo
        if authorization is None:  # the Hub does not tell strangers what is private and what does not exist
            raise _Refusal(401, "RepoNotFound", "Invalid username or password.")
        raise _Refusal(404, "RepoNotFound", "Repository not found")

    def _snapshot(self, repo_id: str, revision: str) -> Snapshot:
        snapshot = self._repo(repo_id).find(revision)
        if snapshot is None:
            raise _Refusal(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return snapshot

    def _api(self, repo_id: str, what: str | None, revision: str) -> Any:
        snapshot = self._snapshot(repo_id, revision)
        if what == "tree":
            folders = {parent.as_posix() for name in snapshot.files for parent in Path(name).parents} - {"."}
            entries = [{"type": "directory", "path": path, "oid": "0" * 40, "size": 0} for path in sorted(folders)]
            return entries + [
                {"type": "file", "path": name, "oid": snapshot.etag(name), "size": path.stat().st_size}
                for name, path in snapshot.files.items()
            ]
        siblings = [{"rfilename": name} for name in snapshot.files]
        return {"_id": "0", "id": repo_id, "modelId": repo_id, "sha": snapshot.commit, "siblings": siblings}

    def _send_json(self, content: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self._send(status, {"Content-Type": "application/json"} | (headers or {}), json.dumps(content).encode())

    def _send_file(self, repo_id: str, revision: str, name: str) -> None:
        snapshot, repo = self._snapshot(repo_id, revision), self.hub.repos[repo_id]
        commit = {"X-Repo-Commit": snapshot.commit}
        if repo.is_gated and self.headers["Authorization"] != f"Bearer {repo.token}":
            raise _Refusal(401, "GatedRepo", f"Access to model {repo_id} is restricted.", **commit)
        if name not in snapshot.files:
            raise _Refusal(404, "EntryNotFound", "Entry not found", **commit)
        data, start, status = snapshot.files[name].read_bytes(), 0, 200
        headers = commit | {"ETag": f'"{snapshot.etag(name)}"', "Accept-Ranges": "bytes"}
        if (asked := self.headers["Range"]) and self.command == "GET":
            with self.hub.lock:
                self.hub.ranges.append(asked)
            start, status = int(asked.removeprefix("bytes=").rstrip("-")), 206
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        with self.hub.lock:
            faults = repo.faults.get(name) if self.command == "GET" else None
            fault = faults.pop(0) if faults else None
        self._send(status, headers, data[start:], fault)

    def _send(self, status: int, headers: dict[str, str], body: bytes, fault: Fault | None = None) -> None:
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "HEAD":
            return
        if fault is None:
            self.wfile.write(body)
            return
        self.wfile.write(body[: len(body) // 2])
        if fault == "pause":
            time.sleep(_PAUSE_S)
            self.wfile.write(body[len(body) // 2 :])
            return
        self.close_connection = True
        if fault == "reset":  # closing without lingering, and before the server's own polite shutdown
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            os.close(self.connection.detach())
