"""The health of InferenceServices as Argo CD would see it, run in Lua, for statuses that KServe was seen to write."""

from __future__ import annotations

from typing import Any

import pytest
from lupa import lua51

from scripts import manifests

FOLDER = manifests.MANIFESTS / "components" / "argocd-admin"


def health(script: str, document: dict[str, Any]) -> tuple[str, str]:
    """Status and message that a script gives an object."""
    lua = lua51.LuaRuntime()
    # Argo CD gives scripts nothing of the operating system; `obj` is the object.
    run = lua.eval("function(text, obj) return setfenv(assert(loadstring(text)), {obj = obj, ipairs = ipairs})() end")
    answer = run((FOLDER / script).read_text(encoding="utf-8"), lua.table_from(document, recursive=True))
    return answer["status"], answer["message"]


def condition(kind: str, status: str, reason: str | None = None, message: str | None = None) -> dict[str, str]:
    """A condition; fields that are not set are absent."""
    found = {"type": kind, "status": status, "reason": reason, "message": message}
    return {key: value for key, value in found.items() if value is not None}


def service(
    ready: str, predictor: tuple[str, str | None, str | None], transition: str, failure: dict[str, str] | None = None
) -> dict[str, Any]:
    """An InferenceService with this status."""
    model = {"transitionStatus": transition, **({"lastFailureInfo": failure} if failure else {})}
    conditions = [
        condition("IngressReady", "True"),
        condition("PredictorReady", *predictor),
        condition("Ready", ready),
        condition("Stopped", "False"),
    ]
    return {"metadata": {"generation": 1}, "status": {"conditions": conditions, "modelStatus": model}}


OLD_FAILURE = {"reason": "ModelLoadFailed", "message": "No model found in qwen/nope."}
UNAVAILABLE = ("False", "MinimumReplicasUnavailable", "Deployment does not have minimum availability.")
AVAILABLE = ("True", "NewReplicaSetAvailable", "ReplicaSet has successfully progressed.")


@pytest.mark.parametrize(
    ("document", "status", "message"),
    [
        ({"metadata": {}}, "Progressing", "has not looked at it"),
        ({"metadata": {}, "status": {}}, "Progressing", "has not looked at it"),
        (service("False", UNAVAILABLE, "InProgress"), "Progressing", "MinimumReplicasUnavailable"),
        (service("True", AVAILABLE, "UpToDate"), "Healthy", "ready"),
        (service("True", AVAILABLE, "UpToDate", OLD_FAILURE), "Healthy", "ready"),
        (
            service("Unknown", ("Unknown", "ReplicaSetUpdated", "progressing"), "InProgress"),
            "Progressing",
            "progressing",
        ),
        (service("True", ("True", "MinimumReplicasAvailable", "m"), "InProgress"), "Progressing", "MinimumReplicas"),
        (service("False", UNAVAILABLE, "BlockedByFailedLoad", OLD_FAILURE), "Degraded", "No model found in qwen/nope."),
        # The old pod serves on while the new version's model is missing.
        (service("True", AVAILABLE, "BlockedByFailedLoad", OLD_FAILURE), "Degraded", "ModelLoadFailed: No model"),
        (
            service("Unknown", ("Unknown", None, None), "InvalidSpec", {"reason": "RuntimeNotRecognized"}),
            "Degraded",
            "RuntimeNotRecognized",
        ),
        (service("False", ("False", "ReconcileFailed", "is invalid"), ""), "Degraded", "ReconcileFailed: is invalid"),
        (
            service("False", ("False", "ProgressDeadlineExceeded", "timed out"), "InProgress"),
            "Degraded",
            "ProgressDeadlineExceeded: timed out",
        ),
        # The Secret of its account may come a moment later.
        (service("False", ("False", "FailedCreate", 'secrets "gone" not found'), "Pending"), "Progressing", "gone"),
        (service("Unknown", ("Unknown", None, None), ""), "Progressing", "look at its events"),
    ],
)
def test_health_of_an_inference_service(document: dict[str, Any], status: str, message: str) -> None:
    found = health("inference-service.lua", document)
    assert found[0] == status
    assert message in found[1]


def test_a_stopped_one_is_suspended() -> None:
    document = service("False", ("False", "Stopped", None), "InProgress")
    document["status"]["conditions"][-1]["status"] = "True"
    assert health("inference-service.lua", document)[0] == "Suspended"


@pytest.mark.parametrize(
    ("document", "status"),
    [
        ({}, "Progressing"),
        ({"status": {}}, "Progressing"),
        ({"status": {"health": {"status": "Degraded"}}}, "Degraded"),
    ],
)
def test_health_of_an_application(document: dict[str, Any], status: str) -> None:
    assert health("application.lua", document)[0] == status
