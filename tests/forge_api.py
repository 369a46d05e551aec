"""A server that keeps pull requests as GitHub (API of 2022-11-28), GitLab (v4) or Gitea (v1) does.

The addresses, fields, statuses and error texts are those of the forges' published API descriptions; none of them was
recorded from a live forge here. As on a forge there is at most one open request for a pair of branches, and the branch
must be in the repository, which is a real one.
"""

from __future__ import annotations

import json
import subprocess
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar, Self
from urllib.parse import parse_qs, urlsplit

TOKEN = "t0ken-of-the-forge"
PROJECT = "ml/manifests"


@dataclass
class Pull:
    """A pull request."""

    number: int
    branch: str
    base: str
    title: str
    body: str
    is_open: bool = True


@dataclass
class ForgeServer:
    """One forge with one project; ``with ForgeServer("github", bare) as forge: …``

    Attributes:
        kind: github, gitlab or gitea.
        repository: the project's bare repository.
        failing: statuses that the next requests get instead of an answer.
        limiting: so many of the next requests are too many, and the pause in seconds that is asked for.
        losing: answers to creations that are lost: the request is made, and 502 is said.
        holding: the answer to a creation is held back until this is set; ``held`` tells that one is.
    """

    kind: str
    repository: Path
    pulls: list[Pull] = field(default_factory=list)
    failing: list[int] = field(default_factory=list)
    limiting: tuple[int, int] = (0, 0)
    losing: int = 0
    holding: threading.Event | None = None
    held: threading.Event = field(default_factory=threading.Event)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def __enter__(self) -> Self:
        forge = self

        class Handler(_Handler):
            server_forge: ClassVar[ForgeServer] = forge

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.holding is not None:
            self.holding.set()
        self._server.shutdown()
        self._thread.join(10)
        self._server.server_close()

    @property
    def settings(self) -> dict[str, Any]:
        """The configuration that leads here; the token is in AVRT_TEST_FORGE."""
        return {
            "deployment.git.mode": "pull_request",
            "deployment.git.forge": self.kind,
            "deployment.git.api_url": f"http://127.0.0.1:{self._server.server_port}{_PREFIX[self.kind]}",
            "deployment.git.project": PROJECT,
            "deployment.git.token_env": "AVRT_TEST_FORGE",
        }

    def has_branch(self, branch: str) -> bool:
        """Whether the repository has it."""
        command = ["git", "rev-parse", "--quiet", "--verify", f"refs/heads/{branch}"]
        return subprocess.run(command, cwd=self.repository, capture_output=True, check=False).returncode == 0


_PREFIX = {"github": "", "gitlab": "/api/v4", "gitea": "/api/v1"}
_PULLS = {
    "github": f"/repos/{PROJECT}/pulls",
    "gitlab": "/api/v4/projects/ml%2Fmanifests/merge_requests",
    "gitea": f"/api/v1/repos/{PROJECT}/pulls",
}
_SCHEME = {"github": "Bearer", "gitlab": "Bearer", "gitea": "token"}


class _Handler(BaseHTTPRequestHandler):
    server_forge: ClassVar[ForgeServer]

    def do_GET(self) -> None:
        if self._let_in():
            self._answer(200, self._listed({key: value[0] for key, value in parse_qs(self._query).items()}))

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self._let_in():
            self._answer(*self._created(asked))

    def do_PATCH(self) -> None:
        self._edit()

    def do_PUT(self) -> None:
        self._edit()

    def _edit(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        path, _, number = self.path.rpartition("/")
        forge = self.server_forge
        if self._let_in(path):
            if self.command != ("PUT" if forge.kind == "gitlab" else "PATCH"):
                self._answer(405, {"message": "405 Method Not Allowed"})
                return
            (pull,) = (pull for pull in forge.pulls if str(pull.number) == number)
            pull.title = asked.get("title", pull.title)
            pull.body = asked.get("description" if forge.kind == "gitlab" else "body", pull.body)
            self._answer(201 if forge.kind == "gitea" else 200, self._shown(pull))

    @property
    def _query(self) -> str:
        return urlsplit(self.path).query

    def _let_in(self, path: str | None = None) -> bool:
        forge = self.server_forge
        requests, pause = forge.limiting
        if forge.failing:
            self._answer(forge.failing.pop(0), {"message": "Try again later"})
        elif requests:
            forge.limiting = (requests - 1, pause)
            said = {"message": "You have exceeded a secondary rate limit. Please wait a few minutes."}
            self._answer(403 if forge.kind == "github" else 429, said, {"Retry-After": str(pause)})
        elif self.headers["Authorization"] != f"{_SCHEME[forge.kind]} {TOKEN}":
            self._answer(401, {"message": "Bad credentials" if forge.kind == "github" else "401 Unauthorized"})
        elif (path or urlsplit(self.path).path) != _PULLS[forge.kind]:
            self._answer(404, {"message": "Not Found" if forge.kind != "gitlab" else "404 Project Not Found"})
        else:
            return True
        return False

    def _listed(self, asked: dict[str, str]) -> list[dict[str, Any]]:
        pulls = self.server_forge.pulls
        if asked.get("state") in ("open", "opened"):
            pulls = [pull for pull in pulls if pull.is_open]
        if self.server_forge.kind == "gitea":  # it filters by neither branch, and gives pages
            limit, page = int(asked["limit"]), int(asked["page"])
            return [self._shown(pull) for pull in pulls[(page - 1) * limit : page * limit]]
        branch, base = asked.get("head", asked.get("source_branch")), asked.get("base", asked.get("target_branch"))
        owner = f"{PROJECT.split('/')[0]}:" if self.server_forge.kind == "github" else ""
        return [self._shown(pull) for pull in pulls if (f"{owner}{pull.branch}", pull.base) == (branch, base)]

    def _created(self, asked: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        forge = self.server_forge
        if forge.kind == "gitlab":
            branch, base, body = asked["source_branch"], asked["target_branch"], asked["description"]
        else:
            branch, base, body = asked["head"], asked["base"], asked["body"]
        with forge.lock:
            for pull in forge.pulls:
                if pull.is_open and (pull.branch, pull.base) == (branch, base):
                    return self._exists(pull)
            if not forge.has_branch(branch):
                return 422, {"message": "Validation Failed", "errors": [{"field": "head", "code": "invalid"}]}
            made = Pull(len(forge.pulls) + 1, branch, base, asked["title"], body)
            forge.pulls.append(made)
        if forge.holding is not None:
            forge.held.set()
            forge.holding.wait(120)
        if forge.losing:
            forge.losing -= 1
            return 502, {"message": "Bad Gateway"}
        return 201, self._shown(made)

    def _exists(self, pull: Pull) -> tuple[int, dict[str, Any]]:
        if self.server_forge.kind == "github":
            text = f"A pull request already exists for {PROJECT.split('/')[0]}:{pull.branch}."
            error = {"resource": "PullRequest", "code": "custom", "message": text}
            return 422, {"message": "Validation Failed", "errors": [error], "status": "422"}
        if self.server_forge.kind == "gitlab":
            text = f"Another open merge request already exists for this source branch: !{pull.number}"
            return 409, {"message": [text]}
        return 409, {"message": f"pull request already exists for these targets [id: {pull.number}]"}

    def _shown(self, pull: Pull) -> dict[str, Any]:
        if self.server_forge.kind == "gitlab":
            return {
                "id": 1000 + pull.number,
                "iid": pull.number,
                "title": pull.title,
                "description": pull.body,
                "state": "opened" if pull.is_open else "closed",
                "source_branch": pull.branch,
                "target_branch": pull.base,
                "web_url": f"https://gitlab.example.com/{PROJECT}/-/merge_requests/{pull.number}",
            }
        word = "pull" if self.server_forge.kind == "github" else "pulls"
        return {
            "id": 1000 + pull.number,
            "number": pull.number,
            "title": pull.title,
            "body": pull.body,
            "state": "open" if pull.is_open else "closed",
            "head": {"ref": pull.branch},
            "base": {"ref": pull.base},
            "html_url": f"https://{self.server_forge.kind}.example.com/{PROJECT}/{word}/{pull.number}",
        }

    def _answer(self, status: int, document: Any, headers: Mapping[str, str] = MappingProxyType({})) -> None:
        body = json.dumps(document).encode()
        try:
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)
        except OSError:  # who asked has been killed meanwhile
            self.close_connection = True

    def log_message(self, *_: object) -> None:
        pass
