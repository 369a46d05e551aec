"""From source clips and questions to samples."""

from kfp import dsl

from components.images import DEFAULT


@dsl.component(base_image=DEFAULT.pipeline, install_kfp_package=False)
def ingest(
    samples: dsl.Output[dsl.Dataset],
    metrics: dsl.Output[dsl.Metrics],
    config: str,
    library_version: str,
    data_hash: str,
    image: str,
    work: str = "",
) -> None:
    """Read the configured sources, decode their media to the student's budget, and write the samples of all splits.

    A row that cannot be used becomes a dropped row with its reason; the counts add up.

    Args:
        samples: the table of samples, and beside it the table of dropped rows.
        metrics: samples, dropped rows, and samples by kind of question.
        config: the run's configuration, or the step's part of it, as JSON text.
        library_version: the version of avrt that the pipeline was compiled with.
        data_hash: identity of the source data; part of the cache key.
        image: identity of the container image; part of the cache key.
        work: folder that survives a killed step; empty: none.
    """
    from avrt_lib.steps import run_step, scalars

    facts = run_step(
        "ingest",
        config=config,
        inputs={},
        outputs={"samples": samples.path},
        work=work,
        params={"data_hash": data_hash},
        library_version=library_version,
    )
    for name, value in scalars(facts).items():
        metrics.log_metric(name, value)
