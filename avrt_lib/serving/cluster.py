"""KServe: create or change the InferenceService, and wait until the new model serves."""

from __future__ import annotations

import logging
import time
from typing import Any

from avrt_lib.config import Config
from avrt_lib.errors import EnvironmentProblem, ServingError

log = logging.getLogger("avrt.serving")

_POLL_S = 2.0
_SOURCE = "internal.serving.kserve.io/storage-initializer-sourceuri"


def deploy(config: Config, decision: dict[str, Any]) -> str:
    """Apply the champion's InferenceService and wait until its pods serve it.

    Args:
        config: ``deployment`` (namespace, ``start_timeout_s``) and what the manifest is made of.
        decision: promotion's, with ``uri``, ``sha256`` and ``version``.

    Returns:
        The cluster's address of the OpenAI interface, ending in ``/v1``.

    Raises:
        EnvironmentProblem: where there is no cluster to talk to.
        ServingError: where the cluster refuses, the model cannot be loaded, or it does not serve in time.
    """
    from kserve import KServeClient, constants
    from kubernetes.client import ApiException
    from kubernetes.config import ConfigException

    from avrt_lib.promotion.manifest import inference_service, to_dict
    from avrt_lib.store import ModelPlace

    service = inference_service(config, ModelPlace(decision["uri"], decision["sha256"], 0), decision["version"])
    name, namespace = config.promotion.model_name, config.deployment.namespace
    try:
        client = KServeClient()
    except ConfigException as error:
        raise EnvironmentProblem(f"There is no cluster to deploy to ({error}): set KUBECONFIG.") from error
    objects = (
        constants.KSERVE_GROUP,
        constants.KSERVE_V1BETA1_VERSION,
        namespace,
        constants.KSERVE_PLURAL_INFERENCESERVICE,
    )
    document = to_dict(service)
    try:
        try:
            client.api_instance.patch_namespaced_custom_object(*objects, name, document)
        except ApiException as error:
            if error.status != 404:
                raise
            client.api_instance.create_namespaced_custom_object(*objects, document)
        deadline = time.monotonic() + config.deployment.start_timeout_s
        while True:
            found = client.api_instance.get_namespaced_custom_object(*objects, name)
            address = _address(found)
            if address and rolled_out(_deployment(client, f"{name}-predictor", namespace), decision["uri"]):
                return f"{address.rstrip('/')}/v1"
            if problem := load_failure(found):
                raise ServingError(f"KServe cannot load {decision['uri']} for {namespace}/{name}: {problem}")
            if time.monotonic() > deadline:
                raise ServingError(
                    f"{namespace}/{name} did not serve {decision['uri']} in {config.deployment.start_timeout_s:g} s "
                    f"({_conditions(found)}): look at the pods of {name}-predictor."
                )
            time.sleep(_POLL_S)
    except ApiException as error:
        raise ServingError(f"The cluster refused {namespace}/{name}: {error.status} {error.reason}.") from error


def rolled_out(deployment: dict[str, Any] | None, uri: str) -> bool:
    """Whether all pods of a predictor's Deployment serve this model.

    Readiness of the InferenceService does not say so: during a change it may stay true for the old model, and its
    ``observedGeneration`` is the Deployment's.
    """
    if deployment is None:
        return False
    template = deployment["spec"]["template"]["metadata"].get("annotations") or {}
    status = deployment.get("status") or {}
    wanted = deployment["spec"].get("replicas", 1)
    return (
        template.get(_SOURCE) == uri
        and status.get("observedGeneration") == deployment["metadata"]["generation"]
        and wanted > 0
        and status.get("replicas") == wanted
        and status.get("updatedReplicas") == wanted
        and status.get("availableReplicas") == wanted
    )


def load_failure(service: dict[str, Any]) -> str | None:
    """What the controller says went wrong, or None; a failure of the past stays in the status and does not count."""
    status = (service.get("status") or {}).get("modelStatus") or {}
    if status.get("transitionStatus") not in ("BlockedByFailedLoad", "InvalidSpec"):
        return None
    info = status.get("lastFailureInfo") or {}
    return f"{info.get('reason', status['transitionStatus'])}: {' '.join(str(info.get('message', '')).split())[-400:]}"


def _deployment(client: Any, name: str, namespace: str) -> dict[str, Any] | None:
    from kubernetes.client import ApiClient, ApiException

    try:
        found = client.app_api.read_namespaced_deployment(name, namespace)
    except ApiException as error:
        if error.status == 404:
            return None
        raise
    document: dict[str, Any] = ApiClient().sanitize_for_serialization(found)
    return document


def _address(service: dict[str, Any]) -> str | None:
    address = ((service.get("status") or {}).get("address") or {}).get("url")
    return str(address) if address else None


def _conditions(service: dict[str, Any]) -> str:
    conditions = (service.get("status") or {}).get("conditions") or []
    shown = [f"{c['type']}={c['status']} {c.get('reason', '')}".strip() for c in conditions]
    return ", ".join(shown) or "no conditions yet"
