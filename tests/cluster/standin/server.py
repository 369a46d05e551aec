"""A stand-in for vLLM's OpenAI server, to see rollouts and failures in seconds. It serves no model.

Its "model" is a folder with ``standin.json``: ``version`` (goes into every answer), ``start_s`` (how long it takes to
become ready), ``crash`` (ends with exit code 3 instead), ``form`` (false: answers without the asked form).
"""

from __future__ import annotations

import argparse
import http.server
import json
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

parser = argparse.ArgumentParser()
parser.add_argument("--model", type=Path, default=Path("/mnt/models"))
parser.add_argument("--served-model-name", default="model")
parser.add_argument("--port", type=int, default=8080)
options, _ = parser.parse_known_args()
model = json.loads((options.model / "standin.json").read_text())
key = os.environ.get("AVRT_API_KEY")


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        if self.path == "/health":
            self.answer({})
        elif self.path == "/v1/models" and self.allowed():
            self.answer({"object": "list", "data": [{"id": options.served_model_name, "object": "model"}]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        if not self.allowed():
            return
        content = body["messages"][-1]["content"]
        kinds = {part["type"] for part in content}
        if body["model"] != options.served_model_name:
            self.answer({"error": f"there is no model {body['model']}"}, 404)
        elif not {"video_url", "input_audio"} <= kinds:
            self.answer({"error": f"video and audio were to be sent, not {sorted(kinds)}"}, 400)
        else:
            text = f"<think>{model['version']}</think><answer>A</answer>" if model.get("form", True) else "Perhaps."
            choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
            usage = {"prompt_tokens": 1, "completion_tokens": 1}
            self.answer({"id": "x", "object": "chat.completion", "choices": [choice], "usage": usage})

    def allowed(self) -> bool:
        if key and self.headers.get("authorization") != f"Bearer {key}":
            self.answer({"error": "wrong key"}, 401)
            return False
        return True

    def answer(self, document: dict[str, Any], code: int = 200) -> None:
        body = json.dumps(document).encode()
        self.send_response(code)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


class Server(http.server.ThreadingHTTPServer):
    daemon_threads = False  # what is being answered is finished
    request_queue_size = 64


if model.get("crash"):
    print("ValueError: the stand-in was told to crash", file=sys.stderr)
    sys.exit(3)
time.sleep(model.get("start_s", 0))
server = Server(("", options.port), Handler)
signal.signal(signal.SIGTERM, lambda *_: threading.Thread(target=server.shutdown).start())
print("serving", model, flush=True)
server.serve_forever(poll_interval=0.1)
server.server_close()
