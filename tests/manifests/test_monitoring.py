"""Alerts, the dashboard and the autoscaler ask for metrics that are really exported, and alerts fire when they should.

`promtool` (Debian's package prometheus) evaluates the alerts; promql-parser reads every other expression.
"""

from __future__ import annotations

import ast
import importlib.util
import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import promql_parser
import pytest
import yaml

from avrt_lib.serving.rollout import CANDIDATE
from scripts.manifest_policies import Build, Object
from tests.manifests.conftest import one

#: Of kube-state-metrics (all stable there), and what Prometheus itself writes.
OF_OTHERS = {
    "kube_deployment_spec_replicas",
    "kube_deployment_status_replicas",
    "kube_deployment_status_replicas_available",
    "kube_deployment_status_replicas_updated",
    "kube_pod_container_status_waiting_reason",
    "kube_pod_init_container_status_waiting_reason",
    "up",
}
_SUFFIXES = {"counter": ("_total",), "gauge": ("",), "histogram": ("_bucket", "_sum", "_count")}


def package(name: str) -> Path:
    """Folder of an installed package, which is not imported."""
    spec = importlib.util.find_spec(name)
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent


@pytest.fixture(scope="module")
def exported() -> set[str]:
    """Names of the series that the installed vLLM exports, from its source."""
    found = set()
    tree = ast.parse((package("vllm") / "v1" / "metrics" / "loggers.py").read_text(encoding="utf-8"))
    for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
        made = re.fullmatch(r"_(counter|gauge|histogram)_cls", getattr(call.func, "attr", ""))
        names = [k.value.value for k in call.keywords if k.arg == "name" and isinstance(k.value, ast.Constant)]
        if made and names:
            found |= {str(names[0]).removesuffix("_total") + suffix for suffix in _SUFFIXES[made[1]]}
    return found


def test_vllms_names_are_found(exported: set[str]) -> None:
    assert {"vllm:num_requests_waiting", "vllm:request_success_total"} <= exported
    assert "vllm:e2e_request_latency_seconds_bucket" in exported


def http_metrics() -> str:
    """What the library that vLLM uses for HTTP exports after a good and a failed request."""
    from fastapi import FastAPI
    from fastapi.testclient import TestClient
    from prometheus_client import CollectorRegistry
    from prometheus_fastapi_instrumentator import Instrumentator

    app, registry = FastAPI(), CollectorRegistry()
    Instrumentator(registry=registry).add().instrument(app).expose(app)

    @app.get("/v1/models")
    def models(fail: bool = False) -> None:
        if fail:
            raise RuntimeError

    client = TestClient(app, raise_server_exceptions=False)
    client.get("/v1/models")
    client.get("/v1/models?fail=true")
    return client.get("/metrics").text


def test_failed_requests_are_counted_as_5xx() -> None:
    text = http_metrics()
    assert re.search(r'^http_requests_total\{.*status="5xx".*\} 1', text, re.MULTILINE)
    assert re.search(r'^http_requests_total\{.*status="2xx".*\} 1', text, re.MULTILINE)


def alerts(build: Build) -> list[Object]:
    """The alerting rules."""
    return [
        rule
        for document in build.objects
        if document["kind"] == "PrometheusRule"
        for group in document["spec"]["groups"]
        for rule in group["rules"]
    ]


def dashboard(build: Build) -> dict[str, Any]:
    """The dashboard."""
    (text,) = one(build, "ConfigMap", "avrt-serving-dashboard")["data"].values()
    document: dict[str, Any] = json.loads(text)
    return document


def expressions(rendered: dict[str, Build]) -> Iterator[tuple[str, str]]:
    """Every expression, and where it stands."""
    for rule in alerts(rendered["production"]):
        yield rule["alert"], rule["expr"]
    for panel in dashboard(rendered["production"])["panels"]:
        for target in panel["targets"]:
            yield panel["title"], target["expr"].replace("$__rate_interval", "5m")
    for document in rendered["serving/production"].objects:
        for trigger in document["spec"].get("triggers", []):
            yield document["metadata"]["name"], trigger["metadata"]["query"]


def test_every_metric_is_exported(rendered: dict[str, Build], exported: set[str]) -> None:
    known = exported | OF_OTHERS | {"http_requests_total"}
    asked = {name for _, text in expressions(rendered) for name in re.findall(r"([a-z_][\w:]*)\{", text)}
    assert asked - known == set()
    assert {"vllm:num_requests_waiting", "vllm:kv_cache_usage_perc", "http_requests_total"} <= asked


def test_every_expression_is_promql(rendered: dict[str, Build]) -> None:
    for where, text in expressions(rendered):
        assert promql_parser.parse(text), where
    with pytest.raises(ValueError, match="promql"):
        promql_parser.parse("sum by (a) rate(x[5m])")


def test_what_is_scraped_has_the_labels_that_expressions_choose_by(rendered: dict[str, Build]) -> None:
    monitor = one(rendered["production"], "PodMonitor", "avrt-predictors")
    job = f"{monitor['metadata']['namespace']}/{monitor['metadata']['name']}"
    for where, text in expressions(rendered):
        assert set(re.findall(r'job="([^"]*)"', text)) <= {job}, where
    (endpoint,) = monitor["spec"]["podMetricsEndpoints"]
    assert [r["targetLabel"] for r in endpoint["relabelings"]] == ["inferenceservice"]
    (container,) = one(rendered["production"], "ServingRuntime", "avrt-vllm")["spec"]["containers"]
    assert endpoint["port"] in [port["name"] for port in container["ports"]]


@pytest.mark.parametrize("overlay", ["staging", "production"])
def test_metrics_are_open_where_they_are_scraped(rendered: dict[str, Build], overlay: str) -> None:
    (container,) = one(rendered[overlay], "ServingRuntime", "avrt-vllm")["spec"]["containers"]
    assert "--metrics" in container["args"]
    assert one(rendered[overlay], "NetworkPolicy", "monitoring")


def test_metrics_are_closed_without_monitoring(rendered: dict[str, Build]) -> None:
    (container,) = one(rendered["test"], "ServingRuntime", "avrt-vllm")["spec"]["containers"]
    assert "--metrics" not in container["args"]


def test_the_dashboard_is_found_and_can_be_narrowed_down(rendered: dict[str, Build]) -> None:
    labels = one(rendered["production"], "ConfigMap", "avrt-serving-dashboard")["metadata"]["labels"]
    assert labels["grafana_dashboard"] == "1"
    panels = dashboard(rendered["production"])["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    assert all("$model" in target["expr"] for panel in panels for target in panel["targets"])


DEPLOYMENT = '{namespace="avrt", deployment="avrt-3b-predictor"}'
SERVED = 'job="avrt/avrt-predictors", namespace="avrt", inferenceservice="avrt-3b"'
POD = 'namespace="avrt", pod="avrt-3b-predictor-a", container="storage-initializer", reason="CrashLoopBackOff"'
AVAILABLE = f"kube_deployment_status_replicas_available{DEPLOYMENT}"
WANTED = f"kube_deployment_spec_replicas{DEPLOYMENT}"
ALL, UPDATED = (f"kube_deployment_status_replicas{suffix}{DEPLOYMENT}" for suffix in ("", "_updated"))
UP = f'up{{{SERVED}, pod="a"}}'
GOOD, BAD = (f'http_requests_total{{{SERVED}, status="{status}"}}' for status in ("2xx", "5xx"))
WAITING, CACHE = (f"vllm:{name}{{{SERVED}}}" for name in ("num_requests_waiting", "kv_cache_usage_perc"))
INIT, MAIN = (f"kube_pod_{kind}container_status_waiting_reason{{{POD}}}" for kind in ("init_", ""))


def within(seconds: str) -> str:
    """The counter of requests that took at most so long."""
    return f'vllm:e2e_request_latency_seconds_bucket{{{SERVED}, le="{seconds}"}}'


def candidates(series: str) -> str:
    """The same series of the candidate's Deployment."""
    return series.replace("avrt-3b-predictor", f"avrt-3b{CANDIDATE}-predictor")


@pytest.mark.parametrize(
    ("alert", "series", "minute", "fires"),
    [
        ("AvrtModelDown", {AVAILABLE: "0x20", WANTED: "1x20"}, 6, True),
        ("AvrtModelDown", {AVAILABLE: "0x20", WANTED: "1x20"}, 4, False),
        ("AvrtModelDown", {AVAILABLE: "1x20", WANTED: "2x20"}, 10, False),
        ("AvrtModelDown", {AVAILABLE: "0x20", WANTED: "0x20"}, 10, False),
        ("AvrtModelDown", {candidates(AVAILABLE): "0x20", candidates(WANTED): "1x20"}, 10, False),
        ("AvrtNotScraped", {AVAILABLE: "1x30"}, 20, True),
        ("AvrtNotScraped", {AVAILABLE: "1x30", UP: "0x30"}, 20, True),
        ("AvrtNotScraped", {AVAILABLE: "1x30", UP: "1x30"}, 20, False),
        ("AvrtNotScraped", {AVAILABLE: "0x30"}, 20, False),
        ("AvrtErrors", {GOOD: "0+90x20", BAD: "0+10x20"}, 15, True),
        ("AvrtErrors", {GOOD: "0+99x20", BAD: "0+1x20"}, 15, False),
        ("AvrtErrors", {GOOD: "0+99x20"}, 15, False),
        ("AvrtErrors", {GOOD: "5x20", BAD: "5x20"}, 15, False),
        ("AvrtQueue", {WAITING: "17x20"}, 12, True),
        ("AvrtQueue", {WAITING: "16x20"}, 12, False),
        ("AvrtSlow", {within("30"): "0+50x40", within("60"): "0+100x40", within("+Inf"): "0+100x40"}, 25, True),
        ("AvrtSlow", {within("30"): "0+99x40", within("60"): "0+100x40", within("+Inf"): "0+100x40"}, 25, False),
        ("AvrtSlow", {within("30"): "9x40", within("60"): "9x40", within("+Inf"): "9x40"}, 25, False),
        ("AvrtCacheFull", {CACHE: "0.97x20"}, 12, True),
        ("AvrtCacheFull", {CACHE: "0.9x20"}, 12, False),
        ("AvrtRolloutStuck", {ALL: "2x60", UPDATED: "1x60"}, 45, True),
        ("AvrtRolloutStuck", {ALL: "2x60", UPDATED: "1x60"}, 35, False),
        ("AvrtRolloutStuck", {ALL: "2x60", UPDATED: "2x60"}, 45, False),
        ("AvrtPodFails", {INIT: "1x20"}, 10, True),
        ("AvrtPodFails", {MAIN: "1 _ _ 1 _ _ 1 _ _ 1 _ _ 1"}, 12, True),
        ("AvrtPodFails", {INIT.replace("avrt-3b-predictor-a", "avrt-mlflow-a"): "1x20"}, 10, False),
        ("AvrtPodFails", {INIT.replace("CrashLoopBackOff", "PodInitializing"): "1x20"}, 10, False),
    ],
)
def test_alerts_fire_when_they_should(
    rendered: dict[str, Build], tmp_path: Path, alert: str, series: dict[str, str], minute: int, fires: bool
) -> None:
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("no promtool: apt-get install prometheus")
    rules = one(rendered["production"], "PrometheusRule", "avrt-serving")["spec"]
    (tmp_path / "rules.yaml").write_text(yaml.safe_dump(rules), encoding="utf-8")
    question = {
        "expr": f'count(ALERTS{{alertname="{alert}", alertstate="firing"}}) or vector(0)',
        "eval_time": f"{minute}m",
        "exp_samples": [{"labels": "{}", "value": int(fires)}],
    }
    case = {
        "interval": "1m",
        "input_series": [{"series": name, "values": values} for name, values in series.items()],
        "promql_expr_test": [question],
    }
    document = {"rule_files": ["rules.yaml"], "evaluation_interval": "1m", "tests": [case]}
    (tmp_path / "test.yaml").write_text(yaml.safe_dump(document), encoding="utf-8")
    for arguments in (("check", "rules", "rules.yaml"), ("test", "rules", "test.yaml")):
        done = subprocess.run([promtool, *arguments], cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
