"""The ``avrt`` command: one function per subcommand, each a thin layer over the library."""

from __future__ import annotations

import importlib.metadata
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from avrt_lib import __version__
from avrt_lib.cli import models, serving
from avrt_lib.cli.console import err, fail, out
from avrt_lib.cli.options import DEFAULT_CONFIG, find_config, overrides, resolve
from avrt_lib.cli.plan import plan

EPILOG_RUN = """
**Examples**

`avrt run` runs the miniature.

`avrt run --set grpo.max_steps=40 --seed 1` changes values of the configuration.

`avrt run --dataset daily-omni:/data/daily_omni` reads one data set and splits it by clip.

`avrt run --dataset train=avqa:/data/train --dataset validation=avqa:/data/val --dataset test=avqa:/data/test`

`avrt run --resume latest` goes on where a run stopped.
"""

app = typer.Typer(
    name="avrt",
    help="From clips and questions to a served, reasoning audio-visual model.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _debug(value: bool) -> bool:
    if value:
        os.environ["AVRT_DEBUG"] = "1"
    return value


def _version(value: bool) -> None:
    if value:
        out.print(f"avrt {__version__}")
        raise typer.Exit


Debug = Annotated[
    bool,
    typer.Option("--debug", help="Show the traceback of an error.", callback=_debug, is_eager=True, expose_value=True),
]
ConfigFile = Annotated[Path, typer.Option("--config", "-c", help="The configuration of the run.", metavar="FILE")]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", "-s", help="Set one value of the configuration.", metavar="SECTION.KEY=VALUE"),
]
RunsDir = Annotated[
    Path, typer.Option("--runs-dir", help="Where runs are kept.", metavar="DIR", envvar="AVRT_RUNS_DIR")
]
RunName = Annotated[str, typer.Option("--run", help="A run by name or folder.", metavar="RUN")]
RUNS = Path("runs")


@app.callback()
def _main(
    version: Annotated[
        bool, typer.Option("--version", help="Show the version.", callback=_version, is_eager=True)
    ] = False,
    debug: Debug = False,
) -> None:
    pass


@app.command(epilog=EPILOG_RUN)
def run(
    config: Annotated[
        Path | None, typer.Option("--config", "-c", help=f"The configuration [{DEFAULT_CONFIG}].", metavar="FILE")
    ] = None,
    settings: Settings = None,
    dataset: Annotated[
        list[str] | None,
        typer.Option(help="Questions and clips; also train=, validation= and test= apart.", metavar="FORMAT:PATH"),
    ] = None,
    runs_dir: RunsDir = RUNS,
    resume: Annotated[
        str | None, typer.Option(help="Go on with this run (a name, a folder, or latest).", metavar="RUN")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="The seed of the run.")] = None,
    unfiltered: Annotated[
        bool, typer.Option("--unfiltered", help="Keep every sample and serve the result for a check: tests the path.")
    ] = False,
    overlap_splits: Annotated[
        bool,
        typer.Option("--overlap-splits", help="Let every clip stand in all splits, where there are too few to split."),
    ] = False,
    debug: Debug = False,
) -> None:
    """Run the whole pipeline on this machine: filter, train, evaluate, promote and serve."""
    from avrt_lib.cli.run import start

    changes = overrides(
        settings=settings or [],
        dataset=dataset or [],
        unfiltered=unfiltered,
        overlap_splits=overlap_splits,
        seed=seed,
    )
    raise typer.Exit(start(config, changes, runs_dir=runs_dir, resume=resume))


@app.command(name="compile")
def compile_(
    output: Annotated[Path, typer.Option("--output", "-o", help="The file to write.", metavar="FILE")] = Path(
        "pipeline.yaml"
    ),
    config: ConfigFile = DEFAULT_CONFIG,
    settings: Settings = None,
    cluster: Annotated[
        Path | None,
        typer.Option(help="The cluster it will run on: pools, secrets, limits become part of it.", metavar="PROFILE"),
    ] = None,
    pipeline: Annotated[
        str, typer.Option(help="avrt (the whole path), data, train or evaluate.", metavar="NAME")
    ] = "avrt",
    kubernetes: Annotated[
        bool, typer.Option("--kubernetes", help="Write Pipeline and PipelineVersion objects for kubectl.")
    ] = False,
    data_hash: Annotated[
        str | None,
        typer.Option(
            help="With --cluster: what tells the data from other data (a version, a hash), where it lies on a claim; "
            "without it such data is read anew in every run.",
            metavar="TEXT",
        ),
    ] = None,
    pipeline_image: Annotated[str | None, typer.Option(help="Image of the steps without torch.")] = None,
    train_image: Annotated[str | None, typer.Option(help="Image of the training steps.")] = None,
    vllm_image: Annotated[str | None, typer.Option(help="Image of the steps with vLLM.")] = None,
    debug: Debug = False,
) -> None:
    """Compile the pipeline for a Kubeflow Pipelines backend; each task holds what its step needs of the configuration.

    Example: `avrt compile --config configs/miniature.yaml --cluster configs/clusters/test.yaml --output pipeline.yaml`
    """
    from avrt_lib.cli.run import compile_file
    from avrt_lib.cluster.profile import find_profile, load_profile

    images = {"pipeline": pipeline_image, "train": train_image, "vllm": vllm_image}
    profile = find_profile(cluster) if cluster else None
    changes = (load_profile(profile).overrides if profile else {}) | overrides_of(settings)
    compile_file(
        resolve(find_config(config), changes),
        output,
        images,
        pipeline=pipeline,
        cluster=profile,
        kubernetes=kubernetes,
        data_hash=data_hash,
    )
    out.print(f"Written: {output}", soft_wrap=True, markup=False)


@app.command()
def serve(
    run: RunName = "latest",
    model: Annotated[
        Path | None, typer.Option(help="Serve this model folder instead of a run's champion.", metavar="DIR")
    ] = None,
    port: Annotated[int, typer.Option(min=1, max=65535)] = 8000,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    runs_dir: RunsDir = RUNS,
    debug: Debug = False,
) -> None:
    """Serve a run's champion with vLLM behind an OpenAI-compatible address, until Ctrl-C.

    Example: `avrt serve`, then `avrt ask --video clip.mp4 "What is heard?" --option "a dog" --option "a cat"`
    """
    from avrt_lib.cli.serve import serve_model

    raise typer.Exit(serve_model(runs_dir, run=run, model=model, host=host, port=port))


@app.command()
def ask(
    question: Annotated[str, typer.Argument(help="The question, without its options.")],
    option: Annotated[
        list[str] | None, typer.Option("--option", "-o", help="An answer to choose from; give two to eight.")
    ] = None,
    video: Annotated[Path | None, typer.Option(help="The clip.", metavar="FILE")] = None,
    audio: Annotated[Path | None, typer.Option(help="Sound in a file of its own.", metavar="FILE")] = None,
    url: Annotated[str, typer.Option(help="The address of the server.")] = "http://127.0.0.1:8000/v1",
    api_key: Annotated[
        str | None, typer.Option(help="Its key [on this machine: the one in the runs folder].", envvar="AVRT_API_KEY")
    ] = None,
    api_key_env: Annotated[
        str | None, typer.Option(help="Read the key from this variable; others can see --api-key.", metavar="VARIABLE")
    ] = None,
    model: Annotated[str | None, typer.Option(help="The model's name [the one that is served].")] = None,
    config: Annotated[
        Path | None,
        typer.Option("--config", "-c", help="The model's configuration, instead of a run's.", metavar="FILE"),
    ] = None,
    timeout: Annotated[
        float | None, typer.Option(help="Longest wait in seconds.", min=0.001, metavar="SECONDS")
    ] = None,
    run: RunName = "latest",
    runs_dir: RunsDir = RUNS,
    debug: Debug = False,
) -> None:
    """Ask a served model about a clip; shows its reasoning and its answer.

    The configuration (of the run, or `--config`) names the prompt and what is kept of the clip. `SSL_CERT_FILE` names a
    certificate authority of your own.

    Examples: `avrt ask --video clip.mp4 "What is heard?" --option "a dog" --option "a cat"`,
    `avrt ask --url https://models.example.com --api-key-env KEY --config configs/avrt-3b.yaml --video clip.mp4 "…"`
    """
    from avrt_lib.cli.serve import ask_model, key_from

    ask_model(
        runs_dir,
        run,
        question,
        option or [],
        config_file=config,
        video=video,
        audio=audio,
        url=url,
        api_key=key_from(api_key_env) if api_key_env else api_key,
        model=model,
        timeout_s=timeout,
    )


@app.command()
def report(
    run: RunName = "latest",
    runs_dir: RunsDir = RUNS,
    open_: Annotated[bool, typer.Option("--open", help="Open it in a browser.")] = False,
    debug: Debug = False,
) -> None:
    """Write a run's summary and report again, and show the result.

    Example: `avrt report --run latest --open`
    """
    from avrt_lib.cli.run import rebuild_report

    path = rebuild_report(runs_dir, run)
    if open_:
        typer.launch(path.as_uri())


@app.command()
def doctor(
    config: Annotated[
        Path | None, typer.Option("--config", "-c", help="Check for this configuration too.", metavar="FILE")
    ] = None,
    runs_dir: RunsDir = RUNS,
    port: Annotated[int, typer.Option(min=1, max=65535, help="The port that would be served on.")] = 8000,
    cluster: Annotated[
        Path | None,
        typer.Option(help="Check the cluster that KUBECONFIG names against this profile instead.", metavar="PROFILE"),
    ] = None,
    debug: Debug = False,
) -> None:
    """Check this machine or a cluster, and say what to do.

    Of this machine: Python, disk, memory, compiler, ports, GPU, packages. Of a cluster: secrets, bucket, permissions,
    KServe, quotas, nodes for each pool, endpoints.

    Examples: `avrt doctor --config configs/miniature.yaml`, `avrt doctor --cluster configs/clusters/test.yaml`
    """
    from avrt_lib.cli.doctor import examine

    raise typer.Exit(examine(config, runs_dir, port, cluster))


@app.command()
def step(
    name: Annotated[str, typer.Argument(help="The step, as in `avrt_lib.steps.STEPS`.")],
    config: ConfigFile = DEFAULT_CONFIG,
    settings: Settings = None,
    inputs: Annotated[
        list[str] | None, typer.Option("--input", "-i", help="An input folder; repeat for a list.", metavar="NAME=DIR")
    ] = None,
    outputs: Annotated[
        list[str] | None, typer.Option("--output", "-o", help="Where to place an output.", metavar="NAME=DIR")
    ] = None,
    params: Annotated[
        list[str] | None, typer.Option("--param", "-p", help="A plain parameter.", metavar="NAME=VALUE")
    ] = None,
    work: Annotated[
        Path | None, typer.Option(help="Work folder; with it a killed step goes on.", metavar="DIR")
    ] = None,
    debug: Debug = False,
) -> None:
    """Run one step of the pipeline on local folders and print its facts as JSON.

    Example: `avrt step vision_teacher --input samples=samples --output traces=traces-0 --param shard=0 --work work`
    """
    from avrt_lib.cli.step import run_one

    settings_ = resolve(find_config(config), overrides_of(settings))
    run_one(name, settings_, inputs=inputs or [], outputs=outputs or [], params=params or [], work=work)


@app.command()
def fidelity(
    config: ConfigFile = DEFAULT_CONFIG,
    settings: Settings = None,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print a Markdown table.")] = False,
    debug: Debug = False,
) -> None:
    """Show every value that the paper or its authors give: theirs, ours, and the one of a configuration.

    Example: `avrt fidelity --config configs/miniature.yaml`
    """
    from avrt_lib.cli.results import fidelity_markdown, fidelity_table

    loaded = resolve(find_config(config), overrides_of(settings))
    if markdown:
        print(fidelity_markdown(loaded))
    else:
        out.print(fidelity_table(loaded))


app.add_typer(models.app)
app.add_typer(serving.app)
app.command()(plan)


def overrides_of(settings: list[str] | None) -> dict[str, Any]:
    """The overrides of ``--set`` alone."""
    return overrides(settings=settings or [], dataset=[], unfiltered=False, overlap_splits=False, seed=None)


def main(arguments: list[str] | None = None) -> None:
    """Entry point: every error ends as one line and an exit code."""
    from avrt_lib.run_signals import Interrupted

    try:
        for entry in importlib.metadata.entry_points(group="avrt.commands"):
            entry.load()(app)
        typer.main.get_command(app)(args=arguments, prog_name="avrt")
    except Interrupted as stopped:
        err.print(f"avrt: stopped ({stopped})")
        sys.exit(stopped.exit_code)
    except BrokenPipeError:
        sys.exit(1)
    except Exception as error:
        sys.exit(fail(error, debug=os.environ.get("AVRT_DEBUG") == "1"))


if __name__ == "__main__":
    main()
