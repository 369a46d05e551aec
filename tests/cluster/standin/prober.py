"""Asks the champion's Service again and again, each time on a new connection, and prints what it has counted so far.

python prober.py URL MODEL [--content FILE] [--pause S] [--timeout S]
"""

from __future__ import annotations

import argparse
import json
import os
import time
import urllib.request
from collections import Counter
from pathlib import Path

parser = argparse.ArgumentParser()
parser.add_argument("url")
parser.add_argument("model")
parser.add_argument("--content", type=Path, help="the message's parts, as JSON")
parser.add_argument("--pause", type=float, default=0.05)
parser.add_argument("--timeout", type=float, default=10.0)
options = parser.parse_args()

content = [
    {"type": "video_url", "video_url": {"url": "data:video/jpeg;base64,AA=="}},
    {"type": "input_audio", "input_audio": {"data": "AA==", "format": "wav"}},
    {"type": "text", "text": "What?"},
]
if options.content:
    content = json.loads(options.content.read_text())
asked = {"model": options.model, "messages": [{"role": "user", "content": content}], "temperature": 0.0}
body = json.dumps({**asked, "max_tokens": 80}).encode()
headers = {"content-type": "application/json", "authorization": f"Bearer {os.environ['AVRT_API_KEY']}"}
answers: Counter[str] = Counter()
failures: list[str] = []
order: list[str] = []
told = 0.0
while True:
    try:
        request = urllib.request.Request(options.url, body, headers)
        with urllib.request.urlopen(request, timeout=options.timeout) as response:
            version = json.load(response)["choices"][0]["message"]["content"]
        answers[version] += 1
        order += [] if order[-1:] == [version] else [version]
    except Exception as error:  # whatever it is, this request has failed; half an answer is no OSError
        failures.append(f"{time.time():.2f} {error!r}")
    if time.monotonic() - told > 0.5:
        told = time.monotonic()
        print(json.dumps({"answers": answers, "failures": failures, "order": order}), flush=True)
    time.sleep(options.pause)
