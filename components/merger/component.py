"""From two single-modality traces to one audio-visual reasoning."""

from typing import List  # noqa: UP035 - kfp 2.17 reads only this form of a list of artifacts

from kfp import dsl

from components.images import DEFAULT


@dsl.component(base_image=DEFAULT.vllm, install_kfp_package=False)
def merger(
    samples: dsl.Input[dsl.Dataset],
    vision_traces: dsl.Input[List[dsl.Dataset]],  # noqa: UP006
    audio_traces: dsl.Input[List[dsl.Dataset]],  # noqa: UP006
    merged: dsl.Output[dsl.Dataset],
    metrics: dsl.Output[dsl.Metrics],
    config: str,
    library_version: str,
    data_hash: str,
    image: str,
    work: str = "",
) -> None:
    """Sort the samples into the ledger of who was right, keep those that the filter keeps, and merge their traces.

    Args:
        samples: the samples that ingest wrote.
        vision_traces: the vision teacher's traces, one table for each shard.
        audio_traces: the audio teacher's traces, one table for each shard.
        merged: the ledger with the merged reasoning of the kept samples, and the flags that the check found.
        metrics: the cells of the ledger, merged rows and flags.
        config: the run's configuration, or the step's part of it, as JSON text.
        library_version: the version of avrt that the pipeline was compiled with.
        data_hash: identity of the source data; part of the cache key.
        image: identity of the container image; part of the cache key.
        work: folder that survives a killed step; empty: none.
    """
    from avrt_lib.steps import run_step, scalars

    facts = run_step(
        "merger",
        config=config,
        inputs={
            "samples": samples.path,
            "vision_traces": [table.path for table in vision_traces],
            "audio_traces": [table.path for table in audio_traces],
        },
        outputs={"merged": merged.path},
        work=work,
        library_version=library_version,
    )
    for name, value in scalars(facts).items():
        metrics.log_metric(name, value)
