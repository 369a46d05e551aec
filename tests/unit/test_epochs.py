"""In which order training asks for its rows."""

from __future__ import annotations

from collections import Counter
from itertools import chain, islice

from avrt_lib.training.epochs import epochs

TYPES = ["either"] * 60 + ["both"] * 40


def first(count: int, seed: int = 0, **weights: float) -> list[int]:
    return list(islice(chain.from_iterable(rows for rows, _ in epochs(TYPES, seed=seed, weights=weights)), count))


def test_each_epoch_holds_every_row_once_in_an_order_of_its_own() -> None:
    order = first(200)
    assert sorted(order[:100]) == sorted(order[100:]) == list(range(100))
    assert order[:100] != order[100:]
    assert len({order[0], *(first(1, seed)[0] for seed in range(1, 6))}) > 1
    assert first(200) == order


def test_weights_say_how_often_a_type_is_asked() -> None:
    order = first(100, both=4.5)
    assert Counter(TYPES[row] for row in order) == {"both": 75, "either": 25}
    shares = Counter(TYPES[row] for row in first(100, either=0.5, sound=7.0))  # no row is of the type sound
    assert shares == {"either": 43, "both": 57}


def test_a_type_that_is_asked_less_goes_on_where_it_stopped() -> None:
    either = [row for row in first(400, both=4.5) if TYPES[row] == "either"]
    assert len(either) == 100
    assert len(set(either[:50])) == 50  # two epochs of 25
    assert set(either[:75]) == set(range(60))
