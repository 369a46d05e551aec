"""The whole path: from clips and questions to a served, reasoning audio-visual model.

The graph is the same on the local runner and on a Kubeflow Pipelines backend. What shaped it:

- The gate is a step that raises. A false condition would skip training and let the run look like a success.
- ``data_validation`` waits for the base's evaluation, so that a run that ends at the gate still shows the base. The
  base is evaluated behind the merger: beside both teachers its pod would wait for one of their GPUs.
- Where the champion was published is a string: artifacts outside the pipeline's root are refused by the launcher.
- Library version, data hash and image identity are parameters of every component, since the caches compare parameters
  and know neither contents nor moved tags. For the same reason each step gets no more of the configuration than it
  needs: a change reaches the steps that it concerns.
- On a cluster the run's summary is made by an exit handler, which runs however the run ends; on one machine the process
  that started the run writes it.
"""

from typing import Any

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
from components.run_summary import run_summary
from components.sft import sft
from components.vision_teacher import vision_teacher
from pipelines.graph import Graph, sharded
from pipelines.options import Options

NAME = "avrt"
COMPONENTS = (
    "preflight",
    "ingest",
    "vision_teacher",
    "audio_teacher",
    "merger",
    "data_validation",
    "sft",
    "grpo",
    "evaluation",
    "promotion",
    "deployment",
)
DESCRIPTION = "Teach an audio-visual model to reason, from the reasoning of single-modality teachers."


def build(options: Options) -> Any:
    """The pipeline function.

    Args:
        options: the compile-time options.
    """
    images = options.images
    teachers = (sharded(vision_teacher, options), sharded(audio_teacher, options))

    @dsl.pipeline(name=NAME, description=DESCRIPTION, pipeline_config=options.pipeline_config())
    def avrt(
        work: str = "",
        data_hash: str = options.data_hash,
        library_version: str = __version__,
        pipeline_image: str = images.pipeline,
        train_image: str = images.train,
        vllm_image: str = images.vllm,
    ) -> None:
        common = {"work": work, "data_hash": data_hash, "library_version": library_version}
        graph = Graph(options, common, {"pipeline": pipeline_image, "train": train_image, "vllm": vllm_image})
        with graph.summarised(run_summary, COMPONENTS):
            checked = graph.task(preflight, components=",".join(COMPONENTS))
            ingested = graph.task(ingest).after(checked)
            samples = ingested.outputs["samples"]
            merging = traces(graph, samples, *teachers)
            base = graph.task(evaluation, "evaluation-base", samples=samples, role="base").after(merging)
            train(graph, samples, merging.outputs["merged"], base)

    return avrt


def traces(graph: Graph, samples: Any, vision_shards: Any, audio_shards: Any) -> Any:
    """Both teachers, and the merger's task, whose output ``merged`` has the merged traces of the training samples."""
    common = {**graph.common, "samples": samples, "image": graph.images["vllm"]}
    seen, heard = vision_shards(**common), audio_shards(**common)
    return graph.task(merger, samples=samples, vision_traces=seen.output, audio_traces=heard.output)


def train(graph: Graph, samples: Any, merged: Any, base: Any) -> None:
    """From merged traces to a served champion: the gate, SFT, GRPO, their evaluation, promotion and deployment.

    Args:
        graph: makes the tasks.
        samples: the sample table.
        merged: the merged traces.
        base: the base's evaluation.
    """
    gate = graph.task(data_validation, samples=samples, merged=merged).after(base)
    cold_start = graph.task(sft, samples=samples, merged=merged).after(gate)
    sft_model = cold_start.outputs["model"]
    reinforced = graph.task(grpo, samples=samples, sft_model=sft_model)
    grpo_model = reinforced.outputs["model"]
    sft_evaluated = graph.task(evaluation, "evaluation-sft", samples=samples, model=sft_model, role="sft")
    grpo_evaluated = graph.task(evaluation, "evaluation-grpo", samples=samples, model=grpo_model, role="grpo")
    promoted = graph.task(
        promotion,
        base_predictions=base.outputs["predictions"],
        sft_predictions=sft_evaluated.outputs["predictions"],
        grpo_predictions=grpo_evaluated.outputs["predictions"],
        sft_model=sft_model,
        grpo_model=grpo_model,
    )
    graph.task(deployment, samples=samples, champion=promoted.outputs["champion"], grpo_model=grpo_model)
