"""Serve the champion and ask it."""

from kfp import dsl

from components.images import DEFAULT


@dsl.component(base_image=DEFAULT.pipeline, install_kfp_package=False)
def deployment(
    samples: dsl.Input[dsl.Dataset],
    champion: dsl.Input[dsl.Artifact],
    grpo_model: dsl.Input[dsl.Model],
    check: dsl.Output[dsl.Artifact],
    metrics: dsl.Output[dsl.Metrics],
    config: str,
    library_version: str,
    data_hash: str,
    image: str,
    work: str = "",
) -> None:
    """Bring the champion up at the configured target, ask it held-out questions with sound and picture, check answers.

    Where nothing was promoted, the step is skipped and says so.

    Args:
        samples: the samples that ingest wrote.
        champion: promotion's decision.
        grpo_model: the last trained checkpoint, served only where deployment.serve_unpromoted says so.
        check: the answers, their form and their latency, as JSON.
        metrics: whether the check passed, and the latencies.
        config: the run's configuration, or the step's part of it, as JSON text.
        library_version: the version of avrt that the pipeline was compiled with.
        data_hash: identity of the source data; part of the cache key.
        image: identity of the container image; part of the cache key.
        work: folder that survives a killed step; empty: none.
    """
    from avrt_lib.steps import run_step, scalars

    facts = run_step(
        "deployment",
        config=config,
        inputs={"samples": samples.path, "champion": champion.path, "grpo_model": grpo_model.path},
        outputs={"check": check.path},
        work=work,
        library_version=library_version,
    )
    for name, value in scalars(facts).items():
        metrics.log_metric(name, value)
