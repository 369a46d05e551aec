"""Our launcher against vLLM's own `vllm serve` under load, on the same checkpoint and machine, in one run.

python benchmarks/serving.py --requests 32 --rounds 6 --concurrency 1 4

Both servers are up; rounds alternate between them (A B, B A, …), and only one is under load at a time. A request is a
held-out rendered clip (frames and sound) with its question, as `avrt ask` sends it, greedy and streamed. Each round has
clips of its own, so that neither server's caches know them; both servers get the same. The first round is a warm-up.

`avrt` is what `avrt serve` starts: key, gate, media limits, and on a CPU neither compilation nor chunked prefill.
`bare` is vLLM's entrypoint with its defaults (no key, every route, torch.compile, chunked prefill) except for what
decides what the model computes: data type, context length, KV cache, size and number of frames. `--bare` gives it more
options: `--bare=--enforce-eager` tells what compilation is worth.

The load comes from `vllm bench serve`, called in this process. None of its data sets joins video and sound, but its
`custom` one hands on a prompt that is a list of chat messages as it is, as long as no tokenizer is loaded
(`--skip-tokenizer-init`). The answer's length is then given by `--extra-body`, and the servers count the tokens.

For CPUs: on a GPU each of the two servers would claim nine tenths of its memory, so there it says so and ends with
code 77, after which `make bench` goes on.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import operator
import os
import secrets
import shlex
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import httpx
import numpy

from avrt_lib import compat
from avrt_lib.child_servers import LOOPBACK, ChildServer, free_ports
from avrt_lib.config import Config, SourceConfig, StudentConfig
from avrt_lib.errors import AvrtError, ServingError, UsageError

# At module level: this file is also the entry point of the bare server, whose engine process imports it anew.
compat.apply()

SERVERS = ("avrt", "bare")
UNITS = {
    "requests": "requests/s",
    "output_tokens": "tokens/s",
    "latency_p50": "s",
    "latency_p95": "s",
    "first_token_p50": "s",
}
#: The seed of the miniature's test questions: no model of the package was trained on its clips.
HELD_OUT_SEED = 1300
#: The exit code of a benchmark that this machine cannot run.
NOT_HERE = 77
START_S = 900.0
STOP_S = 45.0

#: Logs of the servers and of the load, replaced each time.
LOGS = Path(__file__).resolve().parents[1] / "build" / "bench-serving"

Figures = dict[str, float]
Result = Mapping[str, Any]
Line = dict[str, Any]


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a model folder [the newest run's champion]")
    parser.add_argument("--requests", type=int, default=32, help="requests of a round")
    parser.add_argument("--rounds", type=int, default=6, help="rounds of each server that count")
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--bare", type=shlex.split, default=[], help="more options for the bare server")
    options = parser.parse_args()
    if min(options.requests, options.rounds, *options.concurrency) < 1:
        parser.error("--requests, --rounds and --concurrency are 1 or more")
    for number in (signal.SIGTERM, signal.SIGHUP):  # as Ctrl-C: leave every block
        signal.signal(number, lambda number, _: sys.exit(128 + number))
    if not on_cpu():
        print("serving: not measured, as it is for CPUs and this machine's vLLM takes a GPU.", file=sys.stderr)
        sys.exit(NOT_HERE)
    try:
        model, config = checkpoint(options.model)
        rounds = measure(model, config, options)
        lines = [line for level, results in rounds.items() for line in compare(level, *results)]
    except AvrtError as problem:
        sys.exit(str(problem))
    except KeyboardInterrupt:
        sys.exit(130)
    for line in lines:
        print(json.dumps(line), flush=True)
    show(lines, f"{model}, {options.rounds} rounds of {options.requests} requests")
    if any(line["value"] for line in lines if line["name"].endswith(".errors")):
        sys.exit(f"Some requests failed: see {LOGS}.")


def on_cpu() -> bool:
    """Whether vLLM computes on the CPU here."""
    from vllm.platforms import current_platform

    return bool(current_platform.is_cpu())


def measure(model: Path, config: Config, options: argparse.Namespace) -> dict[int, tuple[list[Result], list[Result]]]:
    """Start both servers and load them in turn.

    Returns:
        For each concurrency the rounds of ours and of the bare server, in the same order.

    Raises:
        ServingError: where a server does not start, answers no request of a round, or makes other prompts of them.
    """
    rounds: dict[int, tuple[list[Result], list[Result]]] = {level: ([], []) for level in options.concurrency}
    LOGS.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="avrt-bench-")))
        log = stack.enter_context(open(LOGS / "load.log", "w"))
        print(f"Rendering clips, then starting both servers with {model} …", file=sys.stderr)
        files = write_requests(config, (options.rounds + 1) * len(rounds), options.requests, folder)
        urls = start(stack, model, config, options.bare)
        for number in range(options.rounds + 1):
            for level, results in rounds.items():
                requests, measured = next(files), {}
                for server in order(number):
                    with contextlib.redirect_stdout(log):  # vLLM's generator prints a report of its own
                        measured[server] = load(urls[server], config, requests, level)
                require_same_work(measured[0], measured[1])
                if number:
                    results[0].append(measured[0])
                    results[1].append(measured[1])
            print(f"Round {number} of {options.rounds} has ended.", file=sys.stderr)
    return rounds


def checkpoint(model: Path | None) -> tuple[Path, Config]:
    """The model folder and its configuration: as `avrt serve` finds them, or where there is no run the base student."""
    from avrt_lib import models
    from avrt_lib.cli.serve import champion_folder, nearest_config
    from avrt_lib.runs import LATEST, find

    runs = Path("runs").absolute()
    if model is not None:
        return model.absolute(), nearest_config(runs, LATEST)
    try:
        run = find(runs, LATEST)
        return champion_folder(run), run.config()
    except UsageError as problem:
        print(f"{problem} Taking the untrained student.", file=sys.stderr)
        config = nearest_config(runs, LATEST)
        return models.resolve("builtin:student"), config


def write_requests(config: Config, count: int, size: int, folder: Path) -> Iterator[Path]:
    """Render clips, and write `count` files of `size` requests for `vllm bench serve`; no clip is in two of them."""
    from avrt_lib.engine.messages import student_messages
    from avrt_lib.serving.deployment import probe_questions
    from avrt_lib.steps import run_step

    sources = {
        "all": None,
        "train": SourceConfig(format="miniature", count=3, seed=0),
        "validation": SourceConfig(format="miniature", count=3, seed=1),
        "test": SourceConfig(format="miniature", count=count * size, seed=HELD_OUT_SEED),
    }
    rendered = config.model_copy(update={"data": config.data.model_copy(update=sources)})
    samples = folder / "samples"
    run_step("ingest", config=rendered, inputs={}, outputs={"samples": samples}, params={"data_hash": ""})
    asked = probe_questions(samples, count * size)
    files = []
    for number in range(count):
        files.append(folder / f"requests-{number}.jsonl")
        rows = asked[number * size : (number + 1) * size]
        files[-1].write_text(
            "".join(json.dumps({"prompt": student_messages(config.student.prompt, row)}) + "\n" for row in rows)
        )
    return iter(files)


def start(stack: contextlib.ExitStack, model: Path, config: Config, more: Sequence[str]) -> tuple[str, str]:
    """Start both servers, which end with the stack; their addresses."""
    from avrt_lib.serving.server import ServedModel

    key, name, frames = secrets.token_urlsafe(24), config.promotion.model_name, config.data.frames
    log = LOGS / "avrt.log"
    ours = ServedModel(
        model, name, student=config.student, frames=frames, log=log, api_key=key, start_timeout_s=START_S
    )
    stack.enter_context(ours)
    (port,) = free_ports(1)
    command = [sys.executable, __file__, "vllm", "serve", *bare_arguments(model, name, port, config.student, frames)]
    bare = ChildServer([*command, *more], bare_environment(config.student), LOGS / "bare.log")
    stack.callback(bare.stop, STOP_S)
    url = f"http://{LOOPBACK}:{port}"
    wait(bare, f"{url}/health")
    os.environ.update(OPENAI_API_KEY=key, no_proxy=LOOPBACK)
    return ours.base_url.removesuffix("/v1"), url


def bare_arguments(model: Path, name: str, port: int, student: StudentConfig, frames: int) -> list[str]:
    """What `vllm serve` must be told to compute the same; the rest is its default."""
    from avrt_lib.engine import student_media

    values = {
        "--served-model-name": name,
        "--host": LOOPBACK,
        "--port": port,
        "--dtype": student.dtype,
        "--max-model-len": student.max_model_len,
        "--mm-processor-kwargs": json.dumps(student_media.processor_kwargs(student)),
        "--media-io-kwargs": json.dumps(student_media.media_io_kwargs(frames)),
    }
    trusted = ["--trust-remote-code"] if student.trust_remote_code else []
    return [str(model), *(f"{option}={value}" for option, value in values.items()), *trusted]


def bare_environment(student: StudentConfig) -> dict[str, str]:
    """Offline, the same KV cache and threads as ours; vLLM may compile, as it does by default."""
    ours = compat.vllm_environment(kv_cache_gib=student.kv_cache_gib, in_process=False)
    ours.pop("TORCHDYNAMO_DISABLE", None)
    environment = {**ours, **os.environ}
    environment.pop("VLLM_API_KEY", None)
    return environment


def wait(server: ChildServer, url: str) -> None:
    """Until the server answers.

    Raises:
        ServingError: where it ends, or takes too long.
    """
    deadline = time.monotonic() + START_S
    with httpx.Client(trust_env=False) as client:
        while True:
            with contextlib.suppress(httpx.HTTPError):
                if client.get(url).is_success:
                    return
            if server.returncode is not None or time.monotonic() > deadline:
                raise ServingError(f"`vllm serve` does not answer: {server.tail()} (see {server.log}).")
            time.sleep(0.5)


def order(number: int) -> tuple[int, int]:
    """Who is first changes with each round, so that a machine that gets slower or faster favours nobody."""
    return (0, 1) if number % 2 == 0 else (1, 0)


def load(url: str, config: Config, requests: Path, concurrency: int) -> dict[str, Any]:
    """One round of `vllm bench serve`; what it measured, with lists of one value per request."""
    from vllm.benchmarks.serve import add_cli_args
    from vllm.benchmarks.serve import main as bench_serve
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    values = {
        "--backend": "openai-chat",
        "--base-url": url,
        "--endpoint": "/v1/chat/completions",
        "--model": config.promotion.model_name,
        "--dataset-name": "custom",
        "--dataset-path": requests,
        "--num-prompts": len(requests.read_text().splitlines()),
        "--max-concurrency": concurrency,
        "--extra-body": json.dumps({"temperature": 0, "max_completion_tokens": config.evaluation.max_tokens}),
    }
    flags = ["--skip-tokenizer-init", "--disable-shuffle", "--no-oversample", "--disable-tqdm", "--save-detailed"]
    parser = FlexibleArgumentParser()
    add_cli_args(parser)
    result: dict[str, Any] = bench_serve(parser.parse_args([f"{k}={v}" for k, v in values.items()] + flags))
    return result


def require_same_work(ours: Result, theirs: Result) -> None:
    """Check that two rounds with the same requests can be compared.

    Raises:
        ServingError: where a server answered nothing, or the prompts had other lengths.
    """
    for server, result in zip(SERVERS, (ours, theirs), strict=True):
        if not result["completed"]:
            raise ServingError(f"{server} answered no request of a round: see {LOGS}.")
    if not ours["failed"] + theirs["failed"] and ours["input_lens"] != theirs["input_lens"]:
        raise ServingError("The servers made prompts of different lengths of the same requests: their options differ.")


def figures(result: Result) -> Figures:
    """One round's figures; latencies are those of the requests that were answered."""
    done = numpy.array(result["output_lens"]) > 0
    latencies, first = numpy.array(result["latencies"])[done], numpy.array(result["ttfts"])[done]
    return {
        "requests": result["request_throughput"],
        "output_tokens": result["output_throughput"],
        "latency_p50": float(numpy.percentile(latencies, 50)),
        "latency_p95": float(numpy.percentile(latencies, 95)),
        "first_token_p50": float(numpy.percentile(first, 50)),
    }


def compare(concurrency: int, avrt: Sequence[Result], bare: Sequence[Result]) -> list[Line]:
    """The median over the rounds, the lowest and the highest round; a ratio is of two rounds with the same requests."""
    prefix = f"serving.concurrency_{concurrency}"

    def line(name: str, unit: str, values: Sequence[float]) -> Line:
        spread = {"value": statistics.median(values), "low": min(values), "high": max(values)}
        return {"name": f"{prefix}.{name}", "unit": unit, **{k: round(v, 4) for k, v in spread.items()}}

    lines, both, same = [], (list(map(figures, avrt)), list(map(figures, bare))), []
    for server, rounds, results in zip(SERVERS, both, (avrt, bare), strict=True):
        lines += [line(f"{server}.{what}", unit, [r[what] for r in rounds]) for what, unit in UNITS.items()]
        failed = sum(r["failed"] for r in results)
        lines.append({"name": f"{prefix}.{server}.errors", "unit": "requests", "value": failed})
    for what in UNITS:
        ratios = [ours[what] / theirs[what] for ours, theirs in zip(*both, strict=True)]
        lines.append(line(f"ratio.{what}", "avrt/bare", ratios))
    for ours, theirs in zip(avrt, bare, strict=True):
        same += map(operator.eq, ours["generated_texts"], theirs["generated_texts"])
    share = round(100 * sum(same) / len(same), 1)
    return [*lines, {"name": f"{prefix}.ratio.same_answers", "unit": "%", "value": share}]


def show(lines: Sequence[Line], title: str) -> None:
    """The same figures for people."""
    from rich.console import Console
    from rich.table import Table

    rows: dict[tuple[str, str], dict[str, str]] = {}
    for line in lines:
        _, level, column, what = line["name"].split(".")
        spread = f" ({line['low']:.3g}–{line['high']:.3g})" if "low" in line else ""
        rows.setdefault((level, what), {"unit": line["unit"]})[column] = f"{line['value']:.3g}{spread}"
    columns = ("unit", *SERVERS, "ratio")
    table = Table("concurrency", "", *columns, title=title, box=None)
    for (level, what), cells in rows.items():
        table.add_row(level.removeprefix("concurrency_"), what, *(cells.get(column, "") for column in columns))
    console = Console(stderr=True)
    console.width = max(console.width, 120)
    console.print(table)


if __name__ == "__main__":
    if sys.argv[1:2] == ["vllm"]:
        from vllm.entrypoints.cli.main import main as vllm

        del sys.argv[0]
        vllm()
    else:
        main()
