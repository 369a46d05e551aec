"""``avrt run``, ``avrt compile`` and ``avrt report``."""

from __future__ import annotations

import os
import shlex
import shutil
import tempfile
from pathlib import Path
from typing import Any

from avrt_lib.cli.console import err, out, program
from avrt_lib.cli.display import Watch, log_of
from avrt_lib.cli.options import DEFAULT_CONFIG, find_config, resolve, resumed
from avrt_lib.cli.results import show_summary
from avrt_lib.config import Config
from avrt_lib.errors import UsageError
from avrt_lib.runs import RunFolder, create, find, write_config
from avrt_lib.tables import read_json


def start(config_file: Path | None, changes: dict[str, Any], *, runs_dir: Path, resume: str | None) -> int:
    """Start a run, or go on with one, show it, and return the exit code.

    Args:
        config_file: the configuration, or None for the miniature's.
        changes: overrides by dotted key.
        runs_dir: where runs are kept.
        resume: the run to go on with, or None.
    """
    from avrt_lib.ingest.fingerprint import fingerprint
    from avrt_lib.local_run import execute

    runs_dir = runs_dir.expanduser().absolute()
    _check_place(runs_dir)
    if resume is None:
        config = resolve(find_config(config_file or DEFAULT_CONFIG), changes)
        data_hash = fingerprint(config.data)
        folder = create(runs_dir, config)
    else:
        folder = find(runs_dir, resume)
        config = resumed(folder, config_file, changes)
        data_hash = fingerprint(config.data)
    err.print(f"Run {folder.path} ({config.name}, seed {config.seed})", soft_wrap=True, markup=False)
    if config.data.overlap_splits:
        err.print("Every clip stands in all splits (data.overlap_splits): accuracies say nothing about unseen clips.")
    with Watch(folder, config, err) as watch:
        outcome = execute(folder, config, data_hash, watch.update)
    _show_result(folder, outcome.summary, runs_dir)
    return outcome.exit_code


def _check_place(runs_dir: Path) -> None:
    """Refuse a place whose name the local runner would change.

    Raises:
        UsageError: the message names the text.
    """
    if "python3" in str(runs_dir):
        raise UsageError(
            f"The local pipeline runner replaces the text 'python3' in paths, and {runs_dir} holds it: use another "
            "--runs-dir."
        )


def _show_result(folder: RunFolder, summary: dict[str, Any], runs_dir: Path) -> None:
    show_summary(summary, out)
    failure = summary["failure"]
    if folder.report_file.exists():
        out.print(f"Report: {folder.report_file}", soft_wrap=True, markup=False)
    if failure:
        where = f" in {failure['step']}" if failure["step"] else ""
        line = f"avrt: error{where} ({failure['code']}): {' '.join(failure['message'].split())}"
        err.print(line, soft_wrap=True, markup=False)
        err.print(f"Log: {log_of(folder, failure['step'])}", soft_wrap=True, markup=False)
        return
    options = "" if runs_dir == (Path.cwd() / "runs") else f" --runs-dir {runs_dir}"
    if summary["champion"]:
        out.print(f"Serve it:  {program()} serve --run {folder.path.name}{options}", soft_wrap=True, markup=False)
        out.print(f"Ask it:    {program()} ask{options} {_example(folder)}", soft_wrap=True, markup=False)


def _example(folder: RunFolder) -> str:
    """A question to ``avrt ask``: of a held-out clip that the run has rendered, or a pattern for clips of one's own."""
    for file in sorted(folder.work.glob("scratch/ingest/*/rendered/test-*/annotations.json")):
        rows = read_json(file)
        row = next((row for row in rows if row["question_type"] == "both"), rows[0])
        video = os.path.relpath(file.parent / "videos" / f"{row['video_name']}.mp4")
        options = " ".join(f"--option {shlex.quote(option)}" for option in row["multi_choice"])
        return f"--video {shlex.quote(video)} {shlex.quote(row['question_text'])} {options}"
    return '--video clip.mp4 "What is seen and heard?" --option "…" --option "…"'


def compile_file(
    config: Config,
    output: Path,
    images: dict[str, str | None],
    *,
    pipeline: str,
    cluster: Path | None,
    kubernetes: bool,
    data_hash: str | None = None,
) -> None:
    """Compile a pipeline of a configuration into a file.

    Args:
        config: the configuration.
        output: the YAML file.
        images: references by image name; None: what ``make images`` built, or the default.
        pipeline: which pipeline.
        cluster: the profile of the cluster that it is for.
        kubernetes: write Kubernetes objects.
        data_hash: what tells the source data from other data; None takes the fingerprint of what this machine sees.

    Raises:
        UsageError: where the file's name does not end in .yaml.
    """
    from avrt_lib.local_run import compile_to

    if output.suffix != ".yaml":
        raise UsageError(f"--output must end in .yaml, not {output.name!r}.")
    options = [part for name, image in images.items() if image for part in (f"--{name}-image", image)]
    options += ["--pipeline", pipeline]
    if cluster is not None:
        options += ["--cluster", str(cluster.absolute())]
    if kubernetes:
        options.append("--kubernetes")
    if data_hash:
        options += ["--data-hash", data_hash]
    folder = Path(tempfile.mkdtemp(prefix="avrt-compile-"))
    try:
        write_config(folder / "config.yaml", config)
        compile_to(folder / "config.yaml", output.absolute(), None, *options)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def rebuild_report(runs_dir: Path, name: str) -> Path:
    """Write a run's summary and report again, print the result, and return the report's path.

    The failure of a run that was stopped from outside is kept: no step's report knows of it.

    Raises:
        UsageError: where there is no such run, or it is still going on: it would look like one that was interrupted.
    """
    from avrt_lib.report import summary as summaries
    from avrt_lib.report.html import write_report

    folder = find(runs_dir.expanduser().absolute(), name)
    with folder.locked():
        earlier = read_json(folder.summary_file).get("failure") if folder.summary_file.exists() else None
        summary = summaries.write(folder.path, earlier)
        write_report(folder.path)
    _show_result(folder, summary, runs_dir.expanduser().absolute())
    return folder.report_file
