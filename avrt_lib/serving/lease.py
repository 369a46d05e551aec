"""One rollout at a time: a Lease of the cluster, held by a process that lives and taken over from one that does not.

What a rollout must not forget when it is killed stands in the Lease's annotations. On the InferenceService every
annotation would replace its pods, since KServe copies them to the pods.
"""

from __future__ import annotations

import copy
import logging
import os
import socket
import threading
import time
import uuid
from datetime import UTC, datetime
from types import TracebackType
from typing import Self, TypeGuard

from avrt_lib.errors import AvrtError, ServingError
from avrt_lib.serving.cluster import Cluster, Conflict, Document

log = logging.getLogger("avrt.serving")

#: A Lease that was not renewed for so long is nobody's. Watched on one's own clock: clocks of machines differ.
DURATION_S = 15
RENEW_S = 4.0
_POLL_S = 1.0


class Busy(ServingError):
    """Another process holds the Lease."""


class Lease:
    """Holds a Lease for as long as a block runs.

    Args:
        cluster: its namespace.
        name: its name.

    Raises:
        Busy: on entry, where another process renews it.
    """

    def __init__(self, cluster: Cluster, name: str) -> None:
        self._cluster = cluster
        self._name = name
        self._holder = f"{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:6]}"
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._renewer = threading.Thread(target=self._renew, name=f"lease-{name}", daemon=True)
        self._lease: Document = {}
        self._renewed = 0.0
        self._lost: str | None = None

    @property
    def notes(self) -> dict[str, str]:
        """What its holders wrote down; that of a killed one is still there."""
        return dict(self._lease["metadata"].get("annotations") or {})

    def note(self, **notes: str | None) -> None:
        """Write something down at once (``None`` removes it), under ``avrt/NAME``.

        Raises:
            ServingError: where the Lease was lost.
        """
        changes = {f"avrt/{name}": value for name, value in notes.items()}
        with self._lock:
            kept = {name: value for name, value in (self.notes | changes).items() if value is not None}
            try:
                self._put(self._holder, kept)
            except Conflict as error:
                self._lost = str(error)
        self.check()

    def check(self) -> None:
        """Make sure that this process still holds it; call it before every change.

        Raises:
            ServingError: where it does not: it slept for too long, or the API server was away.
        """
        if self._lost is None and not self._fresh():
            self._lost = f"it was not renewed for {DURATION_S} s"
        if self._lost is not None:
            raise ServingError(f"This rollout has lost its lease {self._name} ({self._lost}): start it again.")

    def __enter__(self) -> Self:
        found, began = self._cluster.lease(self._name), time.monotonic()
        while _held(found) and time.monotonic() - began < DURATION_S:
            time.sleep(_POLL_S)
            before, found = found, self._cluster.lease(self._name)
            if _held(found) and found["spec"] != before["spec"]:
                raise Busy(self._busy(found))
        self._lease = found or {"metadata": {"name": self._name}}
        try:
            self._put(self._holder, self.notes)
        except Conflict as error:
            raise Busy(f"Another rollout has begun at this moment ({error}): wait until it has ended.") from error
        self._renewer.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        self._renewer.join()
        if self._lost is None:
            try:
                self._put("", self.notes)
            except AvrtError as error:
                log.warning("the lease %s runs out by itself: %s", self._name, error)

    def _renew(self) -> None:
        while not self._ended.wait(RENEW_S):
            try:
                with self._lock:
                    self._put(self._holder, self.notes)
            except Conflict as error:
                self._lost = str(error)
                return
            except AvrtError as error:
                log.warning("the lease %s could not be renewed: %s", self._name, error)

    def _put(self, holder: str, notes: dict[str, str]) -> None:
        lease = copy.deepcopy(self._lease)
        lease |= {"apiVersion": "coordination.k8s.io/v1", "kind": "Lease"}
        lease["metadata"]["annotations"] = notes
        moment, now = time.monotonic(), datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
        lease["spec"] = {"holderIdentity": holder, "leaseDurationSeconds": DURATION_S, "renewTime": now}
        try:
            self._lease = self._cluster.put_lease(lease)
        except Conflict:
            # The answer to a write of ours may have been lost, so that the version known here is the one before it.
            found = self._cluster.lease(self._name)
            if found is None or (found.get("spec") or {}).get("holderIdentity") != self._holder:
                raise
            lease["metadata"]["resourceVersion"] = found["metadata"]["resourceVersion"]
            self._lease = self._cluster.put_lease(lease)
        self._renewed = moment

    def _fresh(self) -> bool:
        return time.monotonic() - self._renewed < DURATION_S

    def _busy(self, found: Document) -> str:
        notes = found["metadata"].get("annotations") or {}
        what = f" to {notes['avrt/uri']}, now {notes.get('avrt/stage')}," if "avrt/uri" in notes else ""
        return (
            f"A rollout{what} is going on already (held by {found['spec']['holderIdentity']} in the lease "
            f"{self._cluster.namespace}/{self._name}): wait until it has ended."
        )


def _held(lease: Document | None) -> TypeGuard[Document]:
    return lease is not None and bool((lease.get("spec") or {}).get("holderIdentity"))
