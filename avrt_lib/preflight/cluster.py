"""What a run needs of a cluster, looked for before a GPU is asked for.

The same checks run in the first step's pod and on the machine of whoever submits. Neither may read everything: what
cannot be seen from there is ``not checked``, with the reason. All of it together takes less than a minute, or two
where a store or an MLflow that is still starting is waited for.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence

from avrt_lib.cluster.profile import VARIABLE, Profile, secret_variables
from avrt_lib.config import Config
from avrt_lib.errors import EnvironmentProblem
from avrt_lib.preflight import admin, nodes, objects, services, serving
from avrt_lib.preflight.api import Cluster, NotSeen
from avrt_lib.preflight.checks import FAILED, Check, endpoints
from avrt_lib.preflight.fit import fit

#: The check that fails where the cluster cannot be seen at all.
CLUSTER = "Cluster"


def cluster_checks(config: Config, profile: Profile, components: Sequence[str] | None = None) -> list[Check]:
    """Everything that a run of this configuration asks of the cluster of this profile.

    Args:
        config: the run's configuration, with the profile's ``overrides``.
        profile: the cluster's.
        components: what the run's pipeline is made of; None: the whole path.

    Returns:
        The checks; one that ``failed`` makes the run impossible. No secret's value is in any of them.
    """
    inside, profile = VARIABLE in os.environ, profile.for_pipeline(components)
    variables = {name for keys in secret_variables(profile).values() for name in keys.values()}
    checks = list(fit(config, profile, variables | set(profile.environment), components))
    checks += endpoints(config, inside=inside, components=components)
    credentials: dict[str, dict[str, str]] = {}
    try:
        cluster = Cluster(inside=inside)
        cluster.groups()
    except (EnvironmentProblem, NotSeen) as problem:
        mend = "set KUBECONFIG, or look at the cluster: kubectl get namespaces"
        checks.append(Check(CLUSTER, FAILED, str(problem).rstrip("."), mend))
    else:
        for part in (
            objects.secrets(cluster, config, profile, credentials),
            objects.named(cluster, profile),
            objects.service_pods(cluster, profile),
            serving.kserve(cluster, config, profile),
            admin.kueue(cluster, profile),
            admin.retries(cluster, profile),
            admin.quotas(cluster, profile),
            nodes.pools(cluster, profile),
        ):
            checks += part
    deadline = time.monotonic() + (services.COMING_UP_S if inside else 0.0)
    key = credentials.get(profile.store.secret)
    checks.append(
        services.until_up(
            lambda: services.store_check(config, profile, key, inside=inside, components=components), deadline
        )
    )
    if config.deployment.target == "git" and inside:
        checks.append(services.manifests_check(config))
    if tracking := profile.tracking:
        login = credentials.get(tracking.secret or "")
        checks.append(services.until_up(lambda: services.tracking_check(tracking, login, inside=inside), deadline))
    return checks
