"""``report.html``: what came out of a run, for people.

One file without scripts or outside requests: it can be sent by mail, printed, and opened in ten years. Everything that
a model or a data set wrote is escaped, and a content security policy forbids the page to load or run anything.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from avrt_lib.records import CELLS, CONDITIONS
from avrt_lib.report import charts, examples
from avrt_lib.tables import atomic_path, read_json
from avrt_lib.workspace import read_reports

MODELS = examples.MODELS
CONDITION_NAMES = {"av": "Sound and sight", "audio_only": "Sound only", "vision_only": "Sight only"}
CELL_NAMES = {
    "both": "Both right",
    "audio_only": "Only audio right",
    "vision_only": "Only vision right",
    "none": "Neither right",
}
#: Parts of summary.json that the template shows, with their keys; what is absent is shown as unknown.
SECTIONS = {
    "failure": ("step", "code", "message"),
    "champion": ("model", "version", "uri", "sha256"),
    "promotion": ("promoted", "reason"),
    "serving": ("ok", "latency_s"),
    "dataset": ("samples", "by_kind", "dropped"),
    "merged": ("rows", "flags"),
    "validation": ("passed", "expectations", "failed"),
    "grpo": ("steps", "informative_groups", "kl", "weight_change"),
}
TEMPLATES = Path(__file__).parent / "templates"

Json = Mapping[str, Any]


def write_report(run_dir: Path, reports: Mapping[str, Json] | None = None) -> Path:
    """Write ``report.html`` of a run from its summary, its steps' reports and its tables.

    Args:
        run_dir: the run's folder. Only ``summary.json`` must be there; parts that have nothing to show say so.
        reports: the steps' reports by instance; None reads those in the folder.

    Returns:
        The path of the report.

    Raises:
        DataError: where ``summary.json`` is missing or is not JSON.
    """
    target = run_dir / "report.html"
    text = render(
        read_json(run_dir / "summary.json"), read_reports(run_dir / "work") if reports is None else reports, run_dir
    )
    with atomic_path(target) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return target


def render(summary: Json, reports: Mapping[str, Json], run_dir: Path) -> str:
    """The report's HTML.

    Args:
        summary: the document of ``summary.json``.
        reports: the steps' reports by instance.
        run_dir: where the run's tables, configuration and logs lie.
    """
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(percent=charts.percent, number=number, seconds=duration, plain=plain, pairs=pairs)
    facts = {name: _mapping(report.get("facts")) for name, report in reports.items()}
    models = {role: _mapping(_mapping(summary.get("models")).get(role)) for role in MODELS}
    sft_caption, sft_chart = _sft_chart(facts.get("sft", {}), run_dir)
    config = run_dir / "config.yaml"
    return environment.get_template("report.html.j2").render(
        run=run_dir.resolve().name,
        written=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        status=summary.get("status"),
        headline=headline(summary, models),
        **{name: _section(summary, name, *keys) for name, keys in SECTIONS.items()},
        versions=_mapping(summary.get("versions")),
        caveats=summary.get("caveats") or [],
        model_names=MODELS,
        models={role: model for role, model in models.items() if model.get("accuracy") is not None},
        condition_names=CONDITION_NAMES,
        matrix=matrix(models),
        accuracy_chart=_accuracy_chart(models),
        ledger_chart=_ledger_chart(_mapping(summary.get("ledger"))),
        sft_chart=sft_chart,
        sft_caption=sft_caption,
        grpo_chart=charts.curve(
            charts.series(facts.get("grpo", {}).get("history"), "reward"), "GRPO: mean reward by step", "grpo"
        ),
        steps_chart=_steps_chart(_mapping(summary.get("steps"))),
        total_s=_total_seconds(_mapping(summary.get("steps"))),
        examples=examples.collect(run_dir / "work"),
        config=config.read_text(encoding="utf-8") if config.is_file() else None,
    )


def headline(summary: Json, models: Mapping[str, Json]) -> str:
    """The run in one sentence."""
    failure = _mapping(summary.get("failure"))
    if summary.get("status") != "succeeded":
        return f"The run failed in {failure.get('step') or 'an unnamed step'}."
    known = [(MODELS[role], model["accuracy"]) for role, model in models.items() if model.get("accuracy") is not None]
    course = ", ".join(f"{name} {charts.percent(accuracy)}" for name, accuracy in known)
    champion = _mapping(summary.get("champion"))
    verdict = f"Promoted: {champion.get('model')}" if champion else "Nothing was promoted"
    if champion and champion.get("version") is not None:
        verdict += f", version {champion['version']}"
    return f"{verdict}. {course}." if course else f"{verdict}."


def matrix(models: Mapping[str, Json]) -> list[tuple[str, list[list[float | None]]]]:
    """Accuracies by question kind: for each kind a row of conditions, each with one value per model.

    The first row is over all kinds. Empty where no model was evaluated.
    """
    tables = {
        (role, condition): model if condition == "av" else _mapping(_mapping(model.get("conditions")).get(condition))
        for role, model in models.items()
        for condition in CONDITIONS
    }
    kinds = list(dict.fromkeys(kind for table in tables.values() for kind in _mapping(table.get("by_kind"))))
    if not any(table.get("accuracy") is not None for table in tables.values()):
        return []

    def value(role: str, condition: str, kind: str | None) -> float | None:
        table = tables[role, condition]
        found = table.get("accuracy") if kind is None else _mapping(table.get("by_kind")).get(kind)
        # A kind may come with its count and interval, or as the bare accuracy.
        found = found.get("accuracy") if isinstance(found, Mapping) else found
        return float(found) if isinstance(found, int | float) else None

    return [
        (kind or "all questions", [[value(role, condition, kind) for role in MODELS] for condition in CONDITIONS])
        for kind in [None, *kinds]
    ]


def number(value: Any, digits: int = 3) -> str:
    """A number as people write it, or a dash."""
    if value is None or isinstance(value, bool) or not isinstance(value, int | float):
        return "–" if value is None else str(value)
    return f"{value:,}".replace(",", " ") if isinstance(value, int) else f"{value:.{digits}g}"


def duration(value: Any) -> str:
    """Seconds as people say them."""
    if not isinstance(value, int | float):
        return "–"
    minutes, rest = divmod(round(value), 60)
    return f"{value:.1f} s" if value < 10 else f"{rest} s" if minutes == 0 else f"{minutes} min {rest:02d} s"


def plain(value: Any) -> str:
    """A value of unknown shape on one line."""
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {plain(item)}" for key, item in value.items()) or "none"
    if isinstance(value, list | tuple):
        return "; ".join(plain(item) for item in value) or "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "–" if value is None else number(value, 4)


def pairs(value: Any) -> list[tuple[str, str]]:
    """The entries of a mapping as text; anything else gives one entry without a name, and None gives none."""
    if isinstance(value, Mapping):
        return [(str(key), plain(item)) for key, item in value.items()]
    return [] if value is None else [("", plain(value))]


def _section(summary: Json, name: str, *keys: str) -> dict[str, Any]:
    """A part of the summary with all its keys; empty where nothing of it is known."""
    found = {key: _mapping(summary.get(name)).get(key) for key in keys}
    return found if any(value is not None for value in found.values()) else {}


def _mapping(value: Any) -> Json:
    return value if isinstance(value, Mapping) else {}


def _accuracy_chart(models: Mapping[str, Json]) -> Markup | None:
    rows = []
    for role, model in models.items():
        if model.get("accuracy") is None:
            continue
        ends = model.get("ci95")
        low, high = ends if isinstance(ends, Sequence) and len(ends) == 2 else (None, None)
        note = "" if low is None or high is None else f"{100 * low:.1f} – {100 * high:.1f}"
        rows.append(charts.Interval(MODELS[role], role, model["accuracy"], low, high, note))
    return charts.intervals(rows, "Accuracy on the test questions with 95 % intervals") if rows else None


def _ledger_chart(ledger: Json) -> Markup | None:
    parts = [
        charts.Bar(CELL_NAMES[cell], f"cell-{cell.replace('_', '-')}", float(ledger[cell]), number(ledger[cell]))
        for cell in CELLS
        if isinstance(ledger.get(cell), int | float)
    ]
    return charts.stacked(parts, "Samples by which teacher was right") if parts else None


def _sft_chart(facts: Json, run_dir: Path) -> tuple[str, Markup | None]:
    """Caption and chart of SFT: validation accuracies where there are some, else losses."""
    accuracies = charts.series(facts.get("history"), "accuracy")
    if not accuracies:
        return "SFT: loss", charts.curve(charts.series(facts.get("history"), "loss"), "SFT: loss by step", "sft")
    band = _stop_band(run_dir)
    caption = "SFT: accuracy on validation questions" + ("; the band is where it stops" if band else "")
    title = "SFT: validation accuracy by step"
    return caption, charts.curve(accuracies, title, "sft", fractions=True, band=band)


def _stop_band(run_dir: Path) -> tuple[float, float] | None:
    """The range of validation accuracy in which SFT stops, where the run's configuration sets one."""
    config = run_dir / "config.yaml"
    document = _mapping(yaml.safe_load(config.read_text(encoding="utf-8"))) if config.is_file() else {}
    low, high = (_mapping(document.get("sft")).get(name) for name in ("stop_low", "stop_high"))
    return (float(low), float(high)) if isinstance(low, int | float) and isinstance(high, int | float) else None


def _steps_chart(steps: Json) -> Markup | None:
    rows = []
    for name, entry in steps.items():
        seconds, status = _mapping(entry).get("seconds"), str(_mapping(entry).get("status") or "–")
        note = duration(seconds) if isinstance(seconds, int | float) else status
        if status != "succeeded" and isinstance(seconds, int | float):
            note = f"{status} after {note}"
        css = "failed" if status == "failed" else "time"
        rows.append(charts.Bar(name, css, float(seconds) if isinstance(seconds, int | float) else 0.0, note))
    return charts.bars(rows, "Seconds of each step") if rows else None


def _total_seconds(steps: Json) -> float:
    found = [_mapping(entry).get("seconds") for entry in steps.values()]
    return sum(float(value) for value in found if isinstance(value, int | float))
