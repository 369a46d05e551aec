"""Pods of a compiled pipeline's executors, as the backend's driver makes them.

Everything is read from the two compiled documents. Left out is what does not depend on the pipeline: the launcher's
init container (100m CPU, 256Mi) and its volumes.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from kubernetes import client

from tests.golden.compiled import Compiled, step_of

#: Tells which executor a pod was made of.
EXECUTOR_LABEL = "test.avrt.dev/executor"


def pods(compiled: Compiled, run: str) -> Iterator[client.V1Pod]:
    """One pod for each task, and one for each shard of a loop.

    Args:
        compiled: the pipeline.
        run: the run's id, which names the pods.
    """
    for executor, _, count in compiled.tasks():
        for index in range(count):
            yield pod(compiled, executor, f"{run}-{executor.removeprefix('exec-')}-{index}", run)


def pod(compiled: Compiled, executor: str, name: str, run: str) -> client.V1Pod:
    """The pod of one executor."""
    container, placed = compiled.executors[executor], compiled.placed[executor]
    volumes, mounts = _volumes(placed)
    labels = placed["podMetadata"].get("labels", {})
    return client.V1Pod(
        metadata=client.V1ObjectMeta(
            name=name,
            labels={**labels, "pipeline/runid": run, EXECUTOR_LABEL: executor.removeprefix("exec-")},
            annotations=placed["podMetadata"].get("annotations"),
        ),
        spec=client.V1PodSpec(
            restart_policy="Never",
            active_deadline_seconds=int(placed["activeDeadlineSeconds"]),
            node_selector=placed.get("nodeSelector", {}).get("labels"),
            tolerations=[_toleration(each) for each in placed.get("tolerations", [])],
            affinity=_affinity(placed.get("nodeAffinity", [])),
            image_pull_secrets=[
                client.V1LocalObjectReference(name=each["secretName"]) for each in placed.get("imagePullSecret", [])
            ],
            volumes=volumes,
            containers=[
                client.V1Container(
                    name="main",
                    image=container["image"],
                    image_pull_policy=placed["imagePullPolicy"],
                    command=["true"],
                    resources=_resources(container["resources"]),
                    env=_environment(container, placed),
                    volume_mounts=mounts,
                    security_context=_security(placed["securityContext"]),
                )
            ],
        ),
    )


def steps(compiled: Compiled) -> dict[str, str]:
    """The step of each executor, by the value of its pods' label."""
    return {executor.removeprefix("exec-"): step_of(executor) for executor in compiled.executors}


def _toleration(taint: dict[str, Any]) -> client.V1Toleration:
    return client.V1Toleration(
        key=taint.get("key"),
        operator=taint.get("operator"),
        value=taint.get("value"),
        effect=taint.get("effect"),
        toleration_seconds=int(taint["tolerationSeconds"]) if "tolerationSeconds" in taint else None,
    )


def _affinity(terms: list[dict[str, Any]]) -> client.V1Affinity | None:
    """Terms without a weight are required, and each of them is enough."""
    if not terms:
        return None
    assert all("weight" not in term for term in terms)
    selectors = [
        client.V1NodeSelectorTerm(
            match_expressions=[
                client.V1NodeSelectorRequirement(key=each["key"], operator=each["operator"], values=each.get("values"))
                for each in term["matchExpressions"]
            ]
        )
        for term in terms
    ]
    required = client.V1NodeSelector(node_selector_terms=selectors)
    return client.V1Affinity(
        node_affinity=client.V1NodeAffinity(required_during_scheduling_ignored_during_execution=required)
    )


def _resources(asked: dict[str, Any]) -> client.V1ResourceRequirements:
    names = {"cpu": "Cpu", "memory": "Memory"}
    requests = {name: asked[f"resource{key}Request"] for name, key in names.items() if f"resource{key}Request" in asked}
    limits = {name: asked[f"resource{key}Limit"] for name, key in names.items() if f"resource{key}Limit" in asked}
    if accelerator := asked.get("accelerator"):
        limits[accelerator["resourceType"]] = accelerator["resourceCount"]
    return client.V1ResourceRequirements(requests=requests, limits=limits)


def _environment(container: dict[str, Any], placed: dict[str, Any]) -> list[client.V1EnvVar]:
    found = [client.V1EnvVar(name=each["name"], value=each.get("value", "")) for each in container["env"]]
    for secret in placed["secretAsEnv"]:
        for key in secret["keyToEnv"]:
            reference = client.V1SecretKeySelector(
                name=secret["secretName"], key=key["secretKey"], optional=secret["optional"]
            )
            found.append(
                client.V1EnvVar(name=key["envVar"], value_from=client.V1EnvVarSource(secret_key_ref=reference))
            )
    for field in placed["fieldPathAsEnv"]:
        selector = client.V1ObjectFieldSelector(field_path=field["fieldPath"])
        found.append(client.V1EnvVar(name=field["name"], value_from=client.V1EnvVarSource(field_ref=selector)))
    return found


def _volumes(placed: dict[str, Any]) -> tuple[list[client.V1Volume], list[client.V1VolumeMount]]:
    volumes: dict[str, client.V1Volume] = {}  # Argo merges those of one name
    mounts = []
    for each in placed.get("emptyDirMounts", []):
        source = client.V1EmptyDirVolumeSource(medium=each.get("medium"), size_limit=each.get("sizeLimit"))
        volumes[each["volumeName"]] = client.V1Volume(name=each["volumeName"], empty_dir=source)
        mounts.append(client.V1VolumeMount(name=each["volumeName"], mount_path=each["mountPath"]))
    for each in placed.get("pvcMount", []):
        claim = client.V1PersistentVolumeClaimVolumeSource(claim_name=each["constant"])
        volumes[each["constant"]] = client.V1Volume(name=each["constant"], persistent_volume_claim=claim)
        mounts.append(
            client.V1VolumeMount(name=each["constant"], mount_path=each["mountPath"], sub_path=each.get("subPath"))
        )
    for each in placed.get("configMapAsVolume", []):
        name = each["configMapName"]  # the volume's too: the driver takes it for both
        source = client.V1ConfigMapVolumeSource(name=name, optional=each["optional"])
        volumes[name] = client.V1Volume(name=name, config_map=source)
        mounts.append(client.V1VolumeMount(name=name, mount_path=each["mountPath"]))
    return list(volumes.values()), mounts


def _security(context: dict[str, Any]) -> client.V1SecurityContext:
    return client.V1SecurityContext(
        run_as_non_root=context.get("runAsNonRoot"),
        run_as_user=int(context["runAsUser"]) if "runAsUser" in context else None,
        run_as_group=int(context["runAsGroup"]) if "runAsGroup" in context else None,
    )
