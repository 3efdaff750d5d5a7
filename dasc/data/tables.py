"""The CSV manifests that stages hand on: read with their types, checked, joined by the key `patch`."""

import json
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np
import pandas as pd

from dasc.errors import InputError
from dasc.files import from_cell

LABELS = {0: "negative", 1: "mitosis"}
SPLITS = ("train", "val", "test")

# One row per nucleus patch. patch: POSIX path relative to the manifest, the key of every later table.
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
FIELDS = {"image": str, "path": str, "case": str, "split": str, "um_per_px": float}
ANNOTATIONS = {"image": str, "x_px": float, "y_px": float, "label": int}
MOST = 2**53  # whole numbers beyond this are not read exactly


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


def read_cut_fields(folder: Path, data_root: str = "") -> tuple[Path, pd.DataFrame, pd.DataFrame]:
    """The fields that stage 1 cut: dataset folder, fields and annotations.

    Args:
        data_root: dataset folder that holds the images; empty means where it lay at stage 1.

    Raises:
        InputError: as `read_table`; patches that come from no fields; a field's path that leaves the dataset.
    """
    if read_cut_run(folder)["data_root"] is None:
        raise InputError(f"{folder}: these patches come from no fields, and this script needs fields")
    made_by = "python pre/cut_patch_2.py"
    fields = read_table(folder / "fields.csv", FIELDS, made_by)
    for path in fields["path"]:
        inside(path, folder / "fields.csv")
    annotations = read_table(folder / "annotations.csv", ANNOTATIONS, made_by)
    return Path(data_root or read_cut_run(folder)["data_root"]), fields, annotations


def read_cut_run(folder: Path) -> dict:
    """How stage 1 cut the patches of a folder: its run.json, with data_root and arguments.

    A data_root of None says that the patches come from no fields (pre/split_patches.py).

    Raises:
        InputError: no run.json, or not one of stage 1.
    """
    path = folder / "run.json"
    try:
        run = json.loads(path.read_text(encoding="utf-8"))
        arguments = run["arguments"]
        known = isinstance(run["data_root"], str | None) and isinstance(arguments["normalise_stain"], bool)
        known &= isinstance(arguments["patch_um_per_px"], float | int | None)
        if not known:
            raise ValueError("values of other types")
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise InputError(f"{path}: does not say how the patches were cut; run pre/cut_patch_2.py again") from error
    return run


class ValFields(NamedTuple):
    """The fields that a detector's threshold is chosen on.

    root: folder of the dataset. fields: image, path (relative to root), um_per_px, of val only.
    mitoses: image, x_px, y_px.
    """

    root: Path
    fields: pd.DataFrame
    mitoses: pd.DataFrame
