#!/usr/bin/env python3
"""Resolve both locks, requirements/cpu.lock and requirements/cuda.lock, from pyproject.toml and requirements/*.in.

Run by ``make lock`` with the virtual environment's own Python, which has uv. The locks are for Linux on x86-64; they
name versions only, no index and no path.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BUILDS = ("cpu", "cuda")
EXTRAS = ("pipeline", "train", "vllm", "dev")


def resolve(build: str, *, upgrade: bool) -> None:
    """Write ``requirements/BUILD.lock``; versions that are in it stay unless ``upgrade`` is set.

    Raises:
        subprocess.CalledProcessError: where the requirements cannot be met together; uv has printed why.
    """
    command = [sys.executable, "-m", "uv", "pip", "compile", "pyproject.toml", f"requirements/{build}.in"]
    for extra in EXTRAS:
        command += ["--extra", extra]
    command += ["--overrides", "requirements/overrides.txt", "--excludes", f"requirements/{build}.excludes"]
    command += ["--python-version", "3.11", "--python-platform", "x86_64-manylinux_2_28"]
    command += ["--custom-compile-command", "make lock", "--annotation-style", "line", "--quiet"]
    command += ["--output-file", f"requirements/{build}.lock", *(["--upgrade"] if upgrade else [])]
    subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)


def main() -> int:
    """Resolve what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--build", choices=BUILDS, help="this lock only; both by default")
    parser.add_argument("--upgrade", action="store_true", help="take the newest versions that pyproject.toml allows")
    arguments = parser.parse_args()
    for build in [arguments.build] if arguments.build else BUILDS:
        print(f"Resolving requirements/{build}.lock …", flush=True)
        try:
            resolve(build, upgrade=arguments.upgrade)
        except subprocess.CalledProcessError as error:
            return int(error.returncode)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
