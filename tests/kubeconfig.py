"""Files for KUBECONFIG: one cluster and one user."""

from __future__ import annotations

import base64
from pathlib import Path

import yaml
from kubernetes import client


def write_kubeconfig(path: Path, server: str, *, authority: bytes | None = None, token: str = "t") -> str:
    """Write one for an API server's address; returns the file's name."""
    trusted = {"certificate-authority-data": base64.b64encode(authority).decode()} if authority else {}
    document = {
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [{"name": "c", "cluster": {"server": server, **trusted}}],
        "users": [{"name": "u", "user": {"token": token}}],
        "contexts": [{"name": "c", "context": {"cluster": "c", "user": "u"}}],
        "current-context": "c",
    }
    path.write_text(yaml.safe_dump(document), encoding="utf-8")
    return str(path)


def account_token(namespace: str, account: str) -> str:
    """A token of a service account of the cluster that the tests use."""
    request = client.AuthenticationV1TokenRequest(spec=client.V1TokenRequestSpec(audiences=[], expiration_seconds=3600))
    made = client.CoreV1Api().create_namespaced_service_account_token(account, namespace, request)
    return str(made.status.token)


def write_account_kubeconfig(path: Path, namespace: str, account: str) -> str:
    """Write one with the rights of a service account of the cluster that the tests use; returns the file's name."""
    settings = client.Configuration.get_default_copy()
    authority = Path(settings.ssl_ca_cert).read_bytes()
    return write_kubeconfig(path, settings.host, authority=authority, token=account_token(namespace, account))
