"""A candidate's share of the traffic: on any API server what becomes of an HTTPRoute; with KServe, whole rollouts.

No implementation of the Gateway API takes part: standin/gateway.py takes routes up and sends requests by their weights.
In rollouts the stand-in for vLLM serves, and the requests of users, which come through the gateway, must not fail.
"""

from __future__ import annotations

import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from kubernetes import client

from avrt_lib.errors import EnvironmentProblem, ServingError
from avrt_lib.serving import route as routes_of
from avrt_lib.serving.cluster import Cluster, Conflict
from avrt_lib.serving.inference_service import State
from avrt_lib.serving.rollout import CANDIDATE, Stage
from avrt_lib.serving.route import Route
from tests.cluster import gateway
from tests.cluster.gateway import ROUTE, make_route, weights
from tests.cluster.kserve import API_KEY, Place, Prober, is_serving, isvc, standin_image, standins, uri
from tests.cluster.simulated import wait_for
from tests.cluster.test_rollout import ROOT, TIMEOUT_S, command, config, rolling, samples
from tests.kubeconfig import write_account_kubeconfig

__all__ = ["config", "samples"]  # fixtures

CHAMPION = "champion"
OURS, THEIRS = f"{CHAMPION}-predictor", f"{CHAMPION}{CANDIDATE}-predictor"


def of_champion(namespace: str) -> Route:
    return Route(Cluster(namespace), ROUTE, CHAMPION, CHAMPION + CANDIDATE)


def make_services(core: client.CoreV1Api, namespace: str, *names: str) -> None:
    for name in names:
        body = {"metadata": {"name": name}, "spec": {"ports": [{"port": 80}]}}
        core.create_namespaced_service(namespace, body)


def test_without_the_gateway_api_the_mend_says_so(core: client.CoreV1Api, namespace: str) -> None:
    if gateway.has_routes():
        pytest.skip("this cluster has the Gateway API")
    with pytest.raises(EnvironmentProblem, match=r"install the Gateway API, or unset deployment\.route"):
        of_champion(namespace).check()


@pytest.fixture(scope="module")
def gateway_api(core: client.CoreV1Api) -> Iterator[None]:
    with gateway.routes():
        yield


@pytest.fixture
def followed(core: client.CoreV1Api, namespace: str, gateway_api: None, tmp_path: Path) -> Iterator[str]:
    """A namespace with a route to a champion and a gateway that takes it up."""
    make_services(core, namespace, OURS)
    make_route(namespace, CHAMPION)
    with gateway.gateway_process(namespace, tmp_path):
        yield namespace


def generation(namespace: str) -> int:
    found = Cluster(namespace).route(ROUTE)
    assert found is not None
    return int(found["metadata"]["generation"])


def is_taken(route: Route) -> bool:
    """Whether it could be shared."""
    try:
        route.check()
    except (EnvironmentProblem, ServingError):
        return False
    return True


@pytest.fixture
def ready(followed: str) -> Route:
    """The route of ``followed``, taken up."""
    made = of_champion(followed)
    assert wait_for(lambda: is_taken(made), 30)
    return made


def test_a_check_changes_nothing(followed: str, ready: Route) -> None:
    ready.check()
    assert (weights(followed), generation(followed)) == ({OURS: 100}, 1)


def test_a_share_and_its_end(core: client.CoreV1Api, followed: str, ready: Route) -> None:
    make_services(core, followed, THEIRS)
    before = Cluster(followed).route(ROUTE)
    ready.share(20)
    assert (weights(followed), ready.is_shared()) == ({OURS: 80, THEIRS: 20}, True)
    ready.watch(20)
    ready.take_back()
    after = Cluster(followed).route(ROUTE)
    assert before is not None
    assert after is not None
    assert (after["spec"], ready.is_shared()) == (before["spec"], False)


def test_a_service_that_is_not_there_is_the_gateways_word(
    followed: str, ready: Route, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(routes_of, "TAKE_UP_S", 3.0)
    with pytest.raises(ServingError, match=f"BackendNotFound: no Service {THEIRS}"):
        ready.share(20)


def test_a_change_by_somebody_else_is_seen(core: client.CoreV1Api, followed: str, ready: Route) -> None:
    make_services(core, followed, THEIRS)
    ready.share(20)
    of_champion(followed).share(30)
    with pytest.raises(ServingError, match="somebody else changed HTTPRoute"):
        ready.watch(20)


def test_what_was_written_meanwhile_is_not_written_over(core: client.CoreV1Api, followed: str, ready: Route) -> None:
    make_services(core, followed, THEIRS)
    cluster = Cluster(followed)
    found = cluster.route(ROUTE)
    assert found is not None
    cluster.set_rules(found, [{**found["spec"]["rules"][0], "timeouts": {"request": "60s"}}])
    with pytest.raises(Conflict):
        cluster.set_rules(found, found["spec"]["rules"])
    ready.share(20)
    changed = cluster.route(ROUTE)
    assert changed is not None
    assert changed["spec"]["rules"][0]["timeouts"] == {"request": "60s"}


@pytest.mark.usefixtures("ready")
def test_the_deployers_role_may_share(followed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rules = gateway.deployer_rules()
    less = [rule for rule in rules if "httproutes" not in rule["resources"]]
    for name, granted in (("without", less), ("deployer", rules)):
        gateway.allow(followed, name, granted)
        write_account_kubeconfig(tmp_path / name, followed, name)
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "without"))
    with pytest.raises(EnvironmentProblem, match=r"may not get httproutes in .* bind the Role avrt-deployer"):
        of_champion(followed).check()
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "deployer"))
    assert wait_for(lambda: is_taken(of_champion(followed)), 10)


# Rollouts, with KServe and the stand-in for vLLM.


@pytest.fixture(scope="module")
def place(core: client.CoreV1Api) -> Iterator[Place]:
    with gateway.routes(), standins(core, {"v1": {}, "v2": {"start_s": 3}}) as made:
        yield made


@pytest.fixture(scope="module")
def address(core: client.CoreV1Api, place: Place) -> str:
    """The gateway's, in the cluster."""
    return gateway.gateway_pod(core, place.namespace, standin_image())


@pytest.fixture
def champion(place: Place, address: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A champion that serves v1, with a route."""
    monkeypatch.setenv("AVRT_API_KEY", API_KEY)
    place.apply(isvc(CHAMPION, annotations={"avrt/model-version": "1"}))
    assert place.until(CHAMPION, is_serving, TIMEOUT_S).state is State.SERVING
    make_route(place.namespace, CHAMPION)
    yield CHAMPION
    for name in (CHAMPION, CHAMPION + CANDIDATE):
        place.cluster.delete(name)
    client.CustomObjectsApi().delete_namespaced_custom_object(*gateway.GROUP, place.namespace, "httproutes", ROUTE)
    assert wait_for(lambda: not place.cluster.pods(CHAMPION), 60)


@pytest.fixture
def users(
    place: Place, champion: str, address: str, request: pytest.FixtureRequest, observed: Callable[[str], None]
) -> Iterator[Prober]:
    """Users who come through the gateway; none of their requests may fail."""
    made = Prober(place.core, place.namespace, champion, image=standin_image(), url=address)
    assert made.versions() == ["v1"]
    yield made
    counted = made.counted()
    made.remove()
    answers, failed = counted["answers"], len(counted["failures"])
    observed(f"stand-in, {request.node.name}: {sum(answers.values())} requests answered, {failed} failed")
    assert counted["failures"] == []


def sharing(place: Place, samples: Path, seconds: int) -> list[str]:
    settings = (f"route={ROUTE}", "split_percent=50", f"split_seconds={seconds}")
    return [*rolling(place, CHAMPION, "v2", samples), *(f"--set=deployment.{each}" for each in settings)]


def killed_while_sharing(line: list[str]) -> None:
    """Start a rollout, and kill it once the candidate has its share."""
    with subprocess.Popen(line, cwd=ROOT, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True) as first:
        assert first.stderr is not None
        heard = ""
        for each in first.stderr:
            heard += each
            if each.startswith("50 %"):
                first.kill()
    assert first.returncode == -signal.SIGKILL, heard
    assert Stage.SHARING in heard


def test_users_meet_the_candidate_before_the_champion_changes(place: Place, users: Prober, samples: Path) -> None:
    line = sharing(place, samples, 6)
    with subprocess.Popen(line, cwd=ROOT, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True) as running:
        assert running.stderr is not None
        for heard in running.stderr:
            if heard.startswith("50 %"):
                assert weights(place.namespace) == {OURS: 50, THEIRS: 50}
                assert set(users.versions()) == {"v1", "v2"}
                service = place.cluster.service(CHAMPION)
                assert service is not None
                assert service["spec"]["predictor"]["model"]["storageUri"] == uri("v1")
    assert running.returncode == 0
    assert weights(place.namespace) == {OURS: 100}
    assert place.cluster.service(CHAMPION + CANDIDATE) is None
    assert users.versions()[-1] == "v2"


def test_killed_while_it_shares_it_goes_on(place: Place, users: Prober, samples: Path) -> None:
    killed_while_sharing(sharing(place, samples, 60))
    assert weights(place.namespace) == {OURS: 50, THEIRS: 50}
    again = subprocess.run(sharing(place, samples, 3), cwd=ROOT, capture_output=True, text=True, check=False)
    assert again.returncode == 0, again.stderr
    assert Stage.CHECKING not in again.stderr
    assert weights(place.namespace) == {OURS: 100}
    assert users.versions()[-1] == "v2"


def test_killed_while_it_shares_it_is_taken_back(place: Place, users: Prober, samples: Path) -> None:
    killed_while_sharing(sharing(place, samples, 60))
    back = subprocess.run(command(place, "rollback", CHAMPION), capture_output=True, text=True, check=False)
    assert back.returncode == 0, back.stderr
    assert weights(place.namespace) == {OURS: 100}
    assert place.cluster.service(CHAMPION + CANDIDATE) is None
    assert users.versions()[-1] == "v1"


def test_a_candidate_that_fails_with_users_loses_its_share(place: Place, champion: str, samples: Path) -> None:
    """Its pod goes away; what users ask until the route leads elsewhere may fail, and is not counted."""
    line = sharing(place, samples, 120)
    with subprocess.Popen(line, cwd=ROOT, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True) as running:
        assert running.stderr is not None
        heard = ""
        for each in running.stderr:
            heard += each
            if each.startswith("50 %"):
                (pod,) = place.cluster.pods(champion + CANDIDATE)
                place.core.delete_namespaced_pod(pod["metadata"]["name"], place.namespace)
    assert running.returncode == ServingError.exit_code
    assert "The champion is unchanged; the candidate failed" in heard.replace("\n", " ")
    assert weights(place.namespace) == {OURS: 100}
    assert place.cluster.service(champion + CANDIDATE) is None
