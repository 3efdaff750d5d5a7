"""Difficulty of training patches: the verdict from the memory units, the level of a hard patch, and their tables."""

import warnings
from pathlib import Path

import numpy as np
import pandas as pd
from sklearn.exceptions import ConvergenceWarning
from sklearn.mixture import GaussianMixture

from dasc.data.tables import LABELS, check_once, read_table
from dasc.errors import InputError

VERDICTS = ("clean", "hard", "noisy", "dropped")

# One row per training patch. clean, hard, noisy: counted epochs in which it was that; learned, forgotten: counted
# epochs in which it was or was not selected; noise_score: higher is more probably a wrong label.
MEMORY_COLUMNS = {
    "patch": str,
    "label": int,
    "clean": int,
    "hard": int,
    "noisy": int,
    "learned": int,
    "forgotten": int,
    "centroid_distance": float,
    "noise_score": float,
}
# One row per training patch; level only where the verdict is hard.
HARD_COLUMNS = {
    "patch": str,
    "label": int,
    "verdict": str,
    "level": float,
    "forget_rate": float,
    "centroid_distance": float,
    "noise_score": float,
}
# One row per hard patch. seen: epochs in which its level was predicted; correct: in which it was predicted right.
CHECKED_COLUMNS = {"patch": str, "label": int, "level": int, "seen": int, "correct": int, "kept": int}
# One row per training patch that stays. level: of a hard patch, or one above the hardest where it is clean.
SCL_COLUMNS = {"patch": str, "label": int, "level": int}


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


def read_samples(path: Path, columns: dict[str, type], made_by: str) -> pd.DataFrame:
    """Read a table with one row per patch.

    Raises:
        InputError: as `manifest.read_table`; a patch twice, an unknown label, an empty cell where a number belongs.
    """
    table = read_table(path, columns, made_by)
    check_once(table["patch"], path)
    strange = table["label"][~table["label"].isin(list(LABELS))]
    if len(strange):
        raise InputError(f"{path}: label {strange.iloc[0]}, expected one of {', '.join(map(str, LABELS))}")
    for column in (name for name, kind in columns.items() if kind is not str and name != "level"):
        wrong = ~np.isfinite(table[column]) | ((table[column] < 0) & (columns[column] is int))
        if wrong.any():
            row = int(np.argmax(wrong))
            raise InputError(f"{path}, row {row + 2}: {column} is {table[column][row]}; `{made_by}` makes it anew")
    return table


def read_memory(path: Path) -> pd.DataFrame:
    """Read memory.csv; InputError as `read_samples`, and where a patch has no counted epoch."""
    table = read_samples(path, MEMORY_COLUMNS, "python DMU/main.py")
    uncounted = (table["clean"] + table["hard"] + table["noisy"] == 0) | (table["learned"] + table["forgotten"] == 0)
    if uncounted.any():
        raise InputError(
            f"{path}: {uncounted.sum()} of {len(table)} patches have no counted epoch; "
            "raise EPOCHS of DMU/main.py above its COUNT_AFTER, or lower that"
        )
    return table


def read_verdicts(path: Path) -> pd.DataFrame:
    """Read hard.csv for its verdicts; InputError as `read_samples`, and where a verdict is none that stage 5 gives."""
    table = read_samples(path, HARD_COLUMNS, "python clus_hard.py")
    strange = table["verdict"][~table["verdict"].isin(VERDICTS)]
    if len(strange):
        raise InputError(f"{path}: verdict {strange.iloc[0]!r}, expected one of {', '.join(VERDICTS)}")
    return table


def read_hard(path: Path, levels: int) -> pd.DataFrame:
    """Read hard.csv; InputError as `read_verdicts`, and where a level is none that stage 5 gives."""
    table = read_verdicts(path)
    hard = table["verdict"] == "hard"
    wrong = np.where(hard, ~table["level"].isin(range(levels)), table["level"].notna())
    if wrong.any():
        row = int(np.argmax(wrong))
        verdict, level = table.loc[row, ["verdict", "level"]]
        expected = f"0 to {levels - 1}; LEVELS must be the same in stages 5, 6 and 7" if hard[row] else "none"
        raise InputError(f"{path}, row {row + 2}: verdict {verdict} with level {level:g}, expected {expected}")
    return table


def read_checked(path: Path) -> pd.DataFrame:
    """Read checked.csv; InputError as `read_samples`, and where a level was right more often than seen."""
    table = read_samples(path, CHECKED_COLUMNS, "python DMU/hard_main.py")
    wrong = table["correct"] > table["seen"]
    if wrong.any():
        row = int(np.argmax(wrong))
        raise InputError(f"{path}, row {row + 2}: correct {table['correct'][row]} of {table['seen'][row]} seen")
    return table


def read_scl(path: Path, levels: int) -> pd.DataFrame:
    """Read SCL.csv; InputError as `read_samples`, and where a level is none that stage 7 gives."""
    table = read_samples(path, SCL_COLUMNS, "python clus_scl.py")
    strange = table["level"][~table["level"].isin(range(levels + 1))]
    if len(strange):
        raise InputError(
            f"{path}: level {strange.iloc[0]}, expected 0 to {levels}; LEVELS must be the same in stages 5 to 8"
        )
    return table


def join_by_patch(left: pd.DataFrame, right: pd.DataFrame, left_path: Path, right_path: Path) -> pd.DataFrame:
    """`left`, in its order, with the columns of `right` that it lacks, joined by `patch`.

    Raises:
        InputError: a patch that only one of them holds, or a column of both with different values for one patch.
    """
    advice = "they come from different runs; repeat the stages from the older one on"
    for one, path, other, other_path in ((left, left_path, right, right_path), (right, right_path, left, left_path)):
        absent = one.loc[~one["patch"].isin(other["patch"]), "patch"]
        if len(absent):
            raise InputError(
                f"{other_path}: lacks {len(absent)} of the {len(one)} patches of {path} that belong in it "
                f"(first: {absent.iloc[0]}); {advice}"
            )
    joined = left.merge(right, on="patch", how="left", validate="one_to_one", suffixes=("", " of right"))
    for column in left.columns.intersection(right.columns).drop("patch"):
        differs = ~np.isclose(joined[column].astype(float), joined[f"{column} of right"].astype(float), equal_nan=True)
        if differs.any():
            row = joined.iloc[int(np.argmax(differs))]
            raise InputError(
                f"{right_path}: patch {row['patch']} has {column} {row[f'{column} of right']:g}, "
                f"{left_path} has {row[column]:g}; {advice}"
            )
    return joined.drop(columns=[column for column in joined if column.endswith(" of right")])
