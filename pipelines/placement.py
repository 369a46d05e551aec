"""Where the pods of a run go on a cluster, and what they get there: a profile applied to the tasks of a pipeline.

What the backend was seen to do shaped this:

- Retries without an upper bound of their own end after an hour, counted from the first attempt's start
  (``backoff_max_duration``), and only a whole ``backoff_factor`` is understood.
- Timeouts count from the pod's start; a pod that waits for a node waits for ever, which ``avrt submit`` watches.
- None of these settings is part of the cache's key.
- A pod that names a missing secret, config map or claim is not started, and says so nowhere in the backend's API. The
  first step, which looks for them, and the last one, which tells how the run ended, start without; of the claims the
  first one mounts those that hold what it reads: folders of data and models.
- The driver pods that Kubeflow Pipelines puts before each task take none of it.
"""

from typing import Any

from kfp import kubernetes

from avrt_lib.cluster.profile import (
    CA_FOLDER,
    EMPTY_DIRS,
    RUN_LABEL,
    VARIABLE,
    Pool,
    Profile,
    Volume,
    endpoint_of,
    step_secrets,
)
from avrt_lib.config import Config
from avrt_lib.preflight.fit import volumes_read

STEP_LABEL = "avrt.dev/step"
#: Steps that start without the secrets and config maps of the profile, and say what is missing.
LENIENT = ("preflight", "run_summary")


def place(task: Any, step: str, profile: Profile, config: Config, *, data_hash: str, model: str = "") -> None:
    """Apply a profile to one task.

    Args:
        task: the task; it runs one component.
        step: the component's name.
        profile: the cluster.
        config: the run's configuration.
        data_hash: identity of the source data, which the champion's tags name.
        model: of an evaluation: ``base``, ``sft`` or ``grpo``.
    """
    pool = profile.pool(step, endpoint_of(config, step, model))
    _nodes(task, pool)
    _resources(task, pool)
    # What preflight finds does not go away by itself.
    _lifetime(task, pool, retries=0 if step == "preflight" else pool.retries)
    given = {"AVRT_DATA_HASH": data_hash, "AVRT_S3_BUCKET": config.store.bucket}
    if step == "preflight":
        given[VARIABLE] = profile.model_dump_json(exclude_defaults=True)
    _environment(task, profile, given | profile.environment | pool.environment, lenient=step in LENIENT)
    for secret, keys in step_secrets(profile, config, step, model).items():
        optional = step in LENIENT or secret == profile.api_key_secret
        kubernetes.use_secret_as_env(task, secret, keys, optional=optional)
    _pod(task, step, profile)
    for volume in _volumes(step, profile, config):
        kubernetes.mount_pvc(task, volume.claim, volume.mount_path, volume.sub_path)


def _volumes(step: str, profile: Profile, config: Config) -> list[Volume]:
    """A pod whose claim is missing does not start: what tells of it takes no more of them than it reads."""
    if step == "run_summary":
        return []
    return volumes_read(config, profile) if step == "preflight" else profile.volumes


def _nodes(task: Any, pool: Pool) -> None:
    for key, value in pool.node_selector.items():
        kubernetes.add_node_selector(task, key, value)
    for taint in pool.tolerations:
        kubernetes.add_toleration(task, taint.key, taint.operator, taint.value, taint.effect, taint.seconds)
    if pool.affinity:
        terms = [term.model_dump(exclude={"values"} if not term.values else None) for term in pool.affinity]
        kubernetes.add_node_affinity(task, match_expressions=terms)


def _resources(task: Any, pool: Pool) -> None:
    task.set_cpu_request(pool.cpu_request)
    task.set_memory_request(pool.memory_request)
    if pool.cpu_limit:
        task.set_cpu_limit(pool.cpu_limit)
    if pool.memory_limit:
        task.set_memory_limit(pool.memory_limit)
    if pool.gpus:
        task.set_accelerator_type(pool.gpu_resource)
        task.set_accelerator_limit(pool.gpus)
    if pool.shared_memory:
        kubernetes.empty_dir_mount(task, EMPTY_DIRS[0], "/dev/shm", "Memory", pool.shared_memory)
    if pool.scratch:
        kubernetes.empty_dir_mount(task, EMPTY_DIRS[1], "/tmp", size_limit=pool.scratch)


def _lifetime(task: Any, pool: Pool, retries: int) -> None:
    if pool.timeout_s:
        kubernetes.set_timeout(task, pool.timeout_s)
    if retries:
        attempts = retries + 1
        longest = attempts * ((pool.timeout_s or 86_400) + pool.retry_wait_s * 2**retries)
        task.set_retry(retries, f"{pool.retry_wait_s}s", 2, f"{longest}s")


def _environment(task: Any, profile: Profile, given: dict[str, str], *, lenient: bool) -> None:
    store = profile.store
    values = {
        "AVRT_S3_ENDPOINT": store.endpoint,
        "AVRT_S3_SECURE": "1" if store.secure else "0",
        "AVRT_S3_REGION": store.region,
        "AVRT_RUN_REPORTS": "store",
        **given,
    }
    kubernetes.use_field_path_as_env(task, "AVRT_RUN_ID", f"metadata.labels['{RUN_LABEL}']")
    if store.ca_config_map:
        kubernetes.use_config_map_as_volume(task, store.ca_config_map, CA_FOLDER, optional=lenient)
        values["AVRT_S3_CA_FILE"] = f"{CA_FOLDER}/{store.ca_key}"
    if profile.tracking:
        values["MLFLOW_TRACKING_URI"] = profile.tracking.uri
    for name, value in sorted(values.items()):
        task.set_env_variable(name, value)


def _pod(task: Any, step: str, profile: Profile) -> None:
    labels = {**profile.labels, STEP_LABEL: step}
    if profile.kueue:
        labels["kueue.x-k8s.io/queue-name"] = profile.kueue.queue
        if profile.kueue.priority_class:
            labels["kueue.x-k8s.io/priority-class"] = profile.kueue.priority_class
    for key, value in labels.items():
        kubernetes.add_pod_label(task, key, value)
    for key, value in profile.annotations.items():
        kubernetes.add_pod_annotation(task, key, value)
    if profile.image_pull_secrets:
        kubernetes.set_image_pull_secrets(task, list(profile.image_pull_secrets))
    kubernetes.set_image_pull_policy(task, profile.image_pull_policy)
    kubernetes.set_security_context(
        task,
        run_as_user=profile.run_as_user,
        run_as_group=profile.run_as_group,
        run_as_non_root=profile.run_as_non_root,
    )
