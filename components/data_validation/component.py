"""The gate before training."""

from kfp import dsl

from components.images import DEFAULT


@dsl.component(base_image=DEFAULT.pipeline, install_kfp_package=False)
def data_validation(
    samples: dsl.Input[dsl.Dataset],
    merged: dsl.Input[dsl.Dataset],
    report: dsl.Output[dsl.Artifact],
    metrics: dsl.Output[dsl.Metrics],
    config: str,
    library_version: str,
    data_hash: str,
    image: str,
    work: str = "",
) -> None:
    """Refuse merged traces that must not be trained on.

    The gate raises, and is no condition: a skipped branch would let a failed gate look like a success.

    Args:
        samples: the samples that ingest wrote.
        merged: the merged traces.
        report: the result of every expectation, as JSON.
        metrics: expectations checked and failed.
        config: the run's configuration, or the step's part of it, as JSON text.
        library_version: the version of avrt that the pipeline was compiled with.
        data_hash: identity of the source data; part of the cache key.
        image: identity of the container image; part of the cache key.
        work: folder that survives a killed step; empty: none.
    """
    from avrt_lib.steps import run_step, scalars

    facts = run_step(
        "data_validation",
        config=config,
        inputs={"samples": samples.path, "merged": merged.path},
        outputs={"report": report.path},
        work=work,
        library_version=library_version,
    )
    for name, value in scalars(facts).items():
        metrics.log_metric(name, value)
