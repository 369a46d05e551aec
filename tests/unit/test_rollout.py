"""Rollouts on a namespace kept in memory, which takes and refuses changes as the API server does.

tests/cluster/test_rollout.py has the same on a real KServe.
"""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest

from avrt_lib.errors import ServingError, UsageError
from avrt_lib.serving import inference_service, lease, rollout
from avrt_lib.serving.cluster import Conflict, Document, Documents
from avrt_lib.serving.inference_service import SOURCE, State, Status, annotations_of, storage_uri
from avrt_lib.serving.lease import Busy, Lease
from avrt_lib.serving.rollout import CANDIDATE, PREVIOUS, Stage, Wanted, next_stage, of_manifest, rollback, to_uri

OLD, NEW = "s3://avrt/models/old", "s3://avrt/models/new"
NAME = "champion"


class Killed(BaseException):
    """What a kill looks like from inside: nothing is cleaned up."""


class Memory:
    """A namespace: an InferenceService serves the moment it is stored, unless its model is in ``broken``.

    One whose model is in ``down`` has served, and has lost its pods.
    """

    namespace = "avrt"

    def __init__(self) -> None:
        self.objects: dict[str, Document] = {}
        self.broken: set[str] = set()
        self.down: set[str] = set()
        self.changes: list[tuple[str, str, str | None]] = []
        self.kill_after: int | None = None
        self._clock = 0

    def _store(self, kind: str, document: Document) -> Document:
        self._clock += 1
        name = document["metadata"]["name"]
        stored = copy.deepcopy(document)
        stored["metadata"]["resourceVersion"] = str(self._clock)
        if kind == "isvc":
            stored["spec"]["predictor"]["model"].setdefault("name", "")  # the webhook adds it
        self.objects[f"{kind}/{name}"] = stored
        return copy.deepcopy(stored)

    def _changed(self, verb: str, name: str, uri: str | None) -> None:
        self.changes.append((verb, name, uri))
        if self.kill_after is not None and len(self.changes) >= self.kill_after:
            self.kill_after = None
            raise Killed

    def service(self, name: str) -> Document | None:
        return copy.deepcopy(self.objects.get(f"isvc/{name}"))

    def create(self, service: Document) -> Document:
        if f"isvc/{service['metadata']['name']}" in self.objects:
            raise Conflict("exists")
        stored = self._store("isvc", service)
        self._changed("create", service["metadata"]["name"], storage_uri(service))
        return stored

    def replace(self, service: Document) -> Document:
        self._same(self.objects[f"isvc/{service['metadata']['name']}"], service)
        stored = self._store("isvc", service)
        self._changed("replace", service["metadata"]["name"], storage_uri(service))
        return stored

    def delete(self, name: str) -> None:
        if self.objects.pop(f"isvc/{name}", None) is not None:
            self._changed("delete", name, None)

    def pods(self, name: str) -> list[Document]:
        return []

    def documents(self, name: str) -> Documents:
        service = self.service(name)
        if service is None:
            return Documents(None)
        uri, broken = storage_uri(service), storage_uri(service) in self.broken
        ready = 0 if broken or uri in self.down else 1
        conditions = [
            {"type": "ReplicaFailure", "status": str(broken), "message": "violates PodSecurity"},
            {"type": "Progressing", "reason": "NewReplicaSetAvailable" if not broken else "ReplicaSetUpdated"},
        ]
        deployment = {
            "metadata": {"generation": 1},
            "spec": {"template": {"metadata": {"annotations": {SOURCE: uri, **annotations_of(service)}}}},
            "status": {
                "observedGeneration": 1,
                "replicas": 1,
                "updatedReplicas": 0 if broken else 1,
                "availableReplicas": ready,
                "conditions": conditions,
            },
        }
        return Documents(service, deployment)

    def lease(self, name: str) -> Document | None:
        return copy.deepcopy(self.objects.get(f"lease/{name}"))

    def put_lease(self, document: Document) -> Document:
        before = self.objects.get(f"lease/{document['metadata']['name']}")
        if before is not None or "resourceVersion" in document["metadata"]:
            self._same(before or {"metadata": {}}, document)
        return self._store("lease", document)

    @staticmethod
    def _same(stored: Document, given: Document) -> None:
        if stored["metadata"].get("resourceVersion") != given["metadata"].get("resourceVersion"):
            raise Conflict("changed")


def champion(uri: str = OLD, **more: str) -> Document:
    return {
        "apiVersion": "serving.kserve.io/v1beta1",
        "kind": "InferenceService",
        "metadata": {
            "name": NAME,
            "labels": {"app.kubernetes.io/name": NAME},
            "annotations": {"avrt/model-version": "6", **more},
        },
        "spec": {"predictor": {"minReplicas": 2, "model": {"storageUri": uri, "args": ["--frames=4"]}}},
    }


def quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing in memory takes long."""
    monkeypatch.setattr(lease, "DURATION_S", 1.0)
    monkeypatch.setattr(lease, "RENEW_S", 0.05)
    monkeypatch.setattr(lease, "_POLL_S", 0.02)
    monkeypatch.setattr(inference_service, "POLL_S", 0.01)
    monkeypatch.setattr(inference_service, "PATIENCE_S", 0.03)


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Memory:
    quickly(monkeypatch)
    return Memory()


@pytest.fixture
def running(cluster: Memory) -> Memory:
    cluster.create(champion())
    cluster.changes.clear()
    return cluster


WANTED = to_uri(champion(), NEW, "7")


def roll(cluster: Memory, check: Any = lambda _: None, wanted: Wanted = WANTED) -> Status:
    return rollout.rollout(cluster, wanted, check=check, timeout_s=0.2)  # type: ignore[arg-type]


def back(cluster: Memory) -> Status:
    return rollback(cluster, NAME, timeout_s=0.2)  # type: ignore[arg-type]


def killed_after(cluster: Memory, changes: int, wanted: Wanted = WANTED) -> None:
    """A rollout that is killed with this one of its changes."""
    cluster.kill_after = len(cluster.changes) + changes
    with pytest.raises(Killed):
        roll(cluster, wanted=wanted)


def stored(cluster: Memory) -> Document:
    """The champion."""
    found = cluster.service(NAME)
    assert found is not None
    return found


def with_other_settings() -> Wanted:
    """The wanted model with other arguments."""
    other = to_uri(champion(), NEW, "7")
    other.service["spec"]["predictor"]["model"]["args"] = ["--frames=8"]
    return other


def test_the_order_of_a_rollout(running: Memory) -> None:
    asked: list[str] = []
    found = roll(running, lambda candidate: asked.append(candidate.name))
    assert found.state is State.SERVING
    assert asked == [NAME + CANDIDATE]
    assert running.changes == [
        ("create", NAME + CANDIDATE, NEW),
        ("delete", NAME + CANDIDATE, None),
        ("replace", NAME, NEW),
    ]


def test_a_second_call_changes_nothing(running: Memory) -> None:
    roll(running)
    running.changes.clear()
    assert roll(running).uri == NEW
    assert running.changes == []


def test_the_champion_tells_what_it_was(running: Memory) -> None:
    roll(running)
    now = annotations_of(stored(running))
    before = json.loads(now[PREVIOUS])
    assert (before["uri"], before["annotations"]) == (OLD, {"avrt/model-version": "6"})
    assert now["avrt/model-version"] == "7"


@pytest.mark.parametrize("after", [1, 2, 3])
def test_a_rollout_that_was_killed_goes_on(running: Memory, after: int) -> None:
    killed_after(running, after)
    assert roll(running).uri == NEW
    assert json.loads(annotations_of(stored(running))[PREVIOUS])["uri"] == OLD
    assert running.service(NAME + CANDIDATE) is None
    assert [change for change in running.changes if change[0] == "replace"] == [("replace", NAME, NEW)]


def test_a_rollout_that_was_killed_in_its_check_asks_again(running: Memory) -> None:
    def killed(_: Status) -> None:
        raise Killed

    with pytest.raises(Killed):
        roll(running, killed)
    asked: list[str] = []
    roll(running, lambda candidate: asked.append(candidate.name))
    assert asked == [NAME + CANDIDATE]
    assert [change[0] for change in running.changes] == ["create", "delete", "replace"]


def test_what_has_passed_is_not_asked_again(running: Memory) -> None:
    killed_after(running, 2)  # when the candidate goes

    def never(_: Status) -> None:
        raise AssertionError

    assert roll(running, never).uri == NEW


def test_a_candidate_that_fails_its_check_leaves_the_champion(running: Memory) -> None:
    def refuse(_: Status) -> None:
        raise ServingError("1 of 3 questions was not answered")

    with pytest.raises(ServingError, match="champion is unchanged; the candidate failed: 1 of 3"):
        roll(running, refuse)
    assert storage_uri(stored(running)) == OLD
    assert running.service(NAME + CANDIDATE) is None


def test_a_candidate_that_does_not_come_up_leaves_the_champion(running: Memory) -> None:
    running.broken = {NEW}
    with pytest.raises(ServingError, match=r"champion is unchanged.*violates PodSecurity"):
        roll(running)
    assert [change[1] for change in running.changes] == [NAME + CANDIDATE] * 2


def test_a_champion_that_does_not_come_up_is_set_back(running: Memory) -> None:
    def breaks(_: Status) -> None:
        running.broken = {NEW}

    with pytest.raises(ServingError, match=f"set back to {OLD}.*violates PodSecurity"):
        roll(running, breaks)
    assert storage_uri(stored(running)) == OLD


def test_a_call_that_changes_nothing_sets_nothing_back(running: Memory) -> None:
    roll(running)
    running.broken = {NEW}
    for _ in range(2):
        with pytest.raises(ServingError, match="is failed"):
            roll(running)
    assert storage_uri(stored(running)) == NEW


def test_a_rollout_that_was_killed_sets_back_what_it_had_changed(running: Memory) -> None:
    killed_after(running, 3)  # when the champion changes
    running.broken = {NEW}
    with pytest.raises(ServingError, match=f"set back to {OLD}"):
        roll(running)
    assert storage_uri(stored(running)) == OLD


def test_the_first_champion_is_made_at_once(cluster: Memory) -> None:
    assert roll(cluster, wanted=Wanted(champion(NEW))).uri == NEW
    assert cluster.changes == [("create", NAME, NEW)]


def test_a_candidate_of_another_rollout_is_replaced(running: Memory) -> None:
    running.create(to_uri(champion(), "s3://avrt/models/third", None).candidate())
    running.changes.clear()
    roll(running)
    assert running.changes[:2] == [("delete", NAME + CANDIDATE, None), ("create", NAME + CANDIDATE, NEW)]


def test_a_change_by_somebody_else_is_not_written_over(running: Memory) -> None:
    def meanwhile(_: Status) -> None:
        now = stored(running)
        now["spec"]["predictor"]["model"]["storageUri"] = "s3://avrt/models/third"
        running.replace(now)
        raise Killed

    with pytest.raises(Killed):
        roll(running, meanwhile)
    with Lease(running, "other") as held, pytest.raises(ServingError, match="Somebody else changed"):  # type: ignore[arg-type]
        rollout._change(running, held, NAME, OLD, lambda each: each)  # type: ignore[arg-type]


def _is_refused_at_first(monkeypatch: pytest.MonkeyPatch, cluster: Memory) -> None:
    refusals = iter([True, True, False])
    store = cluster.replace

    def replace(service: Document) -> Document:
        if next(refusals):
            raise Conflict("the object has been modified")
        return store(service)

    monkeypatch.setattr(cluster, "replace", replace)


def test_a_status_that_is_written_meanwhile_is_no_hindrance(running: Memory, monkeypatch: pytest.MonkeyPatch) -> None:
    _is_refused_at_first(monkeypatch, running)
    assert roll(running).uri == NEW


def test_rollback_restores_all_of_the_predictor(running: Memory) -> None:
    before, wanted = stored(running), to_uri(champion(), NEW, "7")
    wanted.service["spec"]["predictor"] = {"model": {"storageUri": NEW, "args": ["--frames=8"]}, "tolerations": []}
    roll(running, wanted=wanted)
    assert back(running).uri == OLD
    now = stored(running)
    assert now["spec"] == before["spec"]
    assert annotations_of(now)["avrt/model-version"] == "6"


def asked_for(uri: str, **predictor: Any) -> Wanted:
    """What a configuration asks for: the champion with more of a predictor."""
    service = champion(uri)
    service["spec"]["predictor"] |= predictor
    return of_manifest(service)


def test_a_setting_that_is_not_asked_for_any_more_is_taken_away(cluster: Memory) -> None:
    roll(cluster, wanted=asked_for(OLD, serviceAccountName="models", timeout=30))
    assert "name" in stored(cluster)["spec"]["predictor"]["model"], "the cluster has added to what was asked for"
    roll(cluster, wanted=asked_for(OLD, timeout=30))
    assert stored(cluster)["spec"]["predictor"].keys() == {"minReplicas", "model", "timeout"}
    cluster.changes.clear()
    roll(cluster, wanted=asked_for(OLD, timeout=30))
    assert cluster.changes == []
    assert back(cluster).uri == OLD
    assert stored(cluster)["spec"]["predictor"]["serviceAccountName"] == "models"
    roll(cluster, wanted=asked_for(OLD, timeout=30))
    assert "serviceAccountName" not in stored(cluster)["spec"]["predictor"]


def test_settings_are_what_was_asked_for_whatever_the_model(cluster: Memory) -> None:
    roll(cluster, wanted=asked_for(OLD, timeout=30))
    roll(cluster, wanted=to_uri(stored(cluster), NEW, "7"))
    cluster.changes.clear()
    for wanted in (asked_for(NEW, timeout=30), to_uri(stored(cluster), NEW, "7")):
        roll(cluster, wanted=wanted)
    assert cluster.changes == []
    roll(cluster, wanted=asked_for(NEW))
    assert "timeout" not in stored(cluster)["spec"]["predictor"]


def of_run(uri: str, version: str | None) -> Wanted:
    """What a run's deployment step asks for."""
    service = champion(uri)
    service["metadata"]["annotations"] = {"avrt/model-version": version} if version else {}
    return of_manifest(service)


def test_the_slower_of_two_runs_does_not_take_the_newer_ones_place(cluster: Memory) -> None:
    roll(cluster, wanted=of_run(NEW, "10"))
    cluster.changes.clear()
    with pytest.raises(
        ServingError, match=r"is set to version 10, so version 9 .* --uri s3://avrt/models/old --version 9"
    ):
        roll(cluster, wanted=of_run(OLD, "9"))
    assert cluster.changes == []
    assert roll(cluster, wanted=to_uri(stored(cluster), OLD, "9")).uri == OLD
    assert roll(cluster, wanted=of_run(NEW, "10")).uri == NEW
    assert back(cluster).uri == OLD
    assert roll(cluster, wanted=of_run(NEW, None)).uri == NEW


def test_what_was_added_by_hand_stays_until_something_changes(running: Memory) -> None:
    roll(running, wanted=asked_for(NEW))
    now = stored(running)
    now["spec"]["predictor"]["timeout"] = 30
    running.replace(now)
    running.changes.clear()
    roll(running, wanted=asked_for(NEW))
    assert running.changes == []


def test_a_setting_is_taken_away_though_a_status_is_written_meanwhile(
    cluster: Memory, monkeypatch: pytest.MonkeyPatch
) -> None:
    roll(cluster, wanted=asked_for(OLD, timeout=30))
    _is_refused_at_first(monkeypatch, cluster)
    roll(cluster, wanted=asked_for(OLD))
    assert "timeout" not in stored(cluster)["spec"]["predictor"]


def test_a_second_rollback_does_not_go_forward(running: Memory) -> None:
    roll(running)
    assert [back(running).uri, back(running).uri] == [OLD, OLD]


def test_rollback_gives_up_a_rollout_that_was_killed(running: Memory) -> None:
    roll(running)
    killed_after(running, 1, to_uri(champion(), "s3://avrt/models/third", None))
    assert back(running).uri == NEW
    assert running.service(NAME + CANDIDATE) is None


def test_rollback_gives_up_other_settings_of_the_same_model(running: Memory) -> None:
    roll(running)
    killed_after(running, 1, with_other_settings())
    assert back(running).uri == NEW
    assert running.service(NAME + CANDIDATE) is None


def test_rollback_takes_other_settings_of_the_same_model_back(running: Memory) -> None:
    roll(running)
    killed_after(running, 3, with_other_settings())  # when the champion changes
    assert back(running).uri == NEW
    assert stored(running)["spec"]["predictor"]["model"]["args"] == ["--frames=4"]


def test_somebody_elses_service_of_the_candidates_name_is_not_removed(running: Memory) -> None:
    theirs = champion()
    theirs["metadata"]["name"] = NAME + CANDIDATE
    running.create(theirs)
    running.changes.clear()
    for call in (roll, back):
        with pytest.raises(UsageError, match="is no rollout's candidate"):
            call(running)
    assert running.changes == []


def test_rollback_needs_something_to_go_back_to(running: Memory) -> None:
    with pytest.raises(UsageError, match="no previous model"):
        back(running)


def test_a_model_that_never_served_is_nothing_to_go_back_to(running: Memory) -> None:
    running.broken = {OLD}
    roll(running)
    with pytest.raises(UsageError, match="no previous model"):
        back(running)


def test_a_model_that_has_lost_its_pods_is_one_to_go_back_to(running: Memory) -> None:
    running.down = {OLD}
    roll(running)
    running.down = set()
    assert back(running).uri == OLD


def test_a_stopped_champion_is_started(cluster: Memory) -> None:
    cluster.create(champion(**{inference_service.STOP: "true"}))
    assert roll(cluster).uri == NEW


def test_argo_cd_would_undo_it(cluster: Memory) -> None:
    cluster.create(champion(**{"argocd.argoproj.io/tracking-id": "a:b"}))
    with pytest.raises(UsageError, match="change it in Git"):
        roll(cluster)
    with pytest.raises(UsageError, match="change it in Git"):
        back(cluster)


def test_a_service_of_another_form_is_refused() -> None:
    other = champion()
    other["spec"]["predictor"] = {"containers": [{"name": "kserve-container", "image": "x"}]}
    with pytest.raises(UsageError, match=r"has no spec\.predictor\.model"):
        to_uri(other, NEW, None)


def test_names_that_kserve_cannot_serve(running: Memory) -> None:
    running.namespace = "n" * 40
    with pytest.raises(UsageError, match="take a shorter name"):
        roll(running)


def test_the_second_of_two_rollouts_is_refused(running: Memory) -> None:
    refused: list[str] = []

    def second(_: Status) -> None:
        with pytest.raises(Busy) as caught:
            roll(running, wanted=to_uri(champion(), "s3://avrt/models/third", None))
        refused.append(str(caught.value))

    assert roll(running, second).uri == NEW
    assert NEW in refused[0]
    assert "checking the candidate" in refused[0]


def test_a_lease_that_was_taken_over_is_lost(cluster: Memory) -> None:
    with Lease(cluster, "x") as held:  # type: ignore[arg-type]
        taken = cluster.lease("x")
        assert taken is not None
        taken["spec"]["holderIdentity"] = "another"
        cluster.put_lease(taken)
        with pytest.raises(ServingError, match="lost its lease"):
            held.note(stage="later")


def _answer_is_lost_once(monkeypatch: pytest.MonkeyPatch, cluster: Memory, method: str, when: Any) -> None:
    """A write that is stored, whose answer does not arrive: the client sends it again, and it is of an old version."""
    store, lost = getattr(cluster, method), []

    def write(document: Document) -> Document:
        stored: Document = store(document)
        if not lost and when(document):
            lost.append(document)
            store(document)
        return stored

    monkeypatch.setattr(cluster, method, write)


def test_a_lease_is_not_lost_with_the_answer_to_its_own_write(cluster: Memory, monkeypatch: pytest.MonkeyPatch) -> None:
    with Lease(cluster, "x") as held:  # type: ignore[arg-type]
        _answer_is_lost_once(monkeypatch, cluster, "put_lease", lambda _: True)
        held.note(stage="later")
        held.check()
        kept = cluster.lease("x")
        assert kept is not None
        assert kept["metadata"]["annotations"] == {"avrt/stage": "later"}


def test_a_change_whose_answer_was_lost_is_no_change_by_somebody_else(
    running: Memory, monkeypatch: pytest.MonkeyPatch
) -> None:
    _answer_is_lost_once(monkeypatch, running, "replace", lambda service: storage_uri(service) == NEW)
    assert roll(running).uri == NEW
    assert [change[0] for change in running.changes] == ["create", "delete", "replace"]


def test_a_lease_that_was_left_is_free(cluster: Memory) -> None:
    for _ in range(2):
        with Lease(cluster, "x") as held:  # type: ignore[arg-type]
            held.check()


SET, CANDIDATE_UP = champion(NEW), WANTED.candidate()
LEAVING = {**CANDIDATE_UP, "metadata": {**CANDIDATE_UP["metadata"], "deletionTimestamp": "2026-11-26T10:00:00Z"}}


@pytest.mark.parametrize(
    ("found", "candidate", "checked", "stage"),
    [
        (None, None, None, Stage.PROMOTING),
        (None, CANDIDATE_UP, None, Stage.CLEARING),
        (champion(), None, None, Stage.CANDIDATE),
        (champion(), CANDIDATE_UP, None, Stage.CHECKING),
        (champion(), LEAVING, None, Stage.CLEARING),
        (champion(), CANDIDATE_UP, "another", Stage.CHECKING),
        (champion(), CANDIDATE_UP, WANTED.fingerprint, Stage.CLEARING),
        (champion(), None, WANTED.fingerprint, Stage.PROMOTING),
        (SET, CANDIDATE_UP, WANTED.fingerprint, Stage.CLEARING),
        (SET, None, None, Stage.PROMOTING),
        (champion(NEW, **{inference_service.STOP: "true"}), None, None, Stage.CANDIDATE),
    ],
)
def test_what_comes_next(found: Document | None, candidate: Document | None, checked: str | None, stage: Stage) -> None:
    notes = {"avrt/checked": checked} if checked else {}
    assert next_stage(found, candidate, WANTED, notes) is stage


def test_a_candidate_is_one_pod_under_its_own_name() -> None:
    assert CANDIDATE_UP["metadata"]["name"] == CANDIDATE_UP["metadata"]["labels"]["app.kubernetes.io/name"]
    assert CANDIDATE_UP["spec"]["predictor"]["minReplicas"] == 1


def test_a_candidate_is_deployed_as_its_champion() -> None:
    asked = {f"serving.kserve.io/{name}": "x" for name in ("deploymentMode", "storageSecretName", "autoscalerClass")}
    found = to_uri(champion(**asked, **{inference_service.STOP: "true", "avrt/run": "r"}), NEW, "7").candidate()
    now = annotations_of(found)
    assert now.keys() >= asked.keys()
    assert now["serving.kserve.io/autoscalerClass"] == "none"
    assert not now.keys() & {inference_service.STOP, "avrt/run"}


def test_other_arguments_make_another_candidate() -> None:
    assert next_stage(champion(), CANDIDATE_UP, with_other_settings(), {}) is Stage.CLEARING
