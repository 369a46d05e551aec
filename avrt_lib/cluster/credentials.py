"""Random credentials where there are none yet, on a cluster without a secret store of its own.

``python -m avrt_lib.cluster.credentials`` runs in a Job of manifests/components/credentials. What is there is kept;
what two namespaces share is copied from the one that has it. Values never leave the cluster and are never logged.
"""

from __future__ import annotations

import argparse
import base64
import datetime
import logging
import secrets
import string
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from avrt_lib.errors import AvrtError, ConfigError, EnvironmentProblem

if TYPE_CHECKING:
    from kubernetes.client import CoreV1Api

log = logging.getLogger("avrt.credentials")

_YEARS = 10
_LETTERS = string.ascii_uppercase + string.digits


@dataclass(frozen=True, slots=True)
class Credential:
    """A secret and what makes its values.

    Attributes:
        make: gives the values of all keys.
        keys: what the secret must hold.
        shared: whether the runs' namespace gets the same secret.
        kind: the secret's type.
        annotations: of the secret.
    """

    name: str
    keys: tuple[str, ...]
    make: Callable[[], dict[str, str]]
    shared: bool = False
    kind: str = "Opaque"
    annotations: dict[str, str] = field(default_factory=dict)


def credentials(store: str) -> list[Credential]:
    """All secrets that the manifests refer to.

    Args:
        store: ``host:port`` of the object store inside the cluster.
    """
    host = store.rpartition(":")[0]
    s3 = {
        "serving.kserve.io/s3-endpoint": store,
        "serving.kserve.io/s3-usehttps": "0",
        "serving.kserve.io/s3-region": "us-east-1",
        "serving.kserve.io/s3-useanoncredential": "false",
    }
    return [
        Credential("avrt-store", ("access_key", "secret_key"), lambda: _pair("access_key", "secret_key"), shared=True),
        Credential("avrt-models-s3", _AWS, lambda: _pair(*_AWS), annotations=s3),
        Credential("avrt-mlflow-s3", _AWS, lambda: _pair(*_AWS)),
        Credential("avrt-mlflow", ("username", "password"), _account, shared=True),
        Credential("avrt-mlflow-server", ("secret_key",), lambda: {"secret_key": secrets.token_hex(32)}),
        Credential("avrt-api-key", ("api_key",), lambda: {"api_key": secrets.token_urlsafe(32)}, shared=True),
        Credential("avrt-store-tls", _TLS, lambda: certificate(host), kind="kubernetes.io/tls"),
    ]


_AWS = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")
_TLS = ("ca.crt", "tls.crt", "tls.key")


def _pair(access: str, secret: str) -> dict[str, str]:
    return {access: "".join(secrets.choice(_LETTERS) for _ in range(20)), secret: secrets.token_urlsafe(30)}


def _account() -> dict[str, str]:
    return {"username": "avrt", "password": secrets.token_urlsafe(24)}


def certificate(host: str) -> dict[str, str]:
    """A certificate of a server, signed by an authority whose key is thrown away.

    Args:
        host: the server's name in the cluster, ``SERVICE.NAMESPACE.svc.cluster.local``.

    Returns:
        ``ca.crt``, ``tls.crt`` and ``tls.key`` in PEM.
    """
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

    now = datetime.datetime.now(datetime.UTC) - datetime.timedelta(hours=1)
    authority, key = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
    issuer = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "avrt-ca")])
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, host.split(".")[0])])
    parts = host.split(".")
    names = [".".join(parts[:length]) for length in range(1, len(parts) + 1)]

    def builder(name: x509.Name, public: ec.EllipticCurvePublicKey) -> x509.CertificateBuilder:
        return (
            x509.CertificateBuilder()
            .subject_name(name)
            .issuer_name(issuer)
            .public_key(public)
            .serial_number(x509.random_serial_number())
            .not_valid_before(now)
            .not_valid_after(now + datetime.timedelta(days=365 * _YEARS))
        )

    # Strict TLS clients ask it of an authority (RFC 5280, 4.2.1.9).
    usage = dict.fromkeys(
        ("digital_signature", "content_commitment", "key_encipherment", "data_encipherment", "key_agreement"), False
    )
    signs = x509.KeyUsage(**usage, key_cert_sign=True, crl_sign=True, encipher_only=False, decipher_only=False)
    root = (
        builder(issuer, authority.public_key())
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(signs, critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(authority.public_key()), critical=False)
        .sign(authority, hashes.SHA256())
    )
    leaf = (
        builder(subject, key.public_key())
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(name) for name in names]), critical=False)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(authority.public_key()), critical=False)
        .sign(authority, hashes.SHA256())
    )
    pem = serialization.Encoding.PEM
    private = key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    return {
        "ca.crt": root.public_bytes(pem).decode(),
        "tls.crt": leaf.public_bytes(pem).decode(),
        "tls.key": private.decode(),
    }


def ensure(api: CoreV1Api, wanted: Sequence[Credential], namespace: str, runs_namespace: str) -> list[str]:
    """Make the secrets that are absent.

    Args:
        api: a client that may create secrets and read those named.
        wanted: what there has to be.
        namespace: of the store, MLflow and serving.
        runs_namespace: of the runs' pods, which get the shared ones too.

    Returns:
        ``NAMESPACE/NAME`` of what was made.

    Raises:
        ConfigError: where a secret lacks a key, or both namespaces have it with different values.
        EnvironmentProblem: where the cluster refuses.
    """
    made = []
    for credential in wanted:
        places = [namespace, runs_namespace] if credential.shared else [namespace]
        found = {place: _read(api, place, credential) for place in places}
        there = [values for values in found.values() if values is not None]
        if any(values != there[0] for values in there):
            raise ConfigError(
                f"Secret {credential.name} differs between {' and '.join(places)}: delete the one that is wrong, "
                "and it is copied from the other."
            )
        values = there[0] if there else credential.make()
        for place in (place for place, present in found.items() if present is None):
            _create(api, place, credential, values)
            made.append(f"{place}/{credential.name}")
            log.info("made secret %s/%s", place, credential.name)
    return made


def _read(api: CoreV1Api, namespace: str, credential: Credential) -> dict[str, str] | None:
    from kubernetes.client import ApiException

    try:
        data = api.read_namespaced_secret(credential.name, namespace).data or {}
    except ApiException as error:
        if error.status == 404:
            return None
        raise EnvironmentProblem(
            f"Secret {namespace}/{credential.name} cannot be read: {error.status} {error.reason}."
        ) from error
    if missing := [key for key in credential.keys if not data.get(key)]:
        raise ConfigError(
            f"Secret {namespace}/{credential.name} has no {', '.join(missing)}: add it, or delete the secret to have "
            "it made anew."
        )
    return {key: base64.b64decode(data[key]).decode() for key in credential.keys}


def _create(api: CoreV1Api, namespace: str, credential: Credential, values: dict[str, str]) -> None:
    from kubernetes.client import ApiException, V1ObjectMeta, V1Secret

    labels = {"app.kubernetes.io/part-of": "avrt"}
    metadata = V1ObjectMeta(name=credential.name, labels=labels, annotations=credential.annotations)
    try:
        api.create_namespaced_secret(namespace, V1Secret(metadata=metadata, string_data=values, type=credential.kind))
    except ApiException as error:
        raise EnvironmentProblem(
            f"Secret {namespace}/{credential.name} cannot be made: {error.status} {error.reason}."
        ) from error


def main(arguments: Sequence[str] | None = None) -> int:
    """Make what is absent, with the pod's own service account or the current kubeconfig."""
    from kubernetes import client, config

    parser = argparse.ArgumentParser(prog="avrt-credentials", description=__doc__)
    parser.add_argument("--namespace", default="avrt")
    parser.add_argument("--runs-namespace", default="kubeflow")
    parser.add_argument("--store", default="avrt-store.avrt.svc.cluster.local:8333", help="host:port")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        config.load_config()
    except config.ConfigException as error:
        print(f"There is no cluster ({error}): set KUBECONFIG.", file=sys.stderr)
        return EnvironmentProblem.exit_code
    try:
        made = ensure(client.CoreV1Api(), credentials(options.store), options.namespace, options.runs_namespace)
    except AvrtError as problem:
        print(problem, file=sys.stderr)
        return problem.exit_code
    log.info("%d made, the others were there", len(made))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
