#!/usr/bin/env python3
"""Print the part of a lock that one image needs: its extra, with everything that it brings along.

    python scripts/image_requirements.py train --build cuda > requirements.txt

Resolves the extra against the lock as constraints, so that an image never has another version than the environment that
was tested. Needs uv (make setup).
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BUILDS = ("cpu", "cuda")
IMAGES = ("pipeline", "train", "vllm")


def requirements(image: str, build: str) -> str:
    """The pinned requirements of an image, one a line.

    Raises:
        subprocess.CalledProcessError: where the extra does not fit the lock (``make lock`` mends it).
    """
    folder = ROOT / "requirements"
    command = [sys.executable, "-m", "uv", "pip", "compile", "pyproject.toml", "--extra", image]
    if image == "vllm":
        command.append(f"requirements/{build}.in")
    command += ["--constraints", str(folder / f"{build}.lock"), "--overrides", str(folder / "overrides.txt")]
    command += ["--excludes", str(folder / f"{build}.excludes")]
    command += ["--python-version", "3.11", "--python-platform", "x86_64-manylinux_2_28", "--no-header"]
    with tempfile.TemporaryDirectory() as temporary:
        output = Path(temporary) / "image.lock"
        command += ["--no-annotate", "--quiet", "--output-file", str(output)]
        subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
        return output.read_text(encoding="utf-8")


def main() -> int:
    """Print the requirements that the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("image", choices=IMAGES)
    parser.add_argument("--build", choices=BUILDS, default="cpu")
    arguments = parser.parse_args()
    try:
        sys.stdout.write(requirements(arguments.image, arguments.build))
    except subprocess.CalledProcessError as error:
        return int(error.returncode)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
