"""From clips and questions to checked, published reasoning traces; no training."""

from typing import Any

from kfp import dsl

from avrt_lib import __version__
from components.audio_teacher import audio_teacher
from components.data_validation import data_validation
from components.ingest import ingest
from components.preflight import preflight
from components.publish_traces import publish_traces
from components.run_summary import run_summary
from components.vision_teacher import vision_teacher
from pipelines.avrt import traces
from pipelines.graph import Graph, sharded
from pipelines.options import Options

COMPONENTS = (
    "preflight",
    "ingest",
    "vision_teacher",
    "audio_teacher",
    "merger",
    "data_validation",
    "publish_traces",
)


def build(options: Options) -> Any:
    """The pipeline function; see ``pipelines.avrt.build``."""
    images = options.images
    teachers = (sharded(vision_teacher, options), sharded(audio_teacher, options))

    @dsl.pipeline(
        name="avrt-data",
        description="Reasoning traces of both teachers, merged, checked and published.",
        pipeline_config=options.pipeline_config(),
    )
    def data(
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
            samples = ingested.outputs["samples"]
            merged = traces(graph, samples, *teachers).outputs["merged"]
            gate = graph.task(data_validation, samples=samples, merged=merged)
            graph.task(publish_traces, merged=merged).after(gate)

    return data
