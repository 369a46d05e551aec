"""The prober of the cluster tests counts every request that failed, in whatever way."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
from pathlib import Path

PROBER = Path(__file__).parents[1] / "cluster" / "standin" / "prober.py"
ANSWER = json.dumps({"choices": [{"message": {"content": "v1"}}]})
#: What a server says before it hangs up; then, for ever, the last.
SAID = (
    "",
    "HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\nhalf an ans",
    "HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nnull",
    "nonsense\r\n\r\n",
    "HTTP/1.1 503 No\r\nContent-Length: 0\r\n\r\n",
    f"HTTP/1.1 200 OK\r\nContent-Length: {len(ANSWER)}\r\n\r\n{ANSWER}",
)


def serve(server: socket.socket) -> None:
    number = 0
    while True:
        try:
            connection, _ = server.accept()
        except OSError:
            return
        with connection:
            asked = b""
            while b'"max_tokens"' not in asked and (more := connection.recv(65536)):
                asked += more
            connection.sendall(SAID[min(number, len(SAID) - 1)].encode())
            number += 1


def test_every_failure_is_counted() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        threading.Thread(target=serve, args=(server,), daemon=True).start()
        url = f"http://127.0.0.1:{server.getsockname()[1]}/v1/chat/completions"
        line = [sys.executable, "-u", str(PROBER), url, "champion", "--pause", "0.1"]
        environment = {**os.environ, "AVRT_API_KEY": "k", "no_proxy": "127.0.0.1"}
        with subprocess.Popen(line, env=environment, stdout=subprocess.PIPE, text=True) as prober:
            assert prober.stdout is not None
            counted = {"answers": {}, "failures": []}
            for told in prober.stdout:
                counted = json.loads(told)
                if counted["answers"]:
                    break
            prober.kill()
    assert len(counted["failures"]) == len(SAID) - 1
    assert list(counted["answers"]) == ["v1"]
