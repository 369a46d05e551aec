"""The one launcher that starts vLLM wherever the student is served: here, in a container, behind KServe.

``python -m avrt_lib.serving.launcher --model DIR --served-model-name NAME --port 8080``

The API key comes from ``AVRT_API_KEY`` (or ``VLLM_API_KEY``), never from the command line, where every user of the
machine could read it. Options that the launcher does not know go to vLLM as they are.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from avrt_lib import compat
from avrt_lib.config import StudentConfig
from avrt_lib.engine import student_media
from avrt_lib.errors import AvrtError, ConfigError, UsageError
from avrt_lib.keys import header_key
from avrt_lib.serving.gate import EXPOSE_METRICS, max_request_mib

# At module level: vLLM's engine process is spawned and imports this module anew, before it imports vLLM.
compat.apply()

API_KEYS = ("AVRT_API_KEY", "VLLM_API_KEY")
#: No host has this name, so no media is fetched: requests carry their media as data URLs.
NO_MEDIA_HOST = "media-as-data-urls-only.invalid"
#: vLLM's options that the launcher decides, or that would open what it closes.
RESERVED = (
    "--api-key",
    "--middleware",
    "--allowed-local-media-path",
    "--allowed-media-domains",
    "--trust-request-mm-kwargs",
    "--trust-request-chat-template",
    "--uds",
    "--config",  # a file with any of these
)


def parser() -> argparse.ArgumentParser:
    """The launcher's own options."""
    result = argparse.ArgumentParser(prog="avrt-launcher", description=__doc__, allow_abbrev=False)
    result.add_argument("--model", required=True, type=Path, help="a model folder")
    result.add_argument("--served-model-name", required=True)
    result.add_argument("--host", default="127.0.0.1")
    result.add_argument("--port", type=int, default=8080)
    result.add_argument("--dtype", default="auto")
    result.add_argument("--max-model-len", type=int, default=8192)
    result.add_argument("--kv-cache-gib", type=float, default=1.0, help="CPU only: memory for the KV cache")
    result.add_argument("--frames", type=int, default=8, help="frames of one video")
    result.add_argument("--video-longest-side-px", type=int, default=448, help="as in training: student.…")
    result.add_argument("--images", type=int, default=8, help="images that one request may carry")
    result.add_argument("--shutdown-timeout", type=int, default=30, help="seconds that requests in flight may take")
    result.add_argument("--metrics", action="store_true", help="expose /metrics")
    result.add_argument("--no-api-key", action="store_true", help="serve without a key: only behind another guard")
    return result


def vllm_arguments(options: argparse.Namespace, no_media: str, *, on_cpu: bool) -> list[str]:
    """vLLM's arguments for the launcher's options.

    Args:
        options: what ``parser`` read.
        no_media: an empty folder, the only one that ``file://`` media may come from. Without such a folder vLLM takes
            the request for a fault of its own (500) instead of the client's (400).
        on_cpu: whether vLLM runs on a CPU.
    """
    student = StudentConfig.model_validate(
        {"model": str(options.model), "video_longest_side_px": options.video_longest_side_px}
    )
    limits = {"image": options.images, "video": 1, "audio": 1}
    values = {
        "--model": options.model,
        "--served-model-name": options.served_model_name,
        "--host": options.host,
        "--port": options.port,
        "--dtype": options.dtype,
        "--max-model-len": options.max_model_len,
        "--shutdown-timeout": options.shutdown_timeout,
        "--limit-mm-per-prompt": json.dumps(limits),
        "--mm-processor-kwargs": json.dumps(student_media.processor_kwargs(student)),
        "--media-io-kwargs": json.dumps(student_media.media_io_kwargs(options.frames)),
        "--allowed-media-domains": NO_MEDIA_HOST,
        "--allowed-local-media-path": no_media,
        "--middleware": "avrt_lib.serving.gate.Gate",
    }
    arguments = [part for name, value in values.items() for part in (name, str(value))]
    arguments.append("--disable-fastapi-docs")
    if on_cpu:
        # Compiling costs minutes on a CPU, and with chunked prefill a request with a seed ends the CPU engine.
        arguments += ["--enforce-eager", "--no-enable-chunked-prefill"]
        arguments += ["--max-num-batched-tokens", str(max(options.max_model_len, 8192))]
    return arguments


def main(arguments: Sequence[str] | None = None) -> None:
    """Serve until SIGTERM or SIGINT, then finish the requests in flight.

    Raises:
        UsageError: where an option would open what the launcher closes.
        ConfigError: where there is no API key or none that can be sent, no model, or no limit that requests can have.
    """
    options, rest = parser().parse_known_args(arguments)
    for option in rest:
        name = option.split("=")[0]
        # vLLM's parser takes an option by its first letters too.
        if name.startswith("--") and any(reserved.startswith(name.replace("_", "-")) for reserved in RESERVED):
            raise UsageError(f"{name} is decided by the launcher and cannot be given.")
    _set_environment(options)

    import uvloop
    from vllm.entrypoints.launchers.api_server.entry import run_server
    from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
    from vllm.entrypoints.serve.utils.api_utils import cli_env_setup
    from vllm.logger import configure_logging_from_args
    from vllm.platforms import current_platform
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    cli_env_setup()
    vllm_parser = make_arg_parser(FlexibleArgumentParser(prog="avrt-launcher"))
    with tempfile.TemporaryDirectory(prefix="avrt-no-media-") as no_media:
        given = vllm_arguments(options, no_media, on_cpu=bool(current_platform.is_cpu()))
        parsed = vllm_parser.parse_args([*given, *rest])
        configure_logging_from_args(parsed)
        validate_parsed_serve_args(parsed)
        uvloop.run(run_server(parsed))


def _set_environment(options: argparse.Namespace) -> None:
    if not (options.model / "config.json").exists():
        raise ConfigError(f"{options.model} is not a model folder (it has no config.json).")
    keys = (header_key(os.environ.get(name, ""), name) for name in API_KEYS)
    key = next(filter(None, keys), "")
    if options.no_api_key:
        os.environ.pop("VLLM_API_KEY", None)
    elif not key:
        raise ConfigError("AVRT_API_KEY is not set: set the key that clients will send, or give --no-api-key.")
    else:
        os.environ["VLLM_API_KEY"] = key
    max_request_mib()  # vLLM would show a wrong one as a traceback, after it has loaded the model
    os.environ[EXPOSE_METRICS] = "1" if options.metrics else "0"
    compat.set_defaults(compat.vllm_environment(kv_cache_gib=options.kv_cache_gib, in_process=False))


if __name__ == "__main__":
    try:
        main()
    except AvrtError as problem:
        print(problem, file=sys.stderr)
        sys.exit(problem.exit_code)
