"""The table of licences, and the checks that are made of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from avrt_lib.config import Config, load
from avrt_lib.licences import KNOWN, find, loaded_models
from avrt_lib.preflight.checks import licence_checks

ROOT = Path(__file__).resolve().parents[2]
SHA = "a" * 64


def config(name: str, **changes: object) -> Config:
    return load(ROOT / "configs" / f"{name}.yaml", {k.replace("__", "."): v for k, v in changes.items()}, pinned=False)


@pytest.mark.parametrize("name", ["avrt-3b", "avrt-7b", "avrt-3b-1gpu"])
def test_every_model_of_the_papers_configurations_has_a_known_licence(name: str) -> None:
    assert all(find(part.model) is not None for part in loaded_models(config(name)).values())


@pytest.mark.parametrize(
    "reference",
    [
        "hub:nvidia/audio-flamingo-3-hf/think",
        f"s3://avrt/models/audio-flamingo-3-hf-think/{SHA}",
        f"/models/audio-flamingo-3-hf-think/{SHA}",
        "/models/audio-flamingo-3-hf",
        "audio-flamingo-3-hf",
    ],
)
def test_a_model_is_known_under_each_of_its_references(reference: str) -> None:
    licence = find(reference)
    assert licence is not None
    assert licence.model == "nvidia/audio-flamingo-3-hf"


def test_a_model_of_another_publisher_with_the_same_name_is_not_taken_for_it() -> None:
    assert find("hub:somebody/Qwen2.5-Omni-7B") is None


def test_the_four_bit_merger_is_not_taken_for_the_other_one() -> None:
    licence = find(f"/models/qwen2.5-14b-instruct-awq/{SHA}")
    assert licence is not None
    assert licence.model == "Qwen/Qwen2.5-14B-Instruct-AWQ"


def test_restricted_models_warn_with_a_mend() -> None:
    warnings = [check for check in licence_checks(config("avrt-3b")) if check.status == "warning"]
    assert [check.name for check in warnings] == [
        "Licence hub:nvidia/audio-flamingo-3-hf/think",
        "Licence hub:Qwen/Qwen2.5-Omni-3B",
    ]
    assert "accepted_licences" in warnings[0].mend


def test_accepted_licences_do_not_warn() -> None:
    accepted = ["nvidia/audio-flamingo-3-hf", "Qwen/Qwen2.5-Omni-3B"]
    checks = licence_checks(config("avrt-3b", accepted_licences=accepted))
    assert {check.status for check in checks} == {"ok"}


def test_a_model_that_is_not_known_warns_until_it_is_accepted() -> None:
    changes = {"merger__engine__model": "/models/our-own-merger"}
    unknown = {check.name: check.status for check in licence_checks(config("avrt-7b", **changes))}
    accepted = licence_checks(config("avrt-7b", **changes, accepted_licences=["/models/our-own-merger"]))
    assert unknown["Licence /models/our-own-merger"] == "warning"
    assert {check.name: check.status for check in accepted}["Licence /models/our-own-merger"] == "ok"


def test_the_miniature_has_nothing_to_accept() -> None:
    assert licence_checks(config("miniature")) == []


def test_the_documentation_has_each_models_licence() -> None:
    page = (ROOT / "docs" / "models.md").read_text(encoding="utf-8")
    shown = [licence for licence in KNOWN.values() if licence.model != "nvidia/audio-flamingo-3"]
    assert all(licence.licence in page and licence.model.removesuffix("-AWQ") in page for licence in shown)
