"""Read an annotated dataset into two tables, and put every case on one side of the split."""

import logging
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from dasc.data.readers import READERS, Point
from dasc.data.splits import Field, assign_splits
from dasc.errors import InputError

logger = logging.getLogger(__name__)


@dataclass
class Dataset:
    """The fields and annotations of a dataset.

    fields: image (unique id), path (POSIX, relative to root), case, split (train, val, test or unlabelled),
    um_per_px (NaN where the dataset does not state it); sorted by image. A listed file may be missing.
    annotations: image, x_px, y_px, label (1 mitosis, 0 hard negative), confidence (of the annotators, NaN where not
    given; for benchmarks, never for training); in the dataset's own order inside an image.
    duplicates: how many annotations were left out because an earlier one is the same.
    """

    root: Path
    fields: pd.DataFrame
    annotations: pd.DataFrame
    duplicates: int = 0


def read_dataset(name: str, root: Path, val: list[str] | None = None, test: list[str] | None = None) -> Dataset:
    """Read the dataset `name` (a key of READERS) in the folder `root`.

    val, test: cases or image ids of a side, ranges such as 41-45 included; a name takes its whole case along. None:
    the paper's, or the split column of a table. The rest is train; fields without labels are unlabelled.
    Errors: InputError naming file and row for whatever cannot be read, is there twice or contradicts itself.
    """
    root = Path(root)
    if name not in READERS:
        raise InputError(f"--dataset {name}: expected one of {', '.join(READERS)}")
    if not root.is_dir():
        hint = "run pre/make_sample.py to make it" if name == "sample" else "give its folder with --data_root"
        raise InputError(f"{root}: no such folder; expected the {name} dataset; {hint}")
    fields, points = READERS[name](root)
    if not any((root / field.path).is_file() for field in fields):
        raise InputError(f"{root}: no image of a {name} dataset found in its layout; check --data_root")
    _check_images(fields, points)
    points, duplicates = _without_duplicates(points)
    assign_splits(name, fields, val, test)
    columns = ["image", "path", "case", "split", "um_per_px"]
    field_table = pd.DataFrame([[getattr(field, column) for column in columns] for field in fields], columns=columns)
    point_table = pd.DataFrame(points, columns=Point._fields).drop(columns="where")
    types = {"x_px": float, "y_px": float, "label": "int64", "confidence": float}
    return Dataset(
        root,
        field_table.astype({"um_per_px": float}).sort_values("image", ignore_index=True),
        point_table.astype(types).sort_values("image", kind="stable", ignore_index=True),
        duplicates,
    )


def drop_outside(annotations: pd.DataFrame, width: int, height: int) -> tuple[pd.DataFrame, int]:
    """Return the annotations of one field that lie on its pixels, and how many do not.

    Pixel centres have whole coordinates, so that the first pixel begins at -0.5.
    """
    inside = annotations["x_px"].between(-0.5, width - 0.5) & annotations["y_px"].between(-0.5, height - 0.5)
    return annotations[inside], int((~inside).sum())


def _check_images(fields: list[Field], points: list[Point]) -> None:
    known: dict[str, Field] = {}
    for field in fields:
        if field.image in known:
            raise InputError(
                f"{known[field.image].where} and {field.where}: both are image {field.image!r}; ids must be unique"
            )
        known[field.image] = field
    for point in points:
        if point.image not in known:
            raise InputError(f"{point.where}: annotation for image {point.image!r}, which is not among the fields")


def _without_duplicates(points: list[Point]) -> tuple[list[Point], int]:
    kept: dict[tuple[str, float, float], Point] = {}
    for point in points:
        first = kept.setdefault((point.image, point.x_px, point.y_px), point)
        if first.label != point.label:
            raise InputError(
                f"{first.where} and {point.where}: the point {point.x_px:g}, {point.y_px:g} of image "
                f"{point.image!r} is a mitosis in one and a hard negative in the other; remove one"
            )
    duplicates = len(points) - len(kept)
    if duplicates:
        logger.warning("%d annotations are exact duplicates of an earlier one and left out", duplicates)
    return list(kept.values()), duplicates
