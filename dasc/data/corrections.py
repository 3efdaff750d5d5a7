"""Corrections of annotations, as readers of review.py decided them, brought into any dataset."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.spatial import cKDTree

from dasc.data.datasets import Dataset
from dasc.data.tables import read_table
from dasc.errors import InputError

SAME_UM = 7.5  # the nearest annotation within this is the nucleus that was judged: the radius of the MIDOG challenge
UNSURE = 2  # label of a nucleus that readers could not name: for neither training nor judging
NEW = {"1": 1, "0": 0, "unsure": UNSURE}

# corrections.csv: one row per cell that readers call otherwise than the annotations. old: 1, 0 or empty where nothing
# is annotated; new: 1, 0 or unsure; votes: how many readers gave each answer; readers: who.
CORRECTIONS = {
    "image": str,
    "x_px": float,
    "y_px": float,
    "um_per_px": float,
    "old": str,
    "new": str,
    "votes": str,
    "readers": str,
}


def read_corrections(path: Path) -> pd.DataFrame:
    """Read a corrections.csv; InputError as `read_table`, and for a label, place or resolution that is none."""
    table = read_table(path, CORRECTIONS, "python review.py --collect")
    numbers = table[["x_px", "y_px", "um_per_px"]]
    wrong = numbers.isna().any(axis=1) | ~table["um_per_px"].gt(0)
    wrong |= ~table["new"].isin(NEW) | ~table["old"].isin(["1", "0", ""])
    if wrong.any():
        row = table[wrong].iloc[0]
        raise InputError(
            f"{path}, row {wrong.idxmax() + 2}: old {row['old']!r}, new {row['new']!r} at {row['x_px']:g}, "
            f"{row['y_px']:g}, {row['um_per_px']:g} um/px; expected old 1, 0 or empty, new 1, 0 or unsure, and numbers"
        )
    return table


def correct_dataset(dataset: Dataset, path: str) -> tuple[Dataset, dict[str, int]]:
    """The dataset with the corrections at `path`, and how many of each kind; says so. As it is where path is empty.

    Raises:
        InputError: as `read_corrections`; corrections of which none is of an image of this dataset.
    """
    if not path:
        return dataset, {}
    corrections = read_corrections(Path(path))
    known = corrections["image"].isin(dataset.fields["image"])
    if len(corrections) and not known.any():
        raise InputError(
            f"{path}: none of its {len(corrections)} corrections is of an image of {dataset.root} "
            f"(first: {corrections['image'].iloc[0]}); they come from another dataset"
        )
    annotations, changes = correct(dataset.annotations, corrections[known])
    changes["in other images"] = int((~known).sum())
    shown = ", ".join(f"{count} {what}" for what, count in changes.items() if count) or "no change"
    print(f"{path}: {shown}")
    return dataclasses.replace(dataset, annotations=annotations), changes


def correct(annotations: pd.DataFrame, corrections: pd.DataFrame) -> tuple[pd.DataFrame, dict[str, int]]:
    """The annotations after the corrections, in their order, what is new last in its image; how many of each kind.

    The annotation nearest to a correction within SAME_UM gets its label, each annotation once; where there is none, one
    is added. An annotation of label UNSURE is in neither training nor judging. The annotators' confidence goes with the
    label that it was given for.

    Args:
        annotations: image, x_px, y_px, label, and columns that stay. corrections: as `read_corrections` gives them.
    """
    names = ("relabelled as mitoses", "relabelled as look-alikes", "mitoses added", "look-alikes added", "unsure")
    changes = dict.fromkeys((*names, "already so"), 0)
    annotations = annotations.reset_index(drop=True)
    labels, added, taken = annotations["label"].to_numpy(copy=True), [], set()
    for image, rows in corrections.groupby("image", sort=False):
        members = np.flatnonzero((annotations["image"] == image).to_numpy())
        for number, row in zip(
            _nearest(annotations.iloc[members], rows, members, taken), rows.itertuples(), strict=True
        ):
            new = NEW[row.new]
            if number is None:
                added.append({"image": image, "x_px": row.x_px, "y_px": row.y_px, "label": new})
                changes["unsure" if new == UNSURE else names[3 - new]] += 1
                continue
            what = "already so" if labels[number] == new else "unsure" if new == UNSURE else names[1 - new]
            changes[what] += 1
            labels[number] = new
    if "confidence" in annotations:
        annotations["confidence"] = annotations["confidence"].where(annotations["label"] == labels)
    annotations = annotations.assign(label=labels)
    if added:
        new = pd.DataFrame(added).reindex(columns=annotations.columns)
        kinds = {name: kind for name, kind in annotations.dtypes.items() if name in ("x_px", "y_px", "label")}
        annotations = pd.concat([annotations, new.astype(kinds)]).sort_values("image", kind="stable", ignore_index=True)
    return annotations, changes


def _nearest(annotations: pd.DataFrame, corrections: pd.DataFrame, numbers: np.ndarray, taken: set) -> list[int | None]:
    """For every correction of one image the number of its annotation, the nearest pairs first; None without one."""
    found: list[int | None] = [None] * len(corrections)
    if not len(numbers):
        return found
    points, places = annotations[["x_px", "y_px"]].to_numpy(float), corrections[["x_px", "y_px"]].to_numpy(float)
    distances = np.hypot(*(places[:, None] - points[None]).transpose(2, 0, 1))
    distances *= corrections["um_per_px"].to_numpy()[:, None]
    for place in np.argsort(distances, axis=None, kind="stable"):
        correction, point = divmod(int(place), len(points))
        if distances[correction, point] > SAME_UM:
            break
        if found[correction] is None and numbers[point] not in taken:
            found[correction] = int(numbers[point])
            taken.add(numbers[point])
    return found


def without_unsure(
    annotations: pd.DataFrame, detections: pd.DataFrame, um_per_px: Mapping[str, float]
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """What is judged: annotations that are sure, and detections whose nearest annotation within SAME_UM is none unsure.

    annotations: image, x_px, y_px, label. detections: image, x_px, y_px. um_per_px: of every image.
    """
    columns, left_out = ["x_px", "y_px"], []
    unsure = annotations["label"] == UNSURE
    for image in annotations.loc[unsure, "image"].unique():
        members = (annotations["image"] == image).to_numpy()
        found = detections.loc[detections["image"] == image, columns]
        distance, nearest = cKDTree(annotations.loc[members, columns]).query(found.to_numpy(float).reshape(-1, 2))
        left_out += found.index[unsure[members].to_numpy()[nearest] & (distance * um_per_px[image] <= SAME_UM)].tolist()
    return annotations[~unsure], detections.drop(index=left_out)
