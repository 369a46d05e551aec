#!/usr/bin/env python3
"""Write the digests of images.yaml, as the registries serve the tags now: make pin-images.

A digest is the SHA-256 of the manifest's bytes, computed here and compared with what the registry says.
"""

from __future__ import annotations

import hashlib
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import httpx
import yaml

ROOT = Path(__file__).resolve().parent.parent
IMAGES = ROOT / "images.yaml"
HUB = "docker.io"
TIMEOUT_S = 15.0
ACCEPT = ", ".join(
    f"application/vnd.{kind}+json"
    for kind in (
        "oci.image.index.v1",
        "docker.distribution.manifest.list.v2",
        "oci.image.manifest.v1",
        "docker.distribution.manifest.v2",
    )
)


class RegistryError(Exception):
    """A registry that cannot be reached, or does not have the tag."""


@dataclass(frozen=True)
class Third:
    """A third-party image of images.yaml."""

    name: str
    tag: str
    digest: str | None = None

    @property
    def reference(self) -> str:
        """What docker and Kubernetes take; by digest where there is one."""
        return f"{self.name}:{self.tag}" + (f"@{self.digest}" if self.digest else "")


def third_party(path: Path = IMAGES) -> dict[str, Third]:
    """The images of images.yaml by key."""
    entries = yaml.safe_load(path.read_text(encoding="utf-8"))["images"]
    return {key: Third(entry["name"], str(entry["tag"]), entry.get("digest")) for key, entry in entries.items()}


def endpoint(name: str) -> tuple[str, str]:
    """A registry's address and the repository in it.

    >>> endpoint("docker.io/library/debian")
    ('https://registry-1.docker.io', 'library/debian')
    """
    host, _, repository = name.partition("/")
    scheme = "http" if host.split(":")[0] in ("localhost", "127.0.0.1") else "https"
    return f"{scheme}://{'registry-1.docker.io' if host == HUB else host}", repository


def reachable(name: str, timeout_s: float = 5.0) -> bool:
    """Whether the registry of an image answers at all."""
    try:
        return httpx.get(f"{endpoint(name)[0]}/v2/", timeout=timeout_s).status_code in (200, 401)
    except httpx.HTTPError:
        return False


def digest(image: Third) -> str:
    """The digest that a registry serves for a tag.

    Raises:
        RegistryError: where it cannot be reached, refuses, or sends other bytes than it says.
    """
    address, repository = endpoint(image.name)
    url = f"{address}/v2/{repository}/manifests/{image.tag}"
    try:
        with httpx.Client(timeout=TIMEOUT_S, follow_redirects=True) as client:
            answer = client.get(url, headers={"Accept": ACCEPT})
            if answer.status_code == 401:
                token = _token(client, answer.headers.get("WWW-Authenticate", ""))
                answer = client.get(url, headers={"Accept": ACCEPT, "Authorization": f"Bearer {token}"})
    except httpx.HTTPError as error:
        raise RegistryError(f"{address} cannot be reached ({type(error).__name__}): pin where it can.") from error
    if answer.status_code != 200:
        raise RegistryError(f"{address} has no {repository}:{image.tag} for us (HTTP {answer.status_code}).")
    computed = f"sha256:{hashlib.sha256(answer.content).hexdigest()}"
    said = answer.headers.get("Docker-Content-Digest", computed)
    if said != computed:
        raise RegistryError(f"{address} says {said} for {repository}:{image.tag}, but its bytes are {computed}.")
    return computed


def _token(client: httpx.Client, challenge: str) -> str:
    """An anonymous token for what a registry's challenge asks."""
    asked = dict(re.findall(r'(\w+)="([^"]*)"', challenge))
    realm = asked.pop("realm", None)
    if not challenge.lower().startswith("bearer") or realm is None:
        raise RegistryError("The registry asks for a login, which pin-images does not do.")
    answer = client.get(realm, params=asked)
    if answer.status_code != 200:
        raise RegistryError(f"{realm} gives no anonymous token (HTTP {answer.status_code}).")
    document = answer.json()
    return str(document.get("token") or document.get("access_token"))


def pin(path: Path = IMAGES) -> dict[str, str]:
    """Write the digest of every image beside its tag. All or nothing; comments stay.

    Returns:
        The digests by key.
    """
    digests = {key: digest(image) for key, image in third_party(path).items()}
    lines, key = [], ""
    for line in path.read_text(encoding="utf-8").splitlines():
        if found := re.fullmatch(r"  ([a-z0-9-]+):", line):
            key = found[1]
        if line.startswith("    digest:"):
            continue
        lines.append(line)
        if line.startswith("    tag:"):
            lines.append(f"    digest: {digests[key]}")
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return digests


def main() -> int:
    """Pin all images; 7 where a registry cannot be reached."""
    try:
        for key, found in pin().items():
            print(f"{key}: {found}")
    except RegistryError as error:
        print(f"Nothing was pinned: {error}", file=sys.stderr)
        return 7
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
