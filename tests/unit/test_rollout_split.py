"""A candidate's share of the traffic, on test_rollout's namespace in memory and a Gateway that takes what it is given.

tests/cluster/test_traffic_split.py has the same on a real API server.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from typing import Any

import pytest

from avrt_lib.config import DeploymentConfig
from avrt_lib.errors import EnvironmentProblem, ServingError, UsageError
from avrt_lib.serving import rollout, route
from avrt_lib.serving.cluster import Conflict, Document, Documents
from avrt_lib.serving.inference_service import State, Status
from avrt_lib.serving.rollout import CANDIDATE, Stage, Wanted, next_stage, to_uri
from avrt_lib.serving.route import Route, Split
from tests.unit.test_rollout import NAME, NEW, OLD, Memory, back, champion, killed_after, quickly, roll

ROUTE = "public"
OURS, THEIRS = f"{NAME}-predictor", f"{NAME}{CANDIDATE}-predictor"
SPLIT = Split(ROUTE, percent=20, seconds=0.05)
WANTED = to_uri(champion(), NEW, "7", SPLIT)


class Routed(Memory):
    """With HTTPRoutes, and a Gateway that takes each change up the moment it is stored, unless it is ``deaf``."""

    def __init__(self) -> None:
        super().__init__()
        self.deaf = False
        self.restarts = 0
        self.refusals = 0
        self.on_pods: Callable[[], None] = lambda: None

    def put_route(self, *rules: Document, **metadata: Any) -> None:
        document = {"metadata": {"name": ROUTE, "generation": 1, **metadata}, "spec": {"rules": list(rules)}}
        self._store("route", document)
        self._take_up()

    def _take_up(self) -> None:
        if not self.deaf:
            stored = self.objects[f"route/{ROUTE}"]
            generation = stored["metadata"]["generation"]
            stored["status"] = {"parents": [{"conditions": conditions(generation)}]}

    def route(self, name: str) -> Document | None:
        return copy.deepcopy(self.objects.get(f"route/{name}"))

    def set_rules(self, found: Document, rules: list[Document], *, dry_run: bool = False) -> None:
        stored = self.objects[f"route/{found['metadata']['name']}"]
        self._same(stored, found)
        if self.refusals:
            self.refusals -= 1
            raise Conflict("the object has been modified")
        if dry_run:
            return
        changed = copy.deepcopy(stored)
        changed["spec"]["rules"] = copy.deepcopy(rules)
        changed["metadata"]["generation"] += 1
        self._store("route", changed)
        self._take_up()
        self._changed("weights", found["metadata"]["name"], " ".join(map(str, self.weights().values())))

    def weights(self) -> dict[str, int]:
        (rule,) = self.objects[f"route/{ROUTE}"]["spec"]["rules"]
        return {ref["name"]: ref["weight"] for ref in rule["backendRefs"]}

    def pods(self, name: str) -> list[Document]:
        if self.service(name) is None:
            return []
        status = {"containerStatuses": [{"name": "kserve-container", "restartCount": self.restarts}]}
        return [{"metadata": {"uid": name}, "status": status}]

    def documents(self, name: str) -> Documents:
        self.on_pods()
        found = super().documents(name)
        found.pods.extend(self.pods(name))
        return found


def conditions(generation: int, **statuses: str) -> list[Document]:
    return [
        {
            "type": kind,
            "status": statuses.get(kind, "True"),
            "reason": "BackendNotFound",
            "message": "no such Service",
            "observedGeneration": generation,
        }
        for kind in ("Accepted", "ResolvedRefs")
    ]


def rule(*names: str) -> Document:
    return {"backendRefs": [{"name": name, "port": 80, "weight": 100} for name in names]}


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Routed:
    quickly(monkeypatch)
    for module in (rollout, route):
        monkeypatch.setattr(module, "POLL_S", 0.01)
    monkeypatch.setattr(route, "TAKE_UP_S", 0.05)
    monkeypatch.setattr(route, "SETTLE_S", 0.0)
    made = Routed()
    made.create(champion())
    made.put_route(rule(OURS))
    made.changes.clear()
    return made


def shared(cluster: Routed, check: Any = lambda _: None, wanted: Wanted = WANTED) -> Status:
    return roll(cluster, check, wanted)


def on_route(cluster: Routed) -> Route:
    return Route(cluster, ROUTE, NAME, NAME + CANDIDATE)  # type: ignore[arg-type]


def while_shared(cluster: Routed, act: Callable[[], None]) -> None:
    """Let something happen once the candidate has its share."""

    def watching() -> None:
        if THEIRS in cluster.weights():
            cluster.on_pods = lambda: None
            act()

    cluster.on_pods = watching


def test_the_order_of_a_shared_rollout(cluster: Routed) -> None:
    assert shared(cluster).state is State.SERVING
    assert cluster.changes == [
        ("create", NAME + CANDIDATE, NEW),
        ("weights", ROUTE, "80 20"),
        ("weights", ROUTE, "100"),
        ("delete", NAME + CANDIDATE, None),
        ("replace", NAME, NEW),
    ]


def test_the_candidate_is_asked_before_it_gets_users_and_while_it_has_them(cluster: Routed) -> None:
    seen: list[list[str]] = []
    shared(cluster, lambda _: seen.append(list(cluster.weights())))
    assert seen == [[OURS], [OURS, THEIRS]]


def test_the_candidate_goes_by_the_name_that_users_ask_for(cluster: Routed) -> None:
    made = WANTED.candidate()["spec"]["predictor"]["model"]["args"]
    assert (made, WANTED.served_as) == (["--frames=4", f"--served-model-name={NAME}"], NAME)
    assert WANTED.service["spec"]["predictor"]["model"]["args"] == ["--frames=4"]


def test_a_candidate_that_was_made_without_a_share_is_replaced(cluster: Routed) -> None:
    alone = to_uri(champion(), NEW, "7")
    assert next_stage(champion(), alone.candidate(), WANTED, {"avrt/checked": alone.fingerprint}) is Stage.CLEARING


@pytest.mark.parametrize("after", [1, 2, 3, 4, 5])
def test_a_shared_rollout_that_was_killed_goes_on(cluster: Routed, after: int) -> None:
    killed_after(cluster, after, WANTED)
    assert shared(cluster).uri == NEW
    assert cluster.weights() == {OURS: 100}
    assert cluster.service(NAME + CANDIDATE) is None
    assert [change for change in cluster.changes if change[0] == "replace"] == [("replace", NAME, NEW)]


def test_killed_while_it_shares_it_shares_again_without_asking_first(cluster: Routed) -> None:
    killed_after(cluster, 2, WANTED)
    asked: list[dict[str, int]] = []
    shared(cluster, lambda _: asked.append(cluster.weights()))
    assert asked == [{OURS: 80, THEIRS: 20}]


def test_another_rollout_takes_a_killed_ones_share_back_first(cluster: Routed) -> None:
    killed_after(cluster, 2, WANTED)
    cluster.changes.clear()
    assert roll(cluster, wanted=to_uri(champion(), "s3://avrt/models/third", None)).state is State.SERVING
    assert cluster.changes[:2] == [("weights", ROUTE, "100"), ("delete", NAME + CANDIDATE, None)]


def test_rollback_takes_a_killed_ones_share_back(cluster: Routed) -> None:
    killed_after(cluster, 2, WANTED)
    cluster.changes.clear()
    assert back(cluster).uri == OLD
    assert cluster.changes == [("weights", ROUTE, "100"), ("delete", NAME + CANDIDATE, None)]


def test_a_share_is_taken_back_when_the_lease_was_lost(cluster: Routed) -> None:
    killed_after(cluster, 2, WANTED)
    del cluster.objects[f"isvc/{NAME}{CANDIDATE}"], cluster.objects[f"lease/{NAME}-rollout"]
    cluster.changes.clear()
    shared(cluster)
    assert cluster.changes[:2] == [("weights", ROUTE, "100"), ("create", NAME + CANDIDATE, NEW)]


def test_a_candidate_that_disappears_while_it_has_a_share_is_asked_anew(cluster: Routed) -> None:
    killed_after(cluster, 2, WANTED)
    cluster.delete(NAME + CANDIDATE)
    asked: list[str] = []
    shared(cluster, lambda candidate: asked.append(candidate.name))
    assert len(asked) == 2


@pytest.mark.parametrize(
    ("happens", "cause"),
    [
        (lambda cluster: setattr(cluster, "restarts", 1), "its pod was restarted"),
        (lambda cluster: cluster.broken.add(NEW), "violates PodSecurity"),
        (lambda cluster: cluster.put_route(rule(OURS)), "somebody else changed HTTPRoute avrt/public"),
        (
            lambda cluster: cluster.objects[f"route/{ROUTE}"].update(
                status={"parents": [{"conditions": conditions(2, ResolvedRefs="False")}]}
            ),
            "BackendNotFound: no such Service",
        ),
    ],
)
def test_a_candidate_that_fails_while_it_has_a_share_loses_it(
    cluster: Routed, happens: Callable[[Routed], None], cause: str
) -> None:
    while_shared(cluster, lambda: happens(cluster))
    wanted = to_uri(champion(), NEW, "7", Split(ROUTE, percent=20, seconds=5.0))
    with pytest.raises(ServingError, match=f"champion is unchanged; the candidate failed: .*{cause}"):
        shared(cluster, wanted=wanted)
    assert cluster.weights() == {OURS: 100}
    assert cluster.service(NAME + CANDIDATE) is None


@pytest.mark.parametrize(("away_s", "fails"), [(0.05, False), (10.0, True)])
def test_an_api_server_that_is_away_for_a_moment_says_nothing_of_the_candidate(
    cluster: Routed, monkeypatch: pytest.MonkeyPatch, away_s: float, fails: bool
) -> None:
    monkeypatch.setattr(rollout, "AWAY_S", 0.2)
    look = cluster.documents
    until: list[float] = []

    def documents(name: str) -> Documents:
        if THEIRS in cluster.weights():
            until[:] = until or [time.monotonic() + away_s]
            if time.monotonic() < until[0]:
                raise EnvironmentProblem("The API server could not list pods (too many requests): try again.")
        return look(name)

    monkeypatch.setattr(cluster, "documents", documents)
    wanted = to_uri(champion(), NEW, "7", Split(ROUTE, percent=20, seconds=0.5))
    if fails:
        with pytest.raises(EnvironmentProblem, match="too many requests"):
            shared(cluster, wanted=wanted)
        assert cluster.weights() == {OURS: 100}
    else:
        assert shared(cluster, wanted=wanted).uri == NEW
    assert until, "it was asked while the candidate had a share"


def test_answers_that_fail_under_users_requests_take_the_share_back(cluster: Routed) -> None:
    def check(_: Status) -> None:
        if THEIRS in cluster.weights():
            raise ServingError("2 of 3 questions were not answered")

    with pytest.raises(ServingError, match="champion is unchanged; the candidate failed: 2 of 3"):
        shared(cluster, check)
    assert [change[0] for change in cluster.changes] == ["create", "weights", "weights", "delete"]


def test_the_candidate_stays_while_the_gateway_still_leads_to_it(cluster: Routed) -> None:
    while_shared(cluster, lambda: setattr(cluster, "deaf", True))
    with pytest.raises(ServingError, match="The Gateway of HTTPRoute avrt/public does not take it"):
        shared(cluster)
    assert cluster.service(NAME + CANDIDATE) is not None
    cluster.deaf = False
    cluster.put_route(rule(OURS))
    assert shared(cluster).uri == NEW


def test_the_first_champion_needs_no_share(cluster: Routed) -> None:
    cluster.delete(NAME)
    cluster.changes.clear()
    shared(cluster, wanted=Wanted(champion(NEW), SPLIT))
    assert cluster.changes == [("create", NAME, NEW)]


@pytest.mark.parametrize(
    ("rules", "metadata", "mend"),
    [
        ([rule("other")], {}, "does not lead to Service champion-predictor"),
        ([], {}, "does not lead to Service champion-predictor"),
        ([rule(OURS, "other")], {}, "leads to other beside champion-predictor"),
        ([rule(OURS)], {"ownerReferences": [{"kind": "InferenceService"}]}, "name a route of your own"),
    ],
)
def test_a_route_that_cannot_be_shared_is_refused_before_anything_is_made(
    cluster: Routed, rules: list[Document], metadata: Document, mend: str
) -> None:
    cluster.put_route(*rules, **metadata)
    with pytest.raises(UsageError, match=mend):
        shared(cluster)
    assert cluster.changes == []
    assert "avrt/uri" not in (cluster.lease(f"{NAME}-rollout") or {})["metadata"]["annotations"]


def test_there_is_no_route(cluster: Routed) -> None:
    del cluster.objects[f"route/{ROUTE}"]
    with pytest.raises(UsageError, match=r"apply manifests/components/gateway-api, or correct deployment\.route"):
        shared(cluster)
    assert cluster.changes == []


def test_no_gateway_has_taken_the_route(cluster: Routed) -> None:
    cluster.deaf = True
    cluster.put_route(rule(OURS))
    with pytest.raises(ServingError, match="it says nothing about it"):
        shared(cluster)
    assert cluster.changes == []


def test_every_rule_of_the_champion_is_shared_and_no_other(cluster: Routed) -> None:
    more = {"matches": [{"path": {"value": "/v1/models"}}], "timeouts": {"request": "60s"}}
    cluster.put_route({**rule(OURS), **more}, rule("docs"), rule(OURS))
    cluster.weights = dict  # type: ignore[method-assign]
    on_route(cluster).share(30)
    found = cluster.route(ROUTE)
    assert found is not None
    weights = [{ref["name"]: ref["weight"] for ref in each["backendRefs"]} for each in found["spec"]["rules"]]
    assert weights == [{OURS: 70, THEIRS: 30}, {"docs": 100}, {OURS: 70, THEIRS: 30}]
    assert {key: found["spec"]["rules"][0][key] for key in more} == more
    assert {ref["port"] for each in found["spec"]["rules"] for ref in each["backendRefs"]} == {80}


def test_a_status_that_is_written_meanwhile_is_no_hindrance(cluster: Routed) -> None:
    cluster.refusals = 2
    on_route(cluster).share(30)
    assert cluster.weights() == {OURS: 70, THEIRS: 30}


def test_what_the_gateway_said_of_an_older_state_does_not_count(cluster: Routed) -> None:
    cluster.deaf = True
    with pytest.raises(ServingError, match="it says nothing about it"):
        on_route(cluster).share(30)


def test_a_route_that_was_deleted_needs_nothing_taken_back(cluster: Routed) -> None:
    del cluster.objects[f"route/{ROUTE}"]
    on_route(cluster).take_back()


def test_promotion_by_git_has_no_candidate() -> None:
    with pytest.raises(ValueError, match="unset route"):
        DeploymentConfig(target="git", manifests_url="https://git.example.com/m.git", route=ROUTE)


def test_without_a_route_there_is_no_split() -> None:
    assert Split.of(DeploymentConfig()) is None
    assert Split.of(DeploymentConfig(route=ROUTE, split_percent=5)) == Split(ROUTE, 5, 300.0)
