"""The run's summary, however the run ended."""

from kfp import dsl

from components.images import DEFAULT


@dsl.component(base_image=DEFAULT.pipeline, install_kfp_package=False)
def run_summary(
    status: dsl.PipelineTaskFinalStatus,
    summary: dsl.Output[dsl.Artifact],
    components: str,
    config: str,
    library_version: str,
    data_hash: str,
    image: str,
    work: str = "",
) -> None:
    """Write the run's summary and report from what its steps reported; the exit handler of a cluster run.

    The same summary is in the object store, and one line of this step's log holds it.

    Args:
        status: how the run ended, as the backend tells an exit handler.
        summary: summary.json and report.html.
        components: the components that the pipeline is made of, separated by commas.
        config: the run's configuration, or the step's part of it, as JSON text.
        library_version: the version of avrt that the pipeline was compiled with.
        data_hash: identity of the source data; part of the cache key.
        image: identity of the container image; part of the cache key.
        work: folder that survives a killed step; empty: none.
    """
    from avrt_lib.steps import run_step

    run_step(
        "run_summary",
        config=config,
        inputs={},
        outputs={"summary": summary.path},
        work=work,
        params={"status": status.state, "components": components},
        library_version=library_version,
    )
