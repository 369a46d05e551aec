"""What a model answers, with both modalities and with one removed."""

from typing import Optional

from kfp import dsl

from components.images import DEFAULT


@dsl.component(base_image=DEFAULT.vllm, install_kfp_package=False)
def evaluation(
    samples: dsl.Input[dsl.Dataset],
    predictions: dsl.Output[dsl.Dataset],
    metrics: dsl.Output[dsl.Metrics],
    role: str,
    config: str,
    library_version: str,
    data_hash: str,
    image: str,
    work: str = "",
    model: Optional[dsl.Input[dsl.Model]] = None,  # noqa: UP045 - kfp reads annotations, and knows only this form
) -> None:
    """Ask a model the validation and test questions, with greedy decoding, in every configured condition.

    Args:
        samples: the samples that ingest wrote.
        predictions: one row for each question and condition.
        metrics: accuracy, invalid answers and words on the test questions.
        role: what the model is in this run: base, sft or grpo.
        config: the run's configuration, or the step's part of it, as JSON text.
        library_version: the version of avrt that the pipeline was compiled with.
        data_hash: identity of the source data; part of the cache key.
        image: identity of the container image; part of the cache key.
        work: folder that survives a killed step; empty: none.
        model: the checkpoint; absent: the student of the configuration as it is.
    """
    from avrt_lib.steps import run_step, scalars

    facts = run_step(
        "evaluation",
        config=config,
        inputs={"samples": samples.path, "model": model.path if model else ""},
        outputs={"predictions": predictions.path},
        work=work,
        params={"role": role},
        library_version=library_version,
    )
    for name, value in scalars(facts).items():
        metrics.log_metric(name, value)
