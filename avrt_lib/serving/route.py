"""A share of the champion's requests for its candidate, by the weights of an HTTPRoute of the Gateway API.

The route and its Gateway are the platform's. At rest the route leads to the champion alone: a candidate that is not
there would make it unhealthy. While the traffic is shared, each rule that leads to the champion names both.
"""

from __future__ import annotations

import copy
import time
from dataclasses import dataclass
from typing import Self

from avrt_lib.config import DeploymentConfig
from avrt_lib.errors import ServingError, UsageError
from avrt_lib.serving.cluster import Cluster, Conflict, Document

#: For the Gateway to say that it has taken a change up.
TAKE_UP_S = 60.0
#: What it says may be ahead of its proxies.
SETTLE_S = 5.0
POLL_S = 0.5
_TRIES = 10


@dataclass(frozen=True, slots=True)
class Split:
    """How a candidate gets a share of the real traffic before the champion changes.

    Attributes:
        route: the HTTPRoute through which users reach the champion.
        percent: the candidate's share of the requests.
        seconds: for how long.
    """

    route: str
    percent: int
    seconds: float

    @classmethod
    def of(cls, deployment: DeploymentConfig) -> Self | None:
        """What the configuration asks for; None where it names no route."""
        if deployment.route is None:
            return None
        return cls(deployment.route, deployment.split_percent, deployment.split_seconds)


class Route:
    """The HTTPRoute through which users reach a champion.

    Args:
        cluster: its namespace, which is the champion's.
        name: its name.
        champion: the champion's InferenceService.
        candidate: the candidate's.
    """

    def __init__(self, cluster: Cluster, name: str, champion: str, candidate: str) -> None:
        self.name = name
        self._cluster = cluster
        self._champion, self._candidate = f"{champion}-predictor", f"{candidate}-predictor"

    def is_shared(self) -> bool:
        """Whether it leads to the candidate too."""
        found = self._cluster.route(self.name) or {"spec": {}}
        return any(self._candidate in _services(rule) for rule in found["spec"].get("rules") or [])

    def check(self) -> None:
        """Make sure that the traffic can be shared, and change nothing.

        Raises:
            EnvironmentProblem: where the cluster has no Gateway API, or this account may not change the route.
            UsageError: where there is no such route, or it is not one whose traffic can be shared.
            ServingError: where its Gateway does not take it.
        """
        self._set(50, dry_run=True)
        if problem := self._problem():
            raise ServingError(problem)

    def share(self, percent: int) -> None:
        """Give the candidate its share of the requests.

        Raises:
            ServingError: where the Gateway does not take it up.
        """
        self._set(percent)
        self._wait()

    def watch(self, percent: int) -> None:
        """Make sure that the candidate still gets its share.

        Raises:
            ServingError: where it does not.
        """
        found = self._found()
        if found["spec"]["rules"] != self._weighted(found, percent):
            raise ServingError(
                f"somebody else changed {self._place}: keep it from them during a rollout (Argo CD needs an ignore "
                "rule: docs/serving.md)."
            )
        if problem := self._problem(found):
            raise ServingError(problem)

    def take_back(self) -> None:
        """Let everything go to the champion again; the candidate may be removed afterwards.

        Raises:
            ServingError: where the Gateway does not take it up.
        """
        if self._cluster.route(self.name) is None:  # it leads nowhere
            return
        if self.is_shared():
            self._set(0)
        self._wait()
        time.sleep(SETTLE_S)

    @property
    def _place(self) -> str:
        return f"HTTPRoute {self._cluster.namespace}/{self.name}"

    def _found(self) -> Document:
        found = self._cluster.route(self.name)
        if found is None:
            raise UsageError(
                f"There is no {self._place}: apply manifests/components/gateway-api, or correct deployment.route."
            )
        return found

    def _set(self, percent: int, *, dry_run: bool = False) -> None:
        """Write the weights; somebody else writes the route's status at the same time."""
        for attempt in range(1, _TRIES + 1):
            found = self._found()
            rules = self._weighted(found, percent)
            if rules == found["spec"]["rules"]:
                return
            try:
                self._cluster.set_rules(found, rules, dry_run=dry_run)
            except Conflict:
                if attempt == _TRIES:
                    raise
                time.sleep(0.2)
            else:
                return

    def _weighted(self, found: Document, percent: int) -> list[Document]:
        """The route's rules with this share for the candidate; with none they do not name it."""
        for owner in found["metadata"].get("ownerReferences") or []:
            if owner["kind"] == "InferenceService":
                raise UsageError(f"{self._place} is KServe's, which would set it back: name a route of your own.")
        rules: list[Document] = copy.deepcopy(found["spec"].get("rules") or [])
        ours = [rule for rule in rules if self._champion in _services(rule)]
        if not ours:
            raise UsageError(f"{self._place} does not lead to Service {self._champion}: correct its backendRefs.")
        for rule in ours:
            if others := _services(rule) - {self._champion, self._candidate}:
                raise UsageError(
                    f"A rule of {self._place} leads to {', '.join(sorted(others))} beside {self._champion}: a share "
                    "for the candidate can only be taken where the champion has all."
                )
            champion = next(ref for ref in rule["backendRefs"] if ref["name"] == self._champion)
            if percent:
                candidate = {**champion, "name": self._candidate, "weight": percent}
                rule["backendRefs"] = [{**champion, "weight": 100 - percent}, candidate]
            elif len(rule["backendRefs"]) > 1:
                rule["backendRefs"] = [{**champion, "weight": 100}]
        return rules

    def _problem(self, found: Document | None = None) -> str | None:
        """Why no Gateway has taken the route up as it is now; None where one has."""
        found = found or self._found()
        generation = found["metadata"].get("generation")
        said = []
        for parent in (found.get("status") or {}).get("parents") or []:
            now = {c["type"]: c for c in parent["conditions"] if c.get("observedGeneration", generation) == generation}
            wanted = [now.get(kind) for kind in ("Accepted", "ResolvedRefs")]
            if all(condition and condition["status"] == "True" for condition in wanted):
                return None
            said += [f"{c['reason']}: {c.get('message', '')}" for c in wanted if c and c["status"] != "True"]
        reason = said[0] if said else "it says nothing about it"
        return (
            f"The Gateway of {self._place} does not take it ({reason}): correct its parentRefs and hostnames, or look "
            "at the Gateway."
        )

    def _wait(self) -> None:
        deadline = time.monotonic() + TAKE_UP_S
        while problem := self._problem():
            if time.monotonic() > deadline:
                raise ServingError(problem)
            time.sleep(POLL_S)


def _services(rule: Document) -> set[str]:
    """The names of what a rule leads to."""
    return {str(ref["name"]) for ref in rule.get("backendRefs") or []}
