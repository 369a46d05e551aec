"""The miniature's data half and one SFT step in the built images, through KFP's DockerRunner.

A process of its own, since the local runner patches ``print`` and keeps its settings for good.

python -m tests.containers.half_run ROOT        (ROOT: an empty folder that anybody may write)
"""

import sys
from pathlib import Path
from typing import Any

from kfp import dsl, local

from avrt_lib import __version__
from avrt_lib.config import Config, load
from components.audio_teacher import audio_teacher
from components.data_validation import data_validation
from components.images import Images, built
from components.ingest import ingest
from components.sft import sft
from components.vision_teacher import vision_teacher
from pipelines.avrt import traces
from pipelines.graph import Graph, sharded
from pipelines.options import Options

CHECKOUT = Path(__file__).resolve().parents[2]
#: As OpenShift runs a pod: an id that no image knows, group 0, no privileges. No network; only /tmp can be written.
CONTAINER = {
    "user": "12345:0",
    "network_mode": "none",
    "read_only": True,
    "tmpfs": {"/tmp": "exec,mode=1777"},
    "cap_drop": ["ALL"],
    "security_opt": ["no-new-privileges"],
    "shm_size": "1g",
}


def tiny() -> Config:
    """The miniature, with few clips and one step under ZeRO-2 with offload."""
    return load(
        CHECKOUT / "configs" / "miniature.yaml",
        {
            "data.train.count": 48,
            "data.validation.count": 8,
            "data.test.count": 8,
            "teachers.shards": 1,
            "teachers.parallelism": 1,
            "validation.minimum_rows": 1,
            "validation.max_letter_share": 1.0,
            "sft.max_steps": 1,
            "sft.per_device_batch": 4,
            "sft.stop_low": None,
            "sft.cooldown_from": None,
            "sft.validation_samples": 8,
            "sft.deepspeed": "zero2_offload",
        },
    )


def build(config: Config, images: Images) -> Any:
    """The pipeline function."""
    options = Options(config, images)
    teachers = (sharded(vision_teacher, options), sharded(audio_teacher, options))

    @dsl.pipeline(name="container-half")
    def half(pipeline_image: str, train_image: str, vllm_image: str, work: str = "") -> None:
        common = {"work": work, "data_hash": "", "library_version": __version__}
        graph = Graph(options, common, {"pipeline": pipeline_image, "train": train_image, "vllm": vllm_image})
        samples = graph.task(ingest).outputs["samples"]
        merged = traces(graph, samples, *teachers).outputs["merged"]
        gate = graph.task(data_validation, samples=samples, merged=merged)
        graph.task(sft, samples=samples, merged=merged).after(gate)

    return half


def main() -> None:
    """Run it below the folder that the command line names."""
    root = Path(sys.argv[1]).absolute()
    images = built(CHECKOUT / "build" / "images.json")
    assert images is not None
    config = tiny()
    local.init(local.DockerRunner(**CONTAINER), pipeline_root=str(root), enable_caching=False)
    references = {"pipeline_image": images.pipeline, "train_image": images.train, "vllm_image": images.vllm}
    build(config, images)(**references)


if __name__ == "__main__":
    main()
