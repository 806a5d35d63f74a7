"""A stand-in for the Hugging Face Hub on the loopback interface: what its library asks of it."""

import base64
import hashlib
import json
import re
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any
from urllib.parse import unquote, urlsplit

Files = dict[str, bytes]


class HubServer:
    """Repositories in memory, each a list of commits on the branch main.

    Attributes:
        asked: each request's method and path.
        commits: of each repository, by hash, oldest first.
        private: repositories that were made private.
        refuses: the status that each request for this repository gets.
        stated_sizes: sizes that listings state, in place of the true ones.
        cut_off: names of files of which half is sent, and nothing if they are asked for again.
    """

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.commits: dict[str, dict[str, Files]] = {}
        self.private: set[str] = set()
        self.refuses: dict[str, int] = {}
        self.stated_sizes: dict[str, int] = {}
        self.cut_off: set[str] = set()
        server = type("Handler", (_Handler,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), server)
        self._server.daemon_threads = True
        Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def add(self, repository: str, files: Files) -> str:
        """Adds a commit; returns its hash."""
        commits = self.commits.setdefault(repository, {})
        content = repr((len(commits), repository, sorted(files.items())))
        commit = hashlib.sha1(content.encode()).hexdigest()
        commits[commit] = files
        return commit

    def find(self, repository: str, revision: str) -> tuple[str, Files] | None:
        commits = self.commits[repository]
        commit = list(commits)[-1] if revision == "main" and commits else revision
        return (commit, commits[commit]) if commit in commits else None


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        self._answer(None)

    def do_HEAD(self) -> None:
        self._answer(None)

    def do_POST(self) -> None:
        if self.headers.get("Transfer-Encoding") == "chunked":
            body = b""
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        else:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self._answer(body)

    def _answer(self, body: bytes | None) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.asked.append(f"{self.command} {path}")
        if path == "/api/validate-yaml":
            self._validate(body or b"")
        elif path == "/api/repos/create":
            self._create(json.loads(body or b""))
        elif match := re.match(
            r"/(?:api/models/)?(\w[\w.-]*/[\w.-]+)(?:/(\w+)/([^/]+)(?:/(.+))?)?$", path
        ):
            repository, what, revision, name = match.groups()
            self._of_repository(repository, what or "revision", revision or "main", name, body)
        else:
            self._send(404)

    def _validate(self, body: bytes) -> None:
        # The Hub knows a list of licences.
        licence = re.search(r"^license: (.*)$", json.loads(body)["content"], re.MULTILINE)
        if licence is None or licence[1] not in ("cc0-1.0", "mit"):
            self._json({"errors": [{"message": '"license" must be one of [...]'}]}, status=400)
        else:
            self._json({"errors": [], "warnings": []})

    def _create(self, wanted: dict[str, Any]) -> None:
        repository = f"{wanted['organization']}/{wanted['name']}"
        url = f"{self.hub.url}/{repository}"
        is_new = repository not in self.hub.commits
        if is_new:
            self.hub.commits[repository] = {}
            if wanted.get("private") or wanted.get("visibility") == "private":
                self.hub.private.add(repository)
        self._json({"url": url, "name": repository, "id": "0"}, status=200 if is_new else 409)

    def _of_repository(
        self, repository: str, what: str, revision: str, name: str | None, body: bytes | None
    ) -> None:
        if status := self.hub.refuses.get(repository):
            return self._send(status)
        if repository not in self.hub.commits:
            return self._send(404, {"X-Error-Code": "RepoNotFound"})
        if what == "preupload":
            names = [file["path"] for file in json.loads(body or b"")["files"]]
            mode = {"uploadMode": "regular", "shouldIgnore": False}
            return self._json({"files": [{"path": name, **mode} for name in names]})
        if what == "commit":
            return self._commit(repository, body or b"")
        found = self.hub.find(repository, revision)
        if found is None:
            return self._send(404, {"X-Error-Code": "RevisionNotFound"})
        commit, files = found
        if what == "resolve":
            return self._file(commit, files, name or "")
        sizes = {n: self.hub.stated_sizes.get(n, len(data)) for n, data in files.items()}
        if what == "tree":
            return self._json(
                [{"type": "file", "path": n, "size": s, "oid": "0" * 40} for n, s in sizes.items()]
            )
        siblings = [{"rfilename": n, "size": s, "blobId": "0" * 40} for n, s in sizes.items()]
        return self._json({"id": repository, "sha": commit, "siblings": siblings})

    def _commit(self, repository: str, body: bytes) -> None:
        latest = self.hub.find(repository, "main")
        files = dict(latest[1]) if latest else {}
        for line in map(json.loads, body.splitlines()):
            if line["key"] == "file":
                files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            elif line["key"] == "deletedFile":
                del files[line["value"]["path"]]
        commit = self.hub.add(repository, files)
        url = f"{self.hub.url}/{repository}/commit/{commit}"
        self._json({"success": True, "commitOid": commit, "commitUrl": url, "hookOutput": ""})

    def _file(self, commit: str, files: Files, name: str) -> None:
        if name not in files:
            return self._send(404, {"X-Error-Code": "EntryNotFound"})
        headers = {
            "X-Repo-Commit": commit,
            "ETag": f'"{hashlib.sha256(files[name]).hexdigest()}"',
            "Accept-Ranges": "none",
        }
        if self.command == "GET" and name in self.hub.cut_off:
            if "Range" in self.headers:
                return self._send(500)
            self.close_connection = True
            return self._send(200, headers, files[name], sent=len(files[name]) // 2)
        return self._send(200, headers, files[name])

    def _json(self, value: object, status: int = 200) -> None:
        self._send(status, {"Content-Type": "application/json"}, json.dumps(value).encode())

    def _send(
        self,
        status: int,
        headers: dict[str, str] | None = None,
        body: bytes = b"",
        sent: int | None = None,
    ) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[:sent])
