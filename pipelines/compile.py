"""Compile the pipeline: ``python -m pipelines.compile CONFIG OUTPUT``."""

import argparse
from pathlib import Path

from kfp import compiler

from avrt_lib.config import Config, load
from avrt_lib.tables import atomic_path
from components.images import DEFAULT, Images
from pipelines.avrt import build
from pipelines.options import Options, config_parameter


def compile_pipeline(config: Config, output: Path, images: Images | None = None) -> None:
    """Write the pipeline of a configuration as KFP IR YAML; the same configuration gives the same bytes."""
    pipeline = build(Options.of(config, images), config_parameter(config))
    with atomic_path(output.with_suffix(".yaml")) as temporary:
        written = temporary.with_name(temporary.name + ".yaml")  # the compiler insists on this ending
        compiler.Compiler().compile(pipeline, str(written))
        written.replace(temporary)


def main(arguments: list[str] | None = None) -> None:
    """Entry point of ``python -m pipelines.compile``."""
    parser = argparse.ArgumentParser(prog="python -m pipelines.compile", description=__doc__)
    parser.add_argument("config", type=Path, help="a configuration file (YAML or JSON)")
    parser.add_argument("output", type=Path, help="the YAML file to write")
    parser.add_argument("--pipeline-image", default=DEFAULT.pipeline)
    parser.add_argument("--train-image", default=DEFAULT.train)
    parser.add_argument("--vllm-image", default=DEFAULT.vllm)
    given = parser.parse_args(arguments)
    images = Images(given.pipeline_image, given.train_image, given.vllm_image)
    compile_pipeline(load(given.config), given.output, images)


if __name__ == "__main__":
    main()
