"""The last step of a cluster run, which runs however the run ends: summary and report from what the steps reported."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import Any

from avrt_lib import tracking
from avrt_lib.config import Config
from avrt_lib.report import summary as summaries
from avrt_lib.report.html import write_report
from avrt_lib.runs import RunFolder, instances, write_config
from avrt_lib.store import run_reports
from avrt_lib.workspace import Workspace

log = logging.getLogger("avrt.report")

#: ``avrt submit`` reads the summary from this line of the step's log.
LINE = "avrt-summary: "


def run(config: Config, *, workspace: Workspace, summary: Path, status: str, components: str = "") -> dict[str, Any]:
    """Write the run's summary and report, keep them in the store, and print the summary as one line.

    Args:
        config: the run's configuration.
        workspace: the step's scratch.
        summary: gets ``summary.json`` and ``report.html``.
        status: how the backend says that the run ended: ``COMPLETE`` or ``FAILED``; ``RUNNING`` where it was stopped.
        components: the components that the pipeline is made of, separated by commas; empty: the whole path.

    Returns:
        ``run_status`` and ``uri`` of the summary in the store.
    """
    folder = RunFolder(summary)
    summary.mkdir(parents=True, exist_ok=True)
    write_config(folder.config_file, config)
    wanted = components.split(",") if components else None
    names = [name for each in instances(config, wanted).values() for name in each]
    reports = run_reports.collect({name: _given(name, config) for name in names})
    failure = None
    if status != "COMPLETE":
        failure = {
            "step": "",
            "code": "interrupted" if status == "RUNNING" else "error",
            "message": "The run was stopped." if status == "RUNNING" else "The run failed: see the log of its step.",
        }
    document = summaries.build(summary, failure, reports=reports, components=wanted)
    folder.summary_file.write_text(json.dumps(document, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    try:
        write_report(summary, reports)
    except Exception:  # the summary is what others wait for, and does not depend on the page
        log.exception("report.html could not be written")
    uri = None
    if run_reports.enabled():
        uri = run_reports.put_document(folder.summary_file.name, folder.summary_file.read_bytes(), "application/json")
        if folder.report_file.exists():
            run_reports.put_document(folder.report_file.name, folder.report_file.read_bytes(), "text/html")
    tracking.end_parent(config, document)
    print(LINE + json.dumps(document, ensure_ascii=False, separators=(",", ":")), flush=True)
    return {"run_status": document["status"], "uri": uri, "run": os.environ.get(run_reports.RUN_ID)}


def _given(instance: str, config: Config) -> Config | None:
    """What a step instance is given of the configuration; None where its result is never taken again."""
    from avrt_lib.steps import STEPS  # it stands above, and runs this module

    step = STEPS[instance.partition("-")[0]]
    return step.part(config) if step.repeatable else None
