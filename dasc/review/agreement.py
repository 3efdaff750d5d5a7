"""How far readers agree, beyond chance: with each other, with themselves, and on cells that nobody doubts.

Answers are numbers 0 to K - 1, -1 where there is none. All intervals are of a bootstrap by case: cells of one case are
alike, so that cases are drawn with replacement, not cells.
"""

from collections.abc import Callable

import numpy as np

REPEATS = 2000
LEVEL = 0.95


def cohen_kappa(tables: np.ndarray) -> np.ndarray:
    """Cohen's kappa (Educational and Psychological Measurement 20, 1960): (p_o - p_e) / (1 - p_e).

    Args:
        tables: (..., K, K) counts of cells by the first and the second reader's answer.

    Returns: (...); NaN where both gave one and the same answer throughout, or there is no cell.
    """
    tables = np.asarray(tables, float)
    total = tables.sum(axis=(-2, -1))
    with np.errstate(divide="ignore", invalid="ignore"):
        observed = np.trace(tables, axis1=-2, axis2=-1) / total
        expected = (tables.sum(axis=-1) * tables.sum(axis=-2)).sum(axis=-1) / total**2
        return np.where(np.isclose(expected, 1), np.nan, (observed - expected) / (1 - expected))


def positive_agreement(tables: np.ndarray, answer: int = 0) -> np.ndarray:
    """Share of what either reader called `answer` that both did: 2a / (2a + b + c), the Dice coefficient.

    tables: as `cohen_kappa`. Feinstein and Cicchetti, Journal of Clinical Epidemiology 43, 1990. NaN without any.
    """
    tables = np.asarray(tables, float)
    both = tables[..., answer, answer]
    with np.errstate(divide="ignore", invalid="ignore"):
        return 2 * both / (tables[..., answer, :].sum(axis=-1) + tables[..., :, answer].sum(axis=-1))


def fleiss_kappa(sums: np.ndarray, readers: int) -> np.ndarray:
    """Fleiss' kappa (Psychological Bulletin 76, 1971) of cells that each of the same number of readers answered.

    Args:
        sums: (..., 1 + K + 1), as `fleiss_sums` gives them, added up over cells.

    Returns: (...); NaN where every answer is the same, or there is no cell.
    """
    sums = np.asarray(sums, float)
    cells = sums[..., 0]
    with np.errstate(divide="ignore", invalid="ignore"):
        observed = sums[..., -1] / cells
        expected = ((sums[..., 1:-1] / (cells * readers)[..., None]) ** 2).sum(axis=-1)
        return np.where(np.isclose(expected, 1), np.nan, (observed - expected) / (1 - expected))


def fleiss_sums(answers: np.ndarray, kinds: int) -> np.ndarray:
    """Per cell 1, the number of readers per answer, and the share of pairs of readers that agree: (N, 1 + K + 1).

    answers: (N, R) of R readers, all of them given.
    """
    counts = (answers[:, :, None] == np.arange(kinds)).sum(axis=1)
    readers = answers.shape[1]
    pairs = (counts * (counts - 1)).sum(axis=1) / (readers * (readers - 1))
    return np.column_stack([np.ones(len(answers)), counts, pairs])


def crosses(first: np.ndarray, second: np.ndarray, kinds: int) -> np.ndarray:
    """A table per cell: (N, K, K), one 1 at the two answers, none where one of them is missing."""
    tables = np.zeros((len(first), kinds, kinds))
    both = np.flatnonzero((first >= 0) & (second >= 0))
    tables[both, first[both], second[both]] = 1
    return tables


def with_interval(
    measure: Callable[[np.ndarray], np.ndarray], per_cell: np.ndarray, cases: np.ndarray, seed: int
) -> dict[str, float | int | None]:
    """A measure of sums over cells, and its interval when cases are drawn again.

    Args:
        measure: of sums (..., *shape of one cell) gives (...). per_cell: (N, *shape). cases: (N,).

    Returns: value, low, high (None where it is not defined; low and high also for fewer than two cases), cells, cases.
    """
    counted = per_cell.reshape(len(per_cell), -1).any(axis=1) if len(per_cell) else np.zeros(0, bool)
    per_cell, cases = per_cell[counted], np.asarray(cases)[counted]
    names, member_of = np.unique(cases.astype(str), return_inverse=True)
    sums = np.zeros((len(names), *per_cell.shape[1:]))
    np.add.at(sums, member_of, per_cell)
    value = float(measure(sums.sum(axis=0)))
    low = high = np.nan
    if len(names) > 1:
        rng = np.random.default_rng(seed)
        times = rng.multinomial(len(names), np.full(len(names), 1 / len(names)), size=REPEATS)
        drawn = measure(np.tensordot(times, sums, axes=1))
        drawn = drawn[np.isfinite(drawn)]
        if len(drawn):
            low, high = np.quantile(drawn, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    found = {"value": value, "low": float(low), "high": float(high)}
    found = {name: round(number, 4) if np.isfinite(number) else None for name, number in found.items()}
    return found | {"cells": int(counted.sum()), "cases": len(names)}


def share_right(sums: np.ndarray) -> np.ndarray:
    """Share of the second in the first of two sums (..., 2): accuracy of cells counted as (1, right)."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return sums[..., 1] / sums[..., 0]
