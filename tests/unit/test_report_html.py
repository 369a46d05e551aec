"""The report: what it shows, what it survives, and that nothing that a model wrote gets out of its box."""

from __future__ import annotations

import copy
import io
import json
import re
from collections.abc import Mapping
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from avrt_lib.errors import DataError
from avrt_lib.records import CONDITIONS, Merged, Prediction, Sample, Trace
from avrt_lib.report import charts, examples
from avrt_lib.report.html import duration, headline, matrix, plain, write_report
from avrt_lib.tables import write_json, write_table

KINDS = ("either", "both", "sound", "sight")
CHAMPION = ("avrt-miniature", "1", "s3://avrt/models/avrt-miniature/ab12/", "ab12")
HOSTILE = "<script>alert(1)</script><img src=http://example.invalid/x onerror=alert(2)>"


def _model(accuracy: float, single: float) -> dict[str, Any]:
    part = {"accuracy": single, "invalid_rate": 0.03, "by_kind": dict.fromkeys(KINDS, single)}
    return {
        "accuracy": accuracy,
        "ci95": [accuracy - 0.04, accuracy + 0.03],
        "invalid_rate": 0.0125,
        "words_mean": 21.4,
        "n": 400,
        "by_kind": dict(zip(KINDS, (accuracy, accuracy - 0.05, accuracy, accuracy + 0.02), strict=True)),
        "conditions": {"audio_only": part, "vision_only": copy.deepcopy(part)},
    }


def _summary() -> dict[str, Any]:
    names = ("preflight", "ingest", "vision_teacher", "merger", "sft", "grpo", "evaluation", "promotion", "deployment")
    return {
        "status": "succeeded",
        "failure": None,
        "steps": {name: {"seconds": 7.0 * (i + 1) ** 1.6, "status": "succeeded"} for i, name in enumerate(names)},
        "dataset": {"samples": 2600, "by_kind": {"either": 1300, "both": 1040}, "dropped": 0},
        "ledger": {"both": 1222, "audio_only": 357, "vision_only": 361, "none": 60},
        "merged": {"rows": 1222, "flags": {"one_sided": 4}},
        "validation": {"passed": True, "expectations": 11, "failed": []},
        "models": {"base": _model(0.3125, 0.29), "sft": _model(0.735, 0.52), "grpo": _model(0.9075, 0.57)},
        "grpo": {"steps": 160, "informative_groups": 0.61, "kl": 0.0312, "weight_change": 0.0184},
        "champion": {
            "model": "avrt-miniature",
            "version": "1",
            "uri": "s3://avrt/models/avrt-miniature/ab12/",
            "sha256": "ab12",
        },
        "promotion": {"promoted": True, "reason": "GRPO beats the base on the validation questions (p < 0.001)."},
        "serving": {"ok": True, "latency_s": {"p50": 0.41, "max": 0.66}},
        "versions": {"avrt": "0.1.0", "python": "3.11.7", "torch": "2.13.0"},
    }


def _jpeg(seed: int) -> bytes:
    buffer = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 255, (4, 4, 3), dtype=np.uint8)
    Image.fromarray(pixels).resize((56, 56), Image.Resampling.BICUBIC).save(buffer, "JPEG")
    return buffer.getvalue()


def _sample(name: str, split: str, needs: str = "both") -> Sample:
    return Sample(
        id=name,
        source="miniature",
        split=split,
        question=f"What happens in {name}? {HOSTILE}",
        options=["a dog barks", "a bell rings", "rain falls", "a red ball rolls"],
        answer_index=1,
        question_type="Happening",
        needs=needs,
        media_kind="video",
        frames=[_jpeg(i) for i in range(4)],
        frame_times_s=[0.0, 0.25, 0.5, 0.75],
        audio=b"fLaC",
        duration_s=1.0,
        width=56,
        height=56,
        fps=8.0,
        media_sha256="00",
        group=name,
    )


def _prediction(sample: str, model: str, letter: int | None, condition: str = "av") -> Prediction:
    text = f"<think>It looks red and it barks. {HOSTILE}</think><answer>{'ABCD'[letter or 0]}</answer>"
    right = letter == 1
    return Prediction(
        sample, "test", sample, "Happening", model, condition, text, letter, None, right, right, 9, 100, 20, 0.1
    )


def _trace(sample: str, teacher: str, letter: int) -> Trace:
    text = f"◁think▷ {teacher} of {sample} {HOSTILE} ◁/think▷ **Correct Answer:** (B)"
    return Trace(sample, teacher, "m", "v", text, "r", letter, None, letter == 1, "stop", 10, 10, 1, None)


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A finished run with small tables."""
    run = tmp_path / "20260101-000000-miniature"
    scratch = run / "work" / "scratch"
    write_json(run / "summary.json", _summary())
    (run / "config.yaml").write_text("name: miniature\nsft:\n  stop_low: 0.65\n  stop_high: 0.8\n")
    history = [{"step": s, "accuracy": a, "loss": 1 / s} for s, a in ((10, 0.2), (50, 0.3), (100, 0.42), (150, 0.73))]
    rewards = [{"step": s, "reward": 1.2 + s / 200, "kl": 0.01} for s in range(5, 161, 5)]
    write_json(run / "work/reports/sft.json", {"instance": "sft", "facts": {"history": history}})
    write_json(run / "work/reports/grpo.json", {"instance": "grpo", "facts": {"history": rewards}})
    samples = [_sample("train-1", "train"), _sample("train-2", "train", "vision")]
    samples += [_sample(f"test-{i}", "test") for i in range(1, 4)]
    write_table(scratch / "ingest/k/samples", Sample, samples)
    reasoning = "It looks red and sounds like a bell."
    rows = [
        Merged("train-1", "both", reasoning, "red", "bell", 1, 8, [], f"<think>{reasoning}</think>", "m", "v"),
        Merged("train-2", "vision_only", "", "", "", None, 0, [], "", "m", "v"),
    ]
    write_table(scratch / "merger/k/merged", Merged, rows)
    for teacher in ("vision", "audio"):
        traces = [_trace("train-1", teacher, 1), _trace("train-2", teacher, 1 if teacher == "vision" else 3)]
        write_table(scratch / f"{teacher}_teacher-0/k/traces", Trace, traces)
    for model, letters in {"base": (0, 1, 0), "sft": (1, 1, None), "grpo": (1, 1, 2)}.items():
        predictions = [_prediction(f"test-{i}", model, letter) for i, letter in enumerate(letters, 1)]
        predictions.append(_prediction("test-1", model, 3, "audio_only"))
        write_table(scratch / f"evaluation-{model}/k/predictions", Prediction, predictions)
    return run


class _Tags(HTMLParser):
    """Collects tags with their attributes, and checks that what is opened is closed."""

    VOID = frozenset({"meta", "img", "br", "rect", "line", "circle", "path"})

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open, f"</{tag}> closes nothing"
            assert self.open.pop() == tag


def _parse(path: Path) -> _Tags:
    parser = _Tags()
    parser.feed(path.read_text(encoding="utf-8"))
    assert parser.open == []
    return parser


def test_report_shows_the_verdict_and_each_part(run_dir: Path) -> None:
    report = write_report(run_dir)
    assert report == run_dir / "report.html"
    text = report.read_text(encoding="utf-8")
    for expected in (
        "Promoted: avrt-miniature, version 1. Base 31.2 %, SFT 73.5 %, GRPO 90.8 %.",
        "GRPO beats the base on the validation questions (p &lt; 0.001).",
        "86.8 % – 93.8 %",
        "Both right",
        "1 222",
        "Test: the base fails, training succeeds",
        "Test: all right",
        "Test: still wrong",
        "Training: the teachers disagree, so the filter leaves it out",
        "sounds like a bell",
        "s3://avrt/models/avrt-miniature/ab12/",
        "61.0 %",
    ):
        assert expected in text, expected
    tags = [name for name, _ in _parse(report).tags]
    assert tags.count("svg") == 5
    assert tags.count("img") == 5 * 4
    assert tags.count("audio") == 5


def test_the_champions_hash_is_named_for_what_it_is(run_dir: Path) -> None:
    text = write_report(run_dir).read_text(encoding="utf-8")
    assert re.search(r"content SHA-256, as its manifest lists it</dt>\s*<dd[^>]*>ab12</dd>", text)


def test_report_loads_and_runs_nothing(run_dir: Path) -> None:
    for tag, attributes in _parse(write_report(run_dir)).tags:
        assert tag not in ("script", "link", "iframe", "object", "base")
        assert not [name for name in attributes if name.startswith("on")]
        for name in ("src", "href", "xlink:href"):
            assert (attributes.get(name) or "data:").startswith("data:")


def test_report_escapes_text_from_everywhere(run_dir: Path) -> None:
    summary = _summary()
    summary["status"] = "failed"
    summary["failure"] = {"step": HOSTILE, "code": HOSTILE, "message": HOSTILE}
    summary["champion"] = dict.fromkeys(("model", "version", "uri", "sha256"), HOSTILE)
    summary["merged"]["flags"] = {HOSTILE: 1}
    summary["steps"] = {HOSTILE: {"seconds": 1.0, "status": "failed"}}
    summary["models"]["base"]["by_kind"] = {HOSTILE: 0.5}
    summary["versions"] = {HOSTILE: HOSTILE}
    write_json(run_dir / "summary.json", summary)
    (run_dir / "config.yaml").write_text(f"name: '{HOSTILE}'\n")
    names = [name for name, _ in _parse(write_report(run_dir)).tags]
    assert "script" not in names
    assert names.count("img") == 5 * 4


def test_failed_run_says_where_and_why(tmp_path: Path) -> None:
    summary = json.loads(json.dumps(_summary()), object_hook=lambda d: dict.fromkeys(d, None) if "accuracy" in d else d)
    summary.update(status="failed", champion=None, serving=None, grpo=None, ledger=None, promotion=None)
    summary["failure"] = {
        "step": "data_validation",
        "code": "validation_failed",
        "message": "letters: B is 71 % of rows",
    }
    summary["steps"]["sft"] = {"seconds": None, "status": "skipped"}
    summary["steps"]["deployment"] = {"seconds": 4.0, "status": "skipped"}
    write_json(tmp_path / "summary.json", summary)
    text = write_report(tmp_path).read_text(encoding="utf-8")
    assert "skipped after 4.0 s" in text
    assert "The run failed in data_validation." in text
    assert "B is 71 % of rows" in text
    assert "No model was evaluated." in text
    assert ">skipped<" in text


def test_report_of_an_empty_summary(tmp_path: Path) -> None:
    write_json(tmp_path / "summary.json", {})
    text = write_report(tmp_path).read_text(encoding="utf-8")
    assert "Nothing was read." in text
    assert "<svg" not in text


def test_report_without_summary_names_the_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=re.escape("summary.json")):
        write_report(tmp_path)


def test_not_promoted_is_said_first() -> None:
    summary = {**_summary(), "champion": None}
    assert headline(summary, summary["models"]).startswith("Nothing was promoted. Base 31.2 %")


def test_matrix_has_a_column_for_each_model_and_condition() -> None:
    models: Mapping[str, Any] = _summary()["models"]
    rows = matrix({**models, "sft": {}})
    assert [kind for kind, _ in rows] == ["all questions", *KINDS]
    assert rows[0][1][0] == [0.3125, None, 0.9075]
    assert rows[2][1][CONDITIONS.index("audio_only")] == [0.29, None, 0.57]
    assert matrix({"base": {}, "sft": {}, "grpo": {}}) == []


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (None, "–"),
        (True, "yes"),
        (12345, "12 345"),
        (0.03123, "0.03123"),
        ({}, "none"),
        ([], "none"),
        ({"train": 10, "test": {"both": 2}}, "train 10, test both 2"),
        (["a", 3], "a; 3"),
    ],
)
def test_plain_writes_values_of_any_shape(value: object, expected: str) -> None:
    assert plain(value) == expected


@pytest.mark.parametrize(
    ("value", "expected"), [(None, "–"), (0.412, "0.4 s"), (59.4, "59 s"), (60, "1 min 00 s"), (754.6, "12 min 35 s")]
)
def test_duration(value: object, expected: str) -> None:
    assert duration(value) == expected


def test_series_takes_the_first_name_that_is_there() -> None:
    history = [
        {"step": 1, "loss": 2.0},
        {"step": 2, "accuracy": None, "loss": 1.0},
        "torn",
        {"step": 3, "accuracy": 0.5},
    ]
    assert charts.series(history, "accuracy", "loss") == [(3.0, 0.5)]
    assert charts.series(history, "loss") == [(1.0, 2.0), (2.0, 1.0)]
    assert charts.series(None, "loss") == []


@pytest.mark.parametrize("points", [[], [(1, 0.5)], [(1, float("nan")), (2, 0.5)]])
def test_curve_needs_two_finite_points(points: list[tuple[float, float]]) -> None:
    assert charts.curve(points, "t", "sft") is None


def test_curve_of_a_constant_stays_inside_the_picture() -> None:
    svg = charts.curve([(1, 2.0), (2, 2.0)], "t", "grpo")
    assert svg is not None
    heights = [float(y) for y in re.findall(r'cy="([\d.]+)"', svg)]
    assert heights
    assert all(10 <= y <= 174 for y in heights)


def test_newest_table_wins_and_unfinished_ones_do_not_count(run_dir: Path) -> None:
    import os

    work = run_dir / "work"
    assert examples.newest_table(work, "merger", "merged") == work / "scratch/merger/k/merged"
    newer = work / "scratch/merger/l/merged"
    newer.mkdir(parents=True)
    assert examples.newest_table(work, "merger", "merged") == work / "scratch/merger/k/merged"
    write_table(newer, Merged, [])
    os.utime(work / "scratch/merger/k/merged/manifest.json", (1, 1))
    assert examples.newest_table(work, "merger", "merged") == newer
    assert examples.newest_table(work, "deployment", "check") is None
