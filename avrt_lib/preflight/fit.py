"""Whether a configuration and a cluster profile fit together, which needs no cluster to be known."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import PurePosixPath
from urllib.parse import urlsplit

from avrt_lib.cluster.profile import Profile, Role, Volume
from avrt_lib.config import Config
from avrt_lib.errors import ConfigError
from avrt_lib.preflight.checks import FAILED, OK, WARNING, Check, engines
from avrt_lib.runs import has_step

#: Whose pods load the model of an engine.
ENGINE_ROLES: dict[str, Role] = {
    "teachers.vision.engine": "teacher",
    "teachers.audio.engine": "teacher",
    "merger.engine": "merger",
}
_LABEL = re.compile(r"([A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?)?")
#: Of a label or an annotation: perhaps a domain, and a name.
_KEY = re.compile(
    r"([a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*/)?[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?"
)
_NAMESPACE = re.compile(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?")
#: Names of Services, which KServe makes of the model's name, start with a letter.
_SERVICE = re.compile(r"[a-z]([-a-z0-9]{0,61}[a-z0-9])?")


def fit(
    config: Config, profile: Profile, variables: set[str], components: Sequence[str] | None = None
) -> Iterator[Check]:
    """Check a configuration against a profile.

    Args:
        config: the run's configuration.
        profile: the cluster's.
        variables: the environment variables that a step's pod gets.
        components: what the run's pipeline is made of; None: the whole path.
    """
    yield _names(config, profile)
    yield _targets(config, components)
    yield from _gpus(config, profile, components)
    yield from _keys(config, variables, components)
    yield from _paths(config, profile, components)


def _names(config: Config, profile: Profile) -> Check:
    from avrt_lib.promotion.manifest import check_names

    wrong = []
    if config.deployment.target != "local":
        try:
            check_names(config)
        except ConfigError as error:
            wrong.append(str(error).rstrip("."))
        if not _SERVICE.fullmatch(config.promotion.model_name):
            wrong.append(f"promotion.model_name {config.promotion.model_name} must start with a letter")
    namespaces = {
        "pipelines.namespace": profile.pipelines.namespace,
        "deployment.namespace": config.deployment.namespace,
    }
    wrong += [
        f"{key} {value} is no DNS label of at most 63 characters"
        for key, value in namespaces.items()
        if not _NAMESPACE.fullmatch(value)
    ]
    labels = {f"labels.{key}": value for key, value in profile.labels.items()}
    for role, pool in profile.pools.items():
        labels |= {f"pools.{role}.node_selector.{key}": value for key, value in pool.node_selector.items()}
    if profile.kueue:
        labels |= {"kueue.queue": profile.kueue.queue, "kueue.priority_class": profile.kueue.priority_class or ""}
    wrong += [
        f"{key} {value!r} is no label's value: at most 63 letters, digits and -_."
        for key, value in labels.items()
        if not _LABEL.fullmatch(value)
    ]
    wrong += [
        f"{where} has the key {key!r}, which is none: DOMAIN/NAME or NAME, of at most 63 letters, digits and -_."
        for where, key in _keys_of_pods(profile)
        if not _KEY.fullmatch(key)
    ]
    if wrong:
        return Check("Names", FAILED, "; ".join(wrong), "shorten or correct them")
    return Check("Names", OK, f"{config.promotion.model_name} in {config.deployment.namespace}")


def _keys_of_pods(profile: Profile) -> Iterator[tuple[str, str]]:
    """Keys in the pods' metadata and of the nodes' labels and taints, and where the profile has them.

    The API server makes no pod with one that is none, and the backend's API does not say so.
    """
    yield from (("labels", key) for key in profile.labels)
    yield from (("annotations", key) for key in profile.annotations)
    for role, pool in profile.pools.items():
        yield from ((f"pools.{role}.node_selector", key) for key in pool.node_selector)
        yield from ((f"pools.{role}.tolerations", taint.key) for taint in pool.tolerations if taint.key)
        yield from ((f"pools.{role}.affinity", term.key) for term in pool.affinity)


def _targets(config: Config, components: Sequence[str] | None) -> Check:
    if config.store.kind == "local":
        return Check(
            "Targets", FAILED, "store.kind=local keeps the models in a pod that goes away", "set store.kind=s3"
        )
    if config.deployment.target == "local" and has_step(components, "deployment"):
        mend = "set deployment.target to kserve or git"
        return Check("Targets", WARNING, "deployment.target=local cannot serve from a step's pod", mend)
    return Check("Targets", OK, f"store {config.store.kind}, deployment {config.deployment.target}")


def _gpus(config: Config, profile: Profile, components: Sequence[str] | None) -> Iterator[Check]:
    """CUDA builds of vLLM start on GPUs alone, and on as many as they are told; so do several training processes."""
    if profile.build != "cuda":
        return
    needed: dict[str, tuple[Role, int]] = {
        name: (ENGINE_ROLES[name], engine.tensor_parallel_size)
        for name, engine in engines(config, components)
        if engine.kind == "vllm"
    }
    if config.evaluation.endpoint is None and has_step(components, "evaluation"):
        needed["evaluation"] = ("evaluation", 1)
    training = {"sft": config.sft.processes or 1, "grpo": config.grpo.processes or 1}
    needed |= {
        name: ("training", processes)
        for name, processes in training.items()
        if processes > 1 and has_step(components, name)
    }
    for name, (role, gpus) in needed.items():
        offered = profile.pools[role].gpus
        key = "processes" if name in training else "tensor_parallel_size"
        if gpus > offered:
            shared = name in training and offered > 0 and gpus % offered == 0  # each GPU takes the rows of several
            yield Check(
                f"GPUs {name}",
                WARNING if shared else FAILED,
                f"it runs on {gpus}, but a pod of pools.{role} gets {offered}",
                f"set pools.{role}.gpus to {gpus}" + (f", or {name}.{key} lower" if gpus > 1 else ""),
            )


def _keys(config: Config, variables: set[str], components: Sequence[str] | None) -> Iterator[Check]:
    for name, engine in engines(config, components):
        if engine.kind == "endpoint" and engine.api_key_env and engine.api_key_env not in variables:
            yield Check(
                f"Key {name}",
                FAILED,
                f"no pod gets {engine.api_key_env}",
                f"name a secret with it in the profile: secret_env: {{SECRET: {{KEY: {engine.api_key_env}}}}}",
            )


def volumes_read(config: Config, profile: Profile) -> list[Volume]:
    """The profile's volumes that hold a folder which the configuration names: preflight looks into these."""
    paths = _folders(config).values()
    return [volume for volume in profile.volumes if any(_holds(volume, path) for path in paths)]


def _paths(config: Config, profile: Profile, components: Sequence[str] | None) -> Iterator[Check]:
    """Folders that a step reads must be on a volume; they may also be part of an image of one's own."""
    for key, path in _folders(config, components).items():
        if not any(_holds(volume, path) for volume in profile.volumes):
            mend = "put it on a claim and name that in the profile's volumes" + (
                ", or publish the model with `avrt models`" if key.endswith(".model") else ""
            )
            yield Check(f"Path {key}", WARNING, f"{path} is on none of the profile's volumes", mend)


def _folders(config: Config, components: Sequence[str] | None = None) -> dict[str, str]:
    """The folders that a configuration names for a step of the pipeline, by key."""
    from avrt_lib.licences import loaded_models
    from avrt_lib.runs import sources

    paths = {f"data.{name}.path": source.path for name, source in sources(config).items() if source.path}
    models = loaded_models(config, components)
    paths |= {f"{key}.model": part.model for key, part in models.items() if ":" not in part.model}
    repository = urlsplit(config.deployment.manifests_url or "")
    if config.deployment.target == "git" and repository.scheme == "file":
        paths["deployment.manifests_url"] = repository.path
    return paths


def _holds(volume: Volume, path: str) -> bool:
    return PurePosixPath(path).is_relative_to(volume.mount_path)
