"""Asks the champion's Service again and again, each time on a new connection, and prints what it has counted so far."""

from __future__ import annotations

import json
import os
import sys
import time
import urllib.error
import urllib.request
from collections import Counter

url, model = sys.argv[1:]
content = [
    {"type": "video_url", "video_url": {"url": "data:video/jpeg;base64,AA=="}},
    {"type": "input_audio", "input_audio": {"data": "AA==", "format": "wav"}},
    {"type": "text", "text": "What?"},
]
body = json.dumps({"model": model, "messages": [{"role": "user", "content": content}]}).encode()
headers = {"content-type": "application/json", "authorization": f"Bearer {os.environ['AVRT_API_KEY']}"}
answers: Counter[str] = Counter()
failures: list[str] = []
order: list[str] = []
told = 0.0
while True:
    try:
        with urllib.request.urlopen(urllib.request.Request(url, body, headers), timeout=10) as response:
            version = json.load(response)["choices"][0]["message"]["content"]
        answers[version] += 1
        order += [] if order[-1:] == [version] else [version]
    except (OSError, urllib.error.URLError) as error:
        failures.append(f"{time.time():.2f} {error!r}")
    if time.monotonic() - told > 0.5:
        told = time.monotonic()
        print(json.dumps({"answers": answers, "failures": failures, "order": order}), flush=True)
    time.sleep(0.05)
