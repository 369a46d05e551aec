"""Parity of two engines: a log-probability that is not a number is no agreement."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from avrt_lib import compat
from avrt_lib.evaluation.parity import largest, parity

torch = pytest.importorskip("torch")
compat.apply()

from safetensors.torch import load_file, save_file  # noqa: E402

from tests import tiny_models  # noqa: E402


@pytest.mark.parametrize(
    ("differences", "found"),
    [([0.1, 0.3, 0.2], 0.3), ([0.1, math.nan, 0.3], None), ([math.nan, 0.3], None), ([math.inf], None), ([], None)],
)
def test_the_largest_difference_passes_over_nothing(differences: list[float], found: float | None) -> None:
    assert largest(differences) == found


class Certain:
    """An engine that gives the first token a log-probability of 0 everywhere."""

    def logprobs(self, requests: Sequence[Any], *, tokens: int) -> list[list[dict[int, float]]]:
        """Finite numbers, whatever is asked."""
        return [[{0: 0.0}] * tokens for _ in requests]


def test_weights_that_are_no_numbers_agree_with_nothing(tmp_path: Path) -> None:
    folder = tiny_models.save_student(tmp_path / "student")
    weights = load_file(folder / "model.safetensors")
    weights["thinker.model.norm.weight"][0] = math.nan
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    found = parity(folder, [tiny_models.sample(0)], tiny_models.config(folder), engine=Certain())  # type: ignore[arg-type]
    assert (found["max_difference"], found["n"]) == (None, 4)
