"""overlays/test as real pods, on the node of the cluster that KUBECONFIG names.

Needs the images of ``make images`` on that node (docs/images.md); skipped without a node or without built images.
"""

from __future__ import annotations

import json

import pytest

from tests.manifests.conftest import Cluster, secret

pytestmark = pytest.mark.slow

#: Runs in MLflow's pod, which may reach the store: tries everything as everybody. Credentials come on standard input.
TRY = """
import io, json, sys
from minio import Minio
from minio.error import S3Error
answers = {}
for who, (access, secret) in json.load(sys.stdin).items():
    store = Minio("avrt-store.avrt.svc.cluster.local:8333", access, secret, secure=False, region="us-east-1")
    tries = {
        "write model": lambda: store.put_object("avrt", "models/tests/config.json", io.BytesIO(b"{}"), 2),
        "write artifact": lambda: store.put_object("avrt", "tests/a", io.BytesIO(b"a"), 1),
        "see bucket": lambda: store.bucket_exists("avrt") or sys.exit("no bucket"),
        "read model": lambda: store.get_object("avrt", "models/tests/config.json").read(),
        "read artifact": lambda: store.get_object("avrt", "tests/a").read(),
        "write mlflow": lambda: store.put_object("avrt-mlflow", "tests/a", io.BytesIO(b"a"), 1),
        "make bucket": lambda: store.make_bucket("tests-own"),
    }
    answers[who] = []
    for what, attempt in tries.items():
        try:
            attempt()
            answers[who].append(what)
        except S3Error as error:
            assert error.code in ("AccessDenied", "InvalidAccessKeyId", "SignatureDoesNotMatch"), (who, what, error)
print(json.dumps(answers))
"""


def in_mlflows_pod(cluster: Cluster, script: str, given: object) -> str:
    """Run Python in MLflow's pod; ``given`` is its standard input, as JSON."""
    command = ("-n", "avrt", "exec", "-i", "deployment/avrt-mlflow", "--", "python", "-c", script)
    result = cluster.kubectl(*command, stdin=json.dumps(given), check=False)
    assert result.returncode == 0, result.stderr
    return str(result.stdout)


def test_each_identity_may_do_its_job_and_no_more(running: Cluster) -> None:
    keys = {
        "pipeline": list(secret(running, "avrt-store").values()),
        "models": list(secret(running, "avrt-models-s3").values()),
        "mlflow": list(secret(running, "avrt-mlflow-s3").values()),
        "nobody": ["AKIDNOBODY", "wrong"],
    }
    assert json.loads(in_mlflows_pod(running, TRY, keys)) == {
        "pipeline": ["write model", "write artifact", "see bucket", "read model", "read artifact"],
        "models": ["see bucket", "read model", "read artifact"],
        "mlflow": ["write mlflow"],
        "nobody": [],
    }


def test_mlflow_asks_who_is_there(running: Cluster) -> None:
    script = """
import json, sys, httpx
url = "http://avrt-mlflow.avrt.svc.cluster.local:5000/api/2.0/mlflow/experiments/search?max_results=1"
given = json.load(sys.stdin)
auth = (given["username"], given["password"])
strange = {"Host": "elsewhere.example.com"}
print(httpx.get(url).status_code, httpx.get(url, auth=auth).status_code,
      httpx.get(url, auth=auth, headers=strange).status_code)
"""
    # A pod cannot reach its own Service where the network has no hairpin; the store's pod has Python too.
    command = ("-n", "avrt", "exec", "-i", "statefulset/avrt-store", "-c", "s3", "--", "python", "-c", script)
    result = running.kubectl(*command, stdin=json.dumps(secret(running, "avrt-mlflow")), check=False)
    assert result.stdout.split() == ["401", "200", "403"], result.stderr


def test_the_stores_other_ports_are_closed(running: Cluster) -> None:
    """Master, volume server and filer, with their gRPC ports, are on loopback."""
    script = """
import json, socket, sys
address, ports = json.load(sys.stdin)
for port in ports:
    try:
        socket.create_connection((address, port), 3)
        print(port)
    except OSError:
        pass
"""
    address = running.kubectl("-n", "avrt", "get", "pod", "avrt-store-0", "-o", "jsonpath={.status.podIP}").stdout
    assert in_mlflows_pod(running, script, [address, [9333, 19333, 9340, 19340, 8888, 18888]]) == ""
    assert in_mlflows_pod(running, script, [address, [8333]]).strip() == "8333"
