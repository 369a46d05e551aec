"""From merged traces that are there already to a served champion: published ones, or one's own."""

from typing import Any

from kfp import dsl

from avrt_lib import __version__
from components.evaluation import evaluation
from components.import_traces import import_traces
from components.ingest import ingest
from components.preflight import preflight
from components.run_summary import run_summary
from pipelines.avrt import train as training
from pipelines.graph import Graph
from pipelines.options import Options

COMPONENTS = (
    "preflight",
    "ingest",
    "import_traces",
    "data_validation",
    "sft",
    "grpo",
    "evaluation",
    "promotion",
    "deployment",
)


def build(options: Options) -> Any:
    """The pipeline function; see ``pipelines.avrt.build``. Its parameter ``traces`` says where the traces are."""
    images = options.images

    @dsl.pipeline(
        name="avrt-train",
        description="SFT and GRPO on merged traces that are there already, to a served champion.",
        pipeline_config=options.pipeline_config(),
    )
    def train(
        traces: str,
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
            ingested = graph.task(ingest).after(graph.task(preflight, components=",".join(COMPONENTS)))
            samples = ingested.outputs["samples"]
            merged = graph.task(import_traces, samples=samples, source=traces).outputs["merged"]
            base = graph.task(evaluation, "evaluation-base", samples=samples, role="base")
            training(graph, samples, merged, base)

    return train
