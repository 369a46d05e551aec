#!/usr/bin/env python3
"""Write the lock of each image and variant: the part of requirements/cpu.lock or cuda.lock that the image needs.

    python scripts/image_requirements.py

An image gets its extra of pyproject.toml, requirements/images/IMAGE.in, and its engine where it is ``vllm``. They are
resolved against the whole lock as constraints, so that an image never has another version than the environment that was
tested. tools.lock is what the images are built with. made-from.json holds a hash of what each was made from, so
``stale()`` tells without an index which are old; it is not in the locks, whose content decides an image's tag. Run it
after ``make lock``. Needs uv (make setup).
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VARIANTS = ("cpu", "cuda")
IMAGES = ("pipeline", "train", "vllm")
FOLDER = ROOT / "requirements" / "images"
TOOLS = FOLDER / "tools.lock"


def path_of(image: str, variant: str) -> Path:
    """Where an image's lock stands."""
    return FOLDER / f"{image}-{variant}.lock"


def inputs(lock: Path) -> list[bytes]:
    """Everything that decides a lock of an image, or the tools' lock."""
    if lock == TOOLS:
        return [TOOLS.with_suffix(".in").read_bytes()]
    image, _, variant = lock.stem.partition("-")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    declared = [project["dependencies"], project["optional-dependencies"][image]]
    names = (f"{variant}.lock", f"{variant}.in", f"{variant}.excludes", "overrides.txt")
    files = [FOLDER / f"{image}.in", *(ROOT / "requirements" / name for name in names)]
    return [json.dumps(declared).encode(), *(file.read_bytes() for file in files)]


def digest(lock: Path) -> str:
    """The hash of a lock's inputs."""
    return hashlib.sha256(b"".join(inputs(lock))).hexdigest()


def made_from() -> dict[str, str]:
    """The hashes of the inputs that the locks were made from, by the lock's name."""
    path = FOLDER / "made-from.json"
    known: dict[str, str] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    return known


def stale() -> list[Path]:
    """The locks whose inputs have changed since they were made."""
    locks, known = [path_of(image, variant) for image in IMAGES for variant in VARIANTS], made_from()
    return [lock for lock in (*locks, TOOLS) if not lock.exists() or known.get(lock.name) != digest(lock)]


def resolve(lock: Path) -> str:
    """The pinned requirements that belong into a lock, one a line.

    Raises:
        subprocess.CalledProcessError: where an extra does not fit the whole lock (``make lock`` mends it).
    """
    command = [sys.executable, "-m", "uv", "pip", "compile", "--no-header", "--no-annotate", "--quiet"]
    command += ["--python-version", "3.11", "--python-platform", "x86_64-manylinux_2_28"]
    with tempfile.TemporaryDirectory() as temporary:
        output = Path(temporary) / "image.lock"
        command += ["--output-file", str(output)]
        if lock == TOOLS:
            command.append(str(TOOLS.with_suffix(".in")))
        else:
            image, _, variant = lock.stem.partition("-")
            command += ["pyproject.toml", "--extra", image, f"requirements/images/{image}.in"]
            if image == "vllm":
                command.append(f"requirements/{variant}.in")
            command += ["--constraints", f"requirements/{variant}.lock", "--overrides", "requirements/overrides.txt"]
            command += ["--excludes", f"requirements/{variant}.excludes"]
        subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
        return output.read_text(encoding="utf-8")


def main() -> int:
    """Write the locks that are not up to date."""
    for lock in stale():
        print(f"Resolving {lock.relative_to(ROOT)} …", flush=True)
        try:
            text = resolve(lock)
        except subprocess.CalledProcessError as error:
            return int(error.returncode)
        lock.write_text(text, encoding="utf-8")
        known = {**made_from(), lock.name: digest(lock)}
        (FOLDER / "made-from.json").write_text(json.dumps(known, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
