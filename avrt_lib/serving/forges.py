"""Pull requests: GitHub's, GitLab's and Gitea's (Forgejo's) API, as far as a promotion needs it."""

from __future__ import annotations

import os
import re
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, urlsplit

from avrt_lib.config import DeploymentConfig
from avrt_lib.errors import ServingError, UsageError

if TYPE_CHECKING:
    import httpx

_TIMEOUT_S = 30.0
_TRIES = 4
#: A forge that asks for a longer pause is asked again by whoever starts the step again.
_LONGEST_WAIT_S = 60.0
_PAGE = 50


def open_pull_request(config: DeploymentConfig, branch: str, title: str, body: str) -> str:
    """Ask for a branch to be merged into the followed one; a pull request that is open already is found again.

    One whose text does not hold the body, since the branch was pushed anew, gets the body; its title stays.

    Args:
        config: the repository, its followed branch, and the forge.
        branch: what is to be merged.
        title: one line.
        body: Markdown.

    Returns:
        Its address for people.

    Raises:
        UsageError: where the configuration does not say which project is meant.
        ServingError: where the forge refuses or does not answer; the message has the reason and the mend.
    """
    import httpx

    forge = _FORGES[config.git.forge or "github"]
    host, project = _place(config)
    address = (config.git.api_url or forge.api(host)).rstrip("/")
    headers = forge.headers(os.environ[config.git.token_env or ""].strip())
    with httpx.Client(headers=headers, timeout=_TIMEOUT_S) as client:
        return forge(client, address, project).open(branch, config.manifests_branch, title, body)


class _Busy(ServingError):
    """The forge may answer a little later; ``wait_s`` is how much later, where it says so."""

    wait_s = 0.0


class _Forge(ABC):
    #: Where a pull request has its address for people, its number and its text.
    _URL, _NUMBER, _BODY = "html_url", "number", "body"
    _EDIT = "PATCH"

    def __init__(self, client: httpx.Client, address: str, project: str) -> None:
        self._client = client
        self._address = address
        self._project = project

    @staticmethod
    @abstractmethod
    def api(host: str) -> str:
        """The API's usual address."""

    @staticmethod
    def headers(token: str) -> dict[str, str]:
        """What every request carries."""
        return {"Authorization": f"Bearer {token}"}

    @property
    @abstractmethod
    def pulls(self) -> str:
        """The path of the project's pull requests."""

    @abstractmethod
    def find(self, branch: str, base: str) -> dict[str, Any] | None:
        """The open pull request, or None."""

    @abstractmethod
    def create(self, branch: str, base: str, title: str, body: str) -> dict[str, Any] | None:
        """A new pull request, or None where there is one by now."""

    def open(self, branch: str, base: str, title: str, body: str) -> str:
        """Find the open pull request, or make it. What was asked in vain may have been heard, so it is looked for."""
        tries = 0
        while True:
            tries += 1
            try:
                if found := self.find(branch, base):
                    self._tell(found, body)
                if pull := found or self.create(branch, base, title, body):
                    return str(pull[self._URL])
                raise _Busy(f"{self._address} has a pull request of {branch}, but does not show it.")
            except _Busy as problem:
                if tries == _TRIES or problem.wait_s > _LONGEST_WAIT_S:
                    raise
                time.sleep(max(2**tries / 4, problem.wait_s))

    def _tell(self, pull: dict[str, Any], body: str) -> None:
        """Give a pull request its text, unless it holds it: what people have written around it stays then."""
        # Forges, and the fields of their pages, have ends of lines of their own.
        if " ".join(body.split()) not in " ".join((pull[self._BODY] or "").split()):
            self.request(self._EDIT, f"{self.pulls}/{pull[self._NUMBER]}", json={self._BODY: body})

    def request(self, method: str, path: str, known: Mapping[int, str] | None = None, **more: Any) -> Any:
        """Ask the API.

        Args:
            method: of HTTP.
            path: below the API's address.
            known: statuses that mean that there is a pull request already, and what the text then holds.
            more: ``params``, ``json``.

        Returns:
            Its JSON answer, or None for a known status.
        """
        import httpx

        try:
            answer = self._client.request(method, f"{self._address}{path}", **more)
        except (httpx.TransportError, httpx.InvalidURL) as error:
            raise _Busy(f"{self._address} cannot be reached ({error}): correct deployment.git.api_url.") from error
        said = " ".join(answer.text.split())[:300]
        if answer.status_code in (known or {}) and (known or {})[answer.status_code] in answer.text:
            return None
        if answer.is_success:
            try:
                document = answer.json()
            except ValueError:
                document = None
            if not isinstance(document, list if method == "GET" else dict):
                raise ServingError(
                    f"{self._address} does not answer as a forge's API ({said}): correct deployment.git.api_url."
                )
            return document
        # GitHub says 403 where others say 429.
        limited = answer.status_code == 429 or (answer.status_code == 403 and "rate limit" in answer.text.lower())
        mend = {
            401: "the token in deployment.git.token_env is not valid",
            403: "the token in deployment.git.token_env may not make pull requests",
            404: f"correct deployment.git.project ({self._project}) or api_url, or let the token see the project",
        }.get(answer.status_code)
        if limited:
            mend = "it takes no more requests of this token for now: start the step again later"
        message = f"{self._address} answered {answer.status_code} to {method} {path}: {said}"
        message = f"{message}{f' — {mend}' if mend else ''}."
        if not limited and answer.status_code < 500:
            raise ServingError(message)
        busy, pause = _Busy(message), answer.headers.get("retry-after", "")
        busy.wait_s = float(pause) if pause.isdecimal() else 0.0
        raise busy


class _GitHub(_Forge):
    @staticmethod
    def api(host: str) -> str:
        return "https://api.github.com" if host == "github.com" else f"https://{host}/api/v3"

    @staticmethod
    def headers(token: str) -> dict[str, str]:
        return {
            "Authorization": f"Bearer {token}",
            "Accept": "application/vnd.github+json",
            "X-GitHub-Api-Version": "2022-11-28",
        }

    def find(self, branch: str, base: str) -> dict[str, Any] | None:
        head = f"{self._project.split('/')[0]}:{branch}"
        found: list[dict[str, Any]] = self.request(
            "GET", self.pulls, params={"state": "open", "head": head, "base": base}
        )
        return found[0] if found else None

    def create(self, branch: str, base: str, title: str, body: str) -> dict[str, Any] | None:
        asked = {"title": title, "head": branch, "base": base, "body": body}
        made: dict[str, Any] | None = self.request("POST", self.pulls, {422: "already exists"}, json=asked)
        return made

    @property
    def pulls(self) -> str:
        return f"/repos/{self._project}/pulls"


class _GitLab(_Forge):
    _URL, _NUMBER, _BODY = "web_url", "iid", "description"
    _EDIT = "PUT"

    @staticmethod
    def api(host: str) -> str:
        return f"https://{host}/api/v4"

    def find(self, branch: str, base: str) -> dict[str, Any] | None:
        asked = {"state": "opened", "source_branch": branch, "target_branch": base}
        found: list[dict[str, Any]] = self.request("GET", self.pulls, params=asked)
        return found[0] if found else None

    def create(self, branch: str, base: str, title: str, body: str) -> dict[str, Any] | None:
        asked = {
            "source_branch": branch,
            "target_branch": base,
            "title": title,
            "description": body,
            "remove_source_branch": True,
        }
        made: dict[str, Any] | None = self.request("POST", self.pulls, {409: "already exists"}, json=asked)
        return made

    @property
    def pulls(self) -> str:
        return f"/projects/{quote(self._project, safe='')}/merge_requests"


class _Gitea(_Forge):
    @staticmethod
    def api(host: str) -> str:
        return f"https://{host}/api/v1"

    @staticmethod
    def headers(token: str) -> dict[str, str]:
        return {"Authorization": f"token {token}"}

    def find(self, branch: str, base: str) -> dict[str, Any] | None:
        page = 1
        while True:
            asked = {"state": "open", "limit": _PAGE, "page": page}
            found: list[dict[str, Any]] = self.request("GET", self.pulls, params=asked)
            for pull in found:
                if (pull["head"]["ref"], pull["base"]["ref"]) == (branch, base):
                    return pull
            if not found:
                return None
            page += 1

    def create(self, branch: str, base: str, title: str, body: str) -> dict[str, Any] | None:
        asked = {"title": title, "head": branch, "base": base, "body": body}
        made: dict[str, Any] | None = self.request("POST", self.pulls, {409: "already exists"}, json=asked)
        return made

    @property
    def pulls(self) -> str:
        return f"/repos/{self._project}/pulls"


_FORGES: dict[str, type[_Forge]] = {"github": _GitHub, "gitlab": _GitLab, "gitea": _Gitea}


def _place(config: DeploymentConfig) -> tuple[str, str]:
    """Host and OWNER/NAME of the repository."""
    url = config.manifests_url or ""
    short = re.fullmatch(r"[\w.-]+@([\w.-]+):(.+)", url)
    address = urlsplit(url)
    host = short[1] if short else address.hostname or ""
    project = config.git.project or (short[2] if short else address.path).strip("/").removesuffix(".git")
    if not config.git.project and (address.scheme == "file" or "/" not in project):
        raise UsageError(f"{project or url} names no project at a forge: set deployment.git.project to OWNER/NAME.")
    if not host and not config.git.api_url:
        raise UsageError("The repository's address names no host: set deployment.git.api_url.")
    return host, project
