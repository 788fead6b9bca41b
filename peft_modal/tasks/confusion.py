"""What a confusion matrix says in a few lines."""

from __future__ import annotations

from collections.abc import Sequence

PAIRS = 8
"""Of which a report tells."""


def confused_pairs(counts: Sequence[Sequence[int]]) -> list[tuple[int, int, int, float]]:
    """The most confused pairs, most first: true class, predicted class, how often, and its share of the true class.

    Args:
        counts: [true][predicted].
    """
    pairs = [(count, i, j) for i, row in enumerate(counts) for j, count in enumerate(row) if i != j and count > 0]
    pairs.sort(key=lambda pair: (-pair[0], pair[1], pair[2]))
    return [(i, j, count, count / sum(counts[i])) for count, i, j in pairs[:PAIRS]]
