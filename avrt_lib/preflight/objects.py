"""Whether the cluster has what the pods of a run name: secrets, accounts, config maps, claims, Services."""

from __future__ import annotations

import base64
import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from avrt_lib.cluster.profile import Profile, secret_variables
from avrt_lib.config import Config
from avrt_lib.preflight.api import Cluster, NotSeen
from avrt_lib.preflight.checks import FAILED, OK, UNKNOWN, Check

#: Annotation of a Job: the secrets that it makes, as NAMESPACE/NAME (manifests/components/credentials).
MAKES_SECRETS = "avrt/makes-secrets"
_SERVICE_ADDRESS = re.compile(r"(?P<name>[a-z0-9-]+)\.(?P<namespace>[a-z0-9-]+)\.svc(\..*)?")


@dataclass(frozen=True)
class _Wanted:
    """An object that must be there: how a check calls it, and what to do where it is not."""

    label: str
    method: Callable[..., Any]
    name: str
    namespace: str
    mend: str


def secrets(
    cluster: Cluster, config: Config, profile: Profile, credentials: dict[str, dict[str, str]]
) -> Iterator[Check]:
    """The secrets with their keys; the values found are put to ``credentials``, by secret and key."""
    namespace = profile.pipelines.namespace
    needed = secret_variables(profile)
    if config.deployment.target != "kserve" and profile.api_key_secret not in (None, *profile.secret_env):
        needed.pop(str(profile.api_key_secret))
    being_made = _being_made(cluster, config)  # asked first: what ends in between has made them
    for secret, keys in needed.items():
        label = f"Secret {secret}"
        literals = " ".join(f"--from-literal={key}=…" for key in keys)
        mend = f"kubectl --namespace {namespace} create secret generic {secret} {literals}"
        try:
            found = cluster.ask(cluster.core.read_namespaced_secret, secret, namespace)
        except NotSeen as reason:
            yield _unseen_secret(label, keys, inside=cluster.inside, reason=str(reason))
            continue
        if found is None and f"{namespace}/{secret}" in being_made:
            where = config.deployment.namespace
            mend = f"look at it: kubectl --namespace {where} get jobs,pods,events"
            yield Check(label, FAILED, f"is not in {namespace} yet; a Job in {where} makes it", mend, coming_up=True)
            continue
        if found is None:
            yield Check(label, FAILED, f"is not in {namespace}; its keys are {', '.join(keys)}", mend)
            continue
        values = {key: base64.b64decode(value).decode(errors="replace") for key, value in (found.data or {}).items()}
        credentials[secret] = values
        missing = [key for key in keys if not values.get(key)]
        if missing:
            found = f"in {namespace} has no {' and no '.join(missing)}"
            yield Check(label, FAILED, found, f"add it: {', '.join(missing)}")
        else:
            yield Check(label, OK, f"in {namespace}, with {', '.join(keys)}")


def _being_made(cluster: Cluster, config: Config) -> set[str]:
    """The secrets, as NAMESPACE/NAME, that a Job which has not ended says it makes."""
    try:
        jobs = cluster.ask(cluster.batch.list_namespaced_job, config.deployment.namespace).items
    except NotSeen:
        return set()
    return {
        place
        for job in jobs
        if not any(each.type in ("Complete", "Failed") for each in job.status.conditions or [])
        for place in (job.metadata.annotations or {}).get(MAKES_SECRETS, "").split()
    }


def _unseen_secret(label: str, keys: Mapping[str, str], *, inside: bool, reason: str) -> Check:
    """A pod that may not read a secret still sees what its environment took from it."""
    if not inside:
        return Check(label, UNKNOWN, reason)
    missing = [key for key, variable in keys.items() if not os.environ.get(variable)]
    if missing:
        return Check(label, FAILED, f"gives this pod no {' and no '.join(missing)}", "make it, with all of its keys")
    return Check(label, OK, f"gives this pod {', '.join(keys)}")


def named(cluster: Cluster, profile: Profile) -> Iterator[Check]:
    """Service account, image pull secrets, config map and claims."""
    namespace, core = profile.pipelines.namespace, cluster.core
    account = profile.pipelines.service_account
    wanted = []
    if not cluster.inside:  # a pod of the run is there by it
        mend = "correct pipelines.service_account of the profile, or install Kubeflow Pipelines there"
        method = core.read_namespaced_service_account
        wanted.append(_Wanted(f"Service account {account}", method, account, namespace, mend))
    for secret in profile.image_pull_secrets:
        mend = f"kubectl --namespace {namespace} create secret docker-registry {secret} …"
        wanted.append(_Wanted(f"Image pull secret {secret}", core.read_namespaced_secret, secret, namespace, mend))
    if profile.store.ca_config_map:
        name = profile.store.ca_config_map
        mend = f"kubectl --namespace {namespace} create configmap {name} --from-file={profile.store.ca_key}"
        wanted.append(_Wanted(f"Config map {name}", core.read_namespaced_config_map, name, namespace, mend))
    for claim in dict.fromkeys(volume.claim for volume in profile.volumes):
        mend = "make it, or take it out of the profile's volumes"
        wanted.append(_Wanted(f"Claim {claim}", core.read_namespaced_persistent_volume_claim, claim, namespace, mend))
    for each in wanted:
        try:
            found = cluster.ask(each.method, each.name, each.namespace)
        except NotSeen as reason:
            yield Check(each.label, UNKNOWN, str(reason))
            continue
        if found is None:
            yield Check(each.label, FAILED, f"is not in {each.namespace}", each.mend)
        elif each.label.startswith("Claim") and found.status.phase == "Lost":
            yield Check(each.label, FAILED, "has lost its volume", each.mend)
        elif each.label.startswith("Config map") and not (found.data or {}).get(profile.store.ca_key):
            yield Check(each.label, FAILED, f"in {each.namespace} has no {profile.store.ca_key}", each.mend)
        else:
            yield Check(each.label, OK, f"in {each.namespace}")


def service_pods(cluster: Cluster, profile: Profile) -> Iterator[Check]:
    """Whether pods stand behind the store's and MLflow's addresses, where these are Services of the cluster.

    A pod of the run asks them itself.
    """
    hosts = [urlsplit(f"//{profile.store.endpoint}").hostname]
    hosts += [urlsplit(profile.tracking.uri).hostname] if profile.tracking else []
    for address in () if cluster.inside else filter(None, (_SERVICE_ADDRESS.fullmatch(host or "") for host in hosts)):
        name, namespace = address["name"], address["namespace"]
        label, of_service = f"Service {name}", f"kubernetes.io/service-name={name}"
        try:
            service = cluster.ask(cluster.core.read_namespaced_service, name, namespace)
            slices = cluster.ask(
                cluster.discovery.list_namespaced_endpoint_slice, namespace, label_selector=of_service
            ).items
        except NotSeen as reason:
            yield Check(label, UNKNOWN, f"in {namespace}: {reason}")
            continue
        ready = any(
            endpoint.conditions is None or endpoint.conditions.ready is not False
            for each in slices
            for endpoint in each.endpoints or []
        )
        if service is None:
            mend = "apply an overlay of manifests, or correct the address in the profile"
            yield Check(label, FAILED, f"is not in {namespace}", mend)
        elif not ready and service.spec.type != "ExternalName":
            mend = f"look at them: kubectl --namespace {namespace} get pods,events"
            yield Check(label, FAILED, f"has no pod in {namespace} that is ready", mend, coming_up=True)
        else:
            yield Check(label, OK, f"in {namespace}")
