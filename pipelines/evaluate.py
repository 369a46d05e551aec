"""Evaluate one model: the configured student, or an endpoint of one's own (``evaluation.endpoint``)."""

from typing import Any

from kfp import dsl

from avrt_lib import __version__
from components.evaluation import evaluation
from components.ingest import ingest
from components.preflight import preflight
from components.run_summary import run_summary
from pipelines.graph import Graph
from pipelines.options import Options

COMPONENTS = ("preflight", "ingest", "evaluation-base")


def build(options: Options) -> Any:
    """The pipeline function; see ``pipelines.avrt.build``."""
    images = options.images

    @dsl.pipeline(
        name="avrt-evaluate",
        description="Accuracy of one model with all modalities and with one removed.",
        pipeline_config=options.pipeline_config(),
    )
    def evaluate(
        work: str = "",
        data_hash: str = options.data_hash,
        library_version: str = __version__,
        pipeline_image: str = images.pipeline,
        vllm_image: str = images.vllm,
    ) -> None:
        common = {"work": work, "data_hash": data_hash, "library_version": library_version}
        graph = Graph(options, common, {"pipeline": pipeline_image, "vllm": vllm_image})
        with graph.summarised(run_summary, COMPONENTS):
            ingested = graph.task(ingest).after(graph.task(preflight, components=",".join(COMPONENTS)))
            graph.task(evaluation, "evaluation-base", samples=ingested.outputs["samples"], role="base")

    return evaluate
