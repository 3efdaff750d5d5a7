"""What passes between the stages: the columns of every table, to read and to write by, joined by the one key `patch`.

Tables are read with their types and checked. Beside them passes only cut.json (cut.py): run.json is a
log, and patches.npy (pack.py) holds the patches once more, for speed.
"""

from pathlib import Path, PurePosixPath

import numpy as np
import pandas as pd

from dasc.errors import InputError
from dasc.files import from_cell, write_csv

LABELS = {0: "negative", 1: "mitosis"}
SPLITS = ("train", "val", "test")
VERDICTS = ("clean", "hard", "noisy", "dropped")
MOST = 2**53  # whole numbers beyond this are not read exactly

# patches.csv: one row per nucleus patch. patch: POSIX path relative to the manifest, the key of every later table.
# x_px, y_px: its centre in the field; point_x_px, point_y_px: the annotated point in the patch, empty without one;
# score: p(mitosis) of the search network where origin is searched, of the weak model where it is mined, else empty.
PATCHES = {
    "patch": str,
    "image": str,
    "case": str,
    "split": str,
    "label": int,
    "origin": str,
    "x_px": float,
    "y_px": float,
    "point_x_px": float,
    "point_y_px": float,
    "score": float,
}
# fields.csv, annotations.csv: the fields that were cut and their annotations, in pixels of the field.
FIELDS = {"image": str, "path": str, "case": str, "split": str, "um_per_px": float}
ANNOTATIONS = {"image": str, "x_px": float, "y_px": float, "label": int}
# memory.csv: one row per training patch. clean, hard, noisy: counted epochs in which it was that; learned, forgotten:
# counted epochs in which it was or was not selected; confidence: m_v; noise_score: the higher, the more probably the
# label is wrong.
MEMORY = {
    "patch": str,
    "label": int,
    "origin": str,
    "clean": int,
    "hard": int,
    "noisy": int,
    "learned": int,
    "forgotten": int,
    "confidence_weak": float,
    "confidence_strong": float,
    "confidence_fused": float,
    "centroid_distance": float,
    "noise_score": float,
}
# hard.csv: one row per training patch. level: of a hard patch, 0 the easiest; hardness: 0 clean to 1 the hardest level,
# empty where the verdict is noisy or dropped.
HARD = {
    "patch": str,
    "label": int,
    "verdict": str,
    "level": float,
    "hardness": float,
    "forget_rate": float,
    "centroid_distance": float,
    "noise_score": float,
}
# checked.csv: one row per hard patch. seen: epochs in which its level was predicted; correct: predicted right.
CHECKED = {"patch": str, "label": int, "level": int, "seen": int, "correct": int}
# SCL.csv: one row per training patch that stays. level: of a hard patch, or one above the hardest where it is clean.
SCL = {"patch": str, "label": int, "level": int, "hardness": float}
OPTIONAL = ("level", "hardness")  # cells that may be empty in a table with one row per training patch


def write_table(path: Path, table: pd.DataFrame, columns: dict[str, type]) -> None:
    """Write the columns of a table that stages hand on, in the order in which they are declared."""
    write_csv(path, table[list(columns)])


def read_table(path: Path, columns: dict[str, type], made_by: str) -> pd.DataFrame:
    """Read a CSV that a stage wrote; text stays text (a case `041` or `NA` too), as it was before `run.cell`.

    Args:
        columns: the columns it must have, with their types.
        made_by: the command that makes it, for the error when it is missing.

    Raises:
        InputError: no such file, not a CSV, a column that is missing, a row of another length than the header, a cell
            that is not of its type.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path}: no such file; `{made_by}` makes it")
    try:
        table = pd.read_csv(path, dtype=str, keep_default_na=False, encoding="utf-8")
    except (ValueError, pd.errors.ParserError) as error:
        raise InputError(f"{path}: not a readable CSV ({str(error).splitlines()[0]})") from error
    if not isinstance(table.index, pd.RangeIndex):  # pandas takes the first ones for names of the rows
        raise InputError(f"{path}: its rows have more cells than its header has names")
    short = table.isna().any(axis=1)
    if short.any():
        raise InputError(
            f"{path}, row {int(np.argmax(short)) + 2}: fewer cells than the {table.shape[1]} of the header"
        )
    absent = [column for column in columns if column not in table.columns]
    if absent:
        raise InputError(f"{path}: column {', '.join(absent)} is missing; found {', '.join(table.columns)}")
    for column, kind in columns.items():
        if kind is str:
            table[column] = table[column].map(from_cell)
            continue
        numbers = pd.to_numeric(table[column], errors="coerce").astype(float)
        wrong = ~np.isfinite(numbers) & ((table[column] != "") | (kind is int))
        if kind is int:
            wrong |= (numbers != numbers.round()) | (numbers.abs() > MOST)
        if wrong.any():
            row = int(np.argmax(wrong))
            expected = "a whole number" if kind is int else "a number"
            raise InputError(f"{path}, row {row + 2}: {column} is {table[column][row]!r}, expected {expected}")
        table[column] = numbers.astype(kind)
    return table[list(columns)]


def read_patches(path: Path) -> pd.DataFrame:
    """Read a patches.csv.

    Raises:
        InputError: as `read_table`; a patch twice, a path that leaves the folder, an unknown label or split.
    """
    table = read_table(path, PATCHES, "python pre/cut_patch_2.py")
    check_once(table["patch"], path)
    for patch in table["patch"]:
        inside(patch, path)
    for column, known in (("label", LABELS), ("split", SPLITS)):
        strange = table[column][~table[column].isin(list(known))]
        if len(strange):
            raise InputError(f"{path}: {column} {strange.iloc[0]}, expected one of {', '.join(map(str, known))}")
    return table


def check_once(names: pd.Series, path: Path) -> None:
    """Raise InputError, with both rows, where a name stands twice in a column of the table at `path`."""
    twice = names[names.duplicated()]
    if len(twice):
        rows = " and ".join(str(row + 2) for row in np.flatnonzero(names == twice.iloc[0])[:2])
        raise InputError(f"{path}, rows {rows}: {names.name} {twice.iloc[0]} stands in it twice; remove one")


def inside(path_text: str, manifest: Path) -> str:
    """Return a path of a manifest unchanged where it stays in the manifest's folder.

    Raises:
        InputError: an absolute path or one with `..`.
    """
    path = PurePosixPath(path_text)
    leaves = path.is_absolute() or ".." in path.parts or any(sign in path_text for sign in "\\\0")
    if not path.parts or leaves or ":" in path.parts[0]:
        raise InputError(f"{manifest}: path {path_text!r} leaves the folder; expected one relative to it")
    return path_text


def read_samples(path: Path, columns: dict[str, type], made_by: str) -> pd.DataFrame:
    """Read a table with one row per patch.

    Raises:
        InputError: as `read_table`; a patch twice, an unknown label, an empty cell where a number belongs.
    """
    table = read_table(path, columns, made_by)
    check_once(table["patch"], path)
    strange = table["label"][~table["label"].isin(list(LABELS))]
    if len(strange):
        raise InputError(f"{path}: label {strange.iloc[0]}, expected one of {', '.join(map(str, LABELS))}")
    for column in (name for name, kind in columns.items() if kind is not str and name not in OPTIONAL):
        wrong = ~np.isfinite(table[column]) | ((table[column] < 0) & (columns[column] is int))
        if wrong.any():
            row = int(np.argmax(wrong))
            raise InputError(f"{path}, row {row + 2}: {column} is {table[column][row]}; `{made_by}` makes it anew")
    return table


def read_memory(path: Path) -> pd.DataFrame:
    """Read memory.csv; InputError as `read_samples`, and where a patch has no counted epoch."""
    table = read_samples(path, MEMORY, "python DMU/main.py")
    uncounted = (table["clean"] + table["hard"] + table["noisy"] == 0) | (table["learned"] + table["forgotten"] == 0)
    if uncounted.any():
        raise InputError(
            f"{path}: {uncounted.sum()} of {len(table)} patches have no counted epoch; "
            "lower COUNT_AFTER_SHARE of DMU/main.py, or raise its EPOCHS"
        )
    return table


def read_hard(path: Path) -> pd.DataFrame:
    """Read hard.csv; InputError as `read_samples`, and where verdict, level and hardness are none of stage 5."""
    table = read_samples(path, HARD, "python clus_hard.py")
    strange = table["verdict"][~table["verdict"].isin(VERDICTS)]
    if len(strange):
        raise InputError(f"{path}: verdict {strange.iloc[0]!r}, expected one of {', '.join(VERDICTS)}")
    check_grades(path, table, hard=table["verdict"] == "hard", clean=table["verdict"] == "clean")
    return table


def without_noisy(train: pd.DataFrame, manifest: Path, hard: Path) -> pd.DataFrame:
    """The training rows of a manifest less those that hard.csv calls noisy; says how many."""
    noisy = join_by_patch(train, read_hard(hard), manifest, hard)["verdict"].to_numpy() == "noisy"
    print(f"{hard}: {noisy.sum()} of {len(train)} training patches are noisy and left out")
    return train[~noisy]


def read_checked(path: Path) -> pd.DataFrame:
    """Read checked.csv; InputError as `read_samples`, and where a level was right more often than seen."""
    table = read_samples(path, CHECKED, "python DMU/hard_main.py")
    wrong = table["correct"] > table["seen"]
    if wrong.any():
        row = int(np.argmax(wrong))
        raise InputError(f"{path}, row {row + 2}: correct {table['correct'][row]} of {table['seen'][row]} seen")
    return table


def read_scl(path: Path) -> pd.DataFrame:
    """Read SCL.csv; InputError as `read_samples`, and where level and hardness are none of stage 7."""
    table = read_samples(path, SCL, "python clus_scl.py")
    check_grades(path, table, hard=table["hardness"] != 0, clean=table["hardness"] == 0)
    return table


def levels_of(table: pd.DataFrame, hard: pd.Series) -> int:
    """How many levels stage 5 made, as the hard patches tell: hardness is (level + 1) / levels; 0 without one."""
    levels = (table.loc[hard, "level"] + 1) / table.loc[hard, "hardness"]
    levels = levels[np.isfinite(levels)].round()
    return int(levels.max()) if len(levels) else 0


def check_grades(path: Path, table: pd.DataFrame, hard: pd.Series, clean: pd.Series) -> None:
    """Raise InputError where level and hardness of a patch contradict each other, or its being hard or clean (bool)."""
    levels = levels_of(table, hard)
    hardness = np.where(hard, (table["level"] + 1) / max(levels, 1), np.where(clean, 0.0, np.nan))
    wrong = ~np.isclose(table["hardness"], hardness, atol=1e-6, equal_nan=True)
    wrong |= hard & ~((table["level"] >= 0) & (table["level"] < levels) & (table["level"] % 1 == 0))
    wrong |= ~hard & table["level"].notna() & ~(clean & (table["level"] >= levels))
    if wrong.any():
        row = int(np.argmax(wrong))
        level, found = table.loc[row, ["level", "hardness"]]
        raise InputError(
            f"{path}, row {row + 2}: level {level:g} with hardness {found:g}, expected {hardness[row]:g} by the other "
            f"patches' {levels} levels; run clus_hard.py and the stages after it again"
        )


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


def check_both_labels(part: pd.DataFrame, what: str, advice: str) -> None:
    """Raise InputError where a part of a manifest lacks mitoses or negatives; `what` names it."""
    for label, word in sorted(LABELS.items(), reverse=True):  # without a mitosis no negatives are drawn either
        if not (part["label"] == label).any():
            raise InputError(f"{what} has no {word} patch ({len(part)} in all); {advice}")
