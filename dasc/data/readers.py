"""The forms that annotated datasets come in: each read in its own layout into fields and annotated points."""

import logging
import math
import re
from collections.abc import Callable
from pathlib import Path

from dasc.data.midog import read_midog
from dasc.data.rows import Content, Point, check_relative, find_file, number_of, number_rows, table_rows
from dasc.data.splits import Field
from dasc.errors import InputError
from dasc.images.read import UM_PER_PX_RANGE

MITOS14_UM_PER_PX = {"A": 0.2455, "H": 0.2274}  # Aperio, Hamamatsu
TUPAC16_UM_PER_PX = 0.25

FRAME_SUFFIXES = (".tif", ".tiff", ".png", ".jpg", ".jpeg", ".bmp")  # frames are often converted
DEPTHS = ("", "*/", "*/*/")  # folders that archives put round the layout; a glob of fixed depth follows links

logger = logging.getLogger(__name__)


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
            given = {path for path in _tables(tables) if path.stem.endswith("_mitosis")}
            used, images = set(), _frames(frames)
            for frame in images:
                field = Field(frame.stem, frame.relative_to(root).as_posix(), case, str(frame))
                field.um_per_px, field.group, field.names = MITOS14_UM_PER_PX[case[0]], case[1:], (twin,)
                positives = find_file(tables / f"{frame.stem}_mitosis.csv")
                negatives = find_file(tables / f"{frame.stem}_not_mitosis.csv")
                used |= {positives, negatives}
                if positives.is_file():
                    for path, label in ((positives, 1), (negatives, 0)):
                        for where, (x, y, *confidence) in number_rows(path, "x,y,confidence", (2, 3)):
                            points.append(Point(field.image, x, y, label, where, *confidence))
                else:  # the official test frames; an empty file would say that there is no mitosis
                    field.split = "unlabelled"
                fields.append(field)
            _check_used(given, used, f"{tables / 'FRAME'}_mitosis.csv", images)
    return Content(fields, points, f"{root}/SLIDE/mitosis/FRAME_mitosis.csv, FRAME being an image of SLIDE/frames/x40")


def _read_tupac16(root: Path, alternative: bool = False) -> Content:
    """Read the TUPAC16 auxiliary data: NN/MM.tif and NN/MM.csv of row,col; a missing CSV means no mitosis.

    Either may be unpacked flat, as NN_MM. alternative: the labels of TUPAC_AL, whose hard negatives lie beside the
    mitoses.
    """
    found = sorted(path for depth in DEPTHS for path in root.glob(f"{depth}mitoses_ground_truth") if path.is_dir())
    found = [path for path in found if path.with_name("nonmitoses_ground_truth").is_dir() == alternative]
    if len(found) != 1:
        layout = "TUPAC_AL/{mitoses,nonmitoses}_ground_truth" if alternative else "mitoses_ground_truth"
        raise InputError(f"{root}: expected one {layout} in this folder, found {len(found)}")
    tables = [(found[0], 1)]
    if alternative:
        tables.append((found[0].with_name("nonmitoses_ground_truth"), 0))
    given = {path for folder, _ in tables for place in (folder, *folder.glob("[0-9]*")) for path in _tables(place)}
    images = _tupac16_images(root)
    fields, points, used = [], [], set()
    for case, number, image in images:
        field = Field(f"{case}_{number}", image.relative_to(root).as_posix(), case, str(image))
        field.um_per_px, field.group = TUPAC16_UM_PER_PX, case
        fields.append(field)
        for labels, label in tables:
            forms = [find_file(labels / case / f"{number}.csv"), find_file(labels / f"{case}_{number}.csv")]
            files = [path for path in forms if path.is_file()]
            if len(files) == 2:
                raise InputError(f"{files[0]} and {files[1]}: both are the labels of {image}; remove one")
            used |= set(files)
            for path in files:
                for where, (y, x) in number_rows(path, "row,col", (2,)):
                    points.append(Point(field.image, x, y, label, where))
    looked_for = f"{found[0]}/NN/MM.csv or NN_MM.csv, for images NN/MM.tif or NN_MM.tif"
    _check_used(given, used, looked_for, images)
    return Content(fields, points, looked_for)


def _tupac16_images(root: Path) -> list[tuple[str, str, Path]]:
    """Case, number and path of every image NN/MM.tif, and of every NN_MM.tif."""
    found = []
    for depth in DEPTHS:
        for folder in sorted(path for path in root.glob(f"{depth}[0-9]*") if path.name.isdecimal()):
            found += [(folder.name, image.stem, image) for image in _frames(folder) if image.stem.isdecimal()]
        for folder in sorted({path.parent for path in root.glob(f"{depth}[0-9]*_[0-9]*.*")}):
            for image in _frames(folder):
                if parts := re.fullmatch(r"(\d+)_(\d+)", image.stem):
                    found.append((parts[1], parts[2], image))
    return found


def _read_table(root: Path) -> Content:
    """Read fields.csv and annotations.csv; a field without a row in annotations.csv is known to be empty."""
    fields, points = [], []
    labelled: dict[str, Field] = {}
    marks = find_file(root / "annotations.csv")
    for where, row in table_rows(find_file(root / "fields.csv"), ("image", "path", "case", "split", "um_per_px")):
        for column in ("image", "path", "case"):
            if not row[column]:
                raise InputError(f"{where}: {column} is empty")
        check_relative(row["image"], where)  # outputs are named after it
        check_relative(row["path"], where)
        if row["split"] not in ("train", "val", "test", "unlabelled"):
            raise InputError(f"{where}: split {row['split']!r}; expected train, val, test or unlabelled")
        um_per_px = number_of(row["um_per_px"], where) if row["um_per_px"] else math.nan
        if um_per_px < UM_PER_PX_RANGE[0] or um_per_px > UM_PER_PX_RANGE[1]:
            raise InputError(f"{where}: um_per_px {um_per_px:g}; expected {UM_PER_PX_RANGE[0]} to {UM_PER_PX_RANGE[1]}")
        path = _in_its_case(root, row["path"])
        field = Field(row["image"], path, row["case"], where, um_per_px, row["split"], row["case"])
        fields.append(field)
        if field.split != "unlabelled":
            first = labelled.setdefault(field.case, field)
            if first.split != field.split:
                raise InputError(
                    f"{first.where} and {where}: case {field.case!r} is in {first.split} and in {field.split}; "
                    "one case goes to one side"
                )
    for where, row in table_rows(marks, ("image", "x_px", "y_px", "label")):
        x, y, label = (number_of(row[column], where) for column in ("x_px", "y_px", "label"))
        if label not in (0, 1):
            raise InputError(f"{where}: label {row['label']}; expected 1 for a mitosis, 0 for a hard negative")
        points.append(Point(row["image"], x, y, int(label), where))
    return Content(fields, points, str(marks))


def _in_its_case(root: Path, path: str) -> str:
    """A path below `root`; with the suffix of the file there where that is written in another case."""
    found = find_file(root / path)
    return path if (root / path).is_file() or not found.is_file() else found.relative_to(root).as_posix()


def _frames(folder: Path) -> list[Path]:
    return sorted(
        path for path in folder.glob("*") if path.suffix.lower() in FRAME_SUFFIXES and not path.name.startswith(".")
    )


def _tables(folder: Path) -> list[Path]:
    return [path for path in folder.glob("*") if path.suffix.lower() == ".csv" and not path.name.startswith(".")]


def _check_used(given: set[Path], used: set[Path], looked_for: str, images: list) -> None:
    """Say which label files have no image; refuse them where not one of them has."""
    unused = given - used
    if unused and images and len(unused) == len(given):
        raise InputError(
            f"{min(unused)}: {_number_of_files(len(unused))} no image of the {len(images)} beside it; looked for "
            f"{looked_for}; rename the files or check --data_root"
        )
    if unused:
        logger.warning("%d annotation files have no image, the first: %s", len(unused), min(unused))


def _number_of_files(count: int) -> str:
    return "this label file matches" if count == 1 else f"this and {count - 1} more label files match"


READERS: dict[str, Callable[[Path], Content]] = {
    "midog": read_midog,
    "mitos14": _read_mitos14,
    "tupac16": _read_tupac16,
    "tupac16_al": lambda root: _read_tupac16(root, alternative=True),
    "table": _read_table,
    "sample": read_midog,
}
