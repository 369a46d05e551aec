"""Merged traces that were made elsewhere."""

from kfp import dsl

from components.images import DEFAULT


@dsl.component(base_image=DEFAULT.pipeline, install_kfp_package=False)
def import_traces(
    samples: dsl.Input[dsl.Dataset],
    merged: dsl.Output[dsl.Dataset],
    source: str,
    config: str,
    library_version: str,
    data_hash: str,
    image: str,
    work: str = "",
) -> None:
    """Bring merged traces into the run: published ones, a merged table, or one's own as JSON lines.

    Args:
        samples: the samples that ingest wrote.
        merged: the merged traces, checked against the samples.
        source: where they are: s3://BUCKET/traces/SHA256, a folder, or a .jsonl file.
        config: the run's configuration, or the step's part of it, as JSON text.
        library_version: the version of avrt that the pipeline was compiled with.
        data_hash: identity of the source data; part of the cache key.
        image: identity of the container image; part of the cache key.
        work: folder that survives a killed step; empty: none.
    """
    from avrt_lib.steps import run_step

    run_step(
        "import_traces",
        config=config,
        inputs={"samples": samples.path},
        outputs={"merged": merged.path},
        work=work,
        params={"source": source},
        library_version=library_version,
    )
