"""Overrides, and addresses that a configuration may hold: it is written to files, logs, MLflow and reports."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from avrt_lib.cluster.profile import load_profile
from avrt_lib.config import load
from avrt_lib.errors import ConfigError
from avrt_lib.runs import write_config

MINIATURE = Path(__file__).parents[2] / "configs" / "miniature.yaml"


def endpoint(url: str) -> dict[str, str]:
    key = "teachers.vision.engine"
    return {f"{key}.kind": "endpoint", f"{key}.model": "m", f"{key}.base_url": url}


@pytest.mark.parametrize(
    "url",
    [
        "http://user:s3cret@host/v1",
        "https://s3cret@host/v1",
        "http://:s3cret@host:8000/v1",
        "https://host/v1?api_key=s3cret",
        "https://host/v1#s3cret",
        "http://user:s3cret",
        "host/v1/s3cret",
    ],
)
def test_an_endpoint_address_holds_no_key_and_the_error_does_not_tell_it(url: str) -> None:
    with pytest.raises(ConfigError, match=r"base_url .* api_key_env") as refused:
        load(MINIATURE, endpoint(url))
    assert "s3cret" not in str(refused.value)


@pytest.mark.parametrize(
    "url", ["http://teacher.models.svc/v1", "https://host:8443/a/@b/v1/", "http://[::1]:8000/v1", "http://127.0.0.1:1"]
)
def test_an_endpoint_address_without_a_key_stands(url: str) -> None:
    assert load(MINIATURE, endpoint(url)).teachers.vision.engine.base_url == url


def test_a_key_of_a_section_that_a_run_wrote_as_null_can_be_set(tmp_path: Path) -> None:
    write_config(tmp_path / "config.yaml", load(MINIATURE))
    changed = load(
        tmp_path / "config.yaml", {"student.lora.rank": 8, "sft.deepspeed": "none", "grpo.deepspeed": "none"}
    )
    assert changed.student.lora is not None
    assert changed.student.lora.rank == 8
    with pytest.raises(ConfigError, match="seed is a value, not a section"):
        load(tmp_path / "config.yaml", {"seed.x": 1})


@pytest.mark.parametrize(
    ("key", "told"),
    [
        ("grpo.maxsteps", r"grpo\.maxsteps: there is no such key; max_steps may be meant"),
        ("grop.max_steps", r"grop: there is no such key; grpo may be meant"),
        ("grpo.reward.length_mean", r"grpo\.reward\.length_mean: there is no such key; length_mean_words may be meant"),
        ("evaluation.endpoint", r"evaluation\.endpoint: Input should be"),
        ("store.qqq", r"store\.qqq: there is no such key among .*bucket"),
    ],
)
def test_a_key_that_is_not_known_is_told_what_is(key: str, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        load(MINIATURE, {key: 3})


@pytest.mark.parametrize(
    ("reader", "named"),
    [(load, "no configuration file .*--config"), (load_profile, "no cluster profile .*--cluster")],
    ids=["configuration", "profile"],
)
def test_a_file_that_cannot_be_read_is_told_with_the_mend(
    reader: Callable[[Path], Any], named: str, tmp_path: Path
) -> None:
    for absent in (tmp_path / "nope.yaml", tmp_path):
        with pytest.raises(ConfigError, match=named):
            reader(absent)
    file = tmp_path / "given.yaml"
    for text, told in {
        b"a: [": "is not valid YAML",
        b"\xff\xfe": "is not valid YAML",
        b"- a": "must hold a mapping, not list",
        b"name: []": "name: Input should be a valid string",
    }.items():
        file.write_bytes(text)
        with pytest.raises(ConfigError, match=rf"^{file}.* {told}"):
            reader(file)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"sft.stop_low": None}, "cooldown_from needs stop_low"),
        ({"sft.cooldown_from": 0.9}, "must not be above stop_high"),
        ({"sft.stop_low": 0.9}, "stop_low must be below stop_high"),
        ({"grpo.type_weights.both": 0}, r"grpo\.type_weights\.both: Input should be greater than 0"),
        ({"sft.modality_dropout_types.both": 1}, r"sft\.modality_dropout_types\.both: Input should be less than 1"),
    ],
)
def test_settings_of_training_that_contradict_are_refused(changes: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        load(MINIATURE, changes)


def test_a_value_of_one_question_type_is_set_beside_the_others() -> None:
    weights = load(MINIATURE, {"grpo.type_weights.both": 2.0, "grpo.type_weights.animals": 0.1}).grpo.type_weights
    assert weights == {**load(MINIATURE).grpo.type_weights, "both": 2.0, "animals": 0.1}
