"""Whether the cluster can serve what a run deploys with ``deployment.target=kserve``."""

from __future__ import annotations

from collections.abc import Iterator

from avrt_lib.cluster.profile import Profile
from avrt_lib.config import Config
from avrt_lib.preflight.api import Cluster, NotSeen
from avrt_lib.preflight.checks import FAILED, OK, UNKNOWN, Check

_KSERVE = "serving.kserve.io"
_GATEWAY = "gateway.networking.k8s.io"


def kserve(cluster: Cluster, config: Config, profile: Profile) -> Iterator[Check]:
    """What ``deployment.target=kserve`` needs: KServe, the runtime, the model's service account, and permission."""
    if config.deployment.target != "kserve":
        return
    deployment, pipelines = config.deployment, profile.pipelines
    if _KSERVE not in cluster.groups():
        mend = "install KServe, or set deployment.target to git (or to local for a run that deploys nothing)"
        yield Check("KServe", FAILED, f"the cluster has no {_KSERVE} (its CRDs are missing)", mend)
        return
    yield Check("KServe", OK, f"{_KSERVE}/{cluster.groups()[_KSERVE]}")
    namespace, runtime = deployment.namespace, deployment.runtime
    try:
        found = cluster.custom(_KSERVE, "v1alpha1", "servingruntimes", runtime, namespace) or cluster.custom(
            _KSERVE, "v1alpha1", "clusterservingruntimes", runtime
        )
        yield (
            Check("Serving runtime", OK, runtime)
            if found
            else Check(
                "Serving runtime",
                FAILED,
                f"{runtime} is not in {namespace}",
                "apply manifests/base there, or correct deployment.runtime",
            )
        )
    except NotSeen as reason:
        yield Check("Serving runtime", UNKNOWN, f"{runtime} {reason}")
    label, account = "Model's service account", deployment.service_account
    try:
        if cluster.ask(cluster.core.read_namespaced_service_account, account, namespace) is None:
            mend = "apply manifests/base there, or correct deployment.service_account"
            yield Check(label, FAILED, f"{account} is not in {namespace}", mend)
        else:
            yield Check(label, OK, f"{account} in {namespace}")
    except NotSeen as reason:
        yield Check(label, UNKNOWN, f"{account} {reason}")
    runs_as = f"system:serviceaccount:{pipelines.namespace}:{pipelines.service_account}"
    # What a rollout does (avrt_lib.serving.cluster).
    needed = [(verb, _KSERVE, "inferenceservices") for verb in ("get", "create", "update", "delete")]
    needed += [(verb, "coordination.k8s.io", "leases") for verb in ("get", "create", "update")]
    needed += [("get", "apps", "deployments"), ("list", "", "pods"), ("list", "", "events")]
    if deployment.route:
        needed += [(verb, _GATEWAY, "httproutes") for verb in ("get", "patch")]
        yield _route(cluster, namespace, deployment.route)
    try:
        missing = [
            f"{verb} {resource}"
            for verb, group, resource in needed
            if not cluster.may(runs_as, verb, group, resource, namespace)
        ]
        mend = f"bind the Role avrt-deployer in {namespace} to it (manifests/base)"
        yield (
            Check("Permission", FAILED, f"{runs_as} may not {', '.join(missing)} in {namespace}", mend)
            if missing
            else Check("Permission", OK, f"{runs_as} may deploy to {namespace}")
        )
    except NotSeen as reason:
        yield Check("Permission", UNKNOWN, f"of {runs_as}: {reason}")


def _route(cluster: Cluster, namespace: str, route: str) -> Check:
    if _GATEWAY not in cluster.groups():
        mend = "install the Gateway API and a controller for it, or unset deployment.route"
        return Check("Route", FAILED, f"the cluster has no {_GATEWAY} (its CRDs are missing)", mend)
    try:
        if cluster.custom(_GATEWAY, "v1", "httproutes", route, namespace) is None:
            mend = "apply manifests/components/gateway-api, or correct deployment.route"
            return Check("Route", FAILED, f"there is no HTTPRoute {route} in {namespace}", mend)
    except NotSeen as reason:
        return Check("Route", UNKNOWN, f"{route} {reason}")
    return Check("Route", OK, f"{route} in {namespace}")
