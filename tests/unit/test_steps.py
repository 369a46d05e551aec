"""How every step is run: what its scratch is keyed by, and how it ends where it is told to stop or the disk is full."""

from __future__ import annotations

import ast
import errno
import importlib
import inspect
import json
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from avrt_lib.config import Config
from avrt_lib.errors import DiskFullError
from avrt_lib.steps import STEPS, _typed
from tests import fake_steps

ROOT = Path(__file__).resolve().parents[2]
#: Sections that say where results go and who is told of them, and change none.
WITHOUT_EFFECT = {"store", "tracking"}


def fields_read(function: Callable[..., Any], seen: set[Any]) -> set[str]:
    """The configuration's fields that a function reads, itself or in what it hands the whole configuration to."""
    if function in seen:
        return set()
    seen.add(function)
    tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    names = {p.name for p in inspect.signature(function).parameters.values() if p.annotation == "Config"}
    scope = dict(vars(importlib.import_module(function.__module__)))
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("avrt_lib"):
            exec(ast.unparse(node), scope)
        elif isinstance(node, ast.Assign) and ast.unparse(node.value).startswith(
            tuple(f"{n}.model_copy(" for n in names)
        ):
            names |= {ast.unparse(target) for target in node.targets}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in names:
            found |= {node.attr} & set(Config.model_fields)
        if (
            isinstance(node, ast.Call)
            and {ast.unparse(value) for value in [*node.args, *(keyword.value for keyword in node.keywords)]} & names
        ):
            called = eval(ast.unparse(node.func), scope)
            found |= fields_read(called.__init__ if inspect.isclass(called) else called, seen)
    return found


@pytest.mark.parametrize("name", [name for name, step in STEPS.items() if step.repeatable])
def test_a_finished_result_is_taken_again_only_where_all_that_was_read_is_the_same(name: str) -> None:
    if STEPS[name].image == "train":
        pytest.importorskip("torch")
    read = fields_read(importlib.import_module(STEPS[name].module).run, set())
    assert read
    assert read - WITHOUT_EFFECT <= set(STEPS[name].sections)


def test_a_step_that_is_told_to_stop_says_so_and_ends_with_75(tmp_path: Path) -> None:
    environment = fake_steps.install(tmp_path / "fakes", hang=["ingest"])
    arguments = ["step", "ingest", "--output", f"samples={tmp_path / 'samples'}", "--work", str(tmp_path / "work")]
    process = subprocess.Popen(
        [sys.executable, "-m", "avrt_lib.cli.main", *arguments],
        env=environment,
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        deadline = time.monotonic() + 60
        while not (tmp_path / "work/hanging").exists():
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.02)
        process.send_signal(signal.SIGTERM)
        _, printed = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 75, printed
    report = json.loads((tmp_path / "work/reports/ingest.json").read_text())
    assert (report["status"], report["failure"]["code"]) == ("failed", "interrupted")
    assert printed.splitlines()[-1].startswith("avrt: error: ingest was told to stop (SIGTERM)")


def torch_writes() -> None:
    pytest.importorskip("torch").save([1], "/dev/full")


def torch_writes_much() -> None:
    torch = pytest.importorskip("torch")
    torch.save(torch.zeros(100_000), "/dev/full")


def python_writes() -> None:
    Path("/dev/full").write_text("x")


def over_quota() -> None:
    raise OSError(errno.EDQUOT, "text of another language")


def safetensors_says() -> None:
    from safetensors import SafetensorError

    raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")


def wrapped() -> None:
    try:
        python_writes()
    except OSError as error:
        raise RuntimeError("the writer thread ended") from error


@pytest.mark.parametrize(
    "write", [torch_writes, torch_writes_much, python_writes, over_quota, safetensors_says, wrapped]
)
def test_a_full_disk_is_known_by_whatever_a_library_makes_of_it(write: Callable[[], None], tmp_path: Path) -> None:
    with pytest.raises(Exception) as raised:  # noqa: PT011 (each library has its own)
        write()
    typed = _typed(raised.value, "sft", tmp_path)
    assert isinstance(typed, DiskFullError)
    assert str(tmp_path) in str(typed)
    assert typed.__cause__ is raised.value


def test_another_error_is_not_taken_for_a_full_disk(tmp_path: Path) -> None:
    for error in (OSError(errno.EIO, "Input/output error"), RuntimeError("unexpected position"), KeyError("x")):
        assert _typed(error, "sft", tmp_path) is error
