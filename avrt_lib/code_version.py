"""Which code made a result."""

from __future__ import annotations

import os
import subprocess
from functools import cache
from pathlib import Path

from avrt_lib import __version__

_ROOT = Path(__file__).resolve().parent.parent


@cache
def code_version(root: Path = _ROOT) -> str:
    """The package's version, with the commit where the package runs from a git checkout.

    It tells people where a result came from. What decides whether a result is taken again (the steps' keys, the
    caches of a cluster) is the version alone, which does not change with an edit.

    Args:
        root: the folder that holds the package.

    Returns:
        ``0.1.0``, ``0.1.0+g1a2b3c4d5e6f``, or ``0.1.0+g1a2b3c4d5e6f.dirty`` where tracked files differ from the commit.
    """
    if not (root / ".git").exists():
        return __version__
    command = ["git", "-C", str(root), "describe", "--always", "--exclude=*", "--abbrev=12", "--dirty=.dirty"]
    # A hook's variables would name another repository; and nothing is written, not even a refreshed index.
    environment = {k: v for k, v in os.environ.items() if not k.startswith("GIT_")} | {"GIT_OPTIONAL_LOCKS": "0"}
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):  # no git here, or a checkout that it does not read
        return __version__
    return f"{__version__}+g{done.stdout.strip()}"
