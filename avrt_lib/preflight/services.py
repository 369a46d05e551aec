"""Whether the object store and MLflow take what a run will bring them."""

from __future__ import annotations

import io
import json
import logging
import os
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from avrt_lib.cluster.profile import Profile, TrackingAccess, amount
from avrt_lib.config import Config
from avrt_lib.errors import AvrtError, ConfigError
from avrt_lib.preflight.checks import ANSWER_S, FAILED, GIB, OK, UNKNOWN, WARNING, Check, in_cluster, one_line
from avrt_lib.preflight.fit import ENGINE_ROLES
from avrt_lib.store.objects import S3Settings, default_bucket, read_object
from avrt_lib.tables import MANIFEST

log = logging.getLogger("avrt.preflight")

#: How long a pod of the run waits for the store and MLflow together, and how often it asks: both may just be starting.
COMING_UP_S, ASK_EVERY_S = 90.0, 5.0
_PROBE = "preflight/probe"
#: Codes of S3 that mean the key itself, not what it may do.
_UNKNOWN_KEY = ("InvalidAccessKeyId", "SignatureDoesNotMatch", "InvalidToken", "ExpiredToken")
_LOGIN = ("username", "password")
_ELSEWHERE = "is an address inside of the cluster; the run's first step asks it"


def until_up(ask: Callable[[], Check], deadline: float) -> Check:
    """Ask until the answer is another than that something is coming up, or until the deadline.

    Args:
        ask: makes the check.
        deadline: by ``time.monotonic()``.
    """
    while (check := ask()).coming_up and time.monotonic() < deadline:
        log.info("%s: %s; it is asked again", check.name, check.found)
        time.sleep(ASK_EVERY_S)
    return check


def store_check(
    config: Config,
    profile: Profile,
    secret: Mapping[str, str] | None,
    *,
    inside: bool,
    components: Sequence[str] | None = None,
) -> Check:
    """Reach the bucket, write to it, and take away what was written; then look for the configuration's models there.

    Args:
        config: the run's configuration.
        profile: the cluster's.
        secret: the store's secret by key, where it could be read; a pod has it in its environment.
        inside: whether this is a pod of the run.
        components: what the run's pipeline is made of; None: the whole path.
    """
    label, access = "Bucket", profile.store
    host = access.endpoint.rpartition(":")[0] or access.endpoint
    if inside:
        try:
            settings = S3Settings.from_environment()
        except ConfigError as error:
            return Check(label, FAILED, str(error).rstrip("."), f"make the secret {access.secret}")
    elif in_cluster(host):
        return Check(label, UNKNOWN, f"{access.endpoint} {_ELSEWHERE}")
    elif not secret or not secret.get("access_key") or not secret.get("secret_key"):
        return Check(label, UNKNOWN, f"the secret {access.secret} cannot be read from here")
    elif access.ca_config_map and "AVRT_S3_CA_FILE" not in os.environ:
        return Check(label, UNKNOWN, f"{access.endpoint} has its own CA: set AVRT_S3_CA_FILE to ask it from here")
    else:
        keys = secret["access_key"].strip(), secret["secret_key"].strip()
        settings = S3Settings(access.endpoint, access.secure, *keys, access.region)
    return _probe(config, profile, settings, components, inside=inside)


def _probe(
    config: Config, profile: Profile, settings: S3Settings, components: Sequence[str] | None, *, inside: bool
) -> Check:
    import urllib3
    from minio.error import MinioException, S3Error

    label, secret = "Bucket", profile.store.secret
    at = settings.endpoint
    connection = settings.connect(attempts=1, timeout_s=ANSWER_S)
    bucket = config.store.bucket
    try:
        for bucket in dict.fromkeys((config.store.bucket, default_bucket())):
            read_object(connection, bucket, _PROBE)  # the next call has no body, in which a wrong key would be told
            if not connection.bucket_exists(bucket):
                if not inside:
                    return Check(label, WARNING, f"there is no {bucket} at {at} yet", "the run makes it, if it may")
                connection.make_bucket(bucket)
            connection.put_object(bucket, _PROBE, io.BytesIO(b"avrt"), 4)
            connection.remove_object(bucket, _PROBE)
        return _models(config, profile, connection, components) or Check(
            label, OK, f"{bucket} at {at} can be written to"
        )
    except S3Error as error:
        if error.code in _UNKNOWN_KEY:
            mend = f"correct access_key and secret_key of the secret {secret}"
            return Check(label, FAILED, f"{at} refuses the credentials ({error.code})", mend)
        if error.code == "AccessDenied":
            mend = f"let the identity of the secret {secret} read, write and delete there"
            return Check(label, FAILED, f"permission denied for {bucket} at {at}", mend)
        return Check(label, FAILED, f"{bucket} at {at}: {error.code} {error.message}", "look at the object store")
    except (MinioException, urllib3.exceptions.HTTPError) as error:
        mend = "start the object store, or correct store.endpoint and store.secure of the profile"
        return Check(label, FAILED, f"{at} cannot be reached ({one_line(error)})", mend, coming_up=inside)


def _models(config: Config, profile: Profile, connection: Any, components: Sequence[str] | None) -> Check | None:
    """Published models must be there, and fit on the disk of the pods that fetch them; None where all is well."""
    from avrt_lib.licences import loaded_models

    for key, part in loaded_models(config, components).items():
        if not part.model.startswith("s3://"):
            continue
        place = urlsplit(part.model)
        document = read_object(connection, place.netloc, f"{place.path.strip('/')}/{MANIFEST}")
        if document is None:
            mend = "publish it with `avrt models`, or correct the address"
            return Check(f"Model {key}", FAILED, f"{part.model} is not in the store", mend)
        size = sum(int(entry["bytes"]) for entry in json.loads(document)["files"].values())
        role = ENGINE_ROLES.get(key, "training")
        scratch = profile.pools[role].scratch
        needed = size * (2 if role == "training" else 1)  # training writes a model of the same size beside it
        if scratch and needed > amount(scratch):
            found = f"{part.model} needs {needed / GIB:.1f} GiB of disk, but pools.{role}.scratch is {scratch}"
            return Check(f"Disk {key}", FAILED, found, f"raise pools.{role}.scratch")
    return None


def tracking_check(tracking: TrackingAccess, secret: Mapping[str, str] | None, *, inside: bool) -> Check:
    """Ask MLflow for an experiment, as promotion will: a champion that it does not take ends the run.

    Args:
        tracking: its address.
        secret: its secret by key, where it could be read; a pod has it in its environment.
        inside: whether this is a pod of the run.
    """
    import httpx

    label, uri = "MLflow", tracking.uri.rstrip("/")
    if not inside and in_cluster(urlsplit(uri).hostname or ""):
        return Check(label, UNKNOWN, f"{uri} {_ELSEWHERE}")
    found = {key: (secret or {}).get(key) or os.environ.get(f"MLFLOW_TRACKING_{key.upper()}", "") for key in _LOGIN}
    login = (found["username"], found["password"]) if found["username"] else None
    if tracking.secret and login is None:
        return Check(label, UNKNOWN, f"the secret {tracking.secret} cannot be read from here")
    try:
        answer = httpx.get(
            f"{uri}/api/2.0/mlflow/experiments/search",
            params={"max_results": 1},
            auth=login,
            timeout=ANSWER_S,
            follow_redirects=True,
        )
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        mend = "start it, or correct tracking.uri of the profile; no champion can be registered without it"
        return Check(label, FAILED, f"{uri} cannot be reached ({one_line(error)})", mend, coming_up=inside)
    if answer.status_code in (401, 403):
        mend = f"correct username and password of the secret {tracking.secret}"
        return Check(label, FAILED, f"{uri} refuses the credentials ({answer.status_code})", mend)
    if answer.status_code != 200:
        mend, starting = "is tracking.uri the address of MLflow?", inside and answer.status_code >= 500
        return Check(label, FAILED, f"{uri} answers {answer.status_code}", mend, coming_up=starting)
    return Check(label, OK, uri)


def manifests_check(config: Config) -> Check:
    """Whether git reaches the repository that ``deployment.target=git`` commits to; asked from a pod of the run."""
    from avrt_lib.serving.git import Repository

    label, deployment = "Manifests", config.deployment
    branch = deployment.manifests_branch
    try:
        with tempfile.TemporaryDirectory(prefix="avrt-git-") as folder:
            repository = Repository(Path(folder), deployment)
            shown, branches = repository.shown(repository.url), repository.branches()
    except AvrtError as error:
        mend = "correct deployment.manifests_url, or give the pods git's credentials (deployment.git.token_env)"
        return Check(label, FAILED, one_line(error).rstrip("."), mend)
    if branch not in branches:
        return Check(label, FAILED, f"{shown} has no branch {branch}", "correct deployment.manifests_branch")
    return Check(label, OK, f"{branch} of {shown} can be read")
