"""Which model becomes the champion."""

from typing import NamedTuple

from kfp import dsl

from components.images import DEFAULT


@dsl.component(base_image=DEFAULT.pipeline, install_kfp_package=False)
def promotion(
    base_predictions: dsl.Input[dsl.Dataset],
    sft_predictions: dsl.Input[dsl.Dataset],
    grpo_predictions: dsl.Input[dsl.Dataset],
    sft_model: dsl.Input[dsl.Model],
    grpo_model: dsl.Input[dsl.Model],
    champion: dsl.Output[dsl.Artifact],
    config: str,
    library_version: str,
    data_hash: str,
    image: str,
    work: str = "",
) -> NamedTuple("Outputs", [("champion_uri", str), ("champion_sha256", str)]):  # type: ignore[valid-type]
    """Choose the winner on the validation questions, and publish it if it beats the base by a paired test.

    A model that is not promoted is a success with a reason.

    Args:
        base_predictions: what the base answered.
        sft_predictions: what the SFT model answered.
        grpo_predictions: what the GRPO model answered.
        sft_model: the SFT checkpoint.
        grpo_model: the GRPO checkpoint.
        champion: the decision with its evidence, and the InferenceService manifest of the champion.
        config: the run's configuration, or the step's part of it, as JSON text.
        library_version: the version of avrt that the pipeline was compiled with.
        data_hash: identity of the source data; part of the cache key.
        image: identity of the container image; part of the cache key.
        work: folder that survives a killed step; empty: none.

    Returns:
        champion_uri: where the champion was published; a string, since it lies outside the pipeline's root. Empty
            where nothing was promoted.
        champion_sha256: SHA-256 of its content, as its manifest lists it, or empty.
    """
    from collections import namedtuple

    from avrt_lib.steps import run_step

    facts = run_step(
        "promotion",
        config=config,
        inputs={
            "base_predictions": base_predictions.path,
            "sft_predictions": sft_predictions.path,
            "grpo_predictions": grpo_predictions.path,
            "sft_model": sft_model.path,
            "grpo_model": grpo_model.path,
        },
        outputs={"champion": champion.path},
        work=work,
        library_version=library_version,
    )
    Outputs = namedtuple("Outputs", ["champion_uri", "champion_sha256"])
    return Outputs(facts.get("uri") or "", facts.get("sha256") or "")
