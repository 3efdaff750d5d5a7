"""What the readers of datasets share: an annotated point, and rows of text files with the place they stand at."""

import csv
import io
import math
from collections.abc import Iterator
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import NamedTuple

from dasc.data.splits import Field
from dasc.errors import InputError

MOST_BYTES = 255  # of a file's name


class Point(NamedTuple):
    """An annotated nucleus; where: file and row that say so. The rest: see `datasets.Dataset`."""

    image: str
    x_px: float
    y_px: float
    label: int
    where: str
    confidence: float = math.nan


class Content(NamedTuple):
    """What a reader found; looked_for: the place and the form in which it expected the labels."""

    fields: list[Field]
    points: list[Point]
    looked_for: str


def find_file(path: Path) -> Path:
    """The file at `path`, or else the one beside it whose suffix is written in another case."""
    for suffix in (path.suffix, path.suffix.lower(), path.suffix.upper(), path.suffix.capitalize()):
        other = path.with_name(path.stem + suffix)
        if other.is_file():
            return other
    return path


def check_relative(path: str, where: str) -> None:
    for flavour in (PurePosixPath(path), PureWindowsPath(path)):
        if flavour.anchor or ".." in flavour.parts:
            raise InputError(f"{where}: {path!r} leads out of the dataset; expected a path relative to its folder")
    if any(len(part.encode("utf-8", "surrogatepass")) > MOST_BYTES for part in PurePosixPath(path).parts):
        raise InputError(f"{where}: a file name of more than {MOST_BYTES} bytes, which no system has: {path[:40]!r}...")


def read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read as a text file in UTF-8 ({error})") from error


def number_of(cell: str, where: str) -> float:
    try:
        number = float(cell)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise InputError(f"{where}: {cell!r} is not a finite number")
    return number


def number_rows(path: Path, expected: str, lengths: tuple[int, ...]) -> Iterator[tuple[str, list[float]]]:
    """Yield where and the numbers of each row of a CSV without header, nothing when there is no such file."""
    for line, text in enumerate(read_text(path).splitlines() if path.is_file() else (), start=1):
        where = f"{path}, line {line}"
        cells = text.strip().rstrip(",").split(",")
        if cells == [""]:
            continue
        if len(cells) not in lengths:
            raise InputError(f"{where}: {text!r}; expected {expected}")
        # Copies of MITOS14 in circulation hold the confidence None.
        given = [cell.strip() for place, cell in enumerate(cells) if place < 2 or cell.strip() != "None"]
        yield where, [number_of(cell, where) for cell in given]


def table_rows(path: Path, columns: tuple[str, ...]) -> Iterator[tuple[str, dict[str, str]]]:
    """Yield where and the cells of each row, as text: 041 and NA stay what they are."""
    if not path.is_file():
        raise InputError(f"{path}: no such file; expected a table with the columns {', '.join(columns)}")
    reader = csv.DictReader(io.StringIO(read_text(path)), strict=True)
    try:
        missing = [column for column in columns if column not in (reader.fieldnames or ())]
        if missing:
            found = ",".join(reader.fieldnames or ())  # shows the semicolons that spreadsheets write in half of Europe
            raise InputError(
                f"{path}: column {', '.join(missing)} is missing; expected {','.join(columns)}, separated by commas; "
                f"found {found[:200]!r}"
            )
        for row in reader:
            where = f"{path}, line {reader.line_num}"
            if None in row or None in row.values():
                raise InputError(f"{where}: expected {len(reader.fieldnames)} cells, as in the header")
            yield where, row
    except csv.Error as error:
        raise InputError(f"{path}, line {reader.reader.line_num}: {error}") from error
