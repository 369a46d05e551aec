"""The load test of the served model: what it makes of measured rounds, and what the bare server is told."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from avrt_lib.config import StudentConfig
from avrt_lib.errors import ServingError
from avrt_lib.serving import launcher
from benchmarks import serving

ROOT = Path(__file__).parents[2]


def result(speed: float, latencies: list[float], **more: Any) -> dict[str, Any]:
    """A round as vLLM's generator reports it; a latency of 0 is a request that failed."""
    lengths = [10 if latency else 0 for latency in latencies]
    return {
        "request_throughput": speed,
        "output_throughput": 10 * speed,
        "latencies": latencies,
        "ttfts": [latency / 2 for latency in latencies],
        "output_lens": lengths,
        "input_lens": [50 if length else 1 for length in lengths],
        "generated_texts": ["A" if length else "" for length in lengths],
        "completed": len(lengths) - lengths.count(0),
        "failed": lengths.count(0),
        **more,
    }


def compared(avrt: list[dict[str, Any]], bare: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return {line["name"].removeprefix("serving.concurrency_4."): line for line in serving.compare(4, avrt, bare)}


def test_the_median_round_counts_and_the_spread_is_told() -> None:
    rounds = [result(speed, [1.0]) for speed in (2.0, 9.0, 3.0)]
    line = compared(rounds, rounds)["avrt.requests"]
    assert line == {"name": "serving.concurrency_4.avrt.requests", "unit": "requests/s"} | {
        "value": 3.0,
        "low": 2.0,
        "high": 9.0,
    }


def test_ratios_are_of_rounds_with_the_same_requests() -> None:
    avrt = [result(1.0, [1.0]), result(10.0, [1.0]), result(100.0, [1.0])]
    bare = [result(2.0, [1.0]), result(20.0, [1.0]), result(200.0, [1.0])]
    line = compared(avrt, bare)["ratio.requests"]
    assert (line["low"], line["value"], line["high"]) == (0.5, 0.5, 0.5)


def test_failed_requests_are_counted_and_have_no_latency() -> None:
    failing, whole = result(1.0, [0.0, 3.0, 0.0]), result(1.0, [1.0, 3.0, 5.0])
    lines = compared([failing], [whole])
    assert (lines["avrt.errors"]["value"], lines["bare.errors"]["value"]) == (2, 0)
    assert lines["avrt.latency_p50"]["value"] == 3.0
    assert lines["avrt.first_token_p50"]["value"] == 1.5


def test_servers_that_were_asked_differently_are_not_compared() -> None:
    with pytest.raises(ServingError, match="different lengths"):
        serving.require_same_work(result(1.0, [1.0]), result(1.0, [1.0], input_lens=[512]))
    serving.require_same_work(result(1.0, [1.0]), result(1.0, [0.0, 1.0]))


def test_a_server_that_answers_nothing_is_named() -> None:
    with pytest.raises(ServingError, match="bare answered no request"):
        serving.require_same_work(result(1.0, [1.0]), result(0.0, [0.0]))


def test_answers_that_differ_are_told() -> None:
    avrt, bare = result(1.0, [1.0, 1.0]), result(1.0, [1.0, 1.0], generated_texts=["A", "B"])
    assert compared([avrt], [bare])["ratio.same_answers"]["value"] == 50.0


def test_neither_server_is_always_first() -> None:
    assert [*serving.order(0), *serving.order(1), *serving.order(2)] == [0, 1, 1, 0, 0, 1]


def test_the_bare_server_computes_what_ours_computes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    student = StudentConfig(model="m", dtype="float32", max_model_len=512, video_longest_side_px=28)
    bare = dict(part.split("=", 1) for part in serving.bare_arguments(tmp_path, "m", 1, student, 4)[1:])
    given = ["--model=m", "--served-model-name=m", "--port=1", "--dtype=float32", "--max-model-len=512"]
    options = launcher.parser().parse_args([*given, "--frames=4", "--video-longest-side-px=28"])
    ours = launcher.vllm_arguments(options, "/empty", on_cpu=True)
    assert bare == {name: ours[ours.index(name) + 1] for name in bare}
    assert json.loads(bare["--media-io-kwargs"]) == {"video": {"num_frames": 4}}

    monkeypatch.setenv("VLLM_API_KEY", "k")
    monkeypatch.delenv("TORCHDYNAMO_DISABLE", raising=False)
    environment = serving.bare_environment(student)
    assert not {"VLLM_API_KEY", "TORCHDYNAMO_DISABLE"} & set(environment)
    assert environment["VLLM_CPU_KVCACHE_SPACE"] == "1"


def test_it_ends_with_one_line_where_vllm_takes_a_gpu(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    platforms = pytest.importorskip("vllm.platforms")
    monkeypatch.setattr(platforms.current_platform, "is_cpu", lambda: False)
    monkeypatch.setattr("sys.argv", ["serving.py"])
    with pytest.raises(SystemExit) as ended:
        serving.main()
    assert ended.value.code == serving.NOT_HERE
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize(("code", "ended"), [(serving.NOT_HERE, 0), (1, 2)])
def test_make_bench_goes_on_after_a_benchmark_that_cannot_run_here(tmp_path: Path, code: int, ended: int) -> None:
    """Make ends with 2 where a command of its failed."""
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\necho "$1" >> {tmp_path}/started\ncase "$1" in *serving.py) exit {code};; esac\n')
    python.chmod(0o755)
    done = subprocess.run(["make", "-o", "setup", "bench", f"BIN={tmp_path}"], cwd=ROOT, capture_output=True)
    scripts = sorted(f"benchmarks/{path.name}" for path in (ROOT / "benchmarks").glob("*.py"))
    assert done.returncode == ended, done.stderr
    assert (tmp_path / "started").read_text().split() == (scripts[:1] if ended else scripts)
