"""The expectations of the gate, with two of our own where Great Expectations has none.

Importing this module imports Great Expectations, which takes seconds.
"""

from __future__ import annotations

from typing import Any

import great_expectations.expectations as gxe
import pandas as pd
from great_expectations.execution_engine import PandasExecutionEngine
from great_expectations.expectations.expectation import ColumnAggregateExpectation, ColumnMapExpectation, Expectation
from great_expectations.expectations.metrics import (
    ColumnAggregateMetricProvider,
    ColumnMapMetricProvider,
    column_aggregate_value,
    column_condition_partial,
)

from avrt_lib import answers
from avrt_lib.config import Config
from avrt_lib.records import CELLS, LETTERS


class _WellFormed(ColumnMapMetricProvider):
    """Whether each value is one whole think section and one answer letter."""

    condition_metric_name = "column_values.avrt_well_formed"

    @column_condition_partial(engine=PandasExecutionEngine)
    def _pandas(cls, column: pd.Series, **_: Any) -> pd.Series:
        return column.map(answers.well_formed)


class ExpectColumnValuesToBeWellFormed(ColumnMapExpectation):
    """Expect each value to be exactly one ``<think>…</think><answer>X</answer>``, with no further tag inside."""

    map_metric = "column_values.avrt_well_formed"
    success_keys = ("mostly",)


class _LargestShare(ColumnAggregateMetricProvider):
    """The share of the rows that hold a column's most common value."""

    metric_name = "column.avrt_largest_share"

    @column_aggregate_value(engine=PandasExecutionEngine)
    def _pandas(cls, column: pd.Series, **_: Any) -> float:
        return float(column.value_counts(normalize=True).max()) if len(column) else 0.0


class ExpectColumnLargestShareToBeAtMost(ColumnAggregateExpectation):
    """Expect no single value to stand in more than ``max_value`` (a fraction) of the rows.

    A model that is trained on one letter's questions learns the letter.
    """

    max_value: float
    min_value: float = 0.0
    metric_dependencies = ("column.avrt_largest_share",)
    success_keys = ("min_value", "max_value")

    def _validate(
        self, metrics: dict[str, Any], runtime_configuration: dict[str, Any] | None = None, execution_engine: Any = None
    ) -> Any:
        return self._validate_metric_value_between(
            metric_name="column.avrt_largest_share",
            metrics=metrics,
            runtime_configuration=runtime_configuration,
            execution_engine=execution_engine,
        )


#: Columns of the frame that is validated, in their order.
COLUMNS = (
    "sample_id",
    "split",
    "cell",
    "reasoning",
    "words",
    "answer",
    "label",
    "composed",
    "flagged",
    "flags",
)


def _expect(kind: type[Expectation], mend: str, **settings: Any) -> Expectation:
    return kind(notes=mend, **settings)


def suite(config: Config) -> list[Expectation]:
    """The expectations, each with what to do about it as its notes.

    What must hold of every row is exact: identity, label, split, cell. What a language model may get wrong now and then
    (length, form) may be wrong in ``validation.max_flagged_share`` of the rows.
    """
    limits, merger = config.validation, config.merger
    mostly = 1.0 - limits.max_flagged_share
    cells = ["both"] if merger.keep == "both" else list(CELLS)
    return [
        _expect(
            gxe.ExpectTableColumnsToMatchOrderedList,
            "run the merger again with this version",
            column_list=list(COLUMNS),
        ),
        _expect(
            gxe.ExpectTableRowCountToBeBetween,
            f"{limits.minimum_rows} are needed: give more training questions, or lower validation.minimum_rows",
            min_value=limits.minimum_rows,
        ),
        _expect(
            gxe.ExpectColumnValuesToBeUnique,
            "a sample was merged twice: run the merger again on an empty output folder",
            column="sample_id",
        ),
        _expect(
            gxe.ExpectColumnValuesToNotBeNull,
            "merged rows name samples that the sample table does not hold: give both tables of the same run",
            column="split",
        ),
        _expect(
            gxe.ExpectColumnValuesToBeInSet,
            "only training samples may be trained on: give the merger the traces of the train split",
            column="split",
            value_set=["train"],
        ),
        _expect(
            gxe.ExpectColumnValuesToBeInSet,
            f"merger.keep is {merger.keep!r}: run the merger again with that setting",
            column="cell",
            value_set=cells,
        ),
        _expect(
            gxe.ExpectColumnValuesToNotBeNull,
            "merged rows without a label cannot be trained on: give the answers in the data set",
            column="label",
        ),
        _expect(
            gxe.ExpectColumnPairValuesToBeEqual,
            "the label was changed after merging: run the teachers and the merger on these samples again",
            column_A="answer",
            column_B="label",
            ignore_row_if="neither",
        ),
        _expect(
            gxe.ExpectColumnValuesToBeInSet,
            "the answer must be one of the question's letters: run the merger again",
            column="answer",
            value_set=list(LETTERS),
        ),
        _expect(
            gxe.ExpectColumnValuesToMatchRegex,
            "the merger wrote nothing: look at merger.prompt and merger.engine.max_tokens",
            column="reasoning",
            regex=r"\S",
            mostly=mostly,
        ),
        _expect(
            gxe.ExpectColumnValuesToBeBetween,
            "look at the longest rows; raise merger.max_words, or ask for shorter reasoning in merger.prompt",
            column="words",
            min_value=1,
            max_value=merger.max_words,
            mostly=mostly,
        ),
        _expect(
            ExpectColumnValuesToBeWellFormed,
            "the merger wrote tags inside its reasoning: look at merger.prompt and merger.engine.max_tokens",
            column="composed",
            mostly=mostly,
        ),
        _expect(
            gxe.ExpectColumnValuesToBeInSet,
            "look at the flagged rows; change merger.prompt or its model, or raise validation.max_flagged_share",
            column="flagged",
            value_set=[False],
            mostly=mostly,
        ),
        _expect(
            ExpectColumnLargestShareToBeAtMost,
            "shuffle the options in the data set, or raise validation.max_letter_share",
            column="answer",
            max_value=limits.max_letter_share,
        ),
    ]
