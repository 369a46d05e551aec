"""Merged traces between runs: published to a real SeaweedFS and taken from there, or brought along as JSON lines."""

from __future__ import annotations

import dataclasses
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from avrt_lib import answers, store
from avrt_lib.config import Config, load
from avrt_lib.errors import AvrtError, ConfigError, DataError, StoreError
from avrt_lib.records import Merged
from avrt_lib.steps import run_step
from avrt_lib.store import LocalObjectServer
from avrt_lib.tables import TableWriter, read_json, read_rows, write_table
from tests import tiny_models

MINIATURE = Path(__file__).parents[2] / "configs" / "miniature.yaml"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalObjectServer]:
    with LocalObjectServer(tmp_path_factory.mktemp("run") / "store") as running:
        yield running


@pytest.fixture
def in_environment(server: LocalObjectServer, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Samples and merged traces."""
    folder = tmp_path_factory.mktemp("data")
    samples, _ = tiny_models.write_data(folder, train=4)
    write_table(folder / "traces", Merged, [trace(number) for number in range(4)])
    return samples, folder / "traces"


def trace(number: int) -> Merged:
    """A row that the merger merged, with what it wrote."""
    row = tiny_models.merged_row(number)
    return dataclasses.replace(row, raw_text=answers.compose(row.reasoning, row.answer_index or 0))


def publish(merged: Path, folder: Path, **settings: Any) -> dict[str, Any]:
    return run_step(
        "publish_traces",
        config=load(MINIATURE, settings).to_json(),
        inputs={"merged": merged},
        outputs={"published": folder / "published"},
    )


def bring(samples: Path, source: Path | str, folder: Path, work: Path | None = None) -> dict[str, Any]:
    return run_step(
        "import_traces",
        config=load(MINIATURE).to_json(),
        inputs={"samples": samples},
        outputs={"merged": folder / "merged"},
        work=work,
        params={"source": str(source)},
    )


@pytest.mark.usefixtures("in_environment")
def test_published_traces_come_back_as_they_were(data: tuple[Path, Path], tmp_path: Path) -> None:
    samples, merged = data
    facts = publish(merged, tmp_path)
    content = read_json(merged / "manifest.json")["content_sha256"]
    assert facts == {"uri": f"s3://avrt/traces/{content}", "rows": 4}
    assert read_json(tmp_path / "published" / "traces.json") == facts
    assert publish(merged, tmp_path / "again")["uri"] == facts["uri"], "the same content has the same place"
    brought = bring(samples, facts["uri"], tmp_path)
    assert brought["merged"]["rows"] == 4
    assert list(read_rows(tmp_path / "merged", Merged)) == list(read_rows(merged, Merged))


@pytest.mark.usefixtures("in_environment")
def test_the_same_rows_in_other_parts_are_published_already(data: tuple[Path, Path], tmp_path: Path) -> None:
    samples, merged = data
    uri = publish(merged, tmp_path / "first")["uri"]
    writer = TableWriter(tmp_path / "parts", Merged, {"step": "merger", "model": "another run's"})
    for number, each in enumerate(read_rows(merged, Merged)):
        writer.commit(f"{number:05d}", [each])
    writer.finish()
    assert publish(tmp_path / "parts", tmp_path / "second")["uri"] == uri
    bring(samples, uri, tmp_path)
    assert read_json(tmp_path / "merged" / "manifest.json") == read_json(merged / "manifest.json")


@pytest.mark.usefixtures("in_environment")
def test_traces_that_were_changed_in_the_store_are_refused(data: tuple[Path, Path], tmp_path: Path) -> None:
    samples, merged = data
    write_table(tmp_path / "other", Merged, [*read_rows(merged, Merged)][:3])
    uri = publish(tmp_path / "other", tmp_path)["uri"]
    (part,) = [path for path in (tmp_path / "other").iterdir() if path.suffix == ".parquet"]
    (tmp_path / "damaged").write_bytes(part.read_bytes()[:-1] + b"x")
    key = f"{uri.removeprefix('s3://avrt/')}/{part.name}"
    store.client().fput_object("avrt", key, str(tmp_path / "damaged"))
    with pytest.raises(StoreError, match="not what its manifest says"):
        bring(samples, uri, tmp_path)
    assert not (tmp_path / "merged").exists()


@pytest.mark.usefixtures("in_environment")
def test_an_address_is_that_of_its_content(data: tuple[Path, Path], tmp_path: Path) -> None:
    samples, merged = data
    uri = publish(merged, tmp_path)["uri"]
    key, wrong = uri.removeprefix("s3://avrt/"), f"{uri.rpartition('/')[0]}/{'0' * 64}"
    connection = store.client()
    for found in connection.list_objects("avrt", prefix=key + "/", recursive=True):
        text = connection.get_object("avrt", found.object_name).read()
        place = wrong.removeprefix("s3://avrt/") + found.object_name.removeprefix(key)
        connection.put_object("avrt", place, io.BytesIO(text), len(text))
    with pytest.raises(StoreError, match="holds another table than its address names"):
        bring(samples, wrong, tmp_path)


@pytest.mark.usefixtures("in_environment")
def test_traces_that_nobody_published_are_named(data: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="s3://avrt/traces/0123 has no manifest"):
        bring(data[0], "s3://avrt/traces/0123", tmp_path)


def test_traces_are_not_published_to_a_pods_own_disk(data: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"store\.kind=s3"):
        publish(data[1], tmp_path, **{"store.kind": "local"})


def test_a_merged_tables_folder_is_taken_as_it_is(data: tuple[Path, Path], tmp_path: Path) -> None:
    samples, merged = data
    assert bring(samples, merged, tmp_path)["merged"]["rows"] == 4
    assert list(read_rows(tmp_path / "merged", Merged)) == list(read_rows(merged, Merged))


def test_traces_of_another_data_set_are_refused(data: tuple[Path, Path], tmp_path: Path) -> None:
    write_table(tmp_path / "foreign", Merged, [trace(number) for number in (0, 99)])
    with pytest.raises(DataError, match=r"train-0099.*no training sample of this run"):
        bring(data[0], tmp_path / "foreign", tmp_path)


def own(folder: Path, *lines: Any) -> Path:
    """A file of one's own; what is not text yet becomes JSON."""
    path = folder / "own.jsonl"
    texts = [each if isinstance(each, str) else json.dumps(each) for each in lines]
    path.write_text("\n".join(texts) + "\n", encoding="utf-8")
    return path


def row(number: int = 0, **changes: Any) -> dict[str, Any]:
    return {
        "sample_id": f"train-{number:04d}",
        "reasoning": "The picture shows a bell and the sound is a bell.",
        "answer": "A",
    } | changes


def test_own_traces_become_merged_rows(data: tuple[Path, Path], tmp_path: Path) -> None:
    samples = data[0]
    right = {number: tiny_models.sample(number).answer_index for number in (0, 1)}
    letters = {number: "ABCDEFGH"[index or 0] for number, index in right.items()}
    wrong = "ABCDEFGH"[((right[1] or 0) + 1) % len(tiny_models.sample(1).options)]
    path = own(tmp_path, row(0, answer=letters[0]), "", row(1, answer=wrong))
    assert bring(samples, path, tmp_path)["merged"]["rows"] == 2
    first, second = read_rows(tmp_path / "merged", Merged)
    assert (first.cell, first.answer_index, first.flags, first.model) == ("both", right[0], [], "own")
    assert first.words == 11
    assert (second.cell, second.flags) == ("none", ["wrong_answer"])


def test_a_source_that_was_changed_is_read_again(data: tuple[Path, Path], tmp_path: Path) -> None:
    work = tmp_path / "work"
    bring(data[0], own(tmp_path, row(0, reasoning="First.")), tmp_path, work)
    bring(data[0], own(tmp_path, row(0, reasoning="Second.")), tmp_path, work)
    assert [trace.reasoning for trace in read_rows(tmp_path / "merged", Merged)] == ["Second."]
    write_table(tmp_path / "table", Merged, [trace(0)])
    bring(data[0], tmp_path / "table", tmp_path, work)
    write_table(tmp_path / "table", Merged, [trace(0), trace(1)])
    assert bring(data[0], tmp_path / "table", tmp_path, work)["merged"]["rows"] == 2


def test_a_text_may_hold_any_character(data: tuple[Path, Path], tmp_path: Path) -> None:
    said = "One line\u2028and the next\u0085of it."
    letter = tiny_models.sample(0).answer_letter
    bring(data[0], own(tmp_path, json.dumps(row(0, reasoning=said, answer=letter), ensure_ascii=False)), tmp_path)
    assert [trace.reasoning for trace in read_rows(tmp_path / "merged", Merged)] == [said]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{not json", "line 2: each line is a JSON object"),
        ({"sample_id": "train-0001", "answer": "A"}, "line 2: .*'reasoning'"),
        ([1, 2], "line 2: each line is a JSON object"),
        (row(1, reasoning=None), "line 2: .*reasoning is no text but NoneType"),
        (row(77), "line 2: there is no training sample 'train-0077'"),
        (row(1, answer="Z"), "line 2: the answer is one letter of the options, not 'Z'"),
        (row(1, answer="the bell"), "line 2: the answer is one letter"),
        (row(1, answer=""), "line 2: the answer is one letter"),
        (row(1, answer="AB"), "line 2: the answer is one letter"),
    ],
)
def test_a_bad_line_is_named_by_its_number(data: tuple[Path, Path], tmp_path: Path, line: Any, said: str) -> None:
    with pytest.raises(DataError, match=said):
        bring(data[0], own(tmp_path, row(0), line), tmp_path)


@pytest.mark.parametrize("source", ["/nonexistent.jsonl", "/nonexistent", "relative"])
def test_a_source_that_is_not_there_is_named(data: tuple[Path, Path], tmp_path: Path, source: str) -> None:
    with pytest.raises(AvrtError, match=source):
        bring(data[0], source, tmp_path)


def test_one_evaluates_an_endpoint_by_naming_it() -> None:
    endpoint = {"kind": "endpoint", "model": "mine", "base_url": "http://models.example.com/v1"}
    config: Config = load(MINIATURE, {"evaluation.endpoint": endpoint})
    assert config.evaluation.endpoint is not None
    assert config.evaluation.endpoint.model == "mine"
    with pytest.raises((ConfigError, ValidationError), match="evaluation: endpoint needs kind: endpoint"):
        load(MINIATURE, {"evaluation.endpoint": {"kind": "vllm", "model": "builtin:student"}})
    with pytest.raises((ConfigError, ValidationError), match="needs base_url"):
        load(MINIATURE, {"evaluation.endpoint": {"kind": "endpoint", "model": "mine"}})
