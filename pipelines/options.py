"""What is decided when a pipeline is compiled: the shape of its graph, its images, and the cluster."""

from dataclasses import dataclass, field
from typing import Any

from kfp import dsl

from avrt_lib.cluster.profile import Profile
from avrt_lib.config import Config
from avrt_lib.errors import ConfigError
from components.images import Images

#: Argo moves arguments of more than 128 KiB into ConfigMaps, which its stock role may not create. A graph's driver gets
#: all of its tasks, and these hold the configuration three times and parts of it about twice more.
MAX_CONFIG_BYTES = 15_000


@dataclass(frozen=True)
class Options:
    """Compile-time options.

    Attributes:
        config: the run's configuration. Shards of the teachers are tasks of their own, so few and large.
        images: the container images.
        cluster: the cluster's profile; None: the local runner, or a backend that needs nothing said.
        data_hash: identity of the source data; empty where it is not known when the pipeline is compiled, and then a
            cluster reads the sources anew in every run.
    """

    config: Config
    images: Images = field(default_factory=Images)
    cluster: Profile | None = None
    data_hash: str = ""

    def pipeline_config(self) -> Any:
        """The settings of the run as a whole: when finished workflows are removed, and how long one may take."""
        if self.cluster is None:
            return None
        access = self.cluster.pipelines
        return dsl.PipelineConfig(
            ttl_seconds_after_finished=access.ttl_s,
            active_deadline_seconds=access.deadline_s,
        )


def config_parameter(config: Config) -> str:
    """A configuration, or a part of it, as the text that travels through the pipeline.

    The local runner replaces the text ``python3`` in every parameter by the interpreter's path, so the letters are
    escaped; JSON readers see the same document.

    Raises:
        ConfigError: where the configuration is too large to travel as a parameter.
    """
    text = config.to_json().replace("python3", "python\\u0033")
    size = len(text.encode())
    if size > MAX_CONFIG_BYTES:
        raise ConfigError(
            f"The configuration has {size} bytes, but only {MAX_CONFIG_BYTES} can travel with a pipeline."
        )
    return text
