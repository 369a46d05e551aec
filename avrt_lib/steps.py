"""The steps of the pipeline by name, and the one way in which all of them are run.

``run_step`` is what a KFP component's body and ``avrt step`` call. It gives the step its scratch folder as output
folder, so that a step that was killed finds what it had committed, and places the finished outputs where the caller
wants them.
"""

from __future__ import annotations

import errno
import hashlib
import importlib
import json
import logging
import math
import os
import re
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from avrt_lib import __version__, tracking
from avrt_lib.config import Config, from_json
from avrt_lib.errors import AvrtError, DiskFullError, EnvironmentProblem, InterruptedStep, OutputMissingError
from avrt_lib.run_signals import Interrupted, signals_raise
from avrt_lib.store import run_reports
from avrt_lib.tables import MANIFEST, hash_folder, place_folder, read_json, sha256_file, write_json
from avrt_lib.workspace import Workspace, log_to_file

log = logging.getLogger("avrt")

DONE = "done.json"
#: A failed step's log has one such line, which `avrt submit` reads: the backend's API tells nothing of errors.
FAILURE_LINE = "avrt-failure: "
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT)
#: How libraries tell it: some with the system's words; torch, when a write failed, without a reason.
_NO_SPACE_TEXT = re.compile(
    "|".join(map(os.strerror, _NO_SPACE))
    + r"|PytorchStreamWriter failed|unexpected pos \d+ vs \d+|basic_ios::clear: iostream error"
)


@dataclass(frozen=True)
class Step:
    """What a step is called, where it lives, and what goes in and out.

    Attributes:
        module: the subpackage with its public ``run``.
        inputs: names of input folders (a name that ends in ``s`` after a shard loop takes a list).
        outputs: names of output folders.
        params: names of plain parameters.
        files: those of them that may name a local file or folder, whose content counts like an input's.
        sections: the configuration sections that it reads; its scratch is keyed by these.
        image: which image runs it: ``pipeline``, ``train`` or ``vllm``.
        repeatable: whether a finished result may be taken again for the same inputs.
    """

    module: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    sections: tuple[str, ...]
    image: str
    params: tuple[str, ...] = ()
    files: tuple[str, ...] = ()
    repeatable: bool = True

    def part(self, config: Config) -> Config:
        """What a task of this step is given of a run's configuration, and what the pipeline's cache compares of it.

        A step with outside effects gets all of it. The others get the sections that decide their outputs, and the two
        that say where reports and checkpoints go; reading another section raises.
        """
        return config.part({*self.sections, "store", "tracking"}) if self.repeatable else config


STEPS: dict[str, Step] = {
    "preflight": Step(
        "avrt_lib.preflight",
        (),
        ("checks",),
        ("data", "teachers", "store", "deployment"),
        "pipeline",
        ("components",),
        repeatable=False,
    ),
    "ingest": Step("avrt_lib.ingest", (), ("samples",), ("data", "merger", "seed"), "pipeline", ("data_hash",)),
    "vision_teacher": Step(
        "avrt_lib.teachers.vision", ("samples",), ("traces",), ("teachers", "data", "seed"), "vllm", ("shard",)
    ),
    "audio_teacher": Step(
        "avrt_lib.teachers.audio", ("samples",), ("traces",), ("teachers", "data", "seed"), "vllm", ("shard",)
    ),
    "merger": Step(
        "avrt_lib.merger", ("samples", "vision_traces", "audio_traces"), ("merged",), ("merger", "seed"), "vllm"
    ),
    "publish_traces": Step("avrt_lib.merger.publishing", ("merged",), ("published",), ("store",), "pipeline"),
    "import_traces": Step(
        "avrt_lib.merger.importing", ("samples",), ("merged",), ("merger",), "pipeline", ("source",), files=("source",)
    ),
    "data_validation": Step(
        "avrt_lib.validation", ("samples", "merged"), ("report",), ("validation", "merger", "data"), "pipeline"
    ),
    "sft": Step(
        "avrt_lib.training.sft",
        ("samples", "merged"),
        ("model",),
        ("student", "sft", "evaluation", "seed", "data"),
        "train",
    ),
    "grpo": Step(
        "avrt_lib.training.grpo", ("samples", "sft_model"), ("model",), ("student", "grpo", "seed", "data"), "train"
    ),
    "evaluation": Step(
        "avrt_lib.evaluation",
        ("samples", "model"),
        ("predictions",),
        ("student", "evaluation", "promotion", "data", "seed"),
        "vllm",
        ("role",),
    ),
    "promotion": Step(
        "avrt_lib.promotion",
        ("base_predictions", "sft_predictions", "grpo_predictions", "sft_model", "grpo_model"),
        ("champion",),
        ("promotion", "deployment", "store", "tracking", "student", "data"),
        "pipeline",
        repeatable=False,
    ),
    "deployment": Step(
        "avrt_lib.serving.deployment",
        ("samples", "champion", "grpo_model"),
        ("check",),
        ("deployment", "promotion", "student", "data", "sft", "evaluation"),
        "pipeline",
        repeatable=False,
    ),
    "run_summary": Step(
        "avrt_lib.report.run_summary",
        (),
        ("summary",),
        (),
        "pipeline",
        ("status", "components"),
        repeatable=False,
    ),
}


def run_step(
    name: str,
    *,
    config: str | Config,
    inputs: Mapping[str, str | Path | Sequence[str | Path]],
    outputs: Mapping[str, str | Path],
    work: str | Path | None = None,
    params: Mapping[str, Any] | None = None,
    library_version: str = "",
) -> dict[str, Any]:
    """Run one step on local folders.

    Args:
        name: a key of ``STEPS``.
        config: the run's configuration, or its JSON text.
        inputs: folder (or list of folders) by input name; an empty path means absent, for optional inputs.
        outputs: where to place each output folder; replaced if it is there.
        work: the run's work folder; None uses a temporary one, and then a killed step starts anew.
        params: plain parameters, such as the shard.
        library_version: the version that the pipeline was compiled with; an image with another one is refused, since
            the configuration would mean something else there. Empty: any.

    Returns:
        The facts that the step reports (counts, metrics), as they also stand in its report.

    Raises:
        AvrtError: whatever the step raised; the report holds its code and message.
    """
    step = STEPS[name]
    settings = config if isinstance(config, Config) else from_json(config)
    given = dict(params or {})
    instance = "-".join([name, *(str(given[p]) for p in step.params if p in ("shard", "role"))])
    temporary = None
    if not work:
        temporary = tempfile.mkdtemp(prefix="avrt-")
    shared = Path(work or temporary or "")
    # Processes of one distributed step share its scratch; the first one's report, tracking and outputs count.
    rank = int(os.environ.get("RANK", "0"))
    root = shared if rank == 0 else shared / "ranks" / str(rank)
    if os.environ.get("AVRT_STEP_LOGS") == "1":
        log_to_file(root / "logs" / f"{instance}.log")
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(levelname)s %(message)s", force=True)
    started = time.time()
    paths = {k: [Path(p) for p in v] if isinstance(v, list | tuple) else Path(v) for k, v in inputs.items() if v}  # type: ignore[arg-type]
    workspace = Workspace(root, instance, shared / "scratch" / instance)
    try:
        with signals_raise(signal.SIGTERM):
            if library_version not in ("", __version__):
                raise EnvironmentProblem(
                    f"The pipeline was compiled with avrt {library_version}, but this image holds avrt {__version__}: "
                    "compile the pipeline again, or name images of its version."
                )
            processes = _processes(name, settings)
            key = _key(step, settings, paths, {**given, "processes": processes} if processes > 1 else given)
            workspace = Workspace(root, instance, shared / "scratch" / instance / key)
            workspace.report(status="running", seconds=None, started=started, failure=None, facts={})
            done = workspace.scratch / DONE
            reused = step.repeatable and done.exists()
            if processes > 1 and not reused and "RANK" not in os.environ:
                from avrt_lib.training import launch

                return launch.run(processes, name, config=settings, workspace=workspace, inputs=paths, outputs=outputs)
            if reused:
                facts: dict[str, Any] = read_json(done)["facts"]
                log.info("%s: finished before with the same inputs; taken from %s", instance, workspace.scratch)
            else:
                workspace.scratch.mkdir(parents=True, exist_ok=True)
                run = importlib.import_module(step.module).run
                making = {k: workspace.scratch / k for k in step.outputs}
                tracker = tracking.step_run(instance, settings, step.sections, making) if rank == 0 else nullcontext()
                with tracker as tracked:
                    facts = run(settings, workspace=workspace, **paths, **making, **given)
                    if tracked is not None:
                        tracked.log_metrics(scalars(facts), step=0)
                if rank == 0:
                    for output, folder in making.items():
                        if not folder.is_dir() or not any(folder.iterdir()):
                            raise OutputMissingError(f"{instance} ended without its output {output!r} ({folder}).")
                    write_json(done, {"facts": facts, "seconds": time.time() - started})
            placed = {output: Path(outputs[output]) for output in step.outputs if rank == 0 and outputs.get(output)}
            for output, target in placed.items():
                place_folder(workspace.scratch / output, target)
            seconds = read_json(done)["seconds"] if rank == 0 else time.time() - started
            status = facts.get("status", "succeeded") if isinstance(facts, dict) else "succeeded"
            ended: dict[str, Any] = {
                "status": status,
                "seconds": seconds,
                "started": started,
                "failure": None,
                "facts": facts,
            }
            places = {output: str(target) for output, target in placed.items()}
            workspace.report(**ended, reused=reused, outputs=places)
            if rank == 0:
                content: dict[str, Any] = {}
                if run_reports.enabled():
                    content["took"] = [identity(folder) for _, folder in _folders(paths)]
                    content["made"] = [identity(workspace.scratch / output) for output in step.outputs]
                run_reports.put(settings, instance, ended | content)
            return facts
    except BaseException as error:
        error = _typed(error, instance, root)
        code = (
            error.code
            if isinstance(error, AvrtError)
            else "interrupted"
            if isinstance(error, KeyboardInterrupt)
            else "error"
        )
        message = str(error) or type(error).__name__
        failure = {"step": name, "code": code, "message": message}
        ended = {
            "status": "failed",
            "seconds": time.time() - started,
            "started": started,
            "failure": failure,
            "facts": getattr(error, "facts", {}),
        }
        try:
            workspace.report(**ended)
        except (OSError, AvrtError):
            log.exception("the report of %s could not be written", instance)
        log.error("%s failed: %s\n%s", instance, message, "".join(traceback.format_exception(error)))
        if rank == 0:
            run_reports.put(settings, instance, ended)
            print(FAILURE_LINE + json.dumps(failure, ensure_ascii=False), file=sys.stderr, flush=True)
        raise error
    finally:
        if temporary:
            shutil.rmtree(temporary, ignore_errors=True)


def _processes(name: str, config: Config) -> int:
    """How many processes run a step. Only training may have more than one, and only there torch is looked for."""
    if STEPS[name].image != "train":
        return 1
    from avrt_lib.training import launch

    return launch.processes(name, config)


def scalars(facts: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """The numbers among a step's facts, by dotted name, as a tracking server or a KFP ``Metrics`` artifact takes them.

    >>> scalars({"n": 4, "by_kind": {"both": 0.5}, "ci95": [0.1, 0.9], "model": "x", "ok": True})
    {'n': 4.0, 'by_kind.both': 0.5, 'ok': 1.0}
    """
    numbers: dict[str, float] = {}
    for name, value in facts.items():
        if isinstance(value, Mapping):
            numbers.update(scalars(value, f"{prefix}{name}."))
        elif isinstance(value, bool | int | float) and math.isfinite(value):
            numbers[f"{prefix}{name}"] = float(value)
    return numbers


def _typed(error: BaseException, instance: str, root: Path) -> BaseException:
    """An error that may come up in any step, in its own type; any other one as it is."""
    if isinstance(error, AvrtError):
        return error
    typed: AvrtError | None = None
    if isinstance(error, Interrupted):
        typed = InterruptedStep(f"{instance} was told to stop ({error}): go on with --resume, or start the step again.")
    elif _is_no_space(error):
        typed = DiskFullError(
            f"No space left on the disk that holds {root} ({' '.join(str(error).split())}): free some, then go on with "
            "--resume."
        )
    if typed is None:
        return error
    typed.__cause__ = error
    return typed


def _is_no_space(error: BaseException | None) -> bool:
    """Whether an error, or one that it came from, is that of a full disk or an exceeded quota."""
    while error is not None:
        if (isinstance(error, OSError) and error.errno in _NO_SPACE) or _NO_SPACE_TEXT.search(str(error)):
            return True
        error = error.__cause__ or error.__context__
    return False


def _key(step: Step, config: Config, inputs: Mapping[str, Path | list[Path]], params: Mapping[str, Any]) -> str:
    """Hash of everything that decides a step's result."""
    digest = hashlib.sha256(f"{step.module} {__version__}".encode())
    document = config.model_dump(mode="json")
    for section in step.sections:
        digest.update(repr((section, document[section])).encode())
    for name, folder in _folders(inputs):
        digest.update(f"{name} {identity(folder)}".encode())
    digest.update(repr(sorted(params.items())).encode())
    for place in (Path(str(params[name])) for name in step.files):
        if place.is_file():
            digest.update(sha256_file(place).encode())
        elif (place / MANIFEST).is_file():
            digest.update(identity(place).encode())
    return digest.hexdigest()[:16]


def _folders(inputs: Mapping[str, Path | list[Path]]) -> Iterator[tuple[str, Path]]:
    """Each input folder with its input's name."""
    for name, folders in sorted(inputs.items()):
        for folder in folders if isinstance(folders, list) else [folders]:
            yield name, folder


def identity(folder: Path) -> str:
    """What a folder holds, as a hash: a table's content hash, a model's manifest, or all its bytes."""
    manifest = folder / MANIFEST
    if manifest.exists():
        document = read_json(manifest)
        if "content_sha256" in document:
            return str(document["content_sha256"])
    return hash_folder(folder)
