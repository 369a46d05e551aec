"""What the audio teacher reasons about its shard of the training samples."""

from kfp import dsl

from components.images import DEFAULT


@dsl.component(base_image=DEFAULT.vllm, install_kfp_package=False)
def audio_teacher(
    samples: dsl.Input[dsl.Dataset],
    traces: dsl.Output[dsl.Dataset],
    metrics: dsl.Output[dsl.Metrics],
    shard: int,
    config: str,
    library_version: str,
    data_hash: str,
    image: str,
    work: str = "",
) -> None:
    """Ask the audio teacher about every training sample of one shard, with the sound alone.

    Finished chunks are committed one by one, so a step that was killed goes on behind the last of them.

    Args:
        samples: the samples that ingest wrote.
        traces: the teacher's traces, one for each sample of the shard.
        metrics: counts of valid, correct and failed traces.
        shard: which shard, from 0.
        config: the run's configuration, or the step's part of it, as JSON text.
        library_version: the version of avrt that the pipeline was compiled with.
        data_hash: identity of the source data; part of the cache key.
        image: identity of the container image; part of the cache key.
        work: folder that survives a killed step; empty: none.
    """
    from avrt_lib.steps import run_step, scalars

    facts = run_step(
        "audio_teacher",
        config=config,
        inputs={"samples": samples.path},
        outputs={"traces": traces.path},
        work=work,
        params={"shard": shard},
        library_version=library_version,
    )
    for name, value in scalars(facts).items():
        metrics.log_metric(name, value)
