"""Cluster profiles: what a pipeline must know of the cluster that it is compiled for, and nothing about the run itself.

One strict YAML file a cluster (``configs/clusters/``). A profile is applied when the pipeline is compiled; the run's
configuration stays the same from cluster to cluster, but for ``overrides``: what the cluster decides about it, such as
where models are served.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, StringConstraints, model_validator

from avrt_lib.config import Config, EngineConfig, Section, read_mapping, validated
from avrt_lib.errors import ConfigError
from avrt_lib.runs import has_step

#: Holds the profile, as JSON, in the pod of a run's first step.
VARIABLE = "AVRT_CLUSTER_PROFILE"
API_KEY = "AVRT_API_KEY"
#: The roles that pools stand for, and the steps of each.
ROLES: dict[str, tuple[str, ...]] = {
    "cpu": (
        "preflight",
        "ingest",
        "publish_traces",
        "import_traces",
        "data_validation",
        "promotion",
        "deployment",
        "run_summary",
    ),
    "teacher": ("vision_teacher", "audio_teacher"),
    "merger": ("merger",),
    "training": ("sft", "grpo"),
    "evaluation": ("evaluation",),
}
Role = Literal["cpu", "teacher", "merger", "training", "evaluation"]

Name = Annotated[str, StringConstraints(pattern=r"^[a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?$")]
#: The backend's driver names a pod's volume after the claim or config map in it, and a volume's name has no dots.
VolumeName = Annotated[str, StringConstraints(pattern=r"^[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?$")]
Quantity = Annotated[str, StringConstraints(pattern=r"^\d+(\.\d+)?(m|k|M|G|T|Ki|Mi|Gi|Ti)?$")]

#: Names of variables, and addresses, that hold a secret. Tokenizers are none.
_CREDENTIAL = re.compile(r"SECRET|PASSWORD|TOKEN(?!IZER)|ACCESS_KEY|API_KEY")
_LOGIN = re.compile(r"://[^/@\s]*:[^/@\s]*@")
#: Names of the empty folders in a step's pod, shared memory first.
EMPTY_DIRS = ("shared-memory", "scratch")
#: Where steps find the store's own CA.
CA_FOLDER = "/etc/avrt-store-ca"
#: The backend puts it on every pod of a run.
RUN_LABEL = "pipeline/runid"
#: Where the backend's launcher and our own placement mount something; a pod with two mounts at one place is refused.
_LAUNCHERS = ("/kfp-launcher", "/minio", "/s3", "/gcs", "/.local", "/.cache", "/.config")
_TAKEN = ("", "/tmp", "/dev/shm", CA_FOLDER, *_LAUNCHERS)
_SIZES = {"m": 1e-3, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}


def amount(quantity: str) -> float:
    """A Kubernetes quantity as a number.

    >>> amount("500m"), amount("2Gi")
    (0.5, 2147483648.0)
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([a-zA-Z]*)", quantity)
    assert found is not None
    return float(found[1]) * _SIZES.get(found[2], 1.0)


class Toleration(Section):
    """A taint that the pods of a pool stand."""

    key: str | None = None
    operator: Literal["Equal", "Exists"] = "Equal"
    value: str | None = None
    effect: Literal["NoSchedule", "PreferNoSchedule", "NoExecute"] | None = None
    seconds: int | None = Field(None, ge=0, description="for NoExecute: how long")

    @model_validator(mode="after")
    def _such_as_kubernetes_takes(self) -> Self:
        if self.operator == "Exists" and self.value is not None:
            raise ValueError("a toleration with operator Exists takes no value")
        if self.operator == "Equal" and self.key is None:
            raise ValueError("a toleration without a key needs operator: Exists")
        if self.seconds is not None and self.effect != "NoExecute":
            raise ValueError("a toleration with seconds needs effect: NoExecute")
        return self


class AffinityTerm(Section):
    """One expression of required node affinity."""

    key: str
    operator: Literal["In", "NotIn", "Exists", "DoesNotExist", "Gt", "Lt"] = "In"
    values: list[str] = Field(default_factory=list)

    @model_validator(mode="after")
    def _such_as_kubernetes_takes(self) -> Self:
        """A pod that Kubernetes refuses is an error that Argo repeats on every level of the graph."""
        if self.operator in ("In", "NotIn") and not self.values:
            raise ValueError(f"an affinity with operator {self.operator} needs values")
        if self.operator in ("Exists", "DoesNotExist") and self.values:
            raise ValueError(f"an affinity with operator {self.operator} takes no values")
        if self.operator in ("Gt", "Lt") and not (len(self.values) == 1 and self.values[0].isdecimal()):
            raise ValueError(f"an affinity with operator {self.operator} needs one whole number as its values")
        return self


class Pool(Section):
    """The nodes that a role's pods go to, and what each pod asks for."""

    node_selector: dict[str, str] = Field(default_factory=dict)
    tolerations: list[Toleration] = Field(default_factory=list)
    affinity: list[AffinityTerm] = Field(default_factory=list, description="required node affinity, all of them")
    gpus: int = Field(0, ge=0, description="GPUs (or MIG slices) of one pod")
    gpu_resource: str = Field(
        "nvidia.com/gpu", pattern=r"^[a-z0-9.-]+/[a-zA-Z0-9.-]+$", description="nvidia.com/mig-3g.40gb for MIG slices"
    )
    gpu_memory_gib: float | None = Field(None, gt=0, description="memory of one GPU or slice, for `avrt plan`")
    cpu_request: Quantity = "1"
    cpu_limit: Quantity | None = None
    memory_request: Quantity = "4Gi"
    memory_limit: Quantity | None = None
    shared_memory: Quantity | None = Field(None, description="size of /dev/shm, which NCCL and data loaders fill")
    scratch: Quantity | None = Field(None, description="size of an emptyDir at /tmp; None: the container's own disk")
    timeout_s: int | None = Field(None, ge=60, description="a pod that runs longer is ended; waiting does not count")
    retries: int = Field(0, ge=0, le=10)
    retry_wait_s: int = Field(60, ge=1)
    environment: dict[str, str] = Field(default_factory=dict, description="for this pool's pods")

    @model_validator(mode="after")
    def _requests_below_limits(self) -> Self:
        for name in ("cpu", "memory"):
            request, limit = getattr(self, f"{name}_request"), getattr(self, f"{name}_limit")
            if limit is not None and amount(request) > amount(limit):
                raise ValueError(f"{name}_request {request} is above {name}_limit {limit}")
        return self


class Volume(Section):
    """A claim that is there already, mounted in the pods of the run: data sets, prepared models.

    A claim may be mounted at several places, with a ``sub_path`` each. The backend's driver then asks for as many
    volumes of the claim's name, and Argo, which merges them into the pod as a strategic patch, makes one of them.
    """

    claim: VolumeName
    mount_path: str = Field(pattern=r"^/[^\s]+$")
    sub_path: str = ""


class StoreAccess(Section):
    """The object store as the steps reach it. The secret holds the keys ``access_key`` and ``secret_key``."""

    endpoint: str = Field(pattern=r"^[^/@\s]+$", description="host:port without a scheme")
    secure: bool = True
    region: str = "us-east-1"
    secret: Name = "avrt-store"
    ca_config_map: VolumeName | None = Field(None, description="config map with the CA, where the store has its own")
    ca_key: str = Field("ca.crt", pattern=r"^[-._a-zA-Z0-9]+$", description="the config map's key")


class TrackingAccess(Section):
    """MLflow as the steps reach it."""

    uri: str = Field(pattern=r"^https?://")
    secret: Name | None = Field(None, description="secret with username and password; None: no authentication")


class PipelinesAccess(Section):
    """The Kubeflow Pipelines backend as ``avrt submit`` reaches it, and how it runs us."""

    host: str | None = Field(None, pattern=r"^https?://", description="None: --host, KFP_ENDPOINT or in-cluster")
    namespace: Name = Field("kubeflow", description="where the runs' pods are; the user's profile in multi-user mode")
    service_account: Name = "pipeline-runner"
    experiment: str = "avrt"
    pipeline_root: str | None = Field(None, pattern=r"^(s3|gs|minio)://", description="None: the backend's own")
    pending_limit_s: int = Field(1800, ge=60, description="a step that waits longer for its pod ends the run")
    ttl_s: int | None = Field(None, ge=60, description="finished workflows are removed after this")
    deadline_s: int | None = Field(None, ge=600, description="the whole run is ended after this")
    retries_are_fixed: bool = Field(
        False, description="the administrator has set Argo's retryPolicy (manifests/components/kfp-admin)"
    )


class Kueue(Section):
    """Pods wait in this queue; Kueue lets them in."""

    queue: Name
    priority_class: Name | None = Field(None, description="a WorkloadPriorityClass")


class Profile(Section):
    """One cluster."""

    name: Name
    description: str = ""
    build: Literal["cpu", "cuda"] = Field("cuda", description="which variant of the images runs here")
    pipelines: PipelinesAccess = Field(default_factory=PipelinesAccess)
    store: StoreAccess
    tracking: TrackingAccess | None = None
    api_key_secret: Name | None = Field("avrt-api-key", description="secret with api_key, which the served model asks")
    secret_env: dict[str, dict[str, str]] = Field(
        default_factory=dict,
        description="more secrets, name -> {key: environment variable}: a variable that the configuration names "
        "(api_key_env, git.token_env) is for the steps that need it, any other one for all pods",
    )
    environment: dict[str, str] = Field(default_factory=dict, description="for all pods: proxies, mirrors, NCCL")
    image_pull_secrets: list[Name] = Field(default_factory=list)
    image_pull_policy: Literal["Always", "IfNotPresent", "Never"] = "IfNotPresent"
    registry: str | None = Field(None, description="images are taken from here: registry.example.com/team")
    run_as_non_root: bool = True
    run_as_user: int | None = Field(None, ge=1, description="None: the image's user, or the one OpenShift gives")
    run_as_group: int | None = Field(None, ge=0)
    kueue: Kueue | None = None
    labels: dict[str, str] = Field(default_factory=dict, description="of every pod")
    annotations: dict[str, str] = Field(default_factory=dict, description="of every pod")
    volumes: list[Volume] = Field(default_factory=list)
    pools: dict[Role, Pool]
    gpu_hour_price: float | None = Field(None, ge=0, description="of one GPU, for `avrt plan`; in any currency")
    overrides: dict[str, Any] = Field(
        default_factory=dict, description="dotted keys of the run's configuration that this cluster decides"
    )

    @model_validator(mode="after")
    def _every_role_has_a_pool(self) -> Self:
        missing = [role for role in ROLES if role not in self.pools]
        if missing:
            raise ValueError(f"pools needs {', '.join(missing)} too: every role has a pool")
        if self.pools["cpu"].gpus:
            raise ValueError("pools.cpu asks for GPUs, but none of its steps uses one: set gpus to 0")
        return self

    @model_validator(mode="after")
    def _volumes_have_places_of_their_own(self) -> Self:
        taken = list(_TAKEN)
        for volume in self.volumes:
            place = volume.mount_path.rstrip("/")
            if place in taken:
                raise ValueError(f"volumes: {place or '/'} is taken in a step's pod: mount {volume.claim} elsewhere")
            if volume.claim in (*EMPTY_DIRS, self.store.ca_config_map):
                raise ValueError(f"volumes: another volume of a step's pod is called {volume.claim}: rename the claim")
            taken.append(place)
        return self

    @model_validator(mode="after")
    def _no_secret_values(self) -> Self:
        pools = {f"pools.{role}.environment": pool.environment for role, pool in self.pools.items()}
        for key, variables in {"environment": self.environment, **pools}.items():
            for name, value in variables.items():
                if _CREDENTIAL.search(name) or _LOGIN.search(value):
                    raise ValueError(f"{key}.{name} looks like a credential: name its secret in secret_env instead")
        for key, address in {
            "pipelines.host": self.pipelines.host,
            "tracking.uri": self.tracking and self.tracking.uri,
        }.items():
            if address and _LOGIN.search(address):
                raise ValueError(f"{key} holds a password: a profile names secrets, and holds none")
        return self

    def pool(self, step: str, endpoint: EngineConfig | None = None) -> Pool:
        """The pool of a step.

        Args:
            step: a component's name.
            endpoint: what the step asks, as ``endpoint_of`` tells. Its pods then go where CPU steps go, and keep the
                timeout and the retries of the step's own pool.
        """
        own = self.pools[role_of(step)]
        if endpoint is None:
            return own
        lifetime = own.model_dump(include={"timeout_s", "retries", "retry_wait_s"})
        return self.pools["cpu"].model_copy(update=lifetime)

    def for_pipeline(self, components: Sequence[str] | None) -> Profile:
        """The same cluster without the pools that no step of a pipeline goes to.

        Args:
            components: what the pipeline is made of; None: the whole path.
        """
        pools = {
            role: pool for role, pool in self.pools.items() if any(has_step(components, step) for step in ROLES[role])
        }
        return self.model_copy(update={"pools": pools})

    def in_namespace(self, namespace: str | None) -> Profile:
        """The same cluster with the runs in this namespace; None leaves them where the profile has them."""
        if namespace is None:
            return self
        return self.model_copy(update={"pipelines": self.pipelines.model_copy(update={"namespace": namespace})})


def role_of(step: str) -> Role:
    """The role of a step."""
    for role, steps in ROLES.items():
        if step in steps:
            return role  # type: ignore[return-value]
    raise KeyError(step)


def endpoint_of(config: Config, step: str, model: str = "") -> EngineConfig | None:
    """The standing endpoint that a step asks in the place of an engine of its own.

    Args:
        config: the run's configuration.
        step: a component's name.
        model: of an evaluation: ``base``, ``sft`` or ``grpo``.
    """
    engines = {
        "vision_teacher": config.teachers.vision.engine,
        "audio_teacher": config.teachers.audio.engine,
        "merger": config.merger.engine,
        "evaluation": config.evaluation.endpoint if model == "base" else None,
    }
    engine = engines.get(step)
    return engine if engine is not None and engine.kind == "endpoint" else None


def find_profile(path: Path) -> Path:
    """A profile's file as given, or of this name among those that come with the package (``test``, ``gke`` …).

    Raises:
        ConfigError: where there is none; the message lists those that come with the package.
    """
    if path.is_file():
        return path
    folder = Path(__file__).parents[2] / "configs" / "clusters"
    for candidate in (folder / path.name, folder / f"{path.name}.yaml"):
        if candidate.is_file() and (path.parent.name in ("", "clusters")) and not path.is_absolute():
            return candidate
    known = ", ".join(sorted(file.stem for file in folder.glob("*.yaml"))) or "none"
    raise ConfigError(f"There is no cluster profile {path}; name one with --cluster (there are {known}).")


def load_profile(path: Path) -> Profile:
    """Read a cluster profile.

    Raises:
        ConfigError: the message names the file, the key and the mend.
    """
    return validated(read_mapping(path, "cluster profile", "--cluster"), str(path), Profile)


def profile_of_pod() -> Profile | None:
    """The profile that this pod's run was compiled for, or None outside of a cluster's run."""
    text = os.environ.get(VARIABLE)
    return Profile.model_validate_json(text) if text else None


def secret_variables(profile: Profile) -> dict[str, dict[str, str]]:
    """What the environment of a run's pods takes from secrets: secret -> {key: variable}."""
    found: dict[str, dict[str, str]] = {}

    def add(secret: str | None, keys: Mapping[str, str]) -> None:
        if secret:
            found.setdefault(secret, {}).update(keys)

    add(profile.store.secret, {"access_key": "AVRT_S3_ACCESS_KEY", "secret_key": "AVRT_S3_SECRET_KEY"})
    if profile.tracking:
        add(
            profile.tracking.secret,
            {"username": "MLFLOW_TRACKING_USERNAME", "password": "MLFLOW_TRACKING_PASSWORD"},
        )
    add(profile.api_key_secret, {"api_key": API_KEY})
    for secret, keys in profile.secret_env.items():
        add(secret, keys)
    return found


def step_secrets(profile: Profile, config: Config, step: str, model: str = "") -> dict[str, dict[str, str]]:
    """What one step's pods take from secrets, as ``secret_variables``: no more than they need.

    Preflight looks at all of them. The served model's key and git's token are deployment's, and an endpoint's key is
    for the step that asks it. The rest is for every step: all of them report to the store and to MLflow.
    """
    found = secret_variables(profile)
    if step == "preflight":
        return found
    asked = endpoint_of(config, step, model)
    askers = (*ROLES["teacher"], *ROLES["merger"], *ROLES["evaluation"])
    endpoints = [endpoint for each in askers if (endpoint := endpoint_of(config, each, "base"))]
    deploying = {API_KEY, config.deployment.git.token_env}
    own = deploying if step == "deployment" else {asked.api_key_env if asked else None}
    others = (deploying | {endpoint.api_key_env for endpoint in endpoints}) - own
    kept = {secret: {k: v for k, v in keys.items() if v not in others} for secret, keys in found.items()}
    return {secret: keys for secret, keys in kept.items() if keys}
