"""Publish merged traces."""

from kfp import dsl

from components.images import DEFAULT


@dsl.component(base_image=DEFAULT.pipeline, install_kfp_package=False)
def publish_traces(
    merged: dsl.Input[dsl.Dataset],
    published: dsl.Output[dsl.Artifact],
    config: str,
    library_version: str,
    data_hash: str,
    image: str,
    work: str = "",
) -> str:
    """Put the merged traces to the object store, where other runs find them by their content.

    Args:
        merged: the merged traces.
        published: where they are, as JSON.
        config: the run's configuration, or the step's part of it, as JSON text.
        library_version: the version of avrt that the pipeline was compiled with.
        data_hash: identity of the source data; part of the cache key.
        image: identity of the container image; part of the cache key.
        work: folder that survives a killed step; empty: none.
    """
    from avrt_lib.steps import run_step

    facts = run_step(
        "publish_traces",
        config=config,
        inputs={"merged": merged.path},
        outputs={"published": published.path},
        work=work,
        library_version=library_version,
    )
    return str(facts["uri"])
