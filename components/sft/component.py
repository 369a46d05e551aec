"""The cold start on merged traces."""

from kfp import dsl

from components.images import DEFAULT


@dsl.component(base_image=DEFAULT.train, install_kfp_package=False)
def sft(
    samples: dsl.Input[dsl.Dataset],
    merged: dsl.Input[dsl.Dataset],
    model: dsl.Output[dsl.Model],
    metrics: dsl.Output[dsl.Metrics],
    config: str,
    library_version: str,
    data_hash: str,
    image: str,
    work: str = "",
) -> None:
    """Fine-tune the student on the merged reasoning, with its encoders frozen.

    Args:
        samples: the samples that ingest wrote.
        merged: the merged traces.
        model: the checkpoint in the layout that vLLM serves.
        metrics: steps, loss and validation accuracy.
        config: the run's configuration, or the step's part of it, as JSON text.
        library_version: the version of avrt that the pipeline was compiled with.
        data_hash: identity of the source data; part of the cache key.
        image: identity of the container image; part of the cache key.
        work: folder that survives a killed step; empty: none.
    """
    from avrt_lib.steps import run_step, scalars

    facts = run_step(
        "sft",
        config=config,
        inputs={"samples": samples.path, "merged": merged.path},
        outputs={"model": model.path},
        work=work,
        library_version=library_version,
    )
    for name, value in scalars(facts).items():
        metrics.log_metric(name, value)
