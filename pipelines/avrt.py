"""The whole path: from clips and questions to a served, reasoning audio-visual model.

The graph is the same on the local runner and on a Kubeflow Pipelines backend. What shaped it:

- Shards loop inside a nested pipeline, over a static list: with a loop at the top, the local runner confuses the
  outputs of other tasks with the loop's item, and both runners refuse ``Collected`` over an empty loop.
- The gate is a step that raises. A false condition would skip training and let the run look like a success.
- ``data_validation`` waits for the base's evaluation, so that a run that ends at the gate still shows the base.
- Where the champion was published is a string: artifacts outside the pipeline's root are refused by the launcher.
- Library version, data hash and image identity are parameters of every component, since the caches compare parameters
  and know neither contents nor moved tags.
"""

from collections.abc import Callable
from typing import Any, List, NamedTuple  # noqa: UP035 - kfp 2.17 reads only this form of a list of artifacts

from kfp import dsl

from avrt_lib import __version__
from components.audio_teacher import audio_teacher
from components.data_validation import data_validation
from components.deployment import deployment
from components.evaluation import evaluation
from components.grpo import grpo
from components.ingest import ingest
from components.merger import merger
from components.preflight import preflight
from components.promotion import promotion
from components.sft import sft
from components.vision_teacher import vision_teacher
from pipelines.options import Options

NAME = "avrt"


class Outputs(NamedTuple):
    """What the pipeline gives to whoever runs it as a part of a larger one; empty where nothing was promoted."""

    champion_uri: str
    champion_sha256: str


def sharded(name: str, component: Callable[..., Any], options: Options) -> Any:
    """A nested pipeline that runs a teacher's shards side by side and hands on their traces as one list.

    Args:
        name: of the nested pipeline.
        component: ``vision_teacher`` or ``audio_teacher``.
        options: how many shards, how many at once, and the image.
    """

    @dsl.pipeline(name=name)
    def teacher(
        samples: dsl.Input[dsl.Dataset],
        config: str,
        library_version: str,
        data_hash: str,
        image: str,
        work: str,
    ) -> List[dsl.Dataset]:  # noqa: UP006
        with dsl.ParallelFor(
            items=list(range(options.shards)), parallelism=options.parallelism, name="shards"
        ) as shard:
            task = component(
                samples=samples,
                shard=shard,
                config=config,
                library_version=library_version,
                data_hash=data_hash,
                image=image,
                work=work,
            )
            task.set_container_image(options.images.vllm)
        return dsl.Collected(task.outputs["traces"])  # type: ignore[no-any-return]

    return teacher


def build(options: Options, config: str = "") -> Any:
    """The pipeline function.

    Args:
        options: the compile-time options.
        config: the default of the pipeline's ``config`` parameter (JSON text), so that the compiled file can be
            submitted as it is.
    """
    images = options.images
    vision_shards = sharded("vision-teacher-shards", vision_teacher, options)
    audio_shards = sharded("audio-teacher-shards", audio_teacher, options)

    @dsl.pipeline(
        name=NAME,
        description="Teach an audio-visual model to reason, from the reasoning of single-modality teachers.",
    )
    def avrt(
        config: str = config,
        work: str = "",
        data_hash: str = "",
        library_version: str = __version__,
        pipeline_image: str = images.pipeline,
        train_image: str = images.train,
        vllm_image: str = images.vllm,
    ) -> Outputs:
        common = {"config": config, "work": work, "data_hash": data_hash, "library_version": library_version}

        def on_pipeline(component: Callable[..., Any], **arguments: Any) -> Any:
            return component(**arguments, **common, image=pipeline_image).set_container_image(images.pipeline)

        def on_train(component: Callable[..., Any], **arguments: Any) -> Any:
            return component(**arguments, **common, image=train_image).set_container_image(images.train)

        def on_vllm(component: Callable[..., Any], **arguments: Any) -> Any:
            return component(**arguments, **common, image=vllm_image).set_container_image(images.vllm)

        checked = on_pipeline(preflight).set_caching_options(False)
        ingested = on_pipeline(ingest).after(checked)
        samples = ingested.outputs["samples"]

        seen = vision_shards(samples=samples, **common, image=vllm_image)
        heard = audio_shards(samples=samples, **common, image=vllm_image)
        merging = on_vllm(merger, samples=samples, vision_traces=seen.output, audio_traces=heard.output)
        merged = merging.outputs["merged"]

        base = on_vllm(evaluation, samples=samples, role="base").set_display_name("evaluation-base")
        gate = on_pipeline(data_validation, samples=samples, merged=merged).after(base)

        cold_start = on_train(sft, samples=samples, merged=merged, validated=gate.outputs["report"])
        sft_model = cold_start.outputs["model"]
        reinforced = on_train(grpo, samples=samples, sft_model=sft_model)
        grpo_model = reinforced.outputs["model"]

        sft_evaluated = on_vllm(evaluation, samples=samples, model=sft_model, role="sft")
        sft_evaluated.set_display_name("evaluation-sft")
        grpo_evaluated = on_vllm(evaluation, samples=samples, model=grpo_model, role="grpo")
        grpo_evaluated.set_display_name("evaluation-grpo")
        promoted = on_pipeline(
            promotion,
            base_predictions=base.outputs["predictions"],
            sft_predictions=sft_evaluated.outputs["predictions"],
            grpo_predictions=grpo_evaluated.outputs["predictions"],
            sft_model=sft_model,
            grpo_model=grpo_model,
        ).set_caching_options(False)
        on_pipeline(
            deployment, samples=samples, champion=promoted.outputs["champion"], grpo_model=grpo_model
        ).set_caching_options(False)

        return Outputs(promoted.outputs["champion_uri"], promoted.outputs["champion_sha256"])

    return avrt
