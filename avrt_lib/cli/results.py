"""The tables that commands end with."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from avrt_lib.config import Config

KINDS = ("either", "both", "sound", "sight")
ROLES = (("base", "base"), ("sft", "SFT"), ("grpo", "GRPO"))
#: What names of question kinds may take up together as columns of the table of models.
_KINDS_WIDTH = 32


def percent(value: float | None) -> str:
    """A fraction as a percentage, or a dash."""
    return "–" if value is None else f"{100 * value:.1f}"


def models_table(summary: dict[str, Any]) -> Table:
    """Base, SFT and GRPO on the held-out test questions; narrow enough for 80 columns."""
    models, of = summary["models"], "test" if summary.get("caveats") else "held-out test"
    count = max(model["n"] or 0 for model in models.values())
    table = Table(
        title=f"Accuracy in % on {count} {of} questions, with 95 % interval",
        title_justify="left",
        caption="audio, vision: the same questions with this modality alone; words: of an answer, on average",
        caption_justify="left",
        box=SIMPLE_HEAD,
        padding=0,
        pad_edge=False,
    )
    kinds = kinds_of(models)
    kinds = kinds if _fit(kinds) else []
    for column in ("model", "acc.", "interval", "invalid", "words", *map(escape, kinds), "audio", "vision"):
        table.add_column(column, justify="left" if column == "model" else "right", no_wrap=True)
    for role, label in ROLES:
        table.add_row(*_row(label, models[role], kinds))
    return table


def kinds_of(models: dict[str, Any]) -> list[str]:
    """The kinds of question that any model was asked, the miniature's first."""
    found = {kind for model in models.values() for kind in model["by_kind"] or {}}
    return [*(kind for kind in KINDS if kind in found), *sorted(found - set(KINDS))]


def _fit(kinds: list[str]) -> bool:
    return sum(len(kind) + 1 for kind in kinds) <= _KINDS_WIDTH


def kinds_table(models: dict[str, Any]) -> Table:
    """A row for each kind of question, for data whose kinds have names too long for columns."""
    table = Table(title="Accuracy in % by kind of question", title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("kind", overflow="fold")
    for _, label in ROLES:
        table.add_column(label, justify="right", no_wrap=True)
    for kind in kinds_of(models):
        table.add_row(escape(kind), *(percent((models[role]["by_kind"] or {}).get(kind)) for role, _ in ROLES))
    return table


def _row(label: str, model: dict[str, Any], kinds: list[str]) -> list[str]:
    interval = model["ci95"]
    conditions = model["conditions"]
    return [
        label,
        percent(model["accuracy"]),
        f"{percent(interval[0])}–{percent(interval[1])}" if interval else "–",
        percent(model["invalid_rate"]),
        "–" if model["words_mean"] is None else f"{model['words_mean']:.0f}",
        *[percent((model["by_kind"] or {}).get(kind)) for kind in kinds],
        percent(conditions["audio_only"]["accuracy"]),
        percent(conditions["vision_only"]["accuracy"]),
    ]


def show_summary(summary: dict[str, Any], console: Console) -> None:
    """Print what came out of a run."""
    for caveat in summary.get("caveats", []):
        console.print(caveat, style="yellow", soft_wrap=True)
    if any(model["n"] is not None for model in summary["models"].values()):
        console.print(models_table(summary))
        if not _fit(kinds_of(summary["models"])):
            console.print(kinds_table(summary["models"]))
    champion, promotion = summary["champion"], summary["promotion"]
    if champion:
        line = f"Champion: {champion['model']} version {champion['version']}, {champion['uri']}"
        console.print(line, soft_wrap=True, markup=False)
    elif promotion["promoted"] is False:
        console.print(f"No champion: {promotion['reason']}", soft_wrap=True, markup=False)


def fidelity_rows(model: type[BaseModel], config: BaseModel, prefix: str = "") -> list[dict[str, Any]]:
    """Every field that carries a source: its dotted name, the paper's value, the value here, and the source."""
    rows: list[dict[str, Any]] = []
    for name, field in model.model_fields.items():
        value = getattr(config, name)
        extra = field.json_schema_extra
        if isinstance(value, BaseModel):
            rows += fidelity_rows(type(value), value, f"{prefix}{name}.")
        elif isinstance(extra, dict) and "source" in extra:
            rows.append({"key": f"{prefix}{name}", "default": extra["paper"], "source": extra["source"], "here": value})
    return rows


SOURCES = ("paper", "authors' correction", "ours")
HEADINGS = ("key", *SOURCES, "here")


def fidelity_cells(config: Config) -> list[tuple[str, ...]]:
    """One row for each sourced field: its key, its value under the heading of its source, and the value here."""
    cells = []
    for row in fidelity_rows(type(config), config):
        sourced = [_text(row["default"]) if row["source"] == source else "" for source in SOURCES]
        cells.append((row["key"], *sourced, _text(row["here"])))
    return cells


def fidelity_table(config: Config) -> Table:
    """Paper, authors' correction, ours, and this configuration, side by side; what differs from its source is bold."""
    table = Table(title=f"Values of the configuration {config.name!r} and their sources", title_justify="left")
    for heading in HEADINGS:
        table.add_column(heading, overflow="fold", no_wrap=heading == "key")
    for *cells, here in fidelity_cells(config):
        table.add_row(*cells, here if here in cells[1:] else f"[bold]{here}[/]")
    return table


def fidelity_markdown(config: Config) -> str:
    """The same table as Markdown, for docs/fidelity.md."""
    lines = [f"| {' | '.join(HEADINGS)} |", f"|{'---|' * len(HEADINGS)}"]
    for *cells, here in fidelity_cells(config):
        shown = here if here in cells[1:] else f"**{here}**"
        lines.append(f"| {' | '.join([f'`{cells[0]}`', *cells[1:], shown])} |")
    return "\n".join(lines)


def _text(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
