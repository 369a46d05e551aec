"""Rollout without a service mesh: the new model proves itself beside the champion before the champion changes.

The new model comes up as an InferenceService of its own, ``NAME-candidate``, and is asked questions. Where users come
through an HTTPRoute, it may get a share of their requests for a while (``route.Split``). Then the candidate makes room,
and the champion is set to the new model: its old pods serve until the new ones are ready. So there is never more than
one pod beside the champion's.

What comes next is read from the cluster each time (``next_stage``): a rollout that is killed goes on with the same
call. What the cluster's objects cannot tell, that the candidate has passed, is noted in the rollout's Lease; what a
rollback needs, in the same write that changes the champion.
"""

from __future__ import annotations

import copy
import hashlib
import json
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from avrt_lib.errors import AvrtError, EnvironmentProblem, ServingError, UsageError
from avrt_lib.promotion.manifest import (
    CANDIDATE,
    DATA,
    LONGEST_NAME_AND_NAMESPACE,
    MODEL_SHA256,
    MODEL_VERSION,
    RUN,
    fits,
)
from avrt_lib.serving.cluster import Cluster, Conflict, Document, container_statuses
from avrt_lib.serving.inference_service import (
    ARGO,
    AWAY_S,
    POLL_S,
    STOP,
    State,
    Status,
    annotations_of,
    came_up,
    judge,
    storage_uri,
    wait,
)
from avrt_lib.serving.lease import Lease
from avrt_lib.serving.route import Route, Split

log = logging.getLogger("avrt.serving")

#: Hash of the settings that were asked for, the model apart. The stored ones cannot tell: the cluster adds its own.
SETTINGS = "avrt/settings"
#: What the champion was before, as JSON: uri, annotations (version, hash, run, data, settings), predictor.
PREVIOUS = "avrt/previous"
#: The model that a rollback took away.
ROLLED_BACK = "avrt/rolled-back-from"
#: On a candidate: the champion that it belongs to.
_OF = "avrt/candidate-of"
_KSERVE = "serving.kserve.io/"
_ORIGIN = (MODEL_VERSION, MODEL_SHA256, RUN, DATA, SETTINGS)
#: What the Lease notes: what has passed its check, and its time with real traffic, by fingerprint; the route that may
#: lead to the candidate now; the model, and the stage, for people and for a rollback.
_CHECKED, _SHARED, _ROUTE = "avrt/checked", "avrt/shared", "avrt/route"
_URI, _STAGE = "avrt/uri", "avrt/stage"
_ENDED = {"uri": None, "stage": None, "checked": None, "shared": None}
_REMOVAL_S = 180.0
_TRIES = 10


class Stage(StrEnum):
    """What a rollout does next."""

    CANDIDATE = "making the candidate"
    CHECKING = "checking the candidate"
    SHARING = "sharing the traffic"
    CLEARING = "removing the candidate"
    PROMOTING = "changing the champion"


@dataclass(frozen=True, slots=True)
class Wanted:
    """The champion as it is to be.

    Attributes:
        service: its InferenceService, without what a cluster adds.
        split: how its candidate gets a share of the real traffic; None: it gets none.
        in_order: whether it may not take the place of a higher version of the registry.
    """

    service: Document
    split: Split | None = None
    in_order: bool = False

    @property
    def name(self) -> str:
        return str(self.service["metadata"]["name"])

    @property
    def uri(self) -> str:
        return str(storage_uri(self.service))

    @property
    def fingerprint(self) -> str:
        """Hash of everything that decides how the model is served."""
        return _hash([self.service["spec"], self.served_as] if self.split else self.service["spec"])

    @property
    def served_as(self) -> str:
        """The model's name in requests to the candidate; users' requests name the champion."""
        return self.name if self.split else self.name + CANDIDATE

    def candidate(self) -> Document:
        """The InferenceService that comes up beside the champion: one pod, no autoscaler."""
        service = copy.deepcopy(self.service)
        service["metadata"]["name"] = self.name + CANDIDATE
        service["metadata"].setdefault("annotations", {}).update(
            {_OF: self.name, _CHECKED: self.fingerprint, "serving.kserve.io/autoscalerClass": "none"}
        )
        if "app.kubernetes.io/name" in (labels := service["metadata"].get("labels") or {}):
            labels["app.kubernetes.io/name"] = service["metadata"]["name"]
        predictor = service["spec"]["predictor"]
        predictor |= {"minReplicas": 1, "maxReplicas": 1}
        for autoscaling in ("autoScaling", "scaleMetric", "scaleTarget", "scaleMetricType"):
            predictor.pop(autoscaling, None)
        if self.split:
            model = predictor["model"]
            model["args"] = [*(model.get("args") or []), f"--served-model-name={self.served_as}"]
        return service


def of_manifest(service: Document, split: Split | None = None) -> Wanted:
    """The champion as a run's manifest says: what it said before and does not say now is taken away.

    Of two runs the slower one may be the older: it does not take the place of the newer one's model.
    """
    service = copy.deepcopy(service)
    settings = copy.deepcopy(service["spec"])
    settings["predictor"]["model"].pop("storageUri")
    service["metadata"].setdefault("annotations", {})[SETTINGS] = _hash(settings)
    return Wanted(service, split, in_order=True)


def to_uri(champion: Document, uri: str, version: str | None, split: Split | None = None) -> Wanted:
    """The champion as it is, with another model; the settings stay those that were asked for.

    Raises:
        UsageError: where it is not of the form that names a model.
    """
    if "model" not in champion["spec"]["predictor"]:
        raise UsageError(
            f"{champion['metadata']['name']} has no spec.predictor.model, so no other model can be put into it: it is "
            "not one of ours."
        )
    kept = {
        # KServe's own decide how it is deployed and fetched, for the candidate too.
        key: value
        for key, value in annotations_of(champion).items()
        if key == SETTINGS or (key.startswith(_KSERVE) and key != STOP)
    }
    service: Document = {
        "apiVersion": champion["apiVersion"],
        "kind": champion["kind"],
        "metadata": {
            "name": champion["metadata"]["name"],
            "annotations": kept | ({MODEL_VERSION: version} if version else {}),
            "labels": champion["metadata"].get("labels") or {},
        },
        "spec": copy.deepcopy(champion["spec"]),
    }
    service["spec"]["predictor"]["model"]["storageUri"] = uri
    return Wanted(service, split)


def next_stage(
    champion: Document | None, candidate: Document | None, wanted: Wanted, notes: Mapping[str, str]
) -> Stage:
    """What comes next.

    Args:
        champion: the InferenceService as it is, or None.
        candidate: the one beside it, or None.
        wanted: the champion as it is to be.
        notes: the Lease's: what has passed, and the route that may lead to the candidate.
    """
    passed = notes.get(_SHARED if wanted.split else _CHECKED)
    gone = candidate is None and _ROUTE not in notes
    if champion is None or _is_set_to(champion, wanted) or passed == wanted.fingerprint:
        return Stage.PROMOTING if gone else Stage.CLEARING
    if gone:
        return Stage.CANDIDATE
    if (
        candidate is None
        or candidate["metadata"].get("deletionTimestamp")
        or annotations_of(candidate).get(_CHECKED) != wanted.fingerprint
    ):
        return Stage.CLEARING  # another rollout's, which was given up
    return Stage.SHARING if notes.get(_CHECKED) == wanted.fingerprint else Stage.CHECKING


def rollout(
    cluster: Cluster,
    wanted: Wanted,
    *,
    check: Callable[[Status], None],
    timeout_s: float,
    told: Callable[[str], None] = lambda _: None,
) -> Status:
    """Bring a model to the champion's place; a killed rollout goes on when it is called again.

    Where there is no champion yet, there is nothing to protect: it is made, and not checked here.

    Args:
        cluster: the champion's namespace.
        wanted: the champion as it is to be.
        check: asks a served candidate; raises ServingError where its answers do not do. Where it gets a share of the
            traffic, it is asked once more at the end of that time.
        timeout_s: how long each of candidate and champion may take to serve.
        told: called with a line whenever something is going on.

    Returns:
        The champion's status, which is serving.

    Raises:
        Busy: where another rollout of this champion is going on.
        UsageError: where the names are too long, Argo CD would undo the change, the route is none to share, or an
            InferenceService of somebody else has the candidate's name.
        ServingError: where the champion is of a newer version and ``wanted`` keeps the order; where the candidate
            fails, which leaves the champion as it was; where the champion does not come up with the new model, which
            sets it back; or where it was set to the model before and does not serve it, which leaves it so.
    """
    candidate_name = wanted.name + CANDIDATE
    if not fits(candidate_name, cluster.namespace):
        raise UsageError(
            f"{candidate_name} and the namespace {cluster.namespace} have more than {LONGEST_NAME_AND_NAMESPACE} "
            "characters together, which KServe cannot serve: take a shorter name."
        )
    split = wanted.split
    route = Route(cluster, split.route, wanted.name, candidate_name) if split else None
    with Lease(cluster, _lease_name(wanted.name)) as lease:
        # Killed after it had changed the champion; only what a rollout has changed is set back.
        begun = lease.notes.get(_URI) == wanted.uri and lease.notes.get(_STAGE) == Stage.PROMOTING
        while True:
            champion, candidate = cluster.service(wanted.name), _candidate(cluster, wanted.name)
            if champion is not None:
                _refuse_argo(champion)
                _refuse_older(cluster.namespace, champion, wanted)
            if route and _ROUTE not in lease.notes and route.is_shared():  # by a rollout whose Lease was lost
                lease.note(route=route.name)
            stage = next_stage(champion, candidate, wanted, lease.notes)
            if route and stage is Stage.CANDIDATE:
                route.check()
            if stage is Stage.PROMOTING and champion is not None and _is_set_to(champion, wanted) and not begun:
                found = _serving(cluster, lease, wanted.name, wanted.uri, timeout_s, told)
                lease.note(**_ENDED)
                return found
            told(f"{stage} ({wanted.uri})")
            lease.note(uri=wanted.uri, stage=stage.value)
            if stage is Stage.CANDIDATE:
                lease.note(checked=None)
                cluster.create(wanted.candidate())
            elif stage is Stage.CLEARING:
                _clear(cluster, lease, wanted.name)
            elif stage in (Stage.CHECKING, Stage.SHARING):
                try:
                    found = _serving(cluster, lease, candidate_name, wanted.uri, timeout_s, told)
                    if route and split and stage is Stage.SHARING:
                        _share(cluster, lease, route, split, found, told)
                    check(found)
                except AvrtError as error:
                    told(f"the candidate fails: {error}")
                    lease.check()
                    _clear(cluster, lease, wanted.name)
                    lease.note(**_ENDED)
                    if not isinstance(error, ServingError):
                        raise
                    raise ServingError(f"The champion is unchanged; the candidate failed: {error}") from error
                lease.note(**{"checked" if stage is Stage.CHECKING else "shared": wanted.fingerprint})
            else:
                found = _promote(cluster, lease, champion, wanted, timeout_s, told)
                lease.note(**_ENDED)
                return found


def rollback(cluster: Cluster, name: str, *, timeout_s: float, told: Callable[[str], None] = lambda _: None) -> Status:
    """Set the champion back to what it was before its last rollout; a rollout that was killed half-way is given up.

    Calling it again after it has gone back does nothing more: what was taken away does not come back.

    Raises:
        Busy: where a rollout is going on.
        UsageError: where there is no champion, it has no previous model, Argo CD would undo the change, or what has
            the candidate's name is none.
        ServingError: where the previous model does not serve.
    """
    with Lease(cluster, _lease_name(name)) as lease:
        champion = cluster.service(name)
        if champion is None:
            raise UsageError(f"There is no InferenceService {name} in {cluster.namespace}.")
        _refuse_argo(champion)
        begun = lease.notes.get(_URI)
        # A rollout of the same model with other settings is told by its stage alone.
        changed = begun == storage_uri(champion) and lease.notes.get(_STAGE) == Stage.PROMOTING
        given_up = begun is not None and not changed
        if _candidate(cluster, name) is not None or _ROUTE in lease.notes:
            told("removing the candidate")
            _clear(cluster, lease, name)
        lease.note(**_ENDED)
        if given_up:
            told(f"the rollout to {begun} is given up; the champion had not been changed")
        elif PREVIOUS in annotations_of(champion):
            told(f"going back to {json.loads(annotations_of(champion)[PREVIOUS])['uri']}")
            champion = _change(cluster, lease, name, str(storage_uri(champion)), restored)
        elif ROLLED_BACK not in annotations_of(champion):
            raise UsageError(f"{cluster.namespace}/{name} has no previous model: it was never rolled out over one.")
        return _serving(cluster, lease, name, str(storage_uri(champion)), timeout_s, told)


def promoted(champion: Document, wanted: Wanted, *, served: bool) -> Document:
    """The champion with the new model, and with what it was before.

    Args:
        champion: as it is.
        wanted: as it is to be.
        served: whether it has served its model. One that never came up is nothing to go back to.
    """
    service, old = copy.deepcopy(champion), annotations_of(champion)
    before = {
        "uri": storage_uri(champion),
        "annotations": {key: old[key] for key in _ORIGIN if key in old},
        "predictor": champion["spec"]["predictor"],
    }
    kept = {key: value for key, value in old.items() if key not in (*_ORIGIN, ROLLED_BACK, STOP)}
    if served:
        kept[PREVIOUS] = json.dumps(before, sort_keys=True)
    service["metadata"]["annotations"] = kept | annotations_of(wanted.service)
    service["metadata"]["labels"] = (service["metadata"].get("labels") or {}) | (
        wanted.service["metadata"].get("labels") or {}
    )
    service["spec"]["predictor"] = copy.deepcopy(wanted.service["spec"]["predictor"])
    return service


def restored(champion: Document) -> Document:
    """The champion as it was before its last rollout."""
    service = copy.deepcopy(champion)
    before: dict[str, Any] = json.loads(annotations_of(champion)[PREVIOUS])
    kept = {key: value for key, value in annotations_of(champion).items() if key not in (*_ORIGIN, PREVIOUS)}
    service["metadata"]["annotations"] = kept | before["annotations"] | {ROLLED_BACK: storage_uri(champion)}
    service["spec"]["predictor"] = before["predictor"]
    return service


def _promote(
    cluster: Cluster,
    lease: Lease,
    champion: Document | None,
    wanted: Wanted,
    timeout_s: float,
    told: Callable[[str], None],
) -> Status:
    """Set the champion to the new model and wait; where it does not come up, set it back."""
    if champion is None:
        cluster.create(wanted.service)
    elif not _is_set_to(champion, wanted):
        deployment = cluster.documents(wanted.name).deployment
        served = deployment is not None and came_up(deployment, str(storage_uri(champion)))
        _change(
            cluster, lease, wanted.name, str(storage_uri(champion)), lambda each: promoted(each, wanted, served=served)
        )
    try:
        return _serving(cluster, lease, wanted.name, wanted.uri, timeout_s, told)
    except ServingError as error:
        lease.check()
        now = cluster.service(wanted.name)
        if now is None or storage_uri(now) != wanted.uri or PREVIOUS not in annotations_of(now):
            raise
        told("the champion does not come up with it: going back")
        lease.note(**_ENDED)
        back = _change(cluster, lease, wanted.name, wanted.uri, restored)
        raise ServingError(f"The champion was set back to {storage_uri(back)}: {error}") from error


def _serving(
    cluster: Cluster, lease: Lease, name: str, uri: str, timeout_s: float, told: Callable[[str], None]
) -> Status:
    last = ""

    def heard(found: Status) -> None:
        nonlocal last
        lease.check()
        if found.line != last:
            last = found.line
            told(last)

    return wait(cluster, name, uri, timeout_s=timeout_s, told=heard)


def _change(cluster: Cluster, lease: Lease, name: str, uri: str, change: Callable[[Document], Document]) -> Document:
    """Change the champion, whose status the controller writes at the same time.

    Raises:
        ServingError: where somebody else set it to another model meanwhile.
    """
    made: Document | None = None
    for attempt in range(1, _TRIES + 1):
        lease.check()
        service = cluster.service(name)
        if made is not None and service is not None and _contains(service, _decided(made)):
            return service  # it was changed, and the answer lost
        if service is None or storage_uri(service) != uri:
            raise ServingError(
                f"Somebody else changed {cluster.namespace}/{name} during the rollout: see what it is set to with "
                f"avrt serving status {name} --namespace {cluster.namespace}, then start the rollout again."
            )
        try:
            made = change(service)
            return cluster.replace(made)
        except Conflict:
            if attempt == _TRIES:
                raise
            time.sleep(0.2)
    raise AssertionError  # unreachable


def _share(
    cluster: Cluster, lease: Lease, route: Route, split: Split, candidate: Status, told: Callable[[str], None]
) -> None:
    """Give a candidate its share of the traffic, and watch it bear it.

    Raises:
        ServingError: where its pod is not ready or was restarted, or the route does not lead to it any more.
    """
    lease.note(route=route.name)  # before it leads to the candidate: whoever removes the candidate takes it back first
    route.share(split.percent)
    told(f"{split.percent} % of the requests through {route.name} go to the candidate, for {split.seconds:g} s")
    until, starts = time.monotonic() + split.seconds, _starts(cluster.pods(candidate.name))
    seen = time.monotonic()
    while (left := until - time.monotonic()) > 0:
        lease.check()
        try:
            route.watch(split.percent)
            documents = cluster.documents(candidate.name)
        except EnvironmentProblem:
            if time.monotonic() - seen > AWAY_S:
                raise
            time.sleep(min(POLL_S, left))
            continue
        seen = time.monotonic()
        found = judge(candidate.name, cluster.namespace, documents, candidate.uri)
        if found.state is not State.SERVING:
            raise ServingError(found.line)
        if _starts(documents.pods) != starts:
            raise ServingError(
                f"its pod was restarted while it got users' requests: see the events of {candidate.name}."
            )
        time.sleep(min(POLL_S, left))


def _starts(pods: list[Document]) -> set[tuple[str, str, int]]:
    """Each container's restarts; another pod has other ones."""
    return {
        (pod["metadata"]["uid"], container["name"], container["restartCount"])
        for pod in pods
        for container in container_statuses(pod)
    }


def _candidate(cluster: Cluster, name: str) -> Document | None:
    """A champion's candidate, or None.

    Raises:
        UsageError: where what has its name is somebody else's, and so not to be removed.
    """
    found = cluster.service(name + CANDIDATE)
    if found is not None and annotations_of(found).get(_OF) != name:
        raise UsageError(
            f"{cluster.namespace}/{name}{CANDIDATE} is no rollout's candidate (it has no annotation {_OF}={name}): "
            f"rename or remove it, since a rollout of {name} needs the name."
        )
    return found


def _clear(cluster: Cluster, lease: Lease, name: str) -> None:
    """Remove a champion's candidate, after what leads users to it."""
    if _ROUTE in lease.notes:
        Route(cluster, lease.notes[_ROUTE], name, name + CANDIDATE).take_back()
        lease.note(route=None)
    _remove(cluster, name + CANDIDATE)


def _remove(cluster: Cluster, name: str) -> None:
    """Delete a candidate, and wait until its pods have given their room back."""
    cluster.delete(name)
    deadline = time.monotonic() + _REMOVAL_S
    while cluster.service(name) is not None or cluster.pods(name):
        if time.monotonic() > deadline:
            raise ServingError(
                f"{cluster.namespace}/{name} is still there {_REMOVAL_S:g} s after it was deleted: look at its pods, "
                "and whether KServe's controller runs."
            )
        time.sleep(POLL_S)


def _decided(service: Document) -> Document:
    """What a rollout decides of an InferenceService; of the settings that are taken away the annotations alone tell."""
    return {"metadata": {"annotations": annotations_of(service)}, "spec": service["spec"]}


def _is_set_to(champion: Document, wanted: Wanted) -> bool:
    now, asked = annotations_of(champion), annotations_of(wanted.service)
    # A champion that was made by hand says nothing of what was asked for.
    same = SETTINGS not in now or SETTINGS not in asked or now[SETTINGS] == asked[SETTINGS]
    return now.get(STOP) != "true" and same and _contains(champion["spec"], wanted.service["spec"])


def _contains(stored: Any, applied: Any) -> bool:
    """Whether a stored object is what was applied, but for what the cluster added."""
    if isinstance(applied, dict) and isinstance(stored, dict):
        return all(key in stored and _contains(stored[key], value) for key, value in applied.items())
    if isinstance(applied, list) and isinstance(stored, list):
        return len(stored) == len(applied) and all(map(_contains, stored, applied))
    return bool(stored == applied)


def _hash(document: Any) -> str:
    return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()[:16]


def _refuse_argo(champion: Document) -> None:
    if ARGO in annotations_of(champion):
        raise UsageError(
            f"{champion['metadata']['name']} is kept by Argo CD, which would undo this at once: change it in Git "
            "(deployment.target=git), and go back by git revert."
        )


def _refuse_older(namespace: str, champion: Document, wanted: Wanted) -> None:
    if not wanted.in_order or storage_uri(champion) == wanted.uri:
        return
    now, asked = (annotations_of(each).get(MODEL_VERSION, "") for each in (champion, wanted.service))
    if not (now.isdecimal() and asked.isdecimal() and int(now) > int(asked)):
        return
    name = wanted.name
    raise ServingError(
        f"{namespace}/{name} is set to version {now}, so version {asked} is not rolled out any more: to go back to it, "
        f"avrt serving rollout {name} --namespace {namespace} --uri {wanted.uri} --version {asked}."
    )


def _lease_name(name: str) -> str:
    return f"{name}-rollout"
