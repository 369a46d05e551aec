"""Steps that do next to nothing, for tests of what runs them: the graph, the local runner, the command line.

``install(folder)`` writes a ``sitecustomize`` that puts them in place of the real ones in every process that has that
folder on its ``PYTHONPATH``. What they report, and which of them fails or hangs, comes from ``AVRT_FAKE``, as JSON:
``{"facts": {instance: facts}, "fail": {instance: [error class, message]}, "hang": [instance]}``.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]

SITECUSTOMIZE = """
import dataclasses, os
if "AVRT_FAKE" in os.environ:
    from avrt_lib import steps
    for name, step in steps.STEPS.items():
        steps.STEPS[name] = dataclasses.replace(step, module="fake_step")
"""

FAKE_STEP = """
import json, os, time
from pathlib import Path
from avrt_lib import errors

def run(config, *, workspace, **given):
    fake = json.loads(os.environ["AVRT_FAKE"])
    name = workspace.instance
    with workspace.progress("rows", 2) as bar:
        bar.advance(1)
        if name in fake.get("hang", []):
            Path(workspace.root, "hanging").write_text(str(os.getpid()))
            time.sleep(600)
        if name in fake.get("fail", {}):
            kind, message = fake["fail"][name]
            raise getattr(errors, kind)(message)
        bar.advance(1)
    seen = {}
    for key, value in given.items():
        for path in value if isinstance(value, list) else [value]:
            if isinstance(path, Path) and path.parent != workspace.scratch:
                seen.setdefault(key, []).append((path / "who.txt").read_text())
    for key, value in given.items():
        if isinstance(value, Path) and value.parent == workspace.scratch:
            value.mkdir(parents=True, exist_ok=True)
            (value / "who.txt").write_text(name + "." + key)
    plain = {k: v for k, v in given.items() if not isinstance(v, (Path, list))}
    Path(workspace.root, "seen-" + name + ".json").write_text(json.dumps({"inputs": seen, "params": plain}))
    return fake.get("facts", {}).get(name, {"n": 1})
"""


def install(folder: Path, **fake: Any) -> dict[str, str]:
    """Write the stand-ins below ``folder`` and return the environment of processes that shall use them."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "sitecustomize.py").write_text(SITECUSTOMIZE, encoding="utf-8")
    (folder / "fake_step.py").write_text(FAKE_STEP, encoding="utf-8")
    path = os.pathsep.join([str(folder), str(ROOT)])
    return {**os.environ, "PYTHONPATH": path, "AVRT_FAKE": json.dumps(fake), "PATH": _path()}


def _path() -> str:
    return os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
