"""The certificate that the store of an overlay without cert-manager gets."""

from __future__ import annotations

import socket
import ssl
import threading
from pathlib import Path

import pytest

from avrt_lib.cluster.credentials import certificate

HOST = "avrt-store.avrt.svc.cluster.local"


@pytest.mark.parametrize("name", ["avrt-store", "avrt-store.avrt", "avrt-store.avrt.svc", HOST])
def test_strict_clients_take_the_certificate(tmp_path: Path, name: str) -> None:
    for file, text in certificate(HOST).items():
        (tmp_path / file).write_text(text)
    server_side = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server_side.load_cert_chain(tmp_path / "tls.crt", tmp_path / "tls.key")
    client_side = ssl.create_default_context(cafile=str(tmp_path / "ca.crt"))
    client_side.verify_flags |= ssl.VERIFY_X509_STRICT  # the default from Python 3.13 on
    ours, theirs = socket.socketpair()
    for end in (ours, theirs):
        end.settimeout(10)
    with ours, theirs:
        answering = threading.Thread(target=lambda: server_side.wrap_socket(theirs, server_side=True).close())
        answering.start()
        with client_side.wrap_socket(ours, server_hostname=name) as connected:
            assert connected.version() is not None
        answering.join(10)
