"""The forms that annotated datasets come in: each read in its own layout into fields and annotated points."""

import csv
import io
import json
import logging
import math
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, NamedTuple

from dasc.data.splits import Field
from dasc.errors import InputError
from dasc.images.read import UM_PER_PX_RANGE

MIDOG21_UNLABELLED = range(151, 201)
MITOS14_UM_PER_PX = {"A": 0.2455, "H": 0.2274}  # Aperio, Hamamatsu
TUPAC16_UM_PER_PX = 0.25

MOST_BYTES = 255  # of a file's name
FRAME_SUFFIXES = (".tif", ".tiff", ".png", ".jpg", ".jpeg", ".bmp")  # frames are often converted
DEPTHS = ("", "*/", "*/*/")  # folders that archives put round the layout; a glob of fixed depth follows links

logger = logging.getLogger(__name__)


class Point(NamedTuple):
    """An annotated nucleus; where: file and row that say so. The rest: see `datasets.Dataset`."""

    image: str
    x_px: float
    y_px: float
    label: int
    where: str
    confidence: float = math.nan


Content = tuple[list[Field], list[Point]]


def _read_midog(root: Path) -> Content:
    """Read MIDOG 2021, 2022 or ++: one JSON, boxes [x1, y1, x2, y2], category 1 mitosis and 2 hard negative."""
    path = root / "MIDOG.json"
    if not path.is_file():
        others = sorted(root.glob("*.json"))
        if len(others) != 1:
            found = ", ".join(other.name for other in others) or "no JSON"
            raise InputError(f"{root}: expected MIDOG.json or a single other JSON, found {found}")
        path = others[0]
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError, OSError) as error:
        raise InputError(f"{path}: cannot be read as JSON ({error})") from error
    for key in ("images", "annotations"):
        entries = content.get(key) if isinstance(content, dict) else None
        if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
            raise InputError(f"{path}: expected a list {key!r} of objects, as in MIDOG.json")
    by_id: dict[Any, Field] = {}
    for row, entry in enumerate(content["images"]):
        where = f"{path}, images[{row}]"
        identity, file_name = entry.get("id"), entry.get("file_name")
        if not isinstance(identity, int | str) or not isinstance(file_name, str):
            raise InputError(f"{where}: expected an id and a file_name, found {identity!r} and {file_name!r}")
        _check_relative(file_name, where)
        stem = PurePosixPath(file_name).stem
        case = str(entry.get("slide") or stem)
        in_images = (root / "images" / file_name).is_file() or not (root / file_name).is_file()
        field = Field(stem, f"images/{file_name}" if in_images else file_name, case, where)
        field.group, field.names = case, (str(identity),)
        if identity in by_id:
            raise InputError(f"{by_id[identity].where} and {where}: both have id {identity!r}; ids must be unique")
        by_id[identity] = field
    points = []
    annotated = set()
    for row, entry in enumerate(content["annotations"]):
        where = f"{path}, annotations[{row}]"
        identity, category, box = entry.get("image_id"), entry.get("category_id"), entry.get("bbox")
        if not isinstance(identity, int | str) or identity not in by_id:
            raise InputError(f"{where}: image_id {identity!r} is not among the images")
        if not isinstance(category, int):
            raise InputError(f"{where}: category_id {category!r}; expected 1 for a mitosis, 2 for a hard negative")
        annotated.add(identity)
        if category not in (1, 2):
            continue
        x1, y1, x2, y2 = _box(box, where)
        points.append(Point(by_id[identity].image, (x1 + x2) / 2, (y1 + y2) / 2, 1 if category == 1 else 0, where))
    # Elsewhere an image without a box is known to be empty; these fifty together are MIDOG 2021's unlabelled scanner.
    if annotated and by_id.keys() >= set(MIDOG21_UNLABELLED) and annotated.isdisjoint(MIDOG21_UNLABELLED):
        for identity in MIDOG21_UNLABELLED:
            by_id[identity].split = "unlabelled"
    return list(by_id.values()), points


def _box(box: Any, where: str) -> list[float]:
    is_box = isinstance(box, list) and len(box) == 4
    if not is_box or not all(isinstance(edge, int | float) and math.isfinite(edge) for edge in box):
        raise InputError(f"{where}: bbox {box!r}; expected four numbers [x1, y1, x2, y2]")
    if box[2] < box[0] or box[3] < box[1]:
        raise InputError(f"{where}: bbox {box!r} looks like [x, y, width, height]; expected [x1, y1, x2, y2]")
    return box


def _read_mitos14(root: Path) -> Content:
    """Read MITOS-ATYPIA-14: A03/frames/x40/*.tiff beside A03/mitosis/*_mitosis.csv of x,y,confidence."""
    fields, points = [], []
    for depth in DEPTHS:
        for frames in sorted(root.glob(f"{depth}[AH][0-9][0-9]/frames/x40")):
            slide = frames.parent.parent
            case = slide.name
            twin = ("H" if case[0] == "A" else "A") + case[1:]
            tables = slide / "mitosis"
            if not tables.is_dir() and slide.parent.name == case:
                tables = slide.parent / "mitosis"
            unused = set(tables.glob("*_mitosis.csv"))
            for frame in _frames(frames):
                field = Field(frame.stem, frame.relative_to(root).as_posix(), case, str(frame))
                field.um_per_px, field.group, field.names = MITOS14_UM_PER_PX[case[0]], case[1:], (twin,)
                positives = tables / f"{frame.stem}_mitosis.csv"
                negatives = tables / f"{frame.stem}_not_mitosis.csv"
                unused -= {positives, negatives}
                if positives.is_file():
                    for path, label in ((positives, 1), (negatives, 0)):
                        for where, (x, y, *confidence) in _number_rows(path, "x,y,confidence", (2, 3)):
                            points.append(Point(field.image, x, y, label, where, *confidence))
                else:  # the official test frames; an empty file would say that there is no mitosis
                    field.split = "unlabelled"
                fields.append(field)
            _warn_unused(unused)
    return fields, points


def _read_tupac16(root: Path, alternative: bool = False) -> Content:
    """Read the TUPAC16 auxiliary data: NN/MM.tif and NN/MM.csv of row,col; a missing CSV means no mitosis.

    alternative: the labels of TUPAC_AL, whose hard negatives lie beside the mitoses.
    """
    found = sorted(path for depth in DEPTHS for path in root.glob(f"{depth}mitoses_ground_truth") if path.is_dir())
    found = [path for path in found if path.with_name("nonmitoses_ground_truth").is_dir() == alternative]
    if len(found) != 1:
        layout = "TUPAC_AL/{mitoses,nonmitoses}_ground_truth" if alternative else "mitoses_ground_truth"
        raise InputError(f"{root}: expected one {layout} in this folder, found {len(found)}")
    tables = [(found[0], 1)]
    if alternative:
        tables.append((found[0].with_name("nonmitoses_ground_truth"), 0))
    unused = {path for folder, _ in tables for path in folder.glob("[0-9]*/[0-9]*.csv")}
    fields, points = [], []
    for depth in DEPTHS:
        for folder in sorted(path for path in root.glob(f"{depth}[0-9]*") if path.name.isdecimal()):
            for image in _frames(folder):
                if not image.stem.isdecimal():
                    continue
                field = Field(
                    f"{folder.name}_{image.stem}", image.relative_to(root).as_posix(), folder.name, str(image)
                )
                field.um_per_px, field.group = TUPAC16_UM_PER_PX, folder.name
                fields.append(field)
                for labels, label in tables:
                    path = labels / folder.name / f"{image.stem}.csv"
                    unused.discard(path)
                    for where, (y, x) in _number_rows(path, "row,col", (2,)):
                        points.append(Point(field.image, x, y, label, where))
    _warn_unused(unused)
    return fields, points


def _read_table(root: Path) -> Content:
    """Read fields.csv and annotations.csv; a field without a row in annotations.csv is known to be empty."""
    fields, points = [], []
    labelled: dict[str, Field] = {}
    for where, row in _table_rows(root / "fields.csv", ("image", "path", "case", "split", "um_per_px")):
        for column in ("image", "path", "case"):
            if not row[column]:
                raise InputError(f"{where}: {column} is empty")
        _check_relative(row["image"], where)  # outputs are named after it
        _check_relative(row["path"], where)
        if row["split"] not in ("train", "val", "test", "unlabelled"):
            raise InputError(f"{where}: split {row['split']!r}; expected train, val, test or unlabelled")
        um_per_px = _number(row["um_per_px"], where) if row["um_per_px"] else math.nan
        if um_per_px < UM_PER_PX_RANGE[0] or um_per_px > UM_PER_PX_RANGE[1]:
            raise InputError(f"{where}: um_per_px {um_per_px:g}; expected {UM_PER_PX_RANGE[0]} to {UM_PER_PX_RANGE[1]}")
        field = Field(row["image"], row["path"], row["case"], where, um_per_px, row["split"], row["case"])
        fields.append(field)
        if field.split != "unlabelled":
            first = labelled.setdefault(field.case, field)
            if first.split != field.split:
                raise InputError(
                    f"{first.where} and {where}: case {field.case!r} is in {first.split} and in {field.split}; "
                    "one case goes to one side"
                )
    for where, row in _table_rows(root / "annotations.csv", ("image", "x_px", "y_px", "label")):
        x, y, label = (_number(row[column], where) for column in ("x_px", "y_px", "label"))
        if label not in (0, 1):
            raise InputError(f"{where}: label {row['label']}; expected 1 for a mitosis, 0 for a hard negative")
        points.append(Point(row["image"], x, y, int(label), where))
    return fields, points


def _frames(folder: Path) -> list[Path]:
    return sorted(
        path for path in folder.glob("*") if path.suffix.lower() in FRAME_SUFFIXES and not path.name.startswith(".")
    )


def _warn_unused(tables: set[Path]) -> None:
    if tables:
        logger.warning("%d annotation files have no image, the first: %s", len(tables), min(tables))


def _check_relative(path: str, where: str) -> None:
    for flavour in (PurePosixPath(path), PureWindowsPath(path)):
        if flavour.anchor or ".." in flavour.parts:
            raise InputError(f"{where}: {path!r} leads out of the dataset; expected a path relative to its folder")
    if any(len(part.encode("utf-8", "surrogatepass")) > MOST_BYTES for part in PurePosixPath(path).parts):
        raise InputError(f"{where}: a file name of more than {MOST_BYTES} bytes, which no system has: {path[:40]!r}...")


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read as a text file in UTF-8 ({error})") from error


def _number(cell: str, where: str) -> float:
    try:
        number = float(cell)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise InputError(f"{where}: {cell!r} is not a finite number")
    return number


def _number_rows(path: Path, expected: str, lengths: tuple[int, ...]) -> Iterator[tuple[str, list[float]]]:
    """Yield where and the numbers of each row of a CSV without header, nothing when there is no such file."""
    for line, text in enumerate(_text(path).splitlines() if path.is_file() else (), start=1):
        where = f"{path}, line {line}"
        cells = text.strip().rstrip(",").split(",")
        if cells == [""]:
            continue
        if len(cells) not in lengths:
            raise InputError(f"{where}: {text!r}; expected {expected}")
        # Copies of MITOS14 in circulation hold the confidence None.
        given = [cell.strip() for place, cell in enumerate(cells) if place < 2 or cell.strip() != "None"]
        yield where, [_number(cell, where) for cell in given]


def _table_rows(path: Path, columns: tuple[str, ...]) -> Iterator[tuple[str, dict[str, str]]]:
    """Yield where and the cells of each row, as text: 041 and NA stay what they are."""
    if not path.is_file():
        raise InputError(f"{path}: no such file; expected a table with the columns {', '.join(columns)}")
    reader = csv.DictReader(io.StringIO(_text(path)), strict=True)
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


READERS: dict[str, Callable[[Path], Content]] = {
    "midog": _read_midog,
    "mitos14": _read_mitos14,
    "tupac16": _read_tupac16,
    "tupac16_al": lambda root: _read_tupac16(root, alternative=True),
    "table": _read_table,
    "sample": _read_midog,
}
