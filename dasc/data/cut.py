"""How the patches of a folder were cut: its cut.json, and the fields that they come from."""

import json
from pathlib import Path
from typing import NamedTuple

import pandas as pd

from dasc.data.tables import ANNOTATIONS, FIELDS, inside, read_table
from dasc.errors import InputError
from dasc.files import write_json


class Cut(NamedTuple):
    """How the patches of a folder were cut: its cut.json.

    patch_size: side in px. um_per_px: resolution, None where it is unknown. normalise_stain: whether the stain of every
    field was brought to one mean and spread. data_root: folder of the dataset, None for patches that come from no
    fields (pre/split_patches.py). source_px: side in px of the files they were resized from, None where they were cut.
    """

    patch_size: int
    um_per_px: float | None
    normalise_stain: bool
    data_root: str | None
    source_px: int | None = None


class ValFields(NamedTuple):
    """The validation fields: the dataset's folder, their rows of fields.csv and of annotations.csv."""

    root: Path
    fields: pd.DataFrame
    annotations: pd.DataFrame


def read_val_fields(folder: Path, data_root: str = "", optional: bool = False) -> ValFields | None:
    """The validation fields of the patches in a folder; None where they are optional and the patches come from none.

    Args:
        data_root: dataset folder that holds the images; empty: where it lay at stage 1.

    Raises:
        InputError: as `read_cut_fields`, or the image of a field is gone: before hours of training, not after.
    """
    if optional and read_cut(folder).data_root is None:
        return None
    root, fields, annotations = read_cut_fields(folder, data_root)
    fields = fields[fields["split"] == "val"]
    for path in fields["path"]:
        if not (root / path).is_file():
            raise InputError(f"{root / path}: this val field is gone; --data_root names the dataset's folder")
    return ValFields(root, fields, annotations[annotations["image"].isin(fields["image"])])


def read_cut_fields(folder: Path, data_root: str = "") -> tuple[Path, pd.DataFrame, pd.DataFrame]:
    """The fields that stage 1 cut: dataset folder, fields and annotations. Arguments as `read_val_fields`.

    Raises:
        InputError: as `read_table`; patches that come from no fields; a field's path that leaves the dataset.
    """
    stated = read_cut(folder).data_root
    if stated is None:
        raise InputError(f"{folder}: these patches come from no fields, and this script needs fields")
    made_by = "python pre/cut_patch_2.py"
    fields = read_table(folder / "fields.csv", FIELDS, made_by)
    for path in fields["path"]:
        inside(path, folder / "fields.csv")
    return Path(data_root or stated), fields, read_table(folder / "annotations.csv", ANNOTATIONS, made_by)


def write_cut(folder: Path, cut: Cut) -> None:
    """Write cut.json."""
    write_json(folder / "cut.json", cut._asdict())


def read_cut(folder: Path) -> Cut:
    """Read cut.json.

    Raises:
        InputError: no such file, or values that are none of a cut.
    """
    path = folder / "cut.json"
    try:
        cut = Cut(**json.loads(path.read_text(encoding="utf-8")))
        sides = (cut.patch_size, 1 if cut.source_px is None else cut.source_px)
        known = all(isinstance(side, int) and not isinstance(side, bool) and 0 < side <= 4096 for side in sides)
        known &= isinstance(cut.um_per_px, float | int | None) and not isinstance(cut.um_per_px, bool)
        known &= cut.um_per_px is None or 0 < cut.um_per_px < 1000
        if not (known and isinstance(cut.normalise_stain, bool) and isinstance(cut.data_root, str | None)):
            raise ValueError("values of other types")
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise InputError(f"{path}: does not say how the patches were cut; run pre/cut_patch_2.py again") from error
    return cut
