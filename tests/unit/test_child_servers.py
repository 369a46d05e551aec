"""Where a server that was started here can be listened to and reached."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from avrt_lib.child_servers import free_ports, require_free
from avrt_lib.config import StudentConfig
from avrt_lib.errors import EnvironmentProblem, PortInUseError
from avrt_lib.serving.server import ServedModel

FAMILIES = {"127.0.0.1": socket.AF_INET, "::1": socket.AF_INET6}


@pytest.fixture(params=FAMILIES)
def host(request: pytest.FixtureRequest) -> str:
    """A loopback address that this machine has."""
    address: str = request.param
    try:
        with socket.socket(FAMILIES[address]) as probe:
            probe.bind((address, 0))
    except OSError as error:
        pytest.skip(f"this machine has no {address}: {error}")
    return address


def test_a_port_that_is_listened_on_is_named(host: str) -> None:
    with socket.create_server((host, 0), family=FAMILIES[host]) as server:
        port = server.getsockname()[1]
        with pytest.raises(PortInUseError, match=rf"Port {port} on {host} is taken"):
            require_free(port, host)
    require_free(port, host)


@pytest.mark.parametrize("foreign", ["192.0.2.1", "2001:db8::1"])
def test_an_address_of_another_machine_is_refused(foreign: str) -> None:
    with pytest.raises(EnvironmentProblem, match=f"on {foreign} cannot be listened on .*an address of this machine"):
        require_free(free_ports(1)[0], foreign)


@pytest.mark.parametrize(
    ("listens", "reached"),
    [
        ("127.0.0.1", "127.0.0.1"),
        ("0.0.0.0", "127.0.0.1"),
        ("localhost", "localhost"),
        ("::1", "[::1]"),
        ("::", "[::1]"),
    ],
)
def test_the_address_under_which_a_served_model_is_reached(tmp_path: Path, listens: str, reached: str) -> None:
    served = ServedModel(
        tmp_path, "m", student=StudentConfig(model="m"), frames=4, log=tmp_path / "log", host=listens, port=8000
    )
    assert served.base_url == f"http://{reached}:8000/v1"
