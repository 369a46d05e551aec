"""The order in which training asks for its rows, epoch after epoch, and how often for those of each question type."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Mapping, Sequence
from itertools import count, islice


def epochs(
    question_types: Sequence[str], *, seed: int, weights: Mapping[str, float] | None = None
) -> Iterator[tuple[list[int], random.Random]]:
    """Epochs without end, each of as many rows as there are.

    They depend on the arguments alone, so that every process and a resumed run see the same.

    Args:
        question_types: the type of each row, of which there is at least one.
        seed: of the order.
        weights: how often a row of each type is asked for, against the others (ours); 1 for a type that it does not
            name. With equal weights an epoch holds every row once. Else a type's rows go on in the next epoch where
            this one stopped, so none is asked for again before all the others of its type.

    Yields:
        The indices of an epoch's rows in its order, and the random numbers that its order was drawn from, for what
        else is to be drawn for it.
    """
    rows: dict[str, list[int]] = {}
    for index, name in enumerate(question_types):
        rows.setdefault(name, []).append(index)
    shares = whole_shares({k: len(v) * (weights or {}).get(k, 1.0) for k, v in rows.items()}, len(question_types))
    streams = {name: _reshuffled(indices, random.Random(f"{seed}/{name}")) for name, indices in rows.items()}
    for epoch in count():
        draw = random.Random(f"{seed}/{epoch}")
        indices = [index for name, share in shares.items() for index in islice(streams[name], share)]
        draw.shuffle(indices)
        yield indices, draw


def _reshuffled(rows: Sequence[int], draw: random.Random) -> Iterator[int]:
    """The rows in a random order, and then in another one, without end."""
    while True:
        yield from draw.sample(rows, len(rows))


def whole_shares(weights: Mapping[str, float], total: int) -> dict[str, int]:
    """``total`` divided in proportion to the weights, in whole numbers (by the largest remainders).

    >>> whole_shares({"a": 3.0, "b": 1.0}, 10)
    {'a': 8, 'b': 2}
    """
    exact = {name: total * weight / sum(weights.values()) for name, weight in weights.items()}
    shares = {name: math.floor(value) for name, value in exact.items()}
    by_remainder = sorted(exact, key=lambda name: (shares[name] - exact[name], name))
    for name in by_remainder[: total - sum(shares.values())]:
        shares[name] += 1
    return shares
