"""``avrt serving``: what a cluster serves, rolling a model out, and going back."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Annotated

import typer

from avrt_lib.cli.console import err, out
from avrt_lib.cli.models import Debug
from avrt_lib.cli.options import find_config, resolve
from avrt_lib.config import Config, SourceConfig, parse_set
from avrt_lib.errors import ServingError, UsageError
from avrt_lib.records import Sample
from avrt_lib.run_signals import Interrupted, signals_raise
from avrt_lib.runs import find
from avrt_lib.workspace import Workspace, read_reports

app = typer.Typer(
    name="serving",
    help="What a cluster serves: its status, a new model's rollout, the way back.",
    no_args_is_help=True,
    rich_markup_mode="markdown",
)

#: Exit code of a rollout that has not ended: ask again.
ROLLING_OUT = 75
CHAMPION = "avrt-student"

Name = Annotated[str, typer.Argument(help="The champion's InferenceService.")]
Namespace = Annotated[str, typer.Option("--namespace", "-n", help="Where it is.")]
Timeout = Annotated[
    float | None,
    typer.Option(
        help="Longest time that a model may take to serve [deployment.start_timeout_s].", min=0.001, metavar="SECONDS"
    ),
]


@app.command()
def status(
    name: Name = CHAMPION,
    namespace: Namespace = "avrt",
    uri: Annotated[
        str | None, typer.Option(help="The model that it is to serve [the one that it is set to].", metavar="URI")
    ] = None,
    debug: Debug = False,
) -> None:
    """Say whether the model that was asked for is being served, and if not, why.

    Ends with 0 where it is, 75 while it is rolling out, 11 otherwise.

    Example: `avrt serving status avrt-student --namespace avrt --uri s3://avrt/models/avrt-student/3f2a…`
    """
    from avrt_lib.serving.cluster import Cluster
    from avrt_lib.serving.inference_service import State
    from avrt_lib.serving.inference_service import status as ask

    found = ask(Cluster(namespace), name, uri)
    out.print(found.line, soft_wrap=True, markup=False)
    if found.state is not State.SERVING:
        raise typer.Exit(ROLLING_OUT if found.state is State.ROLLING_OUT else ServingError.exit_code)


@app.command()
def rollout(
    uri: Annotated[str, typer.Option(help="The new model.", metavar="URI")],
    name: Name = CHAMPION,
    namespace: Namespace = "avrt",
    version: Annotated[str | None, typer.Option(help="Its version in the registry.")] = None,
    samples: Annotated[
        Path | None,
        typer.Option(
            help="Held-out questions to ask, as `ingest` writes them [those of the run, or rendered clips].",
            metavar="DIR",
        ),
    ] = None,
    run: Annotated[str, typer.Option(help="The run with its questions and configuration.", metavar="RUN")] = "latest",
    runs_dir: Annotated[Path, typer.Option(metavar="DIR", envvar="AVRT_RUNS_DIR")] = Path("runs"),
    config: Annotated[
        Path | None, typer.Option("--config", "-c", help="The configuration of the model [the run's].", metavar="FILE")
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", "-s", help="Set one value of --config's configuration.", metavar="SECTION.KEY=VALUE"),
    ] = None,
    timeout_s: Timeout = None,
    debug: Debug = False,
) -> None:
    """Bring a model to the champion's place: a candidate is asked questions first, then the champion changes.

    The key of the served model is taken from AVRT_API_KEY. Started again, it goes on where it was stopped.

    Example: `avrt serving rollout --uri s3://avrt/models/avrt-student/3f2a… --version 7`
    """
    from avrt_lib.serving import rollout as rollouts
    from avrt_lib.serving.cluster import Cluster
    from avrt_lib.serving.deployment import check_candidate
    from avrt_lib.serving.inference_service import Status
    from avrt_lib.serving.route import Split

    if settings and config is None:
        raise UsageError("--set changes the configuration that --config names: give it too.")
    used = resolve(find_config(config), parse_set(settings or [])) if config else find(runs_dir, run).config()
    questions = _questions(used, samples, runs_dir, None if config else run)
    cluster = Cluster(namespace)
    champion = cluster.service(name)
    if champion is None:
        raise UsageError(
            f"There is no {namespace}/{name} to change: the deployment step or a manifest makes the first."
        )
    wanted = rollouts.to_uri(champion, uri, version, Split.of(used.deployment))
    if not os.environ.get("AVRT_API_KEY"):  # said before a large model has loaded in vain
        _told("AVRT_API_KEY is not set: the candidate is asked without a key.")

    def check(candidate: Status) -> None:
        found = check_candidate(used, candidate, questions, wanted.served_as)
        err.print(f"{found['well_formed']} of {found['answers']} answers have the asked form.", soft_wrap=True)

    try:
        with signals_raise():  # so that the next rollout finds the Lease free
            served = rollouts.rollout(
                cluster,
                wanted,
                check=check,
                timeout_s=timeout_s or used.deployment.start_timeout_s,
                told=_told,
            )
    except Interrupted:
        _told(
            "Stopped half-way: the same command goes on, "
            f"avrt serving rollback {name} --namespace {namespace} gives it up."
        )
        raise
    out.print(served.line, soft_wrap=True, markup=False)


@app.command()
def rollback(
    name: Name = CHAMPION, namespace: Namespace = "avrt", timeout_s: Timeout = None, debug: Debug = False
) -> None:
    """Set the champion back to what it was before its last rollout; a rollout that was stopped half-way is given up.

    Example: `avrt serving rollback avrt-student --namespace avrt`
    """
    from avrt_lib.config import DeploymentConfig
    from avrt_lib.serving import rollout as rollouts
    from avrt_lib.serving.cluster import Cluster

    limit = timeout_s or DeploymentConfig().start_timeout_s
    found = rollouts.rollback(Cluster(namespace), name, timeout_s=limit, told=_told)
    out.print(found.line, soft_wrap=True, markup=False)


def _told(line: str) -> None:
    err.print(line, soft_wrap=True, style="dim", markup=False)


def _questions(config: Config, samples: Path | None, runs_dir: Path, run: str | None) -> list[Sample]:
    """Held-out questions with sound and picture: of a folder, of a run, or of clips that are rendered for it."""
    from avrt_lib import ingest
    from avrt_lib.serving.deployment import probe_questions

    count = config.deployment.probe_questions
    if samples is None and run is not None:
        outputs = read_reports(find(runs_dir, run).work).get("ingest", {}).get("outputs") or {}
        kept = Path(outputs["samples"]) if "samples" in outputs else None
        samples = kept if kept and kept.is_dir() else None
    if samples is not None:
        return probe_questions(samples, count)
    rendered = {
        split: SourceConfig(format="miniature", count=count, seed=seed)
        for seed, split in enumerate(("train", "validation", "test"))
    }
    clips = config.model_copy(update={"data": config.data.model_copy(update={"all": None, **rendered})})
    with tempfile.TemporaryDirectory(prefix="avrt-questions-") as folder:
        root = Path(folder)
        ingest.run(clips, workspace=Workspace(root, "ingest", root / "scratch"), samples=root / "samples")
        return probe_questions(root / "samples", count)
