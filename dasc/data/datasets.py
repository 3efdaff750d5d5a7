"""Read an annotated dataset into two tables, and put every case on one side of the split."""

import logging
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.spatial import cKDTree

from dasc.data.readers import READERS
from dasc.data.rows import Point
from dasc.data.splits import Field, assign_splits, find_images_named, parse_cases
from dasc.errors import InputError

# Two annotations nearer than this are of one nucleus. In MITOS-ATYPIA-14, ICPR 2012 and BreCaHAD (1,854 annotations) no
# two are nearer than 5.1 um; two readers of one nucleus are a pixel or two apart.
SAME_NUCLEUS_UM = 3.0
SAME_NUCLEUS_PX = 6.0  # where the labels state no um/px: 1.4 um at 0.23, 3 um at 0.5
# In a set whose labels are complete, images without any box stand alone or in short runs. A run of so many that the
# share of empty images elsewhere in the set makes it likelier than CHANCE is no wonder; longer ones are refused.
LONGEST_RUN = 20
CHANCE = 1e-3
COLUMNS = ["image", "path", "case", "split", "um_per_px", "width_px", "height_px"]

logger = logging.getLogger(__name__)


@dataclass
class Dataset:
    """The fields and annotations of a dataset.

    fields: image (unique id), path (POSIX, relative to root), case, split (train, val, test or unlabelled),
    um_per_px, width_px, height_px (NaN where the labels do not state it); sorted by image. A listed file may be
    missing.
    annotations: image, x_px, y_px, label (1 mitosis, 0 hard negative), confidence (of the annotators, NaN where not
    given; for benchmarks, never for training); in the dataset's own order inside an image.
    duplicates: how many annotations were left out because an earlier one is of the same nucleus.
    contested: as annotations, those left out because another one calls the same nucleus otherwise.
    looked_for: where labels were looked for, for messages.
    """

    root: Path
    fields: pd.DataFrame
    annotations: pd.DataFrame
    duplicates: int
    contested: pd.DataFrame
    looked_for: str


def read_dataset(
    name: str,
    root: Path,
    val: list[str] | None = None,
    test: list[str] | None = None,
    *,
    unlabelled: list[str] | None = None,
    empty: list[str] | None = None,
    contested: str = "refuse",
) -> Dataset:
    """Read the dataset `name` (a key of READERS) in the folder `root`.

    val, test: cases or image ids of a side, ranges such as 41-45 included; a name takes its whole case along. None:
    the paper's, or the split column of a table. The rest is train; fields without labels are unlabelled.
    unlabelled, empty: images that carry no labels, and images in which nothing is to be annotated, named likewise.
    contested: what becomes of a nucleus with both labels: refuse, or drop both annotations.
    Errors: InputError naming file and row for whatever cannot be read, is there twice or contradicts itself, and
    for a dataset without a labelled field or without a mitosis.
    """
    root = Path(root)
    if name not in READERS:
        raise InputError(f"--dataset {name}: expected one of {', '.join(READERS)}")
    if not root.is_dir():
        hint = "run pre/make_sample.py to make it" if name == "sample" else "give its folder with --data_root"
        raise InputError(f"{root}: no such folder; expected the {name} dataset; {hint}")
    fields, points, looked_for = READERS[name](root)
    if not any((root / field.path).is_file() for field in fields):
        raise InputError(f"{root}: no image of a {name} dataset found in its layout; check --data_root")
    _check_images(fields, points)
    _check_pixels(points)
    _mark_unlabelled(fields, points, unlabelled or [], empty or [], looked_for)
    points, duplicates, disputed = _one_per_nucleus(fields, points, contested)
    _check_labelled(fields, points, looked_for)
    assign_splits(name, fields, val, test)
    field_table = pd.DataFrame([[getattr(field, column) for column in COLUMNS] for field in fields], columns=COLUMNS)
    types = {"um_per_px": float, "width_px": float, "height_px": float}
    return Dataset(
        root,
        field_table.astype(types).sort_values("image", ignore_index=True),
        _point_table(points),
        duplicates,
        _point_table(disputed),
        looked_for,
    )


def read_as_asked(args) -> Dataset:
    """As `read_dataset`, by the flags of a script."""
    return read_dataset(
        args.dataset,
        Path(args.data_root),
        parse_cases(args.val) or None,
        parse_cases(args.test) or None,
        unlabelled=parse_cases(args.unlabelled),
        empty=parse_cases(args.empty),
        contested=args.contested,
    )


def _point_table(points: list[Point]) -> pd.DataFrame:
    types = {"x_px": float, "y_px": float, "label": "int64", "confidence": float}
    table = pd.DataFrame(points, columns=Point._fields).drop(columns="where").astype(types)
    return table.sort_values("image", kind="stable", ignore_index=True)


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


def _check_pixels(points: list[Point]) -> None:
    """Raise InputError where every place is a share of its image, before all of them look like one nucleus."""
    if len(points) > 1 and all(min(point[1:3]) >= 0 and max(point[1:3]) <= 1 for point in points):
        raise InputError(
            f"{points[0].where}: {points[0].x_px:g}, {points[0].y_px:g}: all {len(points)} annotations lie from 0 "
            "to 1, as shares of the image do; expected pixels; multiply x by the image's width and y by its height"
        )


def _mark_unlabelled(
    fields: list[Field], points: list[Point], unlabelled: list[str], empty: list[str], looked_for: str
) -> None:
    """Set the split of fields without labels; images without a box that nobody told of are counted or refused."""
    asked = {"unlabelled": unlabelled, "empty": empty}
    told = {flag: find_images_named(fields, names, flag) for flag, names in asked.items()}
    both = told["unlabelled"] & told["empty"]
    if both:
        raise InputError(f"--unlabelled and --empty both name image {min(both)!r}; expected one of them")
    by_image = {field.image: field for field in fields}
    for point in points:
        for name, images in told.items():
            if point.image in images:
                raise InputError(f"{point.where}: an annotation of image {point.image!r}, which --{name} names")
    for image in told["unlabelled"]:
        by_image[image].split, by_image[image].silent = "unlabelled", False
    for image in told["empty"]:
        field = by_image[image]
        field.split, field.silent = "" if field.split == "unlabelled" else field.split, False
    silent = [field for field in fields if field.silent]
    run = _longest_run(fields)
    if points and not _by_chance(len(run), len(silent), len(fields)):
        first, last = (field.names[0] if field.names else field.image for field in (run[0], run[-1]))
        raise InputError(
            f"{looked_for}: no box in {len(run)} images in a row, from {first} to {last}, and in "
            f"{len(silent) - len(run)} of the {len(fields) - len(run)} others: unlabelled, or without a mitosis and a "
            f"look-alike? Look at some of them. If they carry no labels: --unlabelled {first}-{last}; if there is "
            f"nothing to annotate in them: --empty {first}-{last}"
        )
    if silent and points:
        logger.warning(
            "%d of %d images have no box and are taken for empty (--unlabelled names those that carry no labels): %s",
            *(len(silent), len(fields), ", ".join(field.image for field in silent[:5]) + ", ..." * (len(silent) > 5)),
        )
    count = sum(field.split == "unlabelled" for field in fields)
    if count:
        logger.warning("%d of %d images are unlabelled and left out", count, len(fields))


def _longest_run(fields: list[Field]) -> list[Field]:
    """The most silent fields that follow each other."""
    longest, run = [], []
    for field in fields:
        run = [*run, field] if field.silent else []
        longest = run if len(run) > len(longest) else longest
    return longest


def _by_chance(run: int, silent: int, count: int) -> bool:
    """Whether a run of silent fields is short, or likely enough where as many fields are silent as outside of it."""
    if run < LONGEST_RUN:
        return True
    share = (silent - run + 1) / (count - run + 2)  # Laplace's: never 0
    return count * share**run > CHANCE


def _one_per_nucleus(fields: list[Field], points: list[Point], contested: str) -> tuple[list[Point], int, list[Point]]:
    """Leave out what an earlier annotation says of the same nucleus: points, how many left out, those contested."""
    radius = {field.image: _same_nucleus_px(field) for field in fields}
    by_image: dict[str, list[int]] = {}
    for index, point in enumerate(points):
        by_image.setdefault(point.image, []).append(index)
    again: set[int] = set()
    disputed: set[int] = set()
    for image, members in by_image.items():
        places = np.array([points[index][1:3] for index in members])
        for one, other in sorted(cKDTree(places).query_pairs(radius[image])):
            first, second = members[one], members[other]
            if points[first].label != points[second].label:
                if contested == "refuse":
                    raise InputError(_contradiction(points[first], points[second]))
                disputed |= {first, second}
            elif first not in again:
                again.add(second)
    again -= disputed
    if disputed:
        logger.warning("%d annotations of nuclei with both labels left out (--contested drop)", len(disputed))
    if again:
        logger.warning(
            "%d annotations are left out: an earlier one marks the same nucleus alike (within %g um, or %g px where "
            "the labels state no um/px)",
            *(len(again), SAME_NUCLEUS_UM, SAME_NUCLEUS_PX),
        )
    kept = [point for index, point in enumerate(points) if index not in again | disputed]
    return kept, len(again), [points[index] for index in sorted(disputed)]


def _same_nucleus_px(field: Field) -> float:
    return SAME_NUCLEUS_PX if math.isnan(field.um_per_px) else SAME_NUCLEUS_UM / field.um_per_px


def _contradiction(first: Point, second: Point) -> str:
    words = {0: "a hard negative", 1: "a mitosis"}
    far = math.dist(first[1:3], second[1:3])
    beside = f", {far:.1f} px beside it," if far else ""
    return (
        f"{first.where} and {second.where}: the nucleus at {first.x_px:g}, {first.y_px:g} of image {first.image!r} is "
        f"{words[first.label]} in one and {words[second.label]}{beside} in the other; remove one, see that places are "
        "in px, or leave out both with --contested drop"
    )


def _check_labelled(fields: list[Field], points: list[Point], looked_for: str) -> None:
    """Raise InputError where there is nothing to learn or to judge by."""
    labelled = {field.image for field in fields if field.split != "unlabelled"}
    if not labelled:
        raise InputError(
            f"none of the {len(fields)} images has labels; looked for {looked_for}; check the names, or --data_root"
        )
    if not any(point.label == 1 and point.image in labelled for point in points):
        raise InputError(
            f"no mitosis is annotated in the {len(labelled)} labelled images ({len(points)} hard negatives); looked "
            f"for {looked_for}; check the labels, or --data_root"
        )
