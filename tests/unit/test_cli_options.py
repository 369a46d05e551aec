"""From options to a configuration: data sets, overrides, resuming, and where configurations are found."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from avrt_lib import runs
from avrt_lib.cli.options import dataset_overrides, differences, find_config, overrides, resolve, resumed
from avrt_lib.errors import ConfigError, UsageError

ROOT = Path(__file__).parents[2]
MINIATURE = ROOT / "configs" / "miniature.yaml"


def _changes(**given: Any) -> dict[str, Any]:
    nothing: dict[str, Any] = {
        "settings": [],
        "dataset": [],
        "unfiltered": False,
        "overlap_splits": False,
        "seed": None,
    }
    return overrides(**nothing | given)


@pytest.mark.parametrize(
    ("items", "expected"),
    [
        ([], {}),
        (
            ["daily-omni:/d"],
            {
                "data.all": {"format": "daily-omni", "path": "/d"},
                "data.train": None,
                "data.validation": None,
                "data.test": None,
            },
        ),
        (["manifest:/d/a=b.csv"], None),  # an equals sign in a path is not a split
        (["manifest:C:/d"], None),  # a colon in a path belongs to it
        (
            ["train=avqa:/a", "validation=avqa:/b", "test=avqa:/c"],
            {
                "data.all": None,
                "data.train": {"format": "avqa", "path": "/a"},
                "data.validation": {"format": "avqa", "path": "/b"},
                "data.test": {"format": "avqa", "path": "/c"},
            },
        ),
    ],
)
def test_dataset(items: list[str], expected: dict[str, Any] | None) -> None:
    found = dataset_overrides(items)
    if expected is None:
        assert found["data.all"]["format"] == "manifest"
        assert found["data.all"]["path"].endswith(items[0].removeprefix("manifest:"))
    else:
        assert found == expected


@pytest.mark.parametrize(
    ("items", "said"),
    [
        (["daily-omni"], "takes FORMAT:PATH"),
        ([":/d"], "takes FORMAT:PATH"),
        (["daily-omni:"], "takes FORMAT:PATH"),
        (["a:/x", "a:/y"], "given twice"),
        (["train=a:/x", "train=a:/y"], "twice for train"),
        (["a:/x", "test=a:/y"], "either one FORMAT:PATH"),
    ],
)
def test_a_bad_dataset_is_refused(items: list[str], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        dataset_overrides(items)


def test_a_relative_data_set_is_made_absolute(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    assert dataset_overrides(["avqa:data"])["data.all"]["path"] == str(tmp_path / "data")


def test_a_run_with_a_relative_model_folder_goes_on_from_any_folder(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    changes = {"student.model": "models/own", "accepted_licences": ["models/own", "org/other"]}
    folder = runs.create(tmp_path / "runs", resolve(MINIATURE, changes))
    monkeypatch.chdir(ROOT)
    config = resumed(folder, None, {})
    assert config.student.model == str(tmp_path / "models/own")
    assert config.accepted_licences == [str(tmp_path / "models/own"), "org/other"]
    assert config.merger.engine.model == "builtin:merger"


def test_set_has_the_last_word() -> None:
    config = resolve(MINIATURE, _changes(unfiltered=True, seed=4, settings=["merger.keep=both", "grpo.max_steps=7"]))
    assert (config.merger.keep, config.grpo.max_steps, config.seed) == ("both", 7, 4)
    assert config.deployment.serve_unpromoted
    assert config.validation.minimum_rows == 1


def test_one_data_set_replaces_the_three() -> None:
    config = resolve(MINIATURE, _changes(dataset=["daily-omni:/d"], overlap_splits=True))
    assert config.data.all is not None
    assert config.data.train is None
    assert config.data.overlap_splits


def test_a_data_set_is_not_mixed_with_rendered_clips() -> None:
    with pytest.raises(ConfigError, match=r"give validation=FORMAT:PATH and test=FORMAT:PATH too"):
        resolve(MINIATURE, _changes(dataset=["train=avqa:/d"]))


@pytest.mark.parametrize("name", ["configs/miniature.yaml", "miniature.yaml", "miniature"])
def test_shipped_configurations_are_found_from_anywhere(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    assert find_config(Path(name)).samefile(MINIATURE)


def test_an_absent_configuration_lists_what_there_is() -> None:
    with pytest.raises(ConfigError, match=r"there are .*configs/miniature\.yaml"):
        find_config(Path("nope.yaml"))


def test_resuming_keeps_the_configuration(tmp_path: Path) -> None:
    folder = runs.create(tmp_path, resolve(MINIATURE, {"seed": 3}))
    assert resumed(folder, None, {}).seed == 3
    assert resumed(folder, None, {"seed": 3}).seed == 3
    with pytest.raises(UsageError, match=r"other settings \(grpo.max_steps, seed\)"):
        resumed(folder, None, {"seed": 4, "grpo.max_steps": 1})
    with pytest.raises(UsageError, match=r"other settings \(seed\)"):
        resumed(folder, MINIATURE, {})


def test_differences_are_named_by_key() -> None:
    assert differences({"a": {"b": 1, "c": 2}, "d": 1}, {"a": {"b": 1, "c": 3}, "e": 1}) == ["a.c", "d", "e"]


def test_runs_that_start_at_once_get_folders_of_their_own(tmp_path: Path) -> None:
    config = resolve(MINIATURE, {})
    folders = [runs.create(tmp_path, config) for _ in range(3)]
    assert len({folder.path for folder in folders}) == 3
    assert (tmp_path / "latest").resolve() == folders[-1].path.resolve()
    assert folders[0].config() == config
    assert runs.find(tmp_path).path == folders[-1].path.resolve()
    assert runs.find(tmp_path, folders[0].path.name).path == folders[0].path.resolve()


def test_an_unknown_run_lists_those_that_there_are(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="none yet"):
        runs.find(tmp_path)
    folder = runs.create(tmp_path, resolve(MINIATURE, {}))
    with pytest.raises(UsageError, match=folder.path.name):
        runs.find(tmp_path, "other")


def test_a_run_folder_is_for_one_at_a_time(tmp_path: Path) -> None:
    folder = runs.create(tmp_path, resolve(MINIATURE, {}))
    with folder.locked(), pytest.raises(UsageError, match="still going on"), folder.locked():
        pass
    with folder.locked():
        pass
