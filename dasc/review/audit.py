"""A count with an interval: what a random sample of the detections, judged by a reader, says of all of them.

Every detection belongs to a stratum of probability; N_h of them, of which n_h were judged and a_h are mitoses. The
stratified estimator (Cochran, Sampling Techniques, 3rd edition, 1977, section 5.3) of a total is

    M = sum_h N_h a_h / n_h

With A the strata above the threshold: precision = sum_A N_h a_h / n_h / sum_A N_h, and recall = sum_A N_h a_h / n_h /
M, the share of the mitoses among all detections that counts. Mitoses which the model did not even suspect are in no
stratum: recall is of what was written to detections.csv, and an upper bound of the recall of the slide.

The intervals are drawn, since a ratio of such totals has no simple one, and a normal one fails where a_h is 0. Unseen
mitoses of a stratum are beta-binomial: a share from Beta(a_h + c, n_h - a_h + 1 - c), then as many of the N_h - n_h
unseen. c is 1/2, Jeffreys' prior, whose intervals hold their level on average (Brown, Cai and DasGupta, Statistical
Science 16, 2001), above the threshold. Below it, where shares lie near 0 and each of many strata would add its half,
the 1/2 is divided among the strata. What was judged counts as it is, so that a stratum seen whole has no error.

The hotspot's window stays where the detector put it. Its count is the mitoses judged in it and, of its unseen
detections, as many as their stratum's share: supposing that the share is the same within the window as without.
"""

from typing import NamedTuple

import numpy as np

DRAWS = 20_000
LEVEL = 0.95


class Strata(NamedTuple):
    """Detections by stratum, each (H,): how many there are, were judged, are mitoses; whether they count."""

    size: np.ndarray
    judged: np.ndarray
    mitoses: np.ndarray
    above: np.ndarray


def estimate(strata: Strata, seed: int = 0) -> dict[str, list[float | None]]:
    """Mitoses, precision and recall, each as [estimate, low, high]; None where there is nothing to divide by."""
    known, drawn = shares(strata, seed)
    unseen = strata.size - strata.judged
    rng = np.random.default_rng([seed, 1])
    totals = strata.mitoses + rng.binomial(unseen, drawn)
    best = strata.size * known
    above = strata.above.astype(bool)
    found = {"mitoses": _three(best.sum(), totals.sum(axis=1))}
    counted = strata.size[above].sum()
    with np.errstate(divide="ignore", invalid="ignore"):
        found["precision"] = _three(best[above].sum() / counted, totals[:, above].sum(axis=1) / counted)
        found["recall"] = _three(best[above].sum() / best.sum(), totals[:, above].sum(axis=1) / totals.sum(axis=1))
    return found


def estimate_within(strata: Strata, seen: int, unseen: np.ndarray, seed: int = 0) -> list[float | None]:
    """Mitoses within a window or an image: [estimate, low, high].

    seen: mitoses judged in it. unseen: (H,) detections of each stratum in it that nobody judged.
    """
    known, drawn = shares(strata, seed)
    totals = seen + np.random.default_rng([seed, 2]).binomial(unseen, drawn).sum(axis=1)
    return _three(seen + (unseen * known).sum(), totals)


def shares(strata: Strata, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Share of mitoses in every stratum: the estimate (H,), and DRAWS of what it may be, (DRAWS, H)."""
    above = strata.above.astype(bool)
    prior = np.where(above, 0.5, 0.5 / max((~above).sum(), 1))
    rng = np.random.default_rng([seed, 0])
    missed = strata.judged - strata.mitoses
    drawn = rng.beta(strata.mitoses + prior, missed + 1 - prior, size=(DRAWS, len(prior)))
    with np.errstate(divide="ignore", invalid="ignore"):
        known = np.where(strata.judged > 0, strata.mitoses / strata.judged, prior)
    return known, drawn


def _three(best: float, draws: np.ndarray) -> list[float | None]:
    draws = draws[np.isfinite(draws)]
    low, high = np.quantile(draws, [(1 - LEVEL) / 2, (1 + LEVEL) / 2]) if len(draws) else (np.nan, np.nan)
    return [round(float(value), 4) if np.isfinite(value) else None for value in (best, low, high)]
