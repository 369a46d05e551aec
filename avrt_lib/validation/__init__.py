"""The data gate: merged traces are validated before anything is trained on them."""

from __future__ import annotations

import logging
import os
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from avrt_lib import answers
from avrt_lib.config import Config
from avrt_lib.errors import DataError, NothingKeptError, ValidationFailedError
from avrt_lib.records import CELLS, LETTERS, SCHEMAS, Merged, Sample
from avrt_lib.tables import read_rows, verify, write_json
from avrt_lib.workspace import Workspace

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["DATA_DOCS", "REPORT", "run"]

log = logging.getLogger("avrt.validation")

#: Names inside the report folder: our JSON document, and Great Expectations' pages.
REPORT = "validation.json"
DATA_DOCS = "data_docs"
_SHOWN = 5


def run(config: Config, *, workspace: Workspace, samples: Path, merged: Path, report: Path) -> dict[str, Any]:
    """Validate the rows that will be trained on, and refuse them where an expectation fails.

    Args:
        config: ``validation`` gives the limits, ``merger`` what was kept and the longest reasoning.
        workspace: where progress is counted.
        samples: the sample table.
        merged: the merged table.
        report: gets ``validation.json`` (whatever the outcome) and ``data_docs/index.html``.

    Returns:
        ``passed``, ``expectations`` (how many), ``failed`` (``expectation``, ``unexpected_count``, ``sample_ids`` and
        ``mend`` of each), ``rows`` (validated), ``ledger`` and ``flags``.

    Raises:
        DataError: where a table was changed after it was written, or a clip of the training split stands in another.
        NothingKeptError: where no row has a merged reasoning; the message gives the ledger.
        ValidationFailedError: where an expectation fails; ``facts`` on it is what would have been returned.
    """
    report.mkdir(parents=True, exist_ok=True)
    verify(merged)
    ledger, rows = _mergeable(merged)
    facts: dict[str, Any] = {"passed": False, "expectations": 0, "failed": [], "rows": len(rows), "ledger": ledger}
    if not rows:
        counts = ", ".join(f"{cell} {count}" for cell, count in ledger.items())
        error = NothingKeptError(
            f"The filter kept none of {sum(ledger.values())} training samples (teachers right: {counts}), so there is "
            "nothing to train on: use stronger teachers, other questions, or --unfiltered to train on all samples."
        )
        write_json(report / REPORT, facts | {"code": error.code, "message": str(error)})
        error.facts = facts  # type: ignore[attr-defined]  # run_step reports them
        raise error
    _no_clip_in_two_splits(config, samples)
    with workspace.progress("expectations", None) as bar:
        expectations, failed = _validate(config, _frame(samples, rows), report)
        bar.advance(expectations)
    facts |= {"passed": not failed, "expectations": expectations, "failed": failed}
    facts["flags"] = dict(sorted(Counter(flag for row in rows for flag in row.flags).items()))
    write_json(report / REPORT, facts)
    if failed:
        refusal = ValidationFailedError(_message(failed))
        refusal.facts = facts  # type: ignore[attr-defined]
        raise refusal
    log.info("%d rows passed %d expectations", len(rows), expectations)
    return facts


def _no_clip_in_two_splits(config: Config, samples: Path) -> None:
    """Refuse to train on clips that are also measured on.

    Ingest lets too few clips to split pass, so that one can see what the teachers make of them.
    """
    if config.data.overlap_splits:
        return
    splits_of: dict[str, set[str]] = {}
    for row in read_rows(samples, Sample, columns=["split", "media_sha256"]):
        splits_of.setdefault(row.media_sha256, set()).add(row.split)
    if shared := sum("train" in splits and len(splits) > 1 for splits in splits_of.values()):
        raise DataError(
            f"{shared} of {len(splits_of)} clips stand in the training split and in another, so nothing may be trained "
            f"on them; splitting by clip needs at least {config.data.minimum_clips} clips (data.minimum_clips): add "
            "clips, or pass --overlap-splits, for a check of the path only."
        )


def _mergeable(merged: Path) -> tuple[dict[str, int], list[Merged]]:
    """The ledger of all rows, and the rows that the merger was asked about.

    A row of which the merger made nothing has a text or a flag all the same, and counts as a flagged one; but where no
    row has a reasoning, there is nothing to validate.
    """
    ledger: Counter[str] = Counter(dict.fromkeys(CELLS, 0))
    rows: list[Merged] = []
    columns = [n for n in SCHEMAS[Merged].names if n not in ("vision_reasoning", "audio_reasoning", "prompt_version")]
    for row in read_rows(merged, Merged, columns=columns):
        ledger[row.cell] += 1
        if row.reasoning or row.raw_text or row.flags:
            rows.append(row)
    return dict(ledger), rows if any(row.reasoning.strip() for row in rows) else []


def _frame(samples: Path, rows: list[Merged]) -> pd.DataFrame:
    """The merged rows beside their samples, as the expectations name their columns."""
    import pandas as pd

    from avrt_lib.validation.expectations import COLUMNS

    wanted = {row.sample_id for row in rows}
    known = {
        sample.id: sample
        for sample in read_rows(samples, Sample, columns=["id", "split", "options", "answer_index"])
        if sample.id in wanted
    }
    records = []
    for row in rows:
        sample = known.get(row.sample_id)
        in_range = row.answer_index is not None and sample is not None and 0 <= row.answer_index < len(sample.options)
        records.append(
            {
                "sample_id": row.sample_id,
                "split": sample.split if sample else None,
                "cell": row.cell,
                "reasoning": row.reasoning,
                # Counted anew: the gate does not take the merger's word for it.
                "words": answers.count_words(row.reasoning),
                "answer": LETTERS[row.answer_index or 0] if in_range else "",
                "label": sample.answer_letter if sample else None,
                "composed": answers.compose(row.reasoning, row.answer_index or 0) if in_range else "",
                "flagged": bool(row.flags),
                "flags": ", ".join(row.flags),
            }
        )
    return pd.DataFrame.from_records(records, columns=list(COLUMNS))


def _validate(config: Config, frame: pd.DataFrame, report: Path) -> tuple[int, list[dict[str, Any]]]:
    """Run the suite over the frame; returns how many expectations there are, and those that failed."""
    os.environ.setdefault("GX_ANALYTICS_ENABLED", "false")
    import great_expectations as gx
    from great_expectations.data_context.types.base import ProgressBarsConfig

    from avrt_lib.validation.expectations import suite

    context = gx.get_context(mode="ephemeral")
    context.variables.progress_bars = ProgressBarsConfig(globally=False)
    asset = context.data_sources.add_pandas("avrt").add_dataframe_asset("merged")
    batch = asset.add_batch_definition_whole_dataframe("rows")
    expected = context.suites.add(gx.ExpectationSuite(name="gate", expectations=suite(config)))
    definition = context.validation_definitions.add(gx.ValidationDefinition(name="gate", data=batch, suite=expected))
    checkpoint = context.checkpoints.add(
        gx.Checkpoint(
            name="gate",
            validation_definitions=[definition],
            result_format={
                "result_format": "COMPLETE",
                "unexpected_index_column_names": ["sample_id"],
                "partial_unexpected_count": _SHOWN,
            },
        )
    )
    outcome = checkpoint.run(batch_parameters={"dataframe": frame})
    (results,) = outcome.run_results.values()
    _write_pages(context, report)
    return len(results.results), [_failure(result) for result in results.results if not result.success]


def _write_pages(context: Any, report: Path) -> None:
    context.add_data_docs_site(
        "report",
        {
            "class_name": "SiteBuilder",
            "store_backend": {
                "class_name": "TupleFilesystemStoreBackend",
                "base_directory": str((report / DATA_DOCS).absolute()),
            },
            "site_index_builder": {"class_name": "DefaultSiteIndexBuilder"},
        },
    )
    context.build_data_docs(site_names=["report"])


def _failure(result: Any) -> dict[str, Any]:
    """One failed expectation as plain values: what, where, which rows, and what to do."""
    settings = result.expectation_config
    kwargs = settings.kwargs
    column = kwargs.get("column") or "/".join(kwargs[k] for k in ("column_A", "column_B") if k in kwargs)
    detail = result.result
    rows = detail.get("unexpected_index_list") or []
    raised = (result.exception_info or {}).get("exception_message") if result.exception_info else None
    return {
        "expectation": f"{settings.type}({column})" if column else settings.type,
        "unexpected_count": int(detail.get("unexpected_count") or 0),
        "sample_ids": [str(row["sample_id"]) for row in rows[:_SHOWN]],
        "observed": None if detail.get("observed_value") is None else str(detail["observed_value"]),
        "error": raised,
        "mend": settings.notes,
    }


def _message(failed: list[dict[str, Any]]) -> str:
    parts = []
    for failure in failed:
        text = failure["expectation"]
        if failure["unexpected_count"]:
            ids = ", ".join(failure["sample_ids"])
            more = failure["unexpected_count"] - len(failure["sample_ids"])
            text += f" in {failure['unexpected_count']} rows ({ids}{f' and {more} more' if more > 0 else ''})"
        elif failure["observed"] is not None:
            text += f", observed {failure['observed']}"
        elif failure["error"]:
            text += f" could not be evaluated ({failure['error']})"
        parts.append(f"{text} – {failure['mend']}")
    return f"The merged traces failed {len(failed)} expectation{'s' if len(failed) > 1 else ''}: {'; '.join(parts)}."
