"""Difficulty of training patches: the verdict from the memory units, and the level and hardness of a hard patch."""

import warnings

import numpy as np
import pandas as pd
from sklearn.exceptions import ConvergenceWarning
from sklearn.mixture import GaussianMixture


def forget_rate(memory: pd.DataFrame) -> np.ndarray:
    """Share of the counted epochs in which a patch was not selected: (N,) in 0..1."""
    return (memory["forgotten"] / (memory["forgotten"] + memory["learned"])).to_numpy()


def verdicts(memory: pd.DataFrame, noisy_share: float, hard_share: float, trust_mitoses: bool = False) -> np.ndarray:
    """Verdict (N,) of every row of a memory table: the first of these that holds.

    noisy: in more than `noisy_share` of its counted epochs neither view was selected (0: in any, the paper's rule).
    dropped: never selected, its forget rate is 1.
    hard: in more than `hard_share` of them it was not clean (0: in any). clean: the rest.
    With `trust_mitoses` a mitosis that would be noisy or dropped is hard.
    """
    counted = memory["clean"] + memory["hard"] + memory["noisy"]
    noisy = memory["noisy"] / counted > noisy_share
    hard = (memory["hard"] + memory["noisy"]) / counted > hard_share
    verdict = np.select([noisy, forget_rate(memory) == 1, hard], ["noisy", "dropped", "hard"], "clean")
    if trust_mitoses:
        verdict[(memory["label"] == 1) & np.isin(verdict, ["noisy", "dropped"])] = "hard"
    return verdict


def difficulty_levels(
    forget_rates: np.ndarray, centroid_distances: np.ndarray, levels: int, seed: int, iterations: int = 200
) -> tuple[np.ndarray, str]:
    """Level (N,) int of the hard patches of one label, 0 the easiest, whatever the order of the patches.

    A Gaussian mixture on the two standardised measures (N,), its components ordered by the mean difficulty of their
    patches, which is the sum of the two. Where it fails, equal shares of the patches by difficulty.

    Returns:
        levels, and why they are shares (quantiles) and not components; empty where they are components.
    """
    measures = np.stack([forget_rates, centroid_distances], axis=1).astype(float)
    if len(measures) < levels:
        return _quantile_levels(_standardised(measures).sum(axis=1), levels), f"fewer patches than {levels} components"
    order = np.lexsort(measures.T)  # the mixture draws its start by row: sorted, the same patches give the same start
    measures = _standardised(measures[order])
    difficulty = measures.sum(axis=1)
    # Forget rates take few values; reg_covar keeps a component from shrinking onto one of them.
    mixture = GaussianMixture(levels, n_init=5, max_iter=iterations, reg_covar=1e-2, random_state=seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        component = mixture.fit_predict(measures)
    sizes = np.bincount(component, minlength=levels)
    reason = ""
    if not mixture.converged_:
        reason = f"the mixture has not converged in {iterations} iterations"
    elif not sizes.all():
        reason = f"{(sizes == 0).sum()} of {levels} components are empty"
    if reason:
        sorted_levels = _quantile_levels(difficulty, levels)
    else:
        mean = np.bincount(component, difficulty, minlength=levels) / sizes
        sorted_levels = np.argsort(np.argsort(mean, kind="stable"), kind="stable")[component]
    result = np.empty(len(measures), dtype=int)
    result[order] = sorted_levels
    return result, reason


def _standardised(measures: np.ndarray) -> np.ndarray:
    """Each column with mean 0 and deviation 1; a column of one value becomes 0."""
    if not len(measures):
        return measures
    centred = measures - measures.mean(axis=0)
    spread = measures.std(axis=0)
    return np.where(np.ptp(measures, axis=0) > 0, centred / np.where(spread > 0, spread, 1), 0)


def _quantile_levels(difficulty: np.ndarray, levels: int) -> np.ndarray:
    """Shares of equal size as far as equal difficulty gets an equal level."""
    if not len(difficulty):
        return np.empty(0, dtype=int)
    return np.searchsorted(np.quantile(difficulty, np.arange(1, levels) / levels), difficulty, side="left")


def validated(seen: pd.Series, correct: pd.Series, keep_share: float) -> np.ndarray:
    """Which hard patches keep their level: predicted right in `keep_share` of the epochs, or never put to the test."""
    seen, correct = np.asarray(seen, dtype=float), np.asarray(correct, dtype=float)
    return np.divide(correct, seen, out=np.ones_like(correct), where=seen > 0) >= keep_share


def hardness(verdict: np.ndarray, level: np.ndarray, levels: int) -> np.ndarray:
    """Hardness (N,) of patches by verdict and level (N,): 0 clean, (level + 1) / levels hard, NaN noisy or dropped."""
    grade = (np.asarray(level, dtype=float) + 1) / levels
    return np.select([np.asarray(verdict) == "hard", np.asarray(verdict) == "clean"], [grade, 0.0], np.nan)
