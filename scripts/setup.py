#!/usr/bin/env python3
"""Make .venv from the committed lock: ``make setup``. Standard library only; runs under any Python 3.8 or newer.

Order, and why:

1. What the machine must have is checked first, and named with its Debian package.
2. uv, pinned by the lock, installs everything but torch: it is several times faster than pip.
3. torch goes through pip (CPU build only), because pip's own configuration may know a CPU build that uv cannot see.
   Any build of the pinned version serves, so set-up takes the general one where there is no CPU build.
4. The lock is installed without resolving, deepspeed after it, because its build imports torch.

A finished set-up leaves a stamp with the hash of what it was made from, and the next call ends at once. One that was
interrupted goes on: whatever is installed in the locked version is skipped.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BUILDS = ("cpu", "cuda")
PYTHONS = ("python3.11", "python3.12", "python3.13", "python3")
SUPPORTED = ((3, 11), (3, 14))
CPU_INDEX = "https://download.pytorch.org/whl/cpu"
FREE_GB = {"cpu": 5, "cuda": 16}
MARK = ".avrt-setup.json"
#: Packages that do not go through the common installation of the lock.
TORCH, LAST = "torch", "deepspeed"
_PIN = re.compile(r"^([A-Za-z0-9._-]+)==([^\s;#]+)")
_PROBE = """
import json, os, sys, sysconfig
headers = os.path.exists(os.path.join(sysconfig.get_paths()["include"], "Python.h"))
print(json.dumps([sys.version_info[:2], headers]))
"""


class SetupError(Exception):
    """Something that the user has to mend; the message says how."""


def pins(lock: Path) -> dict[str, str]:
    """The lock's versions by package name."""
    found = (_PIN.match(line) for line in lock.read_text(encoding="utf-8").splitlines())
    return {match[1].lower(): match[2] for match in found if match}


def fingerprint(build: str) -> str:
    """Hash of what an environment is made from: the lock, the package's metadata, this script and the checkout."""
    digest = hashlib.sha256(f"{build} {ROOT}".encode())
    for path in (ROOT / "requirements" / f"{build}.lock", ROOT / "pyproject.toml", Path(__file__)):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def read_mark(venv: Path) -> dict[str, str]:
    """What the last set-up left in the environment; empty where there is none."""
    try:
        mark = json.loads((venv / MARK).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return mark if isinstance(mark, dict) else {}


def write_mark(venv: Path, **values: str) -> None:
    """Leave a mark, whole or not at all."""
    temporary = venv / f"{MARK}.tmp"
    temporary.write_text(json.dumps(values) + "\n", encoding="utf-8")
    os.replace(temporary, venv / MARK)


def detect_build() -> str:
    """``cuda`` where an NVIDIA driver answers, else ``cpu``."""
    if shutil.which("nvidia-smi") is None:
        return "cpu"
    try:
        answer = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return "cpu"
    return "cuda" if answer.returncode == 0 and "GPU" in answer.stdout else "cpu"


def probe(python: str) -> tuple[tuple[int, int], bool] | None:
    """Version of an interpreter and whether its C headers are there; None where it does not run.

    A name on PATH is no proof: a pyenv shim exists for versions that are not active.
    """
    try:
        answer = subprocess.run([python, "-c", _PROBE], capture_output=True, text=True, timeout=60)
        version, headers = json.loads(answer.stdout)
    except (OSError, ValueError, subprocess.TimeoutExpired):
        return None
    return (int(version[0]), int(version[1])), bool(headers)


def find_python(wanted: str | None) -> str:
    """An interpreter that the locks support.

    Raises:
        SetupError: where there is none, or the one that was asked for is too old or too new.
    """
    for name in [wanted] if wanted else PYTHONS:
        found = probe(name)
        if found is not None and SUPPORTED[0] <= found[0] < SUPPORTED[1]:
            version, headers = found
            if not headers:
                print(
                    f"Note: the C headers of Python {version[0]}.{version[1]} are missing; DeepSpeed's CPU operators "
                    f"need them: apt-get install python{version[0]}.{version[1]}-dev",
                    flush=True,
                )
            modules = subprocess.run([name, "-c", "import venv, ensurepip"], capture_output=True)
            if modules.returncode != 0:
                raise SetupError(
                    f"{name} cannot make virtual environments: apt-get install python{version[0]}.{version[1]}-venv"
                )
            return name
    if wanted:
        raise SetupError(f"{wanted} is not a working Python 3.11, 3.12 or 3.13.")
    raise SetupError(
        "No Python 3.11, 3.12 or 3.13 was found: apt-get install python3.11 python3.11-venv, "
        "or name one: make setup PYTHON=/path/to/python3.11"
    )


def check_machine(venv: Path, build: str) -> None:
    """Look for what cannot be installed from Python.

    Raises:
        SetupError: naming everything that is missing, with the packages to install.
    """
    missing = []
    if shutil.which("g++") is None and shutil.which("c++") is None:
        missing.append("a C++ compiler (apt-get install g++)")
    if shutil.which("make") is None:
        missing.append("make (apt-get install make)")
    free = shutil.disk_usage(ROOT).free / 1e9
    if not (venv / "bin" / "python").exists() and free < FREE_GB[build]:
        missing.append(f"disk space ({FREE_GB[build]} GB are needed in {ROOT}, {free:.1f} GB are free)")
    if missing:
        raise SetupError("Missing: " + "; ".join(missing) + ".")


def run(command: list[str], what: str, env: dict[str, str] | None = None) -> None:
    """Run a command whose output the user sees.

    Raises:
        SetupError: where it fails.
    """
    if subprocess.run(command, cwd=ROOT, env=env).returncode != 0:
        raise SetupError(f"{what} failed (see above). Start again with make setup: it goes on where it stopped.")


def make_venv(venv: Path, python: str | None, build: str) -> None:
    """Make the environment, or keep the one that is there; one of the other build is made anew."""
    mark = read_mark(venv)
    if mark and mark.get("build") != build:
        print(f"{venv} was made for {mark.get('build')}; making it anew for {build}.", flush=True)
        shutil.rmtree(venv)
    interpreter = venv / "bin" / "python"
    found = probe(str(interpreter)) if interpreter.exists() else None
    if found is None:
        chosen = find_python(python)
        # --clear: what an interrupted call, or a Python that has gone, left behind would only break later.
        run([chosen, "-m", "venv", "--clear", str(venv)], f"Making {venv}")
    elif not SUPPORTED[0] <= found[0] < SUPPORTED[1]:
        raise SetupError(f"{venv} has Python {found[0][0]}.{found[0][1]}: delete it and start again.")
    write_mark(venv, build=build)


def installed(python: str, *names: str) -> dict[str, str]:
    """Versions of installed distributions, by name."""
    code = (
        "import sys, json, importlib.metadata as m\nfound = {}\n"
        "for name in sys.argv[1:]:\n"
        "    try: found[name] = m.version(name)\n"
        "    except m.PackageNotFoundError: pass\n"
        "print(json.dumps(found))"
    )
    answer = subprocess.run([python, "-c", code, *names], capture_output=True, text=True, check=True)
    return dict(json.loads(answer.stdout))


def pip_offers_cpu(pip: list[str], version: str) -> bool:
    """Whether pip, as it is configured here, would choose a CPU build of torch. Nothing is downloaded."""
    answer = subprocess.run([*pip, "index", "versions", TORCH], capture_output=True, text=True)
    return f"{version}+cpu" in re.split(r"[\s,()]+", answer.stdout)


def install_torch(python: str, version: str, index: str | None) -> None:
    """Install torch by pip: the CPU build where there is one, else the general build with what it needs."""
    have = installed(python, TORCH).get(TORCH, "")
    if have.split("+")[0] == version:
        return
    pip = [python, "-m", "pip"]
    quiet = ["-qq", "--no-input", "--no-deps"]
    if index is None and pip_offers_cpu(pip, version):
        run([*pip, "install", *quiet, f"{TORCH}=={version}"], f"Installing torch {version}")
        return
    patience = ["--timeout", "10", "--retries", "1"] if index is None else []
    command = [*pip, "install", *quiet, *patience, "--index-url", index or CPU_INDEX, f"{TORCH}=={version}"]
    answer = subprocess.run(command, cwd=ROOT, stderr=subprocess.DEVNULL if index is None else None)
    if answer.returncode == 0:
        return
    if index is not None:
        raise SetupError(f"{index} has no torch {version}, or cannot be reached.")
    print(f"No CPU build of torch {version} can be had here; taking the general build (some GB more).", flush=True)
    run([*pip, "install", "--no-input", f"{TORCH}=={version}"], f"Installing torch {version}")


def uv_environment(python: str) -> dict[str, str]:
    """The environment for uv: an index that pip is configured to use is told to uv too."""
    env = {**os.environ, "VIRTUAL_ENV": str(Path(python).parent.parent)}
    env.setdefault("UV_HTTP_TIMEOUT", "120")
    listed = subprocess.run([python, "-m", "pip", "config", "list"], capture_output=True, text=True).stdout
    for key, variable in (("index-url", "UV_DEFAULT_INDEX"), ("cert", "SSL_CERT_FILE")):
        values = re.findall(rf"^[^\s=]*\.{key}='(.*)'$", listed, re.MULTILINE)
        if values:
            env.setdefault(variable, values[0])
    return env


def install_lock(python: str, lock: Path, env: dict[str, str], leave_out: set[str]) -> None:
    """Install what the lock names, without resolving; by pip where uv cannot."""
    kept = [line for line in lock.read_text(encoding="utf-8").splitlines() if _name(line) not in leave_out]
    with tempfile.NamedTemporaryFile("w", suffix=".txt", encoding="utf-8") as handle:
        handle.write("\n".join(kept) + "\n")
        handle.flush()
        arguments = ["--no-deps", "-r", handle.name]
        # Compiled here, as pip does, so that no step's process compiles vLLM's and transformers' modules once more: a
        # machine may forbid Python to write what it compiled (PYTHONDONTWRITEBYTECODE).
        command = [python, "-m", "uv", "pip", "install", "--compile-bytecode", *arguments]
        if subprocess.run(command, cwd=ROOT, env=env).returncode != 0:
            print("uv could not install the lock; trying pip, which is slower.", flush=True)
            run([python, "-m", "pip", "install", "--no-input", *arguments], f"Installing {lock}")


def _name(line: str) -> str:
    match = _PIN.match(line)
    return match[1].lower() if match else ""


def set_up(build: str, venv: Path, python: str | None, torch_index: str | None) -> None:
    """Make or complete the environment.

    Raises:
        SetupError: where something is missing or an installation fails.
    """
    lock = ROOT / "requirements" / f"{build}.lock"
    versions = pins(lock)
    check_machine(venv, build)
    make_venv(venv, python, build)
    interpreter = str(venv / "bin" / "python")
    pip = [interpreter, "-m", "pip"]
    say(1, "uv and torch")
    if installed(interpreter, "uv").get("uv") != versions["uv"]:
        run([*pip, "install", "-qq", "--no-input", "--no-deps", f"uv=={versions['uv']}"], "Installing uv")
    if build == "cpu":
        install_torch(interpreter, versions[TORCH], torch_index)
    env = uv_environment(interpreter)
    say(2, f"{len(versions)} packages of {lock.relative_to(ROOT)}")
    install_lock(interpreter, lock, env, {LAST} | ({TORCH} if build == "cpu" else set()))
    say(3, "DeepSpeed")
    if installed(interpreter, LAST).get(LAST) != versions[LAST]:
        # Its operators are compiled when they are first used; the build itself only asks torch what it is.
        build_env = {**env, "DS_BUILD_OPS": "0", **({"DS_ACCELERATOR": "cpu"} if build == "cpu" else {})}
        arguments = ["install", "--no-deps", "--no-build-isolation", f"{LAST}=={versions[LAST]}"]
        run([*pip, "-qq", *arguments], "Installing DeepSpeed", build_env)
    say(4, "avrt")
    run([*pip, "-qq", "install", "--no-deps", "--no-build-isolation", "-e", "."], "Installing avrt")
    run([interpreter, "-c", "import torch, avrt_lib"], "Importing what was installed")
    write_mark(venv, build=build, fingerprint=fingerprint(build))


def say(number: int, what: str) -> None:
    """Announce a part."""
    print(f"[{number}/4] {what}", flush=True)


def size_gb(folder: Path) -> float:
    """Bytes below a folder, in 10**9."""
    return sum(p.lstat().st_size for p in folder.rglob("*") if not p.is_symlink()) / 1e9


def main() -> int:
    """Set up what is missing; return 7 where the machine lacks something."""
    parser = argparse.ArgumentParser(description="Make .venv from the committed lock.")
    parser.add_argument("--build", choices=BUILDS, help="default: the one that is there, else by the machine")
    parser.add_argument("--python", help="the Python to use (3.11, 3.12 or 3.13)")
    parser.add_argument("--torch-index", help="take torch's CPU build from this index only")
    parser.add_argument("--venv", type=Path, default=ROOT / ".venv", help="default: .venv")
    arguments = parser.parse_args()
    venv = arguments.venv.absolute()
    mark = read_mark(venv)
    build = arguments.build or mark.get("build") or detect_build()
    if mark.get("fingerprint") == fingerprint(build) and (venv / "bin" / "python").exists():
        return 0
    started = time.monotonic()
    print(f"Setting up {venv} ({build} build). Once; several minutes.", flush=True)
    try:
        set_up(build, venv, arguments.python, arguments.torch_index)
    except SetupError as error:
        print(f"Set-up stopped: {error}", file=sys.stderr)
        return 7
    except KeyboardInterrupt:
        print("\nInterrupted; make setup goes on where it stopped.", file=sys.stderr)
        return 130
    print(f"Ready after {time.monotonic() - started:.0f} s: {venv}, {size_gb(venv):.1f} GB.", flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
