"""``avrt serve`` and ``avrt ask``."""

from __future__ import annotations

import contextlib
import os
import secrets
import threading
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

from rich.panel import Panel
from rich.text import Text

from avrt_lib.cli.console import err, out, program
from avrt_lib.cli.options import DEFAULT_CONFIG, find_config, resolve
from avrt_lib.config import Config
from avrt_lib.errors import ServingError, UsageError
from avrt_lib.run_signals import Interrupted, signals_raise
from avrt_lib.runs import RunFolder, find
from avrt_lib.tables import read_json

KEY_FILE = "api-key"
CHECK_EVERY_S = 1.0


def serve_model(runs_dir: Path, *, run: str, model: Path | None, host: str, port: int) -> int:
    """Serve until a signal comes.

    Args:
        runs_dir: where runs are kept, and the API key.
        run: the run whose champion is served.
        model: a model folder to serve instead.
        host: where to listen.
        port: where to listen.

    Returns:
        0: being told to stop is how serving ends.

    Raises:
        UsageError: where the run has no champion, or the folder no model.
        PortInUseError: where the port is taken.
        ServingError: where the server does not come up, or ends by itself.
    """
    from avrt_lib.child_servers import require_free
    from avrt_lib.serving.server import ServedModel

    if model is not None and not (model / "config.json").is_file():
        raise UsageError(f"{model} is not a model folder (it has no config.json): name another with --model.")
    require_free(port, host)
    runs_dir = runs_dir.expanduser().absolute()
    with contextlib.suppress(Interrupted), signals_raise():
        if model is None:
            folder = find(runs_dir, run)
            config, place = folder.config(), champion_folder(folder)
        else:
            config, place = nearest_config(runs_dir, run), model
        key, kept = _api_key(runs_dir)
        served = ServedModel(
            place,
            config.promotion.model_name,
            student=config.student,
            frames=config.data.frames,
            log=runs_dir / "serve.log",
            host=host,
            port=port,
            api_key=key,
            start_timeout_s=config.deployment.start_timeout_s,
        )
        starting = f"Starting vLLM with {place} …"
        if not err.is_terminal:  # where a status shows nothing
            err.print(starting, soft_wrap=True, markup=False)
        with err.status(Text(starting)), contextlib.ExitStack() as started:
            started.enter_context(served)
            running = started.pop_all()
        with running:
            out.print(f"Serving {served.name} at {served.base_url}", soft_wrap=True)
            out.print(f"API key: in {kept}; log: {served.log}", soft_wrap=True, markup=False)
            out.print(
                f'Ask it: {program()} ask --video clip.mp4 "…?" --option "…" --option "…"; stop with Ctrl-C.',
                soft_wrap=True,
            )
            while served.running:
                threading.Event().wait(CHECK_EVERY_S)
            raise ServingError(f"The server has ended by itself: see {served.log}.")
    err.print("Stopped.")
    return 0


def champion_folder(folder: RunFolder) -> Path:
    """The champion of a run as a local folder, fetched from where it was published.

    Raises:
        UsageError: where the run has no champion; the message says why.
        StoreError: where it cannot be fetched.
    """
    from avrt_lib.store import download_model

    summary = read_json(folder.summary_file) if folder.summary_file.exists() else {}
    champion = summary.get("champion")
    if not champion:
        failure = summary.get("failure") or {}
        reason = (summary.get("promotion") or {}).get("reason") or failure.get("message") or "it has not ended yet"
        raise UsageError(
            f"The run {folder.path.name} has no champion ({reason.rstrip('.')}): name another with --run, or a model "
            "folder with --model."
        )
    target = folder.path / "champion" / str(champion["sha256"])
    # Without the store where the model is here: it may be in use by a run that goes on.
    with contextlib.nullcontext() if target.exists() else _store(folder, champion["uri"]):
        download_model(champion["uri"], target)
    return target


@contextlib.contextmanager
def _store(folder: RunFolder, uri: str) -> Iterator[None]:
    """The run's own object store for as long as the model is fetched, unless the environment names another one."""
    if urlsplit(uri).scheme != "s3" or "AVRT_S3_ENDPOINT" in os.environ:
        yield
        return
    from avrt_lib.store import LocalObjectServer

    with folder.locked(), LocalObjectServer(folder.store, bucket=folder.config().store.bucket) as server:
        before = {name: os.environ.get(name) for name in server.environment}
        os.environ.update(server.environment)
        try:
            yield
        finally:
            for name, value in before.items():
                os.environ.pop(name) if value is None else os.environ.update({name: value})


def _api_key(runs_dir: Path) -> tuple[str, str]:
    """The key of a server started here, and where it is kept: AVRT_API_KEY, or else the file in the runs folder.

    Raises:
        UsageError: where the file is empty; the server would take a key that nobody knows.
    """
    if key := os.environ.get("AVRT_API_KEY", "").strip():
        return key, "AVRT_API_KEY"
    file = api_key_file(runs_dir)
    if not (key := file.read_text(encoding="utf-8").strip()):
        raise UsageError(f"{file} is empty: remove it, so that a key is made, or set AVRT_API_KEY.")
    return key, str(file)


def api_key_file(runs_dir: Path) -> Path:
    """The file with the API key of servers started here: made once, readable by its owner alone."""
    runs_dir.mkdir(parents=True, exist_ok=True)
    path = runs_dir / KEY_FILE
    if not path.exists():
        # Linked into place whole, so that a reader never sees an empty key; the first of two writers wins.
        temporary = path.with_name(f".{KEY_FILE}.{os.getpid()}.tmp")
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with open(descriptor, "w", encoding="utf-8") as handle:
            handle.write(secrets.token_urlsafe(24) + "\n")
        with contextlib.suppress(FileExistsError):
            os.link(temporary, path)
        temporary.unlink()
    return path


def nearest_config(runs_dir: Path, run: str) -> Config:
    """The configuration of a run, which names prompt and media budget; the default one where there is no run."""
    try:
        return find(runs_dir, run).config()
    except UsageError:
        return resolve(find_config(DEFAULT_CONFIG), {})


def ask_model(
    runs_dir: Path,
    run: str,
    question: str,
    options: list[str],
    *,
    config_file: Path | None,
    video: Path | None,
    audio: Path | None,
    url: str,
    api_key: str | None,
    model: str | None,
    timeout_s: float | None,
) -> None:
    """Ask a served model about a clip, and print its reasoning and its answer.

    Args:
        runs_dir: where runs are kept, and the API key of servers started here.
        run: the run whose configuration names the prompt and what is kept of the media.
        question: the question without its options.
        options: two to eight.
        config_file: the model's configuration, where it comes from no run of this machine.
        video: the clip.
        audio: sound in a file of its own.
        url: the server's address.
        api_key: None takes, for a server on this machine, the key in the runs folder.
        model: its name; None asks the server.
        timeout_s: None takes ``deployment.request_timeout_s``.

    Raises:
        UsageError: too few options, no media, a file that does not exist, or an address that is none.
        MediaError: media that cannot be decoded.
        ServingError: where the server does not answer, or refuses.
    """
    from avrt_lib.serving.client import api_address, ask, is_loopback

    for file in (video, audio):
        if file is not None and not file.is_file():
            raise UsageError(f"There is no file {file}.")
    address = api_address(url)
    runs_dir = runs_dir.expanduser().absolute()
    config = resolve(find_config(config_file), {}) if config_file else nearest_config(runs_dir, run)
    key_file = runs_dir / KEY_FILE
    if api_key is None and is_loopback(address) and key_file.exists():
        api_key = key_file.read_text(encoding="utf-8").strip()
    if api_key and address.startswith("http:") and not is_loopback(address):
        err.print("The API key and the clip go there unencrypted: give an https address.", style="yellow")
    with err.status("Asking …"):
        reply = ask(
            address,
            api_key,
            model,
            config=config,
            question=question,
            options=options,
            video=video,
            audio=audio,
            timeout_s=timeout_s,
        )
    if reply.reasoning:
        out.print(Panel(Text(reply.reasoning), title="Reasoning", title_align="left"))
    if reply.letter is None:
        out.print(Text(f"No valid answer ({reply.invalid_reason}): {reply.raw}"))
    else:
        out.print(Text(f"Answer: {reply.letter}. {reply.text}", style="bold"))
    err.print(f"{reply.latency_s:.2f} s, {reply.tokens_in} tokens in, {reply.tokens_out} out", style="dim")


def key_from(variable: str) -> str:
    """An API key from an environment variable.

    Raises:
        UsageError: where it is not set.
    """
    key = os.environ.get(variable, "").strip()
    if not key:
        raise UsageError(f"The environment variable {variable} (--api-key-env) is not set: put the API key in it.")
    return key
