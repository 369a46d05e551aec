"""The champion's KServe InferenceService, made of the KServe SDK's own classes."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import yaml

from avrt_lib import compat
from avrt_lib.config import Config
from avrt_lib.errors import ConfigError
from avrt_lib.tracking import DATA_HASH, RUN_ID

if TYPE_CHECKING:
    from kserve import V1beta1InferenceService

    from avrt_lib.store import ModelPlace

#: KServe builds the host name NAME-predictor-NAMESPACE, a DNS label of at most 63 characters.
LONGEST_NAME_AND_NAMESPACE = 52
#: What a rollout's candidate has behind the champion's name (``avrt_lib.serving.rollout``).
CANDIDATE = "-candidate"

#: Annotations: what is served, and where it comes from.
MODEL_SHA256 = "avrt/model-sha256"
MODEL_VERSION = "avrt/model-version"
RUN = "avrt/run"
DATA = "avrt/data-hash"


def fits(name: str, namespace: str) -> bool:
    """Whether KServe can make a host name of an InferenceService's name and its namespace."""
    return len(name) + len(namespace) <= LONGEST_NAME_AND_NAMESPACE


def check_names(config: Config) -> None:
    """Check that KServe can make host names of all that a deployment makes: target ``kserve`` makes a candidate too.

    Raises:
        ConfigError: where name and namespace are too long; the cluster would say so only after training.
    """
    name, namespace = config.promotion.model_name, config.deployment.namespace
    if config.deployment.target == "kserve":
        name += CANDIDATE
    if not fits(name, namespace):
        raise ConfigError(
            f"promotion.model_name (as {name}) and deployment.namespace ({namespace}) have more than "
            f"{LONGEST_NAME_AND_NAMESPACE} characters together: KServe cannot make a host name of them, shorten one."
        )


def launcher_arguments(config: Config) -> list[str]:
    """What the launcher must know of training, so that media enter the model as they did there."""
    return [
        f"--dtype={config.student.dtype}",
        f"--max-model-len={config.student.max_model_len}",
        f"--frames={config.data.frames}",
        f"--video-longest-side-px={config.student.video_longest_side_px}",
    ]


def inference_service(config: Config, place: ModelPlace, version: int | None) -> V1beta1InferenceService:
    """The InferenceService of a published model.

    Quantities are canonical and no field is empty, so that the stored object does not differ from this one. Its
    annotations name the model, and the run and the data that ``AVRT_RUN_ID`` and ``AVRT_DATA_HASH`` name.

    Args:
        config: ``promotion.model_name``, ``deployment`` and ``student`` are read.
        place: the published model.
        version: its version in the registry.

    Raises:
        ConfigError: where the names are too long for KServe.
    """
    with compat.without_arguments():
        from kserve import (
            V1beta1InferenceService,
            V1beta1InferenceServiceSpec,
            V1beta1ModelFormat,
            V1beta1ModelSpec,
            V1beta1PredictorSpec,
            constants,
        )
    from kubernetes.client import V1ObjectMeta, V1ResourceRequirements

    check_names(config)
    deployment = config.deployment
    requests = {"cpu": deployment.cpu, "memory": deployment.memory}
    if deployment.gpus:
        requests["nvidia.com/gpu"] = str(deployment.gpus)
    limits = requests | {"cpu": deployment.cpu_limit or deployment.cpu}  # without one KServe sets one core
    annotations = {
        "serving.kserve.io/deploymentMode": "Standard",
        MODEL_SHA256: place.sha256,
        MODEL_VERSION: None if version is None else str(version),
        RUN: os.environ.get(RUN_ID),
        DATA: os.environ.get(DATA_HASH),
    }
    return V1beta1InferenceService(
        api_version=constants.KSERVE_V1BETA1,
        kind=constants.KSERVE_KIND_INFERENCESERVICE,
        metadata=V1ObjectMeta(
            name=config.promotion.model_name,
            namespace=deployment.namespace,
            annotations={key: value for key, value in annotations.items() if value},
            labels={"app.kubernetes.io/name": config.promotion.model_name, "app.kubernetes.io/part-of": "avrt"},
        ),
        spec=V1beta1InferenceServiceSpec(
            predictor=V1beta1PredictorSpec(
                service_account_name=deployment.service_account,
                min_replicas=1,
                max_replicas=1,
                # Longer than the launcher's drain, or the kubelet would cut the last answers off.
                termination_grace_period_seconds=60,
                model=V1beta1ModelSpec(
                    name=None,
                    model_format=V1beta1ModelFormat(name="vLLM"),
                    runtime=deployment.runtime,
                    storage_uri=place.uri,
                    args=launcher_arguments(config),
                    resources=V1ResourceRequirements(requests=requests, limits=limits),
                ),
            )
        ),
    )


def to_dict(service: V1beta1InferenceService) -> dict[str, Any]:
    """The object as the API server takes it."""
    from kubernetes.client import ApiClient

    document: dict[str, Any] = ApiClient().sanitize_for_serialization(service)
    return document


def to_yaml(service: V1beta1InferenceService) -> str:
    """The object as a manifest file."""
    return str(yaml.safe_dump(to_dict(service), sort_keys=False, width=1000))
