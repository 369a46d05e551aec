"""From a configuration and a cluster profile to a run of the backend."""

from __future__ import annotations

import re
import tempfile
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import kfp_server_api  # type: ignore[import-untyped]
import yaml

from avrt_lib.cluster.profile import Profile
from avrt_lib.config import Config
from components.images import Images
from pipelines.backend import Backend, checked_name
from pipelines.compile import compile_pipeline, data_identity

#: Where published traces are: the place tells what they are.
_CONTENT = re.compile(r"s3://.+/[0-9a-f]{64}/?")


@dataclass(frozen=True)
class Order:
    """What is to be run.

    Attributes:
        config: the configuration, with the profile's overrides in it.
        profile: the cluster.
        images: the images' references.
        pipeline: one of ``pipelines.compile.PIPELINES``.
        cache: False runs every step, also those that the backend has a result of.
        traces: where the merged traces are; only the pipeline ``train`` takes them.
    """

    config: Config
    profile: Profile
    images: Images
    pipeline: str = "avrt"
    cache: bool = True
    traces: str | None = None

    @property
    def parameters(self) -> dict[str, str]:
        """The parameters that have no default in the compiled pipeline."""
        return {} if self.traces is None else {"traces": self.traces}

    @property
    def name(self) -> str:
        """Tells runs of this kind from others."""
        return f"{self.pipeline}-{self.config.name}"

    def compiled(self, *, data_hash: str) -> list[dict[str, Any]]:
        """The compiled pipeline and its platform spec, as documents.

        Args:
            data_hash: identity of the source data; empty: the sources are read anew in every run.
        """
        with tempfile.TemporaryDirectory(prefix="avrt-submit-") as folder:
            path = Path(folder) / "pipeline.yaml"
            compile_pipeline(self.config, path, self.images, self.profile, data_hash=data_hash, pipeline=self.pipeline)
            documents: list[dict[str, Any]] = list(yaml.safe_load_all(path.read_text(encoding="utf-8")))
        if not self.cache:
            uncached(documents[0])
        elif self.traces is not None and not _CONTENT.fullmatch(self.traces):
            uncached(documents[0], "comp-import-traces")  # the cache would compare the place alone
        return documents


def uncached(spec: dict[str, Any], component: str | None = None) -> None:
    """Turn the backend's cache off for all tasks, those of nested pipelines and of the exit handler's group too.

    ``kfp.Client`` does so for the outermost tasks only.

    Args:
        spec: the compiled pipeline, which is changed.
        component: only for the tasks of this one.
    """
    for each in (spec["root"], *spec["components"].values()):
        for task in (each.get("dag") or {}).get("tasks", {}).values():
            if component in (None, task["componentRef"]["name"]):
                task["cachingOptions"] = {}


def submit(
    backend: Backend,
    order: Order,
    *,
    experiment: str | None = None,
    run_name: str | None = None,
    data_hash: str | None = None,
) -> str:
    """Compile and start a run, and return its id.

    Args:
        backend: where.
        order: what.
        experiment: None takes the profile's.
        run_name: None makes one of the configuration's name and the time.
        data_hash: what tells the source data from other data; None takes the fingerprint of what this machine sees.

    Raises:
        AvrtError: where it cannot be compiled, or the backend refuses it.
    """
    access = order.profile.pipelines
    name = run_name or f"{order.name}-{datetime.now(UTC):%Y%m%d-%H%M%S}"
    checked_name("run", name)
    spec, *platform = order.compiled(data_hash=data_hash or data_identity(order.config))
    body = kfp_server_api.V2beta1Run(
        display_name=name,
        experiment_id=backend.experiment(experiment or access.experiment),
        pipeline_spec={"pipeline_spec": spec, "platform_spec": platform[0]} if platform else spec,
        runtime_config=kfp_server_api.V2beta1RuntimeConfig(
            parameters=order.parameters, pipeline_root=access.pipeline_root
        ),
        service_account=access.service_account,
    )
    return str(backend.create_run(body).run_id)
