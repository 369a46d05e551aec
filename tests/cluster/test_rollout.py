"""Rollouts on a real KServe, the champion asked all the time; the stand-in takes vLLM's place.

Every test makes a champion of its own and counts the requests to its Service that failed.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from kubernetes import client

from avrt_lib.config import Config, load
from avrt_lib.errors import ServingError
from avrt_lib.records import Sample
from avrt_lib.serving import deployment, rollout
from avrt_lib.serving.cluster import Document
from avrt_lib.serving.inference_service import State, Status, annotations_of, status, storage_uri
from avrt_lib.serving.lease import Busy
from avrt_lib.serving.rollout import CANDIDATE, PREVIOUS, Stage, to_uri
from avrt_lib.tables import read_json, write_json, write_table
from avrt_lib.workspace import Workspace
from tests.cluster.kserve import API_KEY, RUNTIME, Place, Prober, is_serving, isvc, standin_image, standins, uri

ROOT = Path(__file__).resolve().parents[2]
MODELS: dict[str, dict[str, Any]] = {
    "v1": {},
    "v2": {"start_s": 3},
    "v3": {},
    "crash": {"crash": True},
    "rude": {"form": False},
}
TIMEOUT_S = 120.0


@pytest.fixture(scope="module")
def place(core: client.CoreV1Api) -> Iterator[Place]:
    with standins(core, MODELS) as made:
        yield made


@pytest.fixture(autouse=True)
def _key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AVRT_API_KEY", API_KEY)


@pytest.fixture
def champion(place: Place, request: pytest.FixtureRequest) -> Iterator[str]:
    """A champion that serves v1."""
    name = f"c{abs(hash(request.node.name)) % 10**6}"
    place.apply(isvc(name, annotations={"avrt/model-version": "1"}))
    assert place.until(name, is_serving, TIMEOUT_S).state is State.SERVING
    yield name
    for each in (name, name + CANDIDATE):
        place.cluster.delete(each)


@pytest.fixture
def prober(
    place: Place, champion: str, request: pytest.FixtureRequest, observed: Callable[[str], None]
) -> Iterator[Prober]:
    """What counts the champion's failed requests; at the end there must be none."""
    made = Prober(place.core, place.namespace, champion, image=standin_image())
    assert made.versions() == ["v1"]
    yield made
    counted = made.counted()
    made.remove()
    asked = sum(counted["answers"].values())
    observed(f"stand-in, {request.node.name}: {asked} requests answered, {len(counted['failures'])} failed")
    assert counted["failures"] == []


@pytest.fixture(scope="module")
def config() -> Config:
    """The miniature's, for the stand-in."""
    changes = {
        "deployment.target": "kserve",
        "deployment.runtime": RUNTIME,
        "deployment.service_account": "models",
        "deployment.cpu": "10m",
        "deployment.memory": "256Mi",
        "deployment.gpus": 0,
        "deployment.request_timeout_s": 20,
        "deployment.start_timeout_s": TIMEOUT_S,
    }
    return load(ROOT / "configs/miniature.yaml", changes)


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory, config: Config) -> Path:
    """Held-out questions about rendered clips with sound and picture."""
    from avrt_lib.cli.serving import _questions

    folder = tmp_path_factory.mktemp("samples")
    write_table(folder, Sample, _questions(config, None, folder, None))
    return folder


def stored(place: Place, name: str) -> Document:
    found = place.cluster.service(name)
    assert found is not None
    return found


def wanted(place: Place, name: str, model: str) -> rollout.Wanted:
    return to_uri(stored(place, name), uri(model), model)


def checked(config: Config, samples: Path, candidate: Status) -> None:
    deployment.check_candidate(config, candidate, deployment.probe_questions(samples, 3), candidate.name)


def roll(place: Place, name: str, model: str, config: Config, samples: Path) -> Status:
    return rollout.rollout(
        place.cluster,
        wanted(place, name, model),
        check=lambda candidate: checked(config, samples, candidate),
        timeout_s=TIMEOUT_S,
        told=print,
    )


def command(place: Place, *arguments: str) -> list[str]:
    return [sys.executable, "-m", "avrt_lib.cli.main", "serving", *arguments, f"--namespace={place.namespace}"]


def rolling(place: Place, name: str, model: str, samples: Path) -> list[str]:
    options = [f"--uri={uri(model)}", f"--samples={samples}", "--config=configs/miniature.yaml", "--timeout-s=120"]
    return command(place, "rollout", name, *options, f"--version={model}")


def test_a_rollout_and_the_way_back(place: Place, champion: str, prober: Prober, config: Config, samples: Path) -> None:
    found = roll(place, champion, "v2", config, samples)
    assert (found.state, found.served) == (State.SERVING, (uri("v2"),))
    assert prober.versions()[-1] == "v2"
    assert json.loads(annotations_of(stored(place, champion))[PREVIOUS])["uri"] == uri("v1")
    assert place.cluster.service(champion + CANDIDATE) is None
    for _ in range(2):  # the second does nothing
        done = subprocess.run(command(place, "rollback", champion), capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert uri("v1") in done.stdout
    assert prober.versions()[-1] == "v1"


# Sharing the traffic: test_traffic_split.py.
@pytest.mark.parametrize(
    "stage", [stage for stage in Stage if stage is not Stage.SHARING], ids=lambda stage: stage.name.lower()
)
def test_a_rollout_that_is_killed_goes_on(
    place: Place, champion: str, prober: Prober, samples: Path, stage: Stage
) -> None:
    line = rolling(place, champion, "v2", samples)
    with subprocess.Popen(line, cwd=ROOT, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True) as first:
        assert first.stderr is not None
        for heard in first.stderr:
            if heard.startswith(stage):
                break
        first.send_signal(signal.SIGKILL)
    again = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, check=False)
    assert again.returncode == 0, again.stderr
    assert status(place.cluster, champion, uri("v2")).state is State.SERVING
    assert place.cluster.service(champion + CANDIDATE) is None
    assert json.loads(annotations_of(stored(place, champion))[PREVIOUS])["uri"] == uri("v1")
    assert prober.versions()[-1] == "v2"


@pytest.mark.parametrize(("model", "cause"), [("crash", "exit code 3"), ("rude", "answers have the asked form")])
def test_a_candidate_that_fails_leaves_the_champion(
    place: Place, champion: str, prober: Prober, config: Config, samples: Path, model: str, cause: str
) -> None:
    with pytest.raises(ServingError, match="The champion is unchanged") as caught:
        roll(place, champion, model, config, samples)
    assert cause in str(caught.value)
    assert storage_uri(stored(place, champion)) == uri("v1")
    assert place.cluster.service(champion + CANDIDATE) is None
    assert prober.versions() == ["v1"]


def test_the_second_of_two_rollouts_is_refused(place: Place, champion: str, prober: Prober, samples: Path) -> None:
    refusals: list[str] = []

    def second(_: Status) -> None:
        done = subprocess.run(
            rolling(place, champion, "v3", samples), cwd=ROOT, capture_output=True, text=True, check=False
        )
        refusals.append(f"{done.returncode} {done.stderr}")

    rollout.rollout(place.cluster, wanted(place, champion, "v2"), check=second, timeout_s=TIMEOUT_S)
    assert refusals[0].startswith(str(Busy.exit_code))
    assert f"A rollout to {uri('v2')}, now checking the candidate, is going on already" in refusals[0]
    assert prober.versions()[-1] == "v2"


def test_the_deployment_step(place: Place, config: Config, samples: Path, tmp_path: Path) -> None:
    """The first model is made at once, the next one proves itself first; the result has the same fields."""
    name = config.promotion.model_name
    used = config.model_copy(update={"deployment": config.deployment.model_copy(update={"namespace": place.namespace})})
    for version, model in enumerate(("v1", "v3"), start=1):
        decision = {"promoted": True, "uri": uri(model), "sha256": "0" * 64, "version": version, "reason": ""}
        write_json(tmp_path / "champion/champion.json", decision)
        facts = deployment.run(
            used,
            workspace=Workspace(tmp_path, "deployment", tmp_path / "scratch"),
            samples=samples,
            champion=tmp_path / "champion",
            check=tmp_path / "check",
        )
        assert (facts["ok"], facts["uri"], facts["answers"], facts["well_formed"]) == (True, uri(model), 3, 3)
        questions = read_json(tmp_path / "check/check.json")["questions"]
        assert {question["reasoning"] for question in questions} == {model}
    before = json.loads(annotations_of(stored(place, name))[PREVIOUS])
    assert before["annotations"]["avrt/model-version"] == "1"
    line = subprocess.run(
        command(place, "status", name, f"--uri={uri('v3')}"), capture_output=True, text=True, check=False
    )
    assert (line.returncode, "is serving (version 2" in line.stdout) == (0, True), line.stdout + line.stderr
    other = subprocess.run(command(place, "status", name, f"--uri={uri('v1')}"), capture_output=True, check=False)
    assert other.returncode == ServingError.exit_code
