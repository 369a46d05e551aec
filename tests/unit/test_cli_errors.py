"""What a user sees when something is wrong: one line, no traceback, an exit code."""

from __future__ import annotations

import errno
import json
import socket
import stat
from pathlib import Path

import pytest

from avrt_lib.cli import main as cli
from avrt_lib.cli.console import fail
from avrt_lib.cli.serve import api_key_file
from avrt_lib.errors import StoreError, of_code
from avrt_lib.runs import create

ROOT = Path(__file__).parents[2]


def _avrt(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as ended:
        cli.main(list(arguments))
    code = ended.value.code
    seen = capsys.readouterr()
    return (code if isinstance(code, int) else 0 if code is None else 1), seen.out, seen.err


@pytest.fixture(autouse=True)
def _without_debug(monkeypatch: pytest.MonkeyPatch) -> None:
    # set, then deleted, so that what --debug leaves behind is undone too
    monkeypatch.setenv("AVRT_DEBUG", "")


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["run", "--config", "nope.yaml"], 3, "There is no configuration file nope.yaml"),
        (["run", "--set", "grpo.lr=3"], 3, "grpo.lr"),
        (["run", "--set", "grpo.max_steps"], 3, "section.key=value"),
        (["run", "--dataset", "avqa"], 2, "takes FORMAT:PATH"),
        (["run", "--dataset", "daily-omni:/nonexistent/data"], 4, "/nonexistent/data"),
        (["run", "--dataset", "nope:/data"], 3, "no data format 'nope'"),
        (["run", "--resume", "nope"], 2, "There is no run 'nope'"),
        (["run", "--runs-dir", "/tmp/python3/runs"], 2, "'python3'"),
        (["compile", "--output", "p.json"], 2, "must end in .yaml"),
        (["compile", "--pipeline", "nope"], 2, "invalid choice: 'nope'"),
        (["step", "nope"], 2, "There is no step 'nope'"),
        (["step", "merger", "--input", "samples=/nonexistent"], 2, "no such folder"),
        (["step", "ingest"], 2, "--output samples=…"),
        (["step", "ingest", "--param", "shard=1"], 2, "takes data_hash=…"),
        (["step", "vision_teacher", "--param", "shard=one"], 2, "--param shard takes a whole number, not 'one'"),
        (["step", "ingest", "--output", "samples=a", "--output", "samples=b"], 2, "--output samples is given twice"),
        (["step", "ingest", "--param", "data_hash=a", "--param", "data_hash=b"], 2, "--param data_hash is given twice"),
        (["step", "sft", "--input", "samples=/etc", "--input", "samples=/etc"], 2, "--input samples is given twice"),
        (["serve", "--host", "192.0.2.1"], 7, "cannot be listened on (Cannot assign requested address)"),
        (["ask", "Q?", "--video", "/nonexistent.mp4"], 2, "There is no file /nonexistent.mp4"),
        (["ask", "Q?", "--option", "a"], 2, "two to 8 options"),
        (["report"], 2, "There is no run 'latest'"),
        (["serve"], 2, "There is no run 'latest'"),
        (["fidelity", "--config", "nope"], 3, "There is no configuration file"),
    ],
)
def test_errors_are_one_line_with_an_exit_code(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    arguments: list[str],
    code: int,
    said: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    if arguments[0] == "serve":
        arguments = [*arguments, "--port", str(_free_port())]
    found, _, err = _avrt(capsys, *arguments)
    assert said in err
    assert found == code
    assert err.startswith("avrt: error: ")
    assert len(err.strip().splitlines()) == 1
    assert not (tmp_path / "runs").exists()


def test_debug_shows_the_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = _avrt(capsys, "run", "--config", "nope.yaml", "--debug")
    assert code == 3
    assert "Traceback" in err


def test_a_port_in_use_is_said_at_once(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        code, _, err = _avrt(capsys, "serve", "--runs-dir", str(tmp_path), "--port", port)
    assert code == 7
    assert f"Port {port}" in err


def test_a_run_without_champion_is_not_served(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    from avrt_lib.config import load

    folder = create(tmp_path, load(ROOT / "configs" / "miniature.yaml"))
    text = json.dumps({"champion": None, "promotion": {"reason": "p is 0.3."}})
    folder.summary_file.write_text(text, encoding="utf-8")
    code, _, err = _avrt(capsys, "serve", "--runs-dir", str(tmp_path), "--port", str(_free_port()))
    assert code == 2
    assert "has no champion (p is 0.3)" in err


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "/runs/x"), 7, "No space left on the disk (/runs/x)"),
        (PermissionError(errno.EACCES, "Permission denied", "/runs"), 7, "avrt: error: /runs: Permission denied (--"),
        (StoreError("two\nlines"), 10, "avrt: error: two lines"),
        (ValueError("odd"), 1, "ValueError: odd (--debug shows where)"),
    ],
)
def test_fail(capsys: pytest.CaptureFixture[str], error: Exception, code: int, said: str) -> None:
    assert fail(error, debug=False) == code
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("code", "exit_code"),
    [("nothing_kept", 5), ("validation_failed", 6), ("disk_full", 7), ("interrupted", 75), ("unheard_of", 1)],
)
def test_failure_codes_have_exit_codes(code: str, exit_code: int) -> None:
    assert of_code(code).exit_code == exit_code


@pytest.mark.parametrize("command", ["run", "compile", "serve", "ask", "report", "doctor", "step", "fidelity"])
def test_every_command_has_help_with_an_example(capsys: pytest.CaptureFixture[str], command: str) -> None:
    code, out, _ = _avrt(capsys, command, "--help")
    assert code == 0
    assert f"avrt {command}" in out.replace(f"Usage: avrt {command}", "")


def test_the_api_key_is_private_and_stays(tmp_path: Path) -> None:
    path = api_key_file(tmp_path / "runs")
    key = path.read_text(encoding="utf-8")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert len(key.strip()) >= 24
    assert api_key_file(tmp_path / "runs").read_text(encoding="utf-8") == key


def test_fidelity_shows_the_paper_beside_the_configuration(capsys: pytest.CaptureFixture[str]) -> None:
    config = str(ROOT / "configs" / "miniature.yaml")
    code, out, _ = _avrt(capsys, "fidelity", "--markdown", "--config", config, "--set", "grpo.reward.bonus_to_words=28")
    assert code == 0
    assert "| `grpo.group_size` | 4 |  |  | **8** |" in out
    assert "| `grpo.reward.bonus_to_words` |  | 200 |  | **28** |" in out
    assert "| `grpo.clip_epsilon` | 0.2 |  |  | 0.2 |" in out


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
