"""Reinforcement learning on the full training set."""

from kfp import dsl

from components.images import DEFAULT


@dsl.component(base_image=DEFAULT.train, install_kfp_package=False)
def grpo(
    samples: dsl.Input[dsl.Dataset],
    sft_model: dsl.Input[dsl.Model],
    model: dsl.Output[dsl.Model],
    metrics: dsl.Output[dsl.Metrics],
    config: str,
    library_version: str,
    data_hash: str,
    image: str,
    work: str = "",
) -> None:
    """Go on from the SFT checkpoint with group-relative policy optimisation, rewarding format, accuracy and length.

    Args:
        samples: the samples that ingest wrote.
        sft_model: the checkpoint that SFT wrote.
        model: the checkpoint in the layout that vLLM serves.
        metrics: steps, informative groups, KL, and change of the weights.
        config: the run's configuration, or the step's part of it, as JSON text.
        library_version: the version of avrt that the pipeline was compiled with.
        data_hash: identity of the source data; part of the cache key.
        image: identity of the container image; part of the cache key.
        work: folder that survives a killed step; empty: none.
    """
    from avrt_lib.steps import run_step, scalars

    facts = run_step(
        "grpo",
        config=config,
        inputs={"samples": samples.path, "sft_model": sft_model.path},
        outputs={"model": model.path},
        work=work,
        library_version=library_version,
    )
    for name, value in scalars(facts).items():
        metrics.log_metric(name, value)
