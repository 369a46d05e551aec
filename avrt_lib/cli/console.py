"""Where the commands print, and what they do with errors."""

from __future__ import annotations

import errno
import os
import shutil
import sys
import traceback
from pathlib import Path

from rich.console import Console

from avrt_lib.errors import AvrtError, DiskFullError, EnvironmentProblem

#: Results go to standard output, everything else to standard error.
out = Console(highlight=False)
err = Console(stderr=True, highlight=False)


def program() -> str:
    """What to type for this program, from the current folder: ``avrt`` where the shell finds this very one."""
    called, found = Path(sys.argv[0]), shutil.which("avrt")
    if called.name != "avrt" or (found and Path(found).resolve() == called.resolve()):
        return "avrt"
    relative = os.path.relpath(called)
    return str(called.absolute()) if relative.startswith("..") else relative


def fail(error: BaseException, *, debug: bool) -> int:
    """Print an error as one line (with its traceback under ``--debug``) and return the exit code."""
    if debug:
        traceback.print_exception(error)
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        error = DiskFullError(
            f"No space left on the disk ({error.filename or 'while writing'}): free some and try again."
        )
    if isinstance(error, AvrtError):
        message, code = str(error), error.exit_code
    else:
        message, code = f"{type(error).__name__}: {error}", 1
        if isinstance(error, OSError) and error.filename and error.strerror:
            message, code = f"{error.filename}: {error.strerror}", EnvironmentProblem.exit_code
        if not debug:
            message += " (--debug shows where)"
    line = " ".join(message.split())
    print(f"avrt: error: {line}", file=sys.stderr, flush=True)
    return code
