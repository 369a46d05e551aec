"""Compile the pipeline: ``python -m pipelines.compile CONFIG OUTPUT``."""

import argparse
import hashlib
import importlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from kfp import compiler
from kfp.compiler.compiler_utils import KubernetesManifestOptions

from avrt_lib.cluster.profile import Profile, load_profile
from avrt_lib.config import Config, load
from avrt_lib.errors import AvrtError, DataError
from avrt_lib.ingest.fingerprint import fingerprint
from avrt_lib.tables import atomic_path
from components.images import DEFAULT, Images, built
from pipelines.options import Options

#: The graphs: modules of this package with a ``build``.
PIPELINES = ("avrt", "data", "train", "evaluate")


def compile_pipeline(
    config: Config,
    output: Path,
    images: Images | None = None,
    cluster: Profile | None = None,
    *,
    data_hash: str = "",
    pipeline: str = "avrt",
    kubernetes: bool = False,
) -> None:
    """Write a pipeline of a configuration as KFP IR YAML; the same arguments give the same bytes.

    Args:
        config: the configuration; each task holds what its step needs of it.
        output: the YAML file.
        images: the images' references.
        cluster: the profile of the cluster that will run it; its settings become the platform spec, the second document
            of the file.
        data_hash: identity of the source data, where it is known.
        pipeline: which of the pipelines, see ``PIPELINES``.
        kubernetes: write ``Pipeline`` and ``PipelineVersion`` objects instead, for a backend that keeps its pipelines
            in Kubernetes.
    """
    config = for_pipeline(config, pipeline)
    options = Options(config, images or DEFAULT, cluster, data_hash)
    manifest: dict[str, Any] = {}
    if kubernetes:
        version = hashlib.sha256(f"{config.sha256} {images} {cluster} {data_hash}".encode()).hexdigest()[:12]
        manifest = {
            "kubernetes_manifest_format": True,
            "kubernetes_manifest_options": KubernetesManifestOptions(
                pipeline_name=f"{pipeline}-{config.name}",
                pipeline_version_name=f"{pipeline}-{config.name}-{version}",
                namespace=cluster.pipelines.namespace if cluster else "kubeflow",
                include_pipeline_manifest=True,
            ),
        }
    with atomic_path(output.with_suffix(".yaml")) as temporary:
        written = temporary.with_name(temporary.name + ".yaml")  # the compiler insists on this ending
        # In a thread of its own: for each setting of a task KFP's PipelineTask._ensure_container_spec_exists calls
        # inspect.stack() for a function's name, which looks up source and module of every frame of the stack. Under
        # a deep stack, as a command line's or pytest's, that takes many times what the compiler itself does.
        with ThreadPoolExecutor(1) as thread:
            thread.submit(_compile, pipeline, options, written, manifest).result()
        written.replace(temporary)


def for_pipeline(config: Config, pipeline: str) -> Config:
    """The configuration as this pipeline needs it: one that deploys nothing asks for no place to deploy to."""
    if "deployment" in components_of(pipeline):
        return config
    return config.model_copy(update={"deployment": config.deployment.model_copy(update={"target": "local"})})


def components_of(pipeline: str) -> tuple[str, ...]:
    """What a pipeline is made of: components, or single instances of them."""
    found: tuple[str, ...] = importlib.import_module(f"pipelines.{pipeline}").COMPONENTS
    return found


def _compile(pipeline: str, options: Options, written: Path, manifest: dict[str, Any]) -> None:
    function = importlib.import_module(f"pipelines.{pipeline}").build(options)
    compiler.Compiler().compile(function, str(written), **manifest)


def data_identity(config: Config) -> str:
    """The fingerprint of the sources; empty where they are not on this machine."""
    try:
        return fingerprint(config.data)
    except DataError:
        return ""


def main(arguments: list[str] | None = None) -> None:
    """Entry point of ``python -m pipelines.compile``."""
    parser = argparse.ArgumentParser(prog="python -m pipelines.compile", description=__doc__)
    parser.add_argument("config", type=Path, help="a configuration file, with the profile's overrides in it")
    parser.add_argument("output", type=Path, help="the YAML file to write")
    for name in ("pipeline", "train", "vllm"):
        parser.add_argument(f"--{name}-image", help="by default what `make images` built, for a cluster")
    parser.add_argument("--pipeline", choices=PIPELINES, default="avrt")
    parser.add_argument("--cluster", type=Path, help="a cluster profile")
    parser.add_argument("--data-hash", help="tells the data from other data, where this machine does not see it")
    parser.add_argument("--kubernetes", action="store_true", help="write Pipeline and PipelineVersion objects")
    given = parser.parse_args(arguments)
    try:
        _compile_given(given)
    except AvrtError as error:
        parser.exit(error.exit_code, f"{error}\n")


def _compile_given(given: argparse.Namespace) -> None:
    config = load(given.config)
    cluster = load_profile(given.cluster) if given.cluster else None
    found = built(registry=cluster.registry, variant=cluster.build) if cluster else None
    images = found or DEFAULT.at(cluster.registry if cluster else None)
    images = Images(
        given.pipeline_image or images.pipeline, given.train_image or images.train, given.vllm_image or images.vllm
    )
    compile_pipeline(
        config,
        given.output,
        images,
        cluster,
        data_hash=given.data_hash or (data_identity(config) if cluster else ""),
        pipeline=given.pipeline,
        kubernetes=given.kubernetes,
    )


if __name__ == "__main__":
    main()
